"""Reads README.md and docs/*.md as a user does who types their blocks: commands, Python, links."""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "plugins" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code: the page, the line it begins at, its language (or "") and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Fenced and indented blocks. An indented one follows a blank line; text of list items, which
    is indented as well, has less than four spaces more than its item."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match[2], textwrap.dedent(match[3])))
    # Blanked out, so that line numbers stay.
    rest = FENCE.sub(lambda m: re.sub(r"[^\n]", "", m[0]), text).splitlines()
    start, depth = None, 4
    for number, line in enumerate([*rest, "end"]):
        if start is None:
            item = re.match(r"( *)(\d+\.|-) +", line)
            depth = len(item[0]) + 4 if item else 4 if line[:1].strip() else depth
            if line.startswith(" " * depth) and not rest[number - 1].strip():
                start = number
        elif line.strip() and not line.startswith(" " * depth):
            lines = "\n".join(rest[start:number]).rstrip("\n")
            found.append(Block(page, start + 1, "", textwrap.dedent(lines)))
            start = None
    return sorted(found, key=lambda block: block.line)


def is_python(block: Block) -> bool:
    """Marked as Python, or an indented block that reads like it."""
    if block.language:
        return block.language == "python"
    begins = re.match(r"(import|from) \w+|session = ", block.text)
    return begins is not None


def commands(block: Block) -> list[list[str]]:
    """The words of each command in a block; comments, prompts and output left out."""
    if is_python(block):
        return []
    text = block.text.replace("\\\n", " ")
    lines = [re.sub(r"^(\$|- run:) ", "", line) for line in text.splitlines()]
    lines = [line.partition(" >>")[0] for line in lines]
    split = [shlex.split(line, comments=True) for line in lines if STARTS.match(line)]
    return [words for words in split if words]


STARTS = re.compile(r"(bitnet-export|torchrun|python|make|pip|pytest|ctest|\./\w+\.sh)( |$)")


def inline_commands(page: Path) -> list[list[str]]:
    """Commands of this tool in the running text, `bitnet-export doctor` for instance."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"`(bitnet-export [^`]+)`", text)
    return [shlex.split(" ".join(command.split())) for command in found]


def tool_words(words: list[str]) -> list[str] | None:
    """The words after ``bitnet-export``, however it is started; None for any other command."""
    if words[0] == "bitnet-export":
        return words[1:]
    if "bitnet_export" in words and words[words.index("bitnet_export") - 1] == "-m":
        return words[words.index("bitnet_export") + 1 :]
    return None
