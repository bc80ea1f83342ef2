"""Lower TernaryMatMul to com.microsoft::MatMulNBits with 2-bit weights: ONNX Runtime, small M.

accuracy_level 4 and block size 128 are the fast combination; other accuracy levels, and block
sizes of 16 or 256, run a fallback hundreds of times slower (docs/decisions.md). Its int8
activations are scaled per block of K, so results agree with the op to about 1 %, not exactly, and
a row with NaN comes out as numbers: the operator drops it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import packing
from bitnet_export.passes.base import (
    Builder,
    Pass,
    PassResult,
    TernaryNode,
    float32_ends,
    ternary_nodes,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

FAST_BLOCK = 128
ACCURACY_LEVEL = 4


class LowerTwoBit(Pass):
    """TernaryMatMul -> MatMulNBits(bits=2)."""

    name = "lower-2bit"
    requires = "TernaryMatMul nodes; onnxruntime 1.28 or newer, which has the 2-bit CPU kernel"
    ensures = "no TernaryMatMul is left"
    optional = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite every TernaryMatMul."""
        result = PassResult()
        builder = Builder(graph)
        inputs: dict[int, Any] = {}
        for node in ternary_nodes(graph):
            _lower(builder, node, inputs)
            result.rewritten += 1
            if not node.attributes.activation_bits:
                result.notes.append(
                    f"{node.layer}: activations become int8 per block of {FAST_BLOCK}"
                )
            if 0 < node.attributes.group_size < FAST_BLOCK:
                result.notes.append(
                    f"{node.layer}: groups of {node.attributes.group_size} run slower than "
                    f"{FAST_BLOCK}"
                )
        return result


def _lower(builder: Builder, t: TernaryNode, float32_inputs: dict[int, Any]) -> None:
    at = t.attributes
    block = at.group_size or FAST_BLOCK
    blocks = packing.padded_size(at.K, block) // block
    weights = packing.repad(t.packed_weight, at.K, block).reshape(at.N, blocks, -1)
    scale = t.scale if at.group_size else t.scale.reshape(-1, 1)
    t.node.outputs.clear()
    x, y = float32_ends(builder, t, float32_inputs)
    inputs = [
        x,
        builder.constant(weights, f"{t.layer}.packed_weight"),
        builder.constant(np.broadcast_to(scale, (at.N, blocks)), f"{t.layer}.scale"),
    ]
    if t.bias is not None:
        absent = builder.absent()
        inputs += [absent, absent, builder.constant(t.bias, f"{t.layer}.bias")]
    builder.node(
        "MatMulNBits",
        inputs,
        layer=t.layer,
        dtype=np.float32,
        output=y,
        domain="com.microsoft",
        attrs={
            "K": at.K,
            "N": at.N,
            "bits": 2,
            "block_size": block,
            "accuracy_level": ACCURACY_LEVEL,
        },
    )
