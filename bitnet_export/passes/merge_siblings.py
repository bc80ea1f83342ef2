"""Merge TernaryMatMuls that read the same input (q/k/v, gate/up) into a wider one and a Split.

One activation quantization and one larger product instead of several. The Split's outputs keep
the names of the tensors they replace.
"""

from __future__ import annotations

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
    """q/k/v and gate/up become one node each, whose outputs a Split hands out."""

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
    """["a.q", "a.k"] -> "a.{q,k}"; without a parent in common, "{q,k}"."""
    parts = [layer.split(".") for layer in layers]
    parents = [p[:-1] for p in parts]
    shared = next(
        (i for i, names in enumerate(zip(*parents, strict=False)) if len(set(names)) > 1),
        min(map(len, parents)),
    )
    prefix = "".join(f"{name}." for name in parts[0][:shared])
    return f"{prefix}{{{','.join('.'.join(p[shared:]) for p in parts)}}}"


def _merge(builder: Builder, siblings: list[TernaryNode]) -> None:
    first, layer = siblings[0], merged_name([s.layer for s in siblings])
    sizes = [s.attributes.N for s in siblings]
    at = first.attributes
    outputs = [s.y for s in siblings]
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
        bias=_join_biases([s.bias for s in siblings], sizes),
    )
    builder.split(wide, outputs, sizes, layer=layer)


def _rows(node: TernaryNode) -> np.ndarray:
    """The scale, one row for each of the N outputs."""
    return np.broadcast_to(node.scale, (node.attributes.N, *node.scale.shape[1:]))


def _join_biases(biases: list[np.ndarray | None], sizes: list[int]) -> np.ndarray | None:
    """The biases one after the other, zeros where a layer has none; None if all have none."""
    if all(bias is None for bias in biases):
        return None
    pairs = zip(biases, sizes, strict=True)
    return np.concatenate([np.zeros(n, np.float32) if b is None else b for b, n in pairs])
