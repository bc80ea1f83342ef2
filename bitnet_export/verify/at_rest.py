"""What the compressed form of an ONNX file costs, by part, and its ternary codes a weight.

Frames of the compressed file stand for one tensor each (compress.py), so that the account is that
of the bytes on disk. Tensors too small for a frame share what their frames cost by their size.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import compress, onnx_tensors, op
from bitnet_export.errors import InputError
from bitnet_export.packing import CODES_PER_BYTE

if TYPE_CHECKING:
    from bitnet_export.verify.size import FileSize

GRAPH = "graph"
_UNPACKING = ("Unsqueeze", "Reshape", "BitwiseAnd", "BitwiseXor", "Transpose", "BitShift")
_SHIFTS = ([0, 2, 4, 6], [6, 4, 2, 0])  # to the lowest bits of a byte, or to the highest


def stored_size(plain: FileSize, path: Path, at_rest: Path) -> FileSize:
    """The size of ``path`` as it lies compressed beside ``at_rest``: total, parts and tensors.

    Raises InputError where the compressed file is damaged or is not that of ``path``.
    """
    tensors: dict[str, tuple[str, int]] = {}
    shared_plain = shared_stored = 0
    for file, sections in compress.model_sections(path).items():
        source = compress.compressed_path(at_rest.with_name(file.name))
        stored = [(len(content), size) for content, size in compress.frames(source)]
        if [length for length, _ in stored] != [s.end - s.start for s in sections]:
            raise InputError(
                "is not the compressed form of this model", where=str(source), fix="export again"
            )
        for section, (length, size) in zip(sections, stored, strict=True):
            if section.tensor in plain.tensors:
                tensors[section.tensor] = (plain.tensors[section.tensor][0], size)
            else:
                shared_plain, shared_stored = shared_plain + length, shared_stored + size
    for name, (part, size) in plain.tensors.items():
        if name not in tensors:
            tensors[name] = (part, size * shared_stored // max(shared_plain, 1))
    total = sum(file.stat().st_size for file in compress.stored_files(at_rest))
    parts = type(plain.part_bytes)()
    for part, size in tensors.values():
        parts[part] += size
    parts[GRAPH] = total - sum(parts.values())
    return replace(plain, total=total, part_bytes=parts, tensors=tensors)


def code_bits(size: FileSize, path: Path) -> float | None:
    """Bits a ternary weight of the packed codes alone, as ``size`` counts them; None where the
    model holds none. Padding costs bytes and is no weight."""
    import onnx

    model = onnx.load(os.fspath(path), load_external_data=False)
    weights = {name: count for name, count in code_tensors(model) if name in size.tensors}
    stored = sum(size.tensors[name][1] for name in weights)
    return 8 * stored / sum(weights.values()) if weights else None


def code_tensors(model: Any) -> Iterator[tuple[str, int]]:
    """(initializer, ternary weights in it) for every matrix of 2-bit codes: those an operator
    takes packed, and those that the graph unpacks, cut to K columns or whole."""
    constants = {t.name: t for t in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    columns = {
        _source(node.input[0], producers): int(_values(constants[node.input[2]])[0])
        for node in model.graph.node
        if node.op_type == "Slice" and node.input[2] in constants
    }
    for node in model.graph.node:
        attributes = {a.name: a.i for a in node.attribute}
        if node.op_type == op.OP_TYPE or attributes.get("bits") == 2:
            if node.input[1] in constants:
                yield node.input[1], attributes["K"] * attributes["N"]
        elif node.op_type == "BitShift" and node.input[1] in constants:
            source = _source(node.input[0], producers)
            shifts = _values(constants[node.input[1]]).tolist()
            if shifts in _SHIFTS and source in constants:
                rows, *packed = constants[source].dims
                yield source, rows * columns.get(source, CODES_PER_BYTE * prod(packed))


def _source(name: str, producers: dict[str, Any]) -> str:
    """The tensor that a chain of unpacking nodes starts from."""
    while name in producers and producers[name].op_type in _UNPACKING:
        name = producers[name].input[0]
    return name


def _values(tensor: Any) -> Any:
    return onnx_tensors.values(tensor).ravel()
