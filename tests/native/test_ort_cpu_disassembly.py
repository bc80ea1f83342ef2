"""The inner loops as compiled: no vector register is spilled to the stack in them.

gcc 12, left alone, reorders the additions of the AVX2 loops, runs out of registers and halves
their speed, with every result still right. This test sees it; the sources say what prevents it.
And no file lends code to another, which may be compiled for an older processor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_export.native import BUILD_DIR

from .conftest import REPOSITORY, Unavailable
from .test_ort_cpu import library

sys.path.insert(0, str(REPOSITORY / "tools"))

import cpu_report
from cpu_tools.loops import Loop, disassemble, innermost_loops

__all__ = ["library"]

# The instruction that multiplies, and its registers.
PRODUCTS = {
    "avx2": ("vpmaddubsw", "%ymm"),
    "avxvnni": ("vpdpbusd", "%ymm"),
    "avx512vnni": ("vpdpbusd", "%zmm"),
}


def product_loops(library: Path, unavailable: Unavailable) -> dict[str, list[Loop]]:
    """Each path's loops of 8 products and more."""
    if shutil.which("objdump") is None:
        unavailable("there is no objdump: install binutils")
    found = innermost_loops(disassemble(library))
    loops = {
        path: [loop for loop in found if loop.count(*product) >= 8]
        for path, product in PRODUCTS.items()
    }
    if not any(loops.values()):
        pytest.skip("built for another processor: no x86 loops in it")
    return loops


def test_no_spills_in_the_inner_loops(library: Path, unavailable: Unavailable) -> None:
    for path, loops in product_loops(library, unavailable).items():
        for loop in loops:
            stack = loop.vectors_on_the_stack()
            assert not stack, f"{path} loop at {loop.address:x} uses the stack: {stack}"
        assert len(loops) >= 7, (path, len(loops))  # tiles of several rows, and the single row


def test_the_largest_tile_shares_what_it_loads(library: Path, unavailable: Unavailable) -> None:
    """Two products and two loads a cycle: with as many loads, these would decide."""
    for path, loops in product_loops(library, unavailable).items():
        largest = max(loops, key=lambda loop: loop.count(*PRODUCTS[path]))
        products = largest.count(*PRODUCTS[path])
        assert products >= 32, (path, products)
        assert sum(i.reads_memory for i in largest.body) <= 0.8 * products, path


def test_no_function_is_shared_between_instruction_paths(unavailable: Unavailable) -> None:
    """The linker keeps one copy of a weak function, and that may be the one in AVX-512."""
    archive = BUILD_DIR / "cpu" / "cpu" / "libbitnet_cpu.a"
    if shutil.which("nm") is None or not archive.is_file():
        unavailable("there is no nm (binutils), or the native part cpu is not built")
    listed = subprocess.run(
        ["nm", "--demangle", str(archive)], capture_output=True, text=True, check=True
    ).stdout
    assert " T bitnet_cpu_multiply" in listed
    assert re.findall(r" [WVu] (.+)", listed) == []


def test_what_the_report_makes_of_llvm_mca(
    library: Path, unavailable: Unavailable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table from a simulator that takes two cycles an instruction."""
    if not cpu_report.PATHS[0].object_file.is_file() or shutil.which("objdump") is None:
        unavailable("the native part cpu is not built here, or there is no objdump")

    def run(command: list[str], input: str, **_: object) -> subprocess.CompletedProcess[str]:
        total = 2 * len(input.splitlines()) * cpu_report.ITERATIONS
        return subprocess.CompletedProcess(command, 0, f"Total Cycles:      {total}\n", "")

    path = cpu_report.PATHS[0]
    loops = cpu_report.main_loops(path)
    assert list(loops) == ["one row", "several rows", "several rows, unpacking"]
    monkeypatch.setattr(cpu_report.subprocess, "run", run)
    rows = [
        cpu_report.Row(path.name, kind, 8, len(loop.body), path.processors[0],
                       cpu_report.cycles("llvm-mca", path, path.processors[0], loop))
        for kind, loop in loops.items()
    ]  # fmt: skip
    assert [row.cycles for row in rows] == [2 * (len(loop.body) - 1) for loop in loops.values()]
    assert f"| `avx512vnni` | one row | 8 | {rows[0].instructions} | Ice Lake |" in (
        cpu_report.table(rows)
    )
