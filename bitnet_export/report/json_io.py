"""Report <-> JSON: a small codec driven by the dataclasses' own annotations.

Reading validates: a wrong type, a missing key or a newer schema is an InputError that names the
file and the key. Unknown keys are ignored, so that a report with later optional keys can be
read. What the keys are is schema.py's business.
"""

from __future__ import annotations

import json
import types
import typing
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bitnet_export.errors import InputError
from bitnet_export.report.schema import FAIL, PASS, SCHEMA_VERSION, Report

_REMAKE = "make the report again with bitnet-export"


def to_json(report: Report) -> str:
    """Report -> JSON text. Raises ValueError on NaN or infinity, which JSON does not have."""
    return json.dumps(encode(report), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(text: str, where: str = "report.json") -> Report:
    """JSON text -> Report. where: the file, for messages. Raises InputError where it is none."""
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"not JSON ({error})", where=where, fix=_REMAKE) from error
    if not isinstance(data, dict) or "schema_version" not in data:
        raise InputError("JSON, but no bitnet-export report (no schema_version)", where=where)
    _check_version(data["schema_version"], where)
    report = decode(Report, data, where)
    if report.verdict not in (PASS, FAIL):
        raise InputError(
            f'verdict: expected "pass" or "fail", got {report.verdict!r}', where=where, fix=_REMAKE
        )
    return report


def load_report(path: Path | str) -> Report:
    """The report in a file, or report.json in a directory. Raises InputError."""
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        return from_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read the report ({error})",
            where=str(file),
            fix="name a report.json or the directory an export wrote",
        ) from error


def _check_version(version: Any, where: str) -> None:
    if version == SCHEMA_VERSION and not isinstance(version, bool):
        return
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"schema_version {version} is newer than {SCHEMA_VERSION}, which this version reads",
            where=where,
            fix="upgrade bitnet-export",
        )
    raise InputError(f"schema_version: {version!r} is not known", where=where, fix=_REMAKE)


def json_key(item: Field[Any]) -> str:
    """The JSON name of a dataclass field."""
    return item.metadata.get("key") or item.name


def encode(value: Any) -> Any:
    """Dataclasses, lists and dicts -> plain JSON values."""
    if is_dataclass(value):
        return {json_key(f): encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(name): encode(item) for name, item in value.items()}
    return value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def decode(kind: Any, value: Any, where: str, at: str = "") -> Any:
    """A JSON value -> an object of the annotated type ``kind``.

    where: the file; at: the key inside it. Raises InputError on a value of another type.
    """
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where, at)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        inner = next(a for a in arguments if a is not types.NoneType)
        return None if value is None else decode(inner, value, where, at)
    if origin is list:
        items = _expect(list, value, where, at)
        return [decode(arguments[0], item, where, f"{at}[{i}]") for i, item in enumerate(items)]
    if origin is dict:
        pairs = _expect(dict, value, where, at)
        return {k: decode(arguments[1], item, where, _join(at, k)) for k, item in pairs.items()}
    return _expect(kind, value, where, at)


def _decode_dataclass(kind: Any, value: Any, where: str, at: str) -> Any:
    data = _expect(dict, value, where, at)
    hints = _hints(kind)
    values = {}
    for item in fields(kind):
        key = json_key(item)
        if key in data:
            values[item.name] = decode(hints[item.name], data[key], where, _join(at, key))
        elif item.default is MISSING and item.default_factory is MISSING:
            raise InputError(f"{_join(at, key)} is missing", where=where, fix=_REMAKE)
    return kind(**values)


_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_NAMES |= {list: "a list", dict: "an object"}


def _expect(kind: Any, value: Any, where: str, at: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, not to a reader of JSON.
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    shown = json.dumps(value)
    shown = shown if len(shown) <= 40 else f"{shown[:37]}..."
    raise InputError(
        f"{at or 'the report'}: expected {_NAMES.get(kind, kind)}, got {shown}",
        where=where,
        fix=_REMAKE,
    )


def _join(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key
