"""Quantize embedding tables: they decide the file's size once the linears are ternary.

Two forms of the same symmetric codes: GatherBlockQuantized, one operator of ONNX Runtime, and
standard operators that gather the codes and rescale only the rows read, for any runtime. A table
that is the output head as well (tied weights) keeps one copy of its codes for both uses; what
becomes of heads is in heads.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import Builder, Pass, PassResult, constant_values, is_op
from bitnet_export.passes.heads import Head, QuantizedTable, find_heads, rewrite_head

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Weights of a row that share a scale, the largest that divides the row: 8 bits are accurate with
# long blocks, 4 are not. GatherBlockQuantized takes powers of two from 16.
BLOCKS = {8: (128, 64, 32, 16), 4: (32, 16)}
MIN_TABLE_BYTES = 16384


class QuantizeEmbeddings(Pass):
    """Gather(float table [V, D]) -> int8 or int4 codes with a scale a block; output heads too."""

    name = "quantize-embeddings"
    requires = "constants folded"
    ensures = "embedding tables of 16 KiB and more, and heads, are stored in 8 or 4 bits, or listed"

    def __init__(self, bits: int = 8, contrib: bool = True) -> None:
        self.bits = bits
        self.contrib = contrib

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite every Gather on a large constant table, and every output head."""
        result = PassResult()
        builder = Builder(graph)
        tables: dict[int, QuantizedTable] = {}
        heads = find_heads(graph)
        for node in [n for n in graph.nodes if is_op(n, "Gather")]:
            source = node.inputs[0]
            values = constant_values(source)
            if values is None or values.ndim != 2 or values.dtype not in (np.float32, np.float16):
                continue
            reason = self._reason_to_keep(graph, node, values, heads)
            if reason:
                result.skip(source.name, reason)
                continue
            if id(source) not in tables:
                tables[id(source)] = self._quantize(builder, source.name, values)
            self._rewrite(builder, node, tables[id(source)])
            result.rewritten += 1
        for head in heads:
            self._rewrite_head(builder, head, tables, result)
        return result

    def _rewrite_head(
        self, builder: Builder, head: Head, tables: dict[int, QuantizedTable], result: PassResult
    ) -> None:
        table = tables.get(id(head.source))
        if table is None and head.tied:
            return  # its embedding was left alone, with a reason that was given
        if table is None:
            values = head.rows()
            if not np.isfinite(values).all():
                result.skip(head.layer, "holds NaN or Inf")
                return
            if not _block(values.shape[1], self.bits):
                result.skip(head.layer, f"K={values.shape[1]} is not whole blocks of 16")
                return
            table = self._quantize(builder, head.source.name, values)
        rewrite_head(builder, head, table)
        result.rewritten += 1
        result.notes.append(f"{head.layer}: the output head is in int{self.bits}")

    def _reason_to_keep(
        self, graph: gs.Graph, node: gs.Node, table: np.ndarray, heads: list[Head]
    ) -> str:
        source = node.inputs[0]
        if node.attrs.get("axis", 0) not in (0, -2):
            return "gathers columns, not rows"
        if table.nbytes < MIN_TABLE_BYTES:
            return f"{table.nbytes} bytes are too few to matter"
        if not np.isfinite(table).all():
            return "holds NaN or Inf"
        tied = {id(reader) for head in heads for reader in head.readers}
        others = [n for n in source.outputs if not is_op(n, "Gather") and id(n) not in tied]
        if others:
            return f"also read by {others[0].op} {others[0].name}"
        if any(source is output for output in graph.outputs):
            return "is an output of the model, too"
        if not _block(table.shape[1], self.bits):
            return f"rows of {table.shape[1]} are not whole blocks of {BLOCKS[self.bits][-1]}"
        if not self.contrib and node.inputs[1].shape is None:
            return "the rank of the indices is not known"
        return ""

    def _quantize(self, builder: Builder, name: str, table: np.ndarray) -> QuantizedTable:
        block = _block(table.shape[1], self.bits)
        codes, scale = quantize_blocks(table.astype(np.float32), self.bits, block)
        if self.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return QuantizedTable(
            builder.constant(codes, f"{name}.codes"),
            builder.constant(scale.astype(table.dtype), f"{name}.scale"),
            self.bits,
            table.shape[0],
            table.shape[1],
            block,
            table.dtype,
        )

    def _rewrite(self, builder: Builder, node: gs.Node, table: QuantizedTable) -> None:
        indices, y, layer = node.inputs[1], node.outputs[0], onnx_io.layer_of(node)
        node.outputs.clear()
        if not self.contrib:
            self._gather_standard(builder, layer, table, indices, y)
            return
        builder.node(
            "GatherBlockQuantized",
            [table.codes, indices, table.scale],
            layer=layer,
            dtype=table.dtype,
            output=y,
            domain="com.microsoft",
            attrs={
                "bits": self.bits,
                "block_size": table.block,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
        )

    def _gather_standard(
        self, builder: Builder, layer: str, table: QuantizedTable, indices: Any, y: Any
    ) -> None:
        u8, i64, dtype = np.uint8, np.int64, table.dtype
        # 0 in a Reshape keeps a dimension: [..., D] -> [..., D/block, block] -> [..., D].
        lead = [0] * len(indices.shape)

        def node(op_type: str, *inputs: Any, dtype: Any, output: Any = None, **attrs: Any) -> Any:
            return builder.node(
                op_type, inputs, layer=layer, dtype=dtype, attrs=attrs, output=output
            )

        rows = node("Gather", table.codes, indices, dtype=u8, axis=0)
        if self.bits == 4:
            pairs = node("Unsqueeze", rows, builder.literal([-1], i64), dtype=u8)
            shifts, mask = builder.literal([0, 4], u8), builder.literal([15], u8)
            shifted = node("BitShift", pairs, shifts, dtype=u8, direction="RIGHT")
            rows = node("BitwiseAnd", shifted, mask, dtype=u8)
        values = node("Cast", rows, dtype=dtype, to=1 if dtype == np.float32 else 10)
        centred = node("Sub", values, builder.literal(zero_point(self.bits), dtype), dtype=dtype)
        blocks = builder.literal([*lead, table.dim // table.block, table.block], i64)
        by_block = node("Reshape", centred, blocks, dtype=dtype)
        row_scales = node("Gather", table.scale, indices, dtype=dtype, axis=0)
        scales = node("Unsqueeze", row_scales, builder.literal([-1], i64), dtype=dtype)
        scaled = node("Mul", by_block, scales, dtype=dtype)
        whole = builder.literal([*lead, table.dim], i64)
        node("Reshape", scaled, whole, dtype=dtype, output=y)


def _block(dim: int, bits: int) -> int:
    """The largest block that divides a row of ``dim``, 0 where none does."""
    return next((block for block in BLOCKS[bits] if dim % block == 0), 0)


def zero_point(bits: int) -> int:
    """The code of 0."""
    return 1 << (bits - 1)


def quantize_blocks(table: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """table [V, D] float32 -> (codes [V, D] uint8 with zero point 2^(bits-1), scale [V, D/block]).

    Symmetric absmax a block: value = (code - zero point) * scale.
    """
    blocks = table.reshape(table.shape[0], -1, block)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = np.where(peak > 0, peak / (zero_point(bits) - 1), 1).astype(np.float32)
    codes = np.rint(blocks / scale) + zero_point(bits)
    return codes.astype(np.uint8).reshape(table.shape), scale[..., 0]
