"""Builds the kernels for one card and calls them from Python through ctypes.

Two things are built: a shared library (kernels and bridge.cu) for the benchmarks, and the golden
test of plugins/tests/kernels against device memory. Pointers are plain integers, so that nothing
here needs torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .steps import run_program

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "plugins" / "kernels"
TESTS = REPOSITORY / "plugins" / "tests" / "kernels"
FLOAT32, FLOAT16 = 0, 1
FAMILIES = range(1, 8)


class BuildError(Exception):
    """nvcc failed; the message is its output."""


class LaunchError(Exception):
    """A launch was refused; the message says by which status."""


@dataclass(frozen=True)
class Shape:
    """As bitnet::TernaryMatMulShape, in its order."""

    m: int
    k: int
    n: int
    group_size: int = 0
    activation_bits: int = 8

    @property
    def scale_count(self) -> int:
        """One scale an output, or an output and group."""
        return self.n * (self.k // self.group_size if self.group_size else 1)

    def as_c(self) -> ctypes.Array[ctypes.c_int]:
        """The six ints bridge.cu wants."""
        values = (self.m, self.k, self.n, self.group_size, self.activation_bits, self.scale_count)
        return (ctypes.c_int * 6)(*values)


def run_all(commands: list[list[str]], seconds: float = 600.0) -> None:
    """Run compilers side by side, one a core. Raises BuildError with the output of the first that
    fails or is not done after the seconds."""
    end = time.monotonic() + seconds

    def run(command: list[str]) -> str | None:
        status, output = run_program(command, max(1.0, end - time.monotonic()))
        if status == 0:
            return None
        why = f"not finished after {seconds:.0f} s\n" if status is None else ""
        return f"{' '.join(command)}\n{why}{output}"

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for problem in pool.map(run, commands):
            if problem:
                raise BuildError(problem)


def target_flag(nvcc: str, sm: int) -> str:
    """nvcc's option for a card of compute capability sm (75: 7.5): its own machine code, or where
    this nvcc is older than the card, PTX that the driver compiles."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    known = [int(found) for found in re.findall(r"sm_(\d+)\b", listed.stdout)]
    if not known or sm in known:
        return f"-gencode=arch=compute_{sm},code=sm_{sm}"
    older = [one for one in known if one < sm]
    if not older:
        raise BuildError(f"{nvcc} compiles for {min(known)} and newer, the card is {sm}")
    return f"-gencode=arch=compute_{max(older)},code=compute_{max(older)}"


def build(nvcc: str, folder: Path, target: str, seconds: float = 600.0) -> tuple[Path, Path]:
    """Compile -> (shared library, golden test program). target: nvcc's -gencode option."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", target, f"-I{KERNELS}", "-Xcompiler=-fPIC", "-cudart=static"]
    started = time.monotonic()
    sources = [*sorted(KERNELS.glob("*.cu")), Path(__file__).with_name("bridge.cu")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    pairs = zip(sources, objects, strict=True)
    run_all([[nvcc, *flags, "-c", "-o", str(o), str(s)] for s, o in pairs], seconds)
    library, program = folder / "libbitnet_gpu_check.so", folder / "golden_test"
    test = ["-DBITNET_TEST_ON_DEVICE", f"-I{TESTS}", str(TESTS / "golden_test.cpp")]
    run_all(
        [
            [nvcc, *flags, "-shared", "-o", str(library), *map(str, objects)],
            [nvcc, *flags, "-o", str(program), *test, *map(str, objects)],
        ],
        max(1.0, seconds - (time.monotonic() - started)),
    )
    return library, program


_INT, _INTS, _SIZE = ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_size_t
# bridge.cu's functions: result, arguments. A test compares them with that file.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "bitnet_query_device": (_INT, (_INTS,)),
    "bitnet_supports": (_INT, (_INT, _INTS, _INT, _INTS)),
    "bitnet_workspace_bytes": (_SIZE, (_INTS,)),
    "bitnet_launch": (
        _INT,
        (_INT, _INTS, _INT, ctypes.POINTER(ctypes.c_void_p), _SIZE, _INTS, ctypes.c_void_p),
    ),
    "bitnet_status_string": (ctypes.c_char_p, (_INT,)),
    "bitnet_family_name": (ctypes.c_char_p, (_INT,)),
    "bitnet_kernel_version": (_INT, ()),
}


class Library:
    """The built kernels. Raises LaunchError where there is no CUDA device."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = result, arguments
        self.device = (ctypes.c_int * 3)()
        self._check(self._c.bitnet_query_device(self.device))

    def _check(self, status: int) -> None:
        if status:
            raise LaunchError(self._c.bitnet_status_string(status).decode())

    def family_name(self, family: int) -> str:
        """E.g. gemv_dp4a."""
        return str(self._c.bitnet_family_name(family).decode())

    def families(self, shape: Shape, dtype: int) -> Iterator[int]:
        """The families that run the shape on this card, the naive reference (7) included."""
        for family in FAMILIES:
            if self._c.bitnet_supports(family, shape.as_c(), dtype, self.device):
                yield family

    def workspace_bytes(self, shape: Shape) -> int:
        """Enough for every family."""
        return int(self._c.bitnet_workspace_bytes(shape.as_c()))

    def launch(
        self,
        family: int,
        shape: Shape,
        dtype: int,
        pointers: tuple[int, int, int, int, int, int],
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """Enqueue. pointers: x, packed_weight, scale, bias (0: none), y, workspace."""
        array = (ctypes.c_void_p * 6)(*pointers)
        size, handle = ctypes.c_size_t(workspace_bytes), ctypes.c_void_p(stream)
        self._check(
            self._c.bitnet_launch(family, shape.as_c(), dtype, array, size, self.device, handle)
        )
