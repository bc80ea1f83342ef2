"""Finds MatMuls with a constant [K, N] weight, with the bias that follows, in a foreign graph.

Shared by the two passes that make TernaryMatMuls of them: recognise.py and ternarize_dense.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, op, packing
from bitnet_export.errors import InputError
from bitnet_export.passes.base import (
    Builder,
    PassResult,
    constant_values,
    is_constant,
    is_op,
    make_ternary_node,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# What may stand between a head and the model's output: it changes no scores but their form.
_AFTER_HEAD = {
    *("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Slice"),
    *("Softmax", "LogSoftmax", "Sigmoid", "ArgMax", "TopK"),
}


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
    def is_conv(self) -> bool:
        """Whether it replaces a convolution."""
        return False

    @property
    def is_last(self) -> bool:
        """Whether nothing but a change of form (Softmax, Reshape, Cast) follows."""
        waiting, seen = [self.y], set()
        for tensor in waiting:  # grows while it is walked
            for node in tensor.outputs:
                if not is_op(node, *_AFTER_HEAD):
                    return False
                if id(node) not in seen:
                    seen.add(id(node))
                    waiting += node.outputs
        return True

    def check_finite(self) -> None:
        """Raise InputError naming the layer where a weight is NaN or Inf."""
        if not np.isfinite(self.weight).all():
            raise InputError(
                "the weights hold NaN or Inf", where=self.layer, fix="check the file it came from"
            )

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


def find_sites(graph: gs.Graph, result: PassResult) -> list[MatMulSite]:
    """Every MatMul by a constant matrix; others with a constant operand go to result.skipped."""
    sites = []
    for node in graph.nodes:
        if not is_op(node, "MatMul"):
            continue
        weight = constant_values(node.inputs[1])
        reason = _why_no_site(node, weight)
        if reason:
            result.skip(onnx_io.layer_of(node), reason)
        elif weight is not None:
            sites.append(_with_bias(graph, node, weight))
    for subgraph in graph.subgraphs(recursive=True):
        for node in subgraph.nodes:
            if is_op(node, "MatMul", "Gemm") and is_constant(node.inputs[1]):
                result.skip(onnx_io.layer_of(node), "inside the body of an If, Loop or Scan")
    return sites


def _why_no_site(node: gs.Node, weight: np.ndarray | None) -> str:
    """The reason against a MatMul that has a constant operand, "" for none."""
    if weight is None:
        if is_constant(node.inputs[0]):
            return "the constant is the left-hand operand"
        producer = node.inputs[1].inputs[0] if node.inputs[1].inputs else None
        if (
            producer is not None
            and is_op(producer, "Transpose")
            and is_constant(producer.inputs[0])
        ):
            return "shares its weight with an embedding"
        return ""
    if weight.ndim != 2:
        return f"the weight is {list(weight.shape)}, not one matrix"
    if weight.dtype not in (np.float32, np.float16):
        return f"the weight is {weight.dtype}, not float32 or float16"
    return ""


def _with_bias(graph: gs.Graph, node: gs.Node, weight: np.ndarray) -> MatMulSite:
    """The site of a MatMul, the Add of its bias included where nothing else reads the product."""
    x, y = node.inputs[0], node.outputs[0]
    alone = MatMulSite([node], x, y, weight, None)
    if (
        len(y.outputs) != 1
        or not is_op(y.outputs[0], "Add")
        or any(y is out for out in graph.outputs)
    ):
        return alone
    add = y.outputs[0]
    if not any(add is n for n in graph.nodes):  # in the body of an If or Loop
        return alone
    other = next((t for t in add.inputs if t is not y), None)
    bias = None if other is None else _as_bias(constant_values(other), weight.shape[1], y)
    return alone if bias is None else MatMulSite([node, add], x, add.outputs[0], weight, bias)


def _as_bias(values: np.ndarray | None, n: int, y: Any) -> np.ndarray | None:
    """A constant addend as a bias [N]: [N] itself, [1, N] and the like, or one number for all.

    None where it differs between rows, or has more dimensions than y: it would add some.
    """
    if values is None or values.shape[-1:] not in ((n,), (1,), ()) or values.size not in (n, 1):
        return None
    if values.ndim > 1 and (not y.shape or values.ndim > len(y.shape)):
        return None
    return np.broadcast_to(values.reshape(-1), (n,))


def name_sites(graph: gs.Graph, nodes: Callable[[gs.Node], bool]) -> None:
    """Give each of ``nodes`` a layer path of its own: a second one of a module becomes "path#2".

    Reports and per-layer comparisons go by the path.
    """
    taken: dict[str, int] = {}
    for node in graph.nodes:
        if nodes(node):
            layer = onnx_io.layer_of(node)
            taken[layer] = taken.get(layer, 0) + 1
            if taken[layer] > 1:
                onnx_io.set_layer(node, f"{layer}#{taken[layer]}")
