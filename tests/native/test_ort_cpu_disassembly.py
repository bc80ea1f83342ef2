"""The inner loops as compiled: no vector register is spilled to the stack in them.

gcc 12, left alone, reorders the additions of the AVX2 loops, runs out of registers and halves
their speed, with every result still right. This test sees it; the sources say what prevents it.
And no file lends code to another, which may be compiled for an older processor.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from bitnet_export.native import BUILD_DIR

from .conftest import Unavailable
from .test_ort_cpu import library

__all__ = ["library"]

PRODUCTS = {"vpmaddubsw": "avx2", "vpdpbusd": "vnni"}
_LINE = re.compile(r"\s*([0-9a-f]+):\s+(?:\{vex\} )?(\S+)\s*(.*)")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    arguments: str


def disassemble(path: Path) -> list[Instruction]:
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (_LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def innermost_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Bodies of backward jumps that hold no other backward jump."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    loops: list[list[Instruction]] = []
    last_jump = -1
    for i, instruction in enumerate(code):
        target = re.match(r"([0-9a-f]+)", instruction.arguments)
        if not (instruction.name.startswith("j") and target):
            continue
        start = place.get(int(target[1], 16), i + 1)
        if start > i:
            continue
        if start > last_jump:
            loops.append(code[start : i + 1])
        last_jump = i
    return loops


def test_no_spills_in_the_inner_loops(library: Path, unavailable: Unavailable) -> None:
    if shutil.which("objdump") is None:
        unavailable("there is no objdump: install binutils")
    seen = dict.fromkeys(PRODUCTS, 0)
    for loop in innermost_loops(disassemble(library)):
        names = [instruction.name for instruction in loop]
        kind = next((name for name in PRODUCTS if names.count(name) >= 8), None)
        if kind is None:
            continue
        seen[kind] += 1
        stack = [i for i in loop if re.search(r"%[yz]mm", i.arguments) and "(%rsp)" in i.arguments]
        assert not stack, f"{kind} loop at {loop[0].address:x} uses the stack: {stack[:4]}"
    if not any(seen.values()):
        pytest.skip("built for another processor: no x86 loops in it")
    # Tiles of 2 to 4 rows, first and next, and the single row.
    assert all(count >= 7 for count in seen.values()), seen


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
