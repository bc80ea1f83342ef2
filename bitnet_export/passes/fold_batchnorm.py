"""Fold a BatchNormalization after a TernaryMatMul into its scale and bias.

The weights stay ternary: one factor an output is what the op's scale is for. A convolution's
Transpose back to channels first may stand between the two. ONNX Runtime does the same to floating
point convolutions when a session is created.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export.passes.base import (
    Builder,
    Pass,
    PassResult,
    TernaryNode,
    constant_values,
    is_op,
    ternary_nodes,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_EPSILON = 1e-5  # ONNX's default


class FoldBatchNorm(Pass):
    """TernaryMatMul (+ Transpose) + BatchNormalization -> TernaryMatMul (+ Transpose)."""

    name = "fold-batchnorm"
    requires = "TernaryMatMul nodes; constants folded"
    ensures = "no BatchNormalization stands alone behind a TernaryMatMul"

    def run(self, graph: gs.Graph) -> PassResult:
        """Fold every norm that is the only reader of a product."""
        result = PassResult()
        builder = Builder(graph)
        for t in ternary_nodes(graph):
            norm = _norm_after(graph, t)
            if norm is None:
                continue
            statistics = [constant_values(x) for x in norm.inputs[1:5]]
            if any(v is None for v in statistics) or norm.attrs.get("training_mode", 0):
                result.skip(t.layer, "its batch normalization is not constant")
                continue
            _fold(builder, t, norm, [np.asarray(v, np.float64) for v in statistics])
            result.rewritten += 1
        return result


def _norm_after(graph: gs.Graph, t: TernaryNode) -> Any:
    """The BatchNormalization over t's outputs that nothing else reads them before, or None."""
    y, channel = t.y, len(t.y.shape) - 1 if t.y.shape else None
    reader = _only_reader(graph, y)
    if reader is not None and is_op(reader, "Transpose"):
        perm = reader.attrs.get("perm")
        channel = list(perm).index(len(perm) - 1) if perm else None
        y = reader.outputs[0]
        reader = _only_reader(graph, y)
    if reader is None or not is_op(reader, "BatchNormalization") or channel != 1:
        return None
    return reader if reader.inputs[0] is y and len(reader.outputs) == 1 else None


def _only_reader(graph: gs.Graph, tensor: Any) -> Any:
    if len(tensor.outputs) != 1 or any(tensor is out for out in graph.outputs):
        return None
    reader = tensor.outputs[0]
    return reader if any(reader is n for n in graph.nodes) else None  # not in an If's body


def _fold(builder: Builder, t: TernaryNode, norm: gs.Node, statistics: list[np.ndarray]) -> None:
    """scale p + b normalized is scale f p + (b - mean) f + beta, f = gamma / sqrt(variance + eps).

    In float64, rounded once.
    """
    gamma, beta, mean, variance = statistics
    factor = gamma / np.sqrt(variance + norm.attrs.get("epsilon", _EPSILON))
    rows = np.broadcast_to(t.scale, (t.attributes.N, *t.scale.shape[1:])).astype(np.float64)
    scale = rows * factor.reshape(-1, *[1] * (rows.ndim - 1))
    bias = np.zeros_like(mean) if t.bias is None else t.bias.astype(np.float64)
    bias = (bias - mean) * factor + beta
    t.node.inputs = [
        *t.node.inputs[:2],
        builder.constant(scale.astype(np.float32), f"{t.layer}.scale"),
        builder.constant(bias.astype(np.float32), f"{t.layer}.bias"),
    ]
    last = norm.inputs[0].inputs[0]  # the product itself, or the Transpose behind it
    last.outputs = [norm.outputs[0]]
    norm.outputs.clear()
