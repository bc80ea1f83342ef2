"""Quantize embedding tables: they decide the file's size once the linears are ternary.

Two forms of the same symmetric codes: GatherBlockQuantized, one operator of ONNX Runtime, and
standard operators that gather the codes and rescale only the rows read, for any runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import Builder, Pass, PassResult, constant_values

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Block along the row that shares a scale: whole-row accuracy needs less at 8 bits than at 4.
BLOCK = {8: 128, 4: 32}
MIN_TABLE_BYTES = 16384


class QuantizeEmbeddings(Pass):
    """Gather(float table [V, D]) -> int8 or int4 codes with a scale a block."""

    name = "quantize-embeddings"
    requires = "constants folded"
    ensures = "embedding tables of 16 KiB and more are stored in 8 or 4 bits"

    def __init__(self, bits: int = 8, contrib: bool = True) -> None:
        self.bits = bits
        self.contrib = contrib

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite every Gather on a large constant table."""
        result = PassResult()
        builder = Builder(graph)
        tables: dict[int, tuple[Any, Any]] = {}
        for node in [n for n in graph.nodes if n.op == "Gather"]:
            table = constant_values(node.inputs[0])
            if table is None or table.ndim != 2 or table.dtype != np.float32:
                continue
            reason = self._reason_to_keep(node, table)
            if reason:
                result.skip(node.inputs[0].name, reason)
                continue
            key = id(node.inputs[0])
            if key not in tables:
                tables[key] = self._constants(builder, node.inputs[0].name, table)
            self._rewrite(builder, node, table.shape[1], *tables[key])
            result.rewritten += 1
        return result

    def _reason_to_keep(self, node: gs.Node, table: np.ndarray) -> str:
        if node.attrs.get("axis", 0) != 0:
            return "gathers columns, not rows"
        if table.nbytes < MIN_TABLE_BYTES:
            return f"{table.nbytes} bytes are too few to matter"
        others = [n for n in node.inputs[0].outputs if n.op != "Gather"]
        if others:
            return f"also read by {others[0].op} {others[0].name}"
        if table.shape[1] % BLOCK[self.bits]:
            return f"rows of {table.shape[1]} are not whole blocks of {BLOCK[self.bits]}"
        return ""

    def _constants(self, builder: Builder, name: str, table: np.ndarray) -> tuple[Any, Any]:
        codes, scale = quantize_blocks(table, self.bits, BLOCK[self.bits])
        if self.bits == 4:
            codes = codes[:, 0::2] | codes[:, 1::2] << 4
        return builder.constant(codes, f"{name}.codes"), builder.constant(scale, f"{name}.scale")

    def _rewrite(self, builder: Builder, node: gs.Node, dim: int, codes: Any, scale: Any) -> None:
        indices, y, layer = node.inputs[1], node.outputs[0], onnx_io.layer_of(node)
        node.outputs.clear()
        if self.contrib:
            builder.node(
                "GatherBlockQuantized",
                [codes, indices, scale],
                layer=layer,
                dtype=np.float32,
                output=y,
                domain="com.microsoft",
                attrs={
                    "bits": self.bits,
                    "block_size": BLOCK[self.bits],
                    "gather_axis": 0,
                    "quantize_axis": 1,
                },
            )
        else:
            self._gather_standard(builder, layer, codes, scale, indices, y, dim)

    def _gather_standard(
        self, builder: Builder, layer: str, codes: Any, scale: Any, indices: Any, y: Any, dim: int
    ) -> None:
        u8, f32, i64 = np.uint8, np.float32, np.int64
        lead = [0] * len(indices.shape) if indices.shape is not None else None
        block = BLOCK[self.bits]

        def node(op_type: str, *inputs: Any, dtype: Any, output: Any = None, **attrs: Any) -> Any:
            return builder.node(
                op_type, inputs, layer=layer, dtype=dtype, attrs=attrs, output=output
            )

        rows = node("Gather", codes, indices, dtype=u8, axis=0)
        if self.bits == 4:
            pairs = node("Unsqueeze", rows, builder.literal([-1], i64), dtype=u8)
            shifted = node(
                "BitShift", pairs, builder.literal([0, 4], u8), dtype=u8, direction="RIGHT"
            )
            rows = node("BitwiseAnd", shifted, builder.literal([15], u8), dtype=u8)
        values = node("Cast", rows, dtype=f32, to=1)
        zero = float(1 << (self.bits - 1))
        centred = node("Sub", values, builder.literal(zero, f32), dtype=f32)
        # 0 in a Reshape keeps a dimension: [..., D] -> [..., D/block, block] -> [..., D].
        blocks = builder.literal([*(lead or []), dim // block, block], i64)
        by_block = node("Reshape", centred, blocks, dtype=f32)
        row_scales = node("Gather", scale, indices, dtype=f32, axis=0)
        scales = node("Unsqueeze", row_scales, builder.literal([-1], i64), dtype=f32)
        scaled = node("Mul", by_block, scales, dtype=f32)
        node("Reshape", scaled, builder.literal([*(lead or []), dim], i64), dtype=f32, output=y)


def quantize_blocks(table: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """table [V, D] float32 -> (codes [V, D] uint8 with zero point 2^(bits-1), scale [V, D/block]).

    Symmetric absmax a block: value = (code - zero point) * scale.
    """
    zero, limit = 1 << (bits - 1), (1 << (bits - 1)) - 1
    blocks = table.reshape(table.shape[0], -1, block)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = np.where(peak > 0, peak / limit, 1).astype(np.float32)
    codes = np.rint(blocks / scale) + zero
    return codes.astype(np.uint8).reshape(table.shape), scale[..., 0]
