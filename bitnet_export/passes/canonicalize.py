"""Bring every product with a constant matrix into one form: MatMul(x, W[K, N]) and an Add."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import (
    Builder,
    Pass,
    PassResult,
    constant_values,
    is_constant,
    is_op,
)
from bitnet_export.passes.matmul_sites import name_sites

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class Canonicalize(Pass):
    """Gemm with a constant B becomes MatMul (+ Add); alpha, beta and transB go into the weights."""

    name = "canonicalize"
    requires = "constants folded"
    ensures = "constant matrices are the right-hand [K, N] operand of a MatMul of its own name"
    optional = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite every Gemm that allows it."""
        result = PassResult()
        builder = Builder(graph)
        name_sites(graph, _multiplies_by_a_constant)
        for node in [n for n in graph.nodes if is_op(n, "Gemm")]:
            weight = constant_values(node.inputs[1])
            if weight is None:
                result.skip(onnx_io.layer_of(node), "B is computed, not a weight")
            elif node.attrs.get("transA", 0):
                result.skip(onnx_io.layer_of(node), "A is transposed")
            else:
                _split_gemm(builder, node, weight)
                result.rewritten += 1
        return result


def _multiplies_by_a_constant(node: gs.Node) -> bool:
    return is_op(node, "Gemm", "MatMul", "Conv") and is_constant(node.inputs[1])


def _split_gemm(builder: Builder, node: gs.Node, weight: np.ndarray) -> None:
    attrs = node.attrs
    w = weight.T if attrs.get("transB", 0) else weight
    w = (w * np.asarray(attrs.get("alpha", 1.0), w.dtype)).astype(w.dtype)
    x, y, layer = node.inputs[0], node.outputs[0], onnx_io.layer_of(node)
    addend = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    node.outputs.clear()
    w_tensor = builder.constant(w, f"{layer}.weight")
    product = builder.node(
        "MatMul", [x, w_tensor], layer=layer, dtype=w.dtype, output=None if addend else y
    )
    if addend is None:
        return
    beta = attrs.get("beta", 1.0)
    if beta != 1.0:
        addend = builder.node(
            "Mul", [addend, builder.literal(beta, w.dtype)], layer=layer, dtype=w.dtype
        )
    builder.node("Add", [product, addend], layer=layer, dtype=w.dtype, output=y)
