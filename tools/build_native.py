"""Build the native parts with one command, test-ready and ready to ship (``make native``).

Parts: the host emulation of kernels and plugin with their ctest suites (a C++ compiler is
enough), the TensorRT plugin (nvcc), the ONNX Runtime CPU library (a C++ compiler). Each has a
build tree of its own in plugins/build; libraries to ship are copied to bitnet_export/_native,
where the package and its wheel have them. A part whose tools are missing is skipped with the
reason, or is an error with --require. What is compiled how is said in plugins/CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# This checkout's package, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fetch_ort_headers
import fetch_tensorrt_headers

from bitnet_export.errors import (
    EXIT_MISSING_REQUIREMENT,
    EXIT_OK,
    BitnetExportError,
    MissingRequirement,
    StageError,
)
from bitnet_export.native import BUILD_DIR, LIBRARIES, NATIVE_DIR, read_build_info

REPOSITORY = Path(__file__).resolve().parents[1]
PLUGINS = REPOSITORY / "plugins"

CI_ARCHS = ("75",)
RELEASE_ARCHS = ("75", "80", "86", "89", "90", "120")
MINIMUM_CMAKE = (3, 24)
# Where a TensorRT SDK's packages put their headers; plugins/cmake looks there too.
SYSTEM_INCLUDES = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
)


@dataclass(frozen=True)
class Part:
    """One build tree. option: the CMake switch that turns it on; ships: the libraries it makes,
    by their names in bitnet_export.native."""

    name: str
    option: str
    ships: tuple[str, ...] = ()
    needs_nvcc: bool = False
    needs_tensorrt: bool = False
    needs_onnxruntime: bool = False


PARTS = (
    Part("emulation", "BITNET_BUILD_EMULATION", needs_tensorrt=True),
    Part(
        "cuda",
        "BITNET_BUILD_CUDA",
        ships=("tensorrt_plugin", "tensorrt_register"),
        needs_nvcc=True,
        needs_tensorrt=True,
    ),
    Part("cpu", "BITNET_BUILD_CPU", ships=("ort_cpu",), needs_onnxruntime=True),
)


@dataclass(frozen=True)
class Tools:
    """Programs of this machine; None where missing."""

    cmake: str
    ninja: str | None
    compiler: str | None
    nvcc: str | None


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    skipped = []
    try:
        tools = find_tools()
        for part in PARTS:
            if part.name not in options.parts:
                continue
            try:
                build(part, tools, options)
            except MissingRequirement as error:
                skipped.append(part.name)
                print(f"skipped {part.name}: {error}")
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if skipped and options.require:
        print(f"error: --require, but skipped {', '.join(skipped)}", file=sys.stderr)
        return EXIT_MISSING_REQUIREMENT
    return EXIT_OK


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART")
    parser.add_argument("--require", action="store_true", help="a skipped part is an error")
    archs = parser.add_mutually_exclusive_group()
    archs.add_argument(
        "--cuda-archs", default=",".join(CI_ARCHS), help="e.g. 75,86; default %(default)s"
    )
    archs.add_argument(
        "--release",
        dest="cuda_archs",
        action="store_const",
        const=",".join(RELEASE_ARCHS),
        help="every compute capability of the wheel",
    )
    parser.add_argument("--tensorrt-include", type=Path, help="folder with NvInferRuntime.h")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--verbose", action="store_true", help="show the compilers' output")
    return parser.parse_args(argv)


def build(part: Part, tools: Tools, options: argparse.Namespace) -> None:
    """Configure, compile and ship one part. Raises MissingRequirement or StageError."""
    started = time.monotonic()
    tree = BUILD_DIR / part.name
    settings = _settings(part, tools, options)
    generator = "Ninja" if tools.ninja else "Unix Makefiles"
    _discard_foreign_tree(tree, generator)
    command = [tools.cmake, "-S", os.fspath(PLUGINS), "-B", os.fspath(tree), "-G", generator]
    command += [f"-D{key}={value}" for key, value in settings.items()]
    _run(command, part, options.verbose)
    _run([tools.cmake, "--build", os.fspath(tree), "-j", str(options.jobs)], part, options.verbose)
    made = [ship(name, tree) for name in part.ships] or [tree]
    result = ", ".join(os.fspath(path.relative_to(REPOSITORY)) for path in made)
    print(f"built {part.name}: {result} ({time.monotonic() - started:.0f} s)")


def _settings(part: Part, tools: Tools, options: argparse.Namespace) -> dict[str, str]:
    """What CMake is told, headers fetched if need be. Raises MissingRequirement."""
    if tools.compiler is None:
        raise MissingRequirement("no C++ compiler", fix="apt-get install g++")
    settings = {other.option: "ON" if other is part else "OFF" for other in PARTS}
    settings["BITNET_PYTHON"] = sys.executable  # golden data comes from the NumPy reference
    if tools.ninja:
        settings["CMAKE_MAKE_PROGRAM"] = tools.ninja
    if part.needs_nvcc:
        settings |= _cuda_settings(tools, options.cuda_archs.replace(",", ";").split(";"))
    if part.needs_tensorrt:
        settings["TENSORRT_INCLUDE_DIR"] = os.fspath(_tensorrt_include(options.tensorrt_include))
    if part.needs_onnxruntime:
        given = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
        settings["ONNXRUNTIME_INCLUDE_DIR"] = given or os.fspath(fetch_ort_headers.fetch())
    return settings


def _cuda_settings(tools: Tools, archs: list[str]) -> dict[str, str]:
    """CMake settings for nvcc. Raises MissingRequirement without one that knows all of archs."""
    if tools.nvcc is None:
        raise MissingRequirement(
            "no nvcc on the PATH or in CUDA_HOME", fix="install the CUDA toolkit, 12.8 or newer"
        )
    listed = subprocess.run([tools.nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = set(re.findall(r"compute_(\d+)", listed.stdout))
    unknown = [arch for arch in archs if arch not in known]
    if unknown:
        raise MissingRequirement(
            f"{tools.nvcc} cannot compile for {', '.join(unknown)}; it knows "
            + ", ".join(sorted(known, key=int)),
            fix="pass --cuda-archs with some of those, or install another CUDA toolkit",
        )
    return {"CMAKE_CUDA_COMPILER": tools.nvcc, "BITNET_CUDA_ARCHS": ";".join(archs)}


def _tensorrt_include(given: Path | None) -> Path | str:
    """The folder for CMake, "" to let it find an installed SDK; fetches headers if need be."""
    if given:
        return given.resolve()
    installed = any((Path(folder) / "NvInferRuntime.h").is_file() for folder in SYSTEM_INCLUDES)
    return "" if installed or os.environ.get("TENSORRT_ROOT") else fetch_tensorrt_headers.fetch()


def find_tools() -> Tools:
    """Look on the PATH, then beside this Python, where the PyPI packages cmake and ninja are.

    Raises MissingRequirement without a CMake that is new enough.
    """
    cmake = next((c for c in _programs("cmake") if _cmake_version(c) >= MINIMUM_CMAKE), None)
    if cmake is None:
        wanted = ".".join(map(str, MINIMUM_CMAKE))
        raise MissingRequirement(f"no cmake {wanted} or newer", fix="pip install cmake ninja")
    cuda_bin = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    nvcc = shutil.which("nvcc") or (os.fspath(cuda_bin) if cuda_bin.is_file() else None)
    compilers = (os.environ.get("CXX"), "g++", "c++", "clang++")
    ninja = next(iter(_programs("ninja")), None)
    if ninja is None and shutil.which("make") is None:
        raise MissingRequirement("neither ninja nor make", fix="pip install ninja")
    return Tools(
        cmake=cmake,
        ninja=ninja,
        compiler=next((found for c in compilers if c and (found := shutil.which(c))), None),
        nvcc=nvcc,
    )


def _programs(name: str) -> list[str]:
    found = [shutil.which(name), shutil.which(name, path=os.fspath(Path(sys.executable).parent))]
    return [program for program in found if program]


def _cmake_version(program: str) -> tuple[int, ...]:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"(\d+)\.(\d+)", shown.stdout)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _discard_foreign_tree(tree: Path, generator: str) -> None:
    """Remove a tree that CMake would refuse: of a moved checkout or of another generator."""
    cache = tree / "CMakeCache.txt"
    if not cache.is_file():
        return
    text = cache.read_text(errors="replace")
    wanted = (f"CMAKE_HOME_DIRECTORY:INTERNAL={PLUGINS}", f"CMAKE_GENERATOR:INTERNAL={generator}")
    if not all(f"{line}\n" in text for line in wanted):
        shutil.rmtree(tree)


def _run(command: list[str], part: Part, verbose: bool) -> None:
    """Run a build step; its output is shown if it fails or verbose. Raises StageError."""
    done = subprocess.run(command, capture_output=not verbose, text=True, check=False)
    if done.returncode:
        output = "" if verbose else f"\n{done.stdout}{done.stderr}".rstrip()
        raise StageError(
            f"{' '.join(command)} failed with exit code {done.returncode}{output}",
            where=f"native part {part.name}",
        )


def ship(name: str, tree: Path) -> Path:
    """Copy the library a tree made into the package, whole or not at all; its new path."""
    spec = LIBRARIES[name]
    built = next(tree.glob(f"*/{spec.file}"), None)
    if built is None:
        raise StageError(f"the build made no {spec.file}", where=os.fspath(tree))
    if (read_build_info(built) or {}).get("library") != name:
        raise StageError(f"{built} does not say that it is {name}", where=os.fspath(tree))
    NATIVE_DIR.mkdir(exist_ok=True)
    part = NATIVE_DIR / f".{spec.file}.part"
    shutil.copy2(built, part)
    part.replace(NATIVE_DIR / spec.file)
    return NATIVE_DIR / spec.file


if __name__ == "__main__":
    sys.exit(main())
