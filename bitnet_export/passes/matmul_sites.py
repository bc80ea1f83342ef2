"""Finds MatMuls with a constant [K, N] weight, with the bias that follows, in a foreign graph.

Shared by the two passes that make TernaryMatMuls of them: recognise.py and ternarize_dense.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, op, packing
from bitnet_export.passes.base import Builder, PassResult, constant_values, make_ternary_node

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


@dataclass
class MatMulSite:
    """y = MatMul(x, weight [K, N]) (+ bias [N]): what a TernaryMatMul would replace."""

    nodes: list[gs.Node]
    x: Any
    y: Any
    weight: np.ndarray
    bias: np.ndarray | None

    @property
    def layer(self) -> str:
        """Module path, or the node's name in a graph that has none."""
        return onnx_io.layer_of(self.nodes[0])

    @property
    def is_head(self) -> bool:
        """Whether nothing follows: the layer that makes the model's output."""
        return not self.y.outputs

    def replace(
        self, builder: Builder, trits: np.ndarray, scale: np.ndarray, activation_bits: int
    ) -> None:
        """Put a TernaryMatMul with trits [N, K] and its scale in place of the nodes."""
        n, k = trits.shape
        group_size = k // scale.shape[1] if scale.ndim == 2 else 0
        layer = self.layer  # a node without a name is called after its output
        for node in self.nodes:
            node.outputs.clear()
        make_ternary_node(
            builder,
            layer=layer,
            x=self.x,
            y=self.y,
            attributes=op.TernaryAttributes(k, n, group_size, activation_bits),
            packed_weight=packing.pack(trits),
            scale=scale,
            bias=self.bias,
        )


def find_sites(graph: gs.Graph, result: PassResult) -> Iterator[MatMulSite]:
    """Every MatMul by a constant matrix; others with a constant operand go to result.skipped."""
    for node in [n for n in graph.nodes if n.op == "MatMul"]:
        weight = constant_values(node.inputs[1])
        if weight is None:
            if constant_values(node.inputs[0]) is not None:
                result.skip(onnx_io.layer_of(node), "the constant is the left-hand operand")
            continue
        if weight.ndim != 2 or weight.dtype not in (np.float32, np.float16):
            result.skip(
                onnx_io.layer_of(node), f"the weight is {weight.dtype} {list(weight.shape)}"
            )
            continue
        yield _with_bias(node, weight)


def _with_bias(node: gs.Node, weight: np.ndarray) -> MatMulSite:
    x, y = node.inputs[0], node.outputs[0]
    consumers = y.outputs
    if len(consumers) == 1 and consumers[0].op == "Add":
        add = consumers[0]
        other = next((t for t in add.inputs if t is not y), None)
        bias = None if other is None else constant_values(other)
        if bias is not None and bias.shape == (weight.shape[1],):
            return MatMulSite([node, add], x, add.outputs[0], weight, bias)
    return MatMulSite([node], x, y, weight, None)
