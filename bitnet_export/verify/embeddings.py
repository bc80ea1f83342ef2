"""What quantizing embedding tables and output heads changed in them, against the float tables.

Read off the two files: the ternary model before lowering still holds every table in floating
point, the lowered one its codes and scales under the same name (passes/quantize_embeddings.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_export import onnx_io, onnx_tensors
from bitnet_export.verify.results import EmbeddingRow, finite

_ROWS = 1024  # of a table compared at a time
_CODES = re.compile(r"(?P<name>.+)\.codes(?P<copy>_\d+)?\Z")


def embedding_errors(before: Path, after: Path) -> list[EmbeddingRow]:
    """A row for each table that ``before`` holds in floating point and ``after`` in codes."""
    floats, lowered = _constants(before), _constants(after)
    rows = []
    for stored, codes in lowered.items():
        match = _CODES.fullmatch(stored)
        scale = lowered.get(f"{match['name']}.scale{match['copy'] or ''}") if match else None
        table = floats.get(match["name"]) if match else None
        if match is not None and scale is not None and table is not None:
            row = _compare(match["name"], *map(onnx_tensors.values, (table, codes, scale)))
            rows += [] if row is None else [row]
    return rows


def dequantize_blocks(codes: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """codes [V, D] uint8, or [V, D/2] with two 4-bit codes a byte from the low bits, scale
    [V, D/block] -> [V, D] float32: (code - 2^(bits-1)) * scale."""
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)
    centred = codes.astype(np.float32) - (1 << (bits - 1))
    blocks = centred.reshape(*scale.shape, -1) * scale.astype(np.float32)[..., None]
    return blocks.reshape(codes.shape)


def _compare(
    name: str, table: np.ndarray, codes: np.ndarray, scale: np.ndarray
) -> EmbeddingRow | None:
    """None where the shapes are not those of a table and its codes."""
    if table.ndim != 2 or codes.ndim != 2 or scale.ndim != 2:
        return None
    if codes.shape[0] != table.shape[0]:
        table = table.T  # an output head that is stored [K, N]
    bits = {table.shape[1]: 8, table.shape[1] // 2: 4}.get(codes.shape[1])
    if bits is None or codes.shape[0] != table.shape[0] or table.shape[1] % scale.shape[1]:
        return None
    squares, largest = np.zeros(2), 0.0
    for start in range(0, table.shape[0], _ROWS):  # in float64, a table may be larger than memory
        rows = slice(start, start + _ROWS)
        error = dequantize_blocks(codes[rows], scale[rows], bits) - table[rows]
        squares += [np.square(x, dtype=np.float64).sum() for x in (error, table[rows])]
        largest = max(largest, float(np.abs(error).max()))
    relative = float(np.sqrt(squares[0] / squares[1])) if squares[1] else 0.0
    return EmbeddingRow(
        name=name,
        bits=bits,
        rows=table.shape[0],
        columns=table.shape[1],
        block=table.shape[1] // scale.shape[1],
        relative_error=finite(relative),
        max_abs=finite(largest),
    )


def _constants(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in onnx_io.read_model(path).graph.initializer}
