"""The shipped plugin as a file: what it exports, what it needs, what it says it is."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from bitnet_export.native import read_build_info

from .conftest import REPOSITORY, Unavailable

# Anything else the dynamic loader would have to find on the user's machine.
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|dl|rt|pthread)\.so\.\d|ld-linux.*")


def _readelf(option: str, path: Path, unavailable: Unavailable) -> str:
    if shutil.which("readelf") is None:
        unavailable("there is no readelf: apt-get install binutils")
    done = subprocess.run(
        ["readelf", "--wide", option, str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout


def _exported(path: Path, unavailable: Unavailable) -> set[str]:
    names = set()
    for line in _readelf("--dyn-syms", path, unavailable).splitlines():
        columns = line.split()
        # Num: Value Size Type Bind Vis Ndx Name
        if len(columns) >= 8 and columns[4] in ("GLOBAL", "WEAK") and columns[6] != "UND":
            names.add(columns[7].split("@")[0])
    return names


def test_register_library_exports_nothing(register_library: Path, unavailable: Unavailable) -> None:
    assert _exported(register_library, unavailable) == set()


def test_exports_only_what_tensorrt_looks_up(
    plugin_library: Path, unavailable: Unavailable
) -> None:
    assert _exported(plugin_library, unavailable) == {"getCreators", "setLoggerFinder"}


@pytest.mark.parametrize("library", ["plugin_library", "register_library"])
def test_needs_only_system_libraries(
    library: str, request: pytest.FixtureRequest, unavailable: Unavailable
) -> None:
    dynamic = _readelf("--dynamic", request.getfixturevalue(library), unavailable)
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert needed
    foreign = [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)]
    assert foreign == []  # in particular no libnvinfer, libcudart, libcuda, libstdc++
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_says_what_it_is(plugin_library: Path) -> None:
    info = read_build_info(plugin_library)
    assert info is not None
    assert info["library"] == "tensorrt_plugin"
    assert info["version"] == importlib.metadata.version("bitnet-export")
    header = (REPOSITORY / "plugins" / "kernels" / "ternary_matmul.h").read_text()
    kernels = re.search(r"kKernelVersion = (\d+)", header)
    assert kernels
    assert info["kernels"] == kernels[1]
    assert "75-real" in info["cuda"]


def _cuobjdump() -> str | None:
    """On the PATH, of a CUDA toolkit, or of the PyPI package nvidia-cuda-cuobjdump."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return found
    installed = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump")
    return next((str(path) for path in installed), None)


def test_holds_turing_code_and_ptx(plugin_library: Path) -> None:
    """Machine code for compute capability 7.5, and PTX that newer cards compile."""
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump: pip install nvidia-cuda-cuobjdump")
    listed = subprocess.run(
        [cuobjdump, "--list-elf", "--list-ptx", str(plugin_library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "sm_75.cubin" in listed
    assert re.search(r"sm_\d+\.ptx", listed)
