"""Reads a torch.export archive before torch does, and refuses what would run code.

torch.export.load is made for files one trusts: it unpickles sample inputs, custom objects and
some weights, loads compiled libraries, looks operators up by dotted name and evaluates symbolic
sizes. A file that bitnet_export.save wrote needs none of the dangerous half of that, so anything
beyond plain tensors, registered operators and arithmetic is an error that names it.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bitnet_export.errors import InputError

# operator.* that compute on sizes; call, methodcaller, attrgetter would reach anything.
_OPERATORS = re.compile(
    r"(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|invert"
    r"|lshift|rshift|getitem|index|truth|matmul)\Z"
)
_TORCH_OP = re.compile(r"torch\.ops\.[a-z]\w*(\.(?!__)\w+|\.__(and|or|xor)__)(\.(?!__)\w+)?\Z")
_OTHER_TARGET = re.compile(r"(torch\.sym_[a-z]+|math\.[a-z]\w*)\Z")
# Registered operators that touch the file system.
_UNSAFE_OPS = ("aten.from_file", "aten.save", "prim.", "inductor.", "quantized_engine.")
# What symbolic sizes are written with: sympy's classes, its few lower-case functions, symbols.
_EXPRESSION_NAME = re.compile(r"([A-Z]\w*|floor|ceiling|oo|int_oo|log|[a-z]{1,2}\d+)\Z")
_EXPRESSION_NODES = (
    ast.Expression,
    ast.Call,
    ast.Name,
    ast.Load,
    ast.keyword,
    ast.Constant,
    ast.BinOp,
    ast.UnaryOp,
    ast.operator,
    ast.unaryop,
    ast.Compare,
    ast.cmpop,
)


def check_archive(path: Path) -> None:
    """Raise InputError if the archive is damaged or reading it would run code."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(archive, str(path))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, json.JSONDecodeError) as e:
        raise InputError(
            f"the torch.export archive is truncated or damaged ({e})",
            where=str(path),
            fix="copy it again, or write it again with bitnet_export.save",
        ) from e


def _check_members(archive: zipfile.ZipFile, where: str) -> None:
    for member in archive.namelist():
        name = member.split("/", 1)[-1]  # without the archive's root folder
        if member.startswith("serialized_"):
            raise InputError(
                "it was written by torch 2.7 or older, in a form that cannot be checked",
                where=where,
                fix="write it again with bitnet_export.save under a newer torch",
            )
        if name.startswith("data/aotinductor/"):
            raise _refusal(where, f"it holds compiled code ({name})")
        if name.startswith("data/sample_inputs/"):
            _check_pickle(archive.read(member), name, where)
        elif name.startswith(("data/weights/", "data/constants/")):
            if name.endswith(".json"):
                _check_tensors(archive, member, where)
        elif name.startswith("models/") and name.endswith(".json"):
            _check_graph(json.loads(archive.read(member)), where)


def _check_tensors(archive: zipfile.ZipFile, member: str, where: str) -> None:
    """Tensors are raw bytes; the few that are pickled must be nothing but tensors."""
    folder = member.rpartition("/")[0]
    for name, entry in json.loads(archive.read(member)).get("config", {}).items():
        file = str(entry["path_name"])
        if file.startswith("custom_obj"):
            raise _refusal(where, f"{name} is a custom object")
        if entry["use_pickle"]:
            _check_pickle(archive.read(f"{folder}/{file}"), name, where)


def _check_pickle(data: bytes, name: str, where: str) -> None:
    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as e:
        raise _refusal(where, f"{name} is a pickle with more than tensors in it") from e


def _check_graph(model: Any, where: str) -> None:
    for key, value in _strings(model):
        if key == "target" and not _is_known_target(value):
            raise _refusal(where, f"its graph calls {value}")
        if key == "expr_str" and not _is_arithmetic(value):
            raise _refusal(where, f"a symbolic size is written as {value!r}")


def _strings(tree: Any) -> Iterator[tuple[str, str]]:
    """(key, value) of every call target and size expression. A graph's calls are the dicts that
    have inputs; a signature's ``target`` is a parameter name and is not looked up."""
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if isinstance(item.get("expr_str"), str):
                yield "expr_str", item["expr_str"]
            if "inputs" in item and isinstance(item.get("target"), str):
                yield "target", item["target"]
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def _is_known_target(target: str) -> bool:
    if target.startswith("_operator."):
        return bool(_OPERATORS.match(target.removeprefix("_operator.")))
    if any(target.startswith(f"torch.ops.{op}") for op in _UNSAFE_OPS):
        return False
    return bool(_TORCH_OP.match(target) or _OTHER_TARGET.match(target))


def _is_arithmetic(expression: str) -> bool:
    """True for arithmetic on symbols: no attributes, no subscripts, no calls but sympy's."""
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if not isinstance(node, _EXPRESSION_NODES):
            return False
        if isinstance(node, ast.Name) and not _EXPRESSION_NAME.match(node.id):
            return False
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            return False
        # A string is a symbol's name; sympy would evaluate a longer one.
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and not text.isidentifier():
            return False
    return True


def _refusal(where: str, what: str) -> InputError:
    return InputError(
        f"reading this file would run code that is in it: {what}",
        where=where,
        fix="write it with bitnet_export.save, or pass --trust-pickle if you trust its author",
    )
