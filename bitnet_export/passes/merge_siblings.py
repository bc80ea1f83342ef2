"""Merge TernaryMatMuls that read the same input (q/k/v, gate/up) into a wider one and a Split.

One activation quantization and one larger product instead of several. The Split's outputs keep
the names of the tensors they replace.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from bitnet_export import op
from bitnet_export.passes.base import (
    Builder,
    Pass,
    PassResult,
    TernaryNode,
    make_ternary_node,
    ternary_nodes,
)

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class MergeSiblings(Pass):
    """Widen."""

    name = "merge-siblings"
    requires = "TernaryMatMul nodes"
    ensures = "no two TernaryMatMuls with equal K, group size and activation bits share an input"

    def run(self, graph: gs.Graph) -> PassResult:
        """Merge every group of two or more."""
        result = PassResult()
        builder = Builder(graph)
        groups: dict[tuple[int, int, int, int], list[TernaryNode]] = {}
        for node in ternary_nodes(graph):
            at = node.attributes
            key = (id(node.x), at.K, at.group_size, at.activation_bits)
            groups.setdefault(key, []).append(node)
        for siblings in groups.values():
            if len(siblings) > 1:
                _merge(builder, siblings)
                result.rewritten += len(siblings)
            else:
                result.skip(siblings[0].layer, "no other TernaryMatMul reads its input")
        return result


def merged_name(layers: list[str]) -> str:
    """["a.q", "a.k"] -> "a.{q,k}"."""
    prefix = os.path.commonprefix(layers)
    prefix = prefix[: prefix.rfind(".") + 1]
    return f"{prefix}{{{','.join(layer[len(prefix) :] for layer in layers)}}}"


def _merge(builder: Builder, siblings: list[TernaryNode]) -> None:
    first, layer = siblings[0], merged_name([s.layer for s in siblings])
    sizes = [s.attributes.N for s in siblings]
    at = first.attributes
    outputs = [s.y for s in siblings]
    biases = [s.bias for s in siblings]
    wide = builder.variable_like(f"{layer}/merged", outputs[0], sum(sizes))
    for s in siblings:
        s.node.outputs.clear()
    make_ternary_node(
        builder,
        layer=layer,
        x=first.x,
        y=wide,
        attributes=op.TernaryAttributes(at.K, sum(sizes), at.group_size, at.activation_bits),
        packed_weight=np.concatenate([s.packed_weight for s in siblings]),
        scale=np.concatenate([_rows(s) for s in siblings]),
        bias=None
        if all(b is None for b in biases)
        else np.concatenate(
            [
                np.zeros(n, np.float32) if b is None else b
                for b, n in zip(biases, sizes, strict=True)
            ]
        ),
    )
    builder.split(wide, outputs, sizes, layer=layer)


def _rows(node: TernaryNode) -> np.ndarray:
    """The scale, one row for each of the N outputs."""
    return np.broadcast_to(node.scale, (node.attributes.N, *node.scale.shape[1:]))
