"""The inner loops of the CPU library as the compiler left them, read from the disassembly.

Nothing here judges them: tests/native/test_ort_cpu_disassembly.py does, and cpu_report.py asks
LLVM's processor models how long they take.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bitnet_export.errors import MissingRequirement, StageError

_LINE = re.compile(r"\s*([0-9a-f]+):\s+((?:\{vex\} )?\S+)\s*(.*)")
_JUMP = re.compile(r"(j\w+|b\.\w+|cbn?z|tbn?z)$")
_COMMENT = re.compile(r"\s+#\s.*|\s*//.*|<.*?>")
_TARGET = re.compile(r"\b([0-9a-f]+) <")


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    arguments: str

    @property
    def name(self) -> str:
        """Without the encoding that may stand before it."""
        return self.mnemonic.removeprefix("{vex} ")

    @property
    def reads_memory(self) -> bool:
        """x86 in AT&T syntax: a memory operand that is not the destination, which is last."""
        return "(" in self.arguments and not self.arguments.endswith(")")


@dataclass(frozen=True)
class Loop:
    """A body of instructions; the jump back is its last."""

    body: tuple[Instruction, ...]

    @property
    def address(self) -> int:
        return self.body[0].address

    def count(self, name: str, register: str = "") -> int:
        """Instructions of that name that use registers of that kind."""
        return sum(i.name == name and register in i.arguments for i in self.body)

    def vectors_on_the_stack(self) -> list[Instruction]:
        return [
            i
            for i in self.body
            if (re.search(r"%[yz]mm", i.arguments) and "(%rsp" in i.arguments)
            or (re.match(r"[qv]\d", i.arguments) and "[sp" in i.arguments)
        ]

    def assembly(self) -> str:
        """Without the jump: what an assembler reads."""
        lines = (f"{i.mnemonic} {_COMMENT.sub('', i.arguments)}" for i in self.body[:-1])
        return "\n".join(lines) + "\n"


def disassemble(path: Path, objdump: str = "objdump") -> list[Instruction]:
    """Raises MissingRequirement without objdump, StageError where it fails."""
    command = [objdump, "--disassemble", "--no-show-raw-insn", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as missing:
        raise MissingRequirement(f"there is no {objdump}", fix="install binutils") from missing
    if done.returncode:
        raise StageError(f"{objdump} failed on {path}: {done.stderr.strip()[:300]}")
    found = (_LINE.match(line) for line in done.stdout.splitlines())
    return [Instruction(int(m[1], 16), m[2], m[3]) for m in found if m]


def innermost_loops(code: list[Instruction]) -> list[Loop]:
    """Bodies of backward jumps that hold no other backward jump."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    loops: list[Loop] = []
    last_jump = -1
    for i, instruction in enumerate(code):
        target = _TARGET.search(instruction.arguments)
        if not (_JUMP.match(instruction.name) and target):
            continue
        start = place.get(int(target[1], 16), i + 1)
        if start > i:
            continue
        if start > last_jump:
            loops.append(Loop(tuple(code[start : i + 1])))
        last_jump = i
    return loops
