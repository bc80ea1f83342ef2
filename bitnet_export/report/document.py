"""The tables of docs/report.md, made from the schema, so that page and code cannot drift apart.

``python -m bitnet_export.report.document docs/report.md`` rewrites what stands between the two
markers of that page; a test compares.
"""

from __future__ import annotations

import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from bitnet_export.report.json_io import json_key
from bitnet_export.report.schema import Report

BEGIN = "<!-- begin: made by bitnet_export.report.document -->"
END = "<!-- end -->"
_TYPES = {str: "text", int: "integer", float: "number", bool: "boolean", Any: "any"}


def schema_tables() -> str:
    """One Markdown table for each object of report.json, the report itself first."""
    blocks, waiting = [], [Report]
    for kind in waiting:  # grows while it is walked
        hints = typing.get_type_hints(kind)
        lines = [f"### {kind.__name__}", "", str(kind.__doc__).strip(), ""]
        lines += ["| key | type | unit | meaning |", "|---|---|---|---|"]
        for item in fields(kind):
            hint = hints[item.name]
            waiting += [k for k in dataclasses_in(hint) if k not in waiting]
            doc, unit = item.metadata["doc"], item.metadata["unit"]
            lines.append(f"| `{json_key(item)}` | {type_name(hint)} | {unit} | {doc} |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def dataclasses_in(hint: Any) -> list[Any]:
    """The dataclasses an annotation speaks of."""
    if is_dataclass(hint):
        return [hint]
    return [kind for part in typing.get_args(hint) for kind in dataclasses_in(part)]


def type_name(hint: Any) -> str:
    """An annotation in words: ``list of SpeedRow``, ``number or null``."""
    if is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        return f"[{name}](#{name.lower()})"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    if origin is dict:
        return f"object of {type_name(arguments[1])}"
    if arguments:
        return f"{type_name(arguments[0])} or null"
    return _TYPES[hint]


def with_tables(page: str) -> str:
    """The page with the text between its markers made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{schema_tables()}\n{END}{after}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
