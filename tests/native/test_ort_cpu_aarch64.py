"""The 64-bit ARM path: cross-compiled, and its ctest suite run under qemu.

Runs where both tools are (Debian: g++-aarch64-linux-gnu, qemu-user).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_export.native import BUILD_DIR, read_build_info

from .conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tools"))

from cpu_tools.loops import disassemble, innermost_loops

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING = [tool for tool in (COMPILER, EMULATOR, "cmake", "ctest") if shutil.which(tool) is None]


def run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_neon() -> None:
    run(sys.executable, REPOSITORY / "tools" / "fetch_ort_headers.py")
    tree = BUILD_DIR / "aarch64"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CROSSCOMPILING_EMULATOR": f"{EMULATOR};-L;/usr/aarch64-linux-gnu",
        "BITNET_BUILD_EMULATION": "OFF",
        "BITNET_BUILD_CPU": "ON",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    run("cmake", "-S", REPOSITORY / "plugins", "-B", tree, *options)
    run("cmake", "--build", tree, "--target", "cpu", "cpu_golden", "bitnet_ort_cpu")
    output = run("ctest", "--test-dir", tree, "-R", r"^cpu(_golden)?\.", "--no-tests=error")
    assert "Skipped" not in output
    for name in ("cpu.neon", "cpu_golden.neon", "cpu.portable"):
        assert f"{name} " in output
    info = read_build_info(tree / "ort" / "libbitnet_ort_cpu.so")
    assert info
    assert info["library"] == "ort_cpu"
    check_loops(tree / "ort" / "libbitnet_ort_cpu.so")


def check_loops(library: Path) -> None:
    """No vector on the stack in a tile, and more products than loads."""
    code = disassemble(library, "aarch64-linux-gnu-objdump")
    tiles = [loop for loop in innermost_loops(code) if loop.count("sdot") >= 16]
    assert len(tiles) >= 5  # of 1 to 4 rows, and the single row
    for loop in tiles:
        assert not loop.vectors_on_the_stack(), hex(loop.address)
    largest = max(tiles, key=lambda loop: loop.count("sdot"))
    loads = largest.count("ldr") + 2 * largest.count("ldp")
    assert loads <= 0.5 * largest.count("sdot")
