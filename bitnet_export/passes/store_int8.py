"""Store the weights of layers that stay out of the ternary form as int8, a scale per channel.

Computed in floating point: runtimes turn Cast and Mul of constants into a float matrix when a
session is created, so such a layer costs the bytes of int8 and the time of float32. The weights
were rounded before the export (ternary/sensitivity.py); nothing is lost here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import Builder, Pass, PassResult, constant_values, is_op

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

INT8_MAX = 127
# The largest difference that rounding float32 once more explains, as a part of the scale.
_ROUNDING = 1e-3


class StoreInt8(Pass):
    """MatMul and Gemm of the given layers read int8 weights through Cast and Mul."""

    name = "store-int8"
    requires = "constant weights on a grid of 255 steps per output channel"
    ensures = "the given layers' weights are int8"
    optional = False

    def __init__(self, layers: Collection[str]) -> None:
        self.layers = set(layers)

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite the weight operand of every product of these layers."""
        result = PassResult()
        builder = Builder(graph)
        found = set()
        for node in list(graph.nodes):
            layer = onnx_io.layer_of(node)
            if not is_op(node, "MatMul", "Gemm") or layer not in self.layers:
                continue
            found.add(layer)
            weight = node.inputs[1]
            values = constant_values(weight)
            if values is None or values.ndim != 2 or len(weight.outputs) != 1:
                result.skip(layer, "its weight is no constant of its own")
                continue
            channel = 0 if node.attrs.get("transB", 0) else 1
            codes, scale = quantize(values, 1 - channel)
            if np.abs(codes * scale - values).max() > _ROUNDING * scale.max():
                result.skip(layer, "its weights are not on the int8 grid")
                continue
            node.inputs[1] = _dequantized(builder, layer, codes, scale, values.dtype)
            result.rewritten += 1
        for layer in sorted(self.layers - found):
            result.skip(layer, "no product of that layer in the graph")
        return result


def quantize(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Float matrix -> (int8 codes, float32 scale with ``axis``, the one summed over, of size 1)."""
    scale = np.abs(values).max(axis, keepdims=True).astype(np.float32) / INT8_MAX
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return np.rint(values / scale).astype(np.int8), scale


def _dequantized(
    builder: Builder, layer: str, codes: np.ndarray, scale: np.ndarray, dtype: Any
) -> Any:
    """The constant codes * scale, as nodes."""
    from onnx import helper

    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    stored = builder.constant(codes, f"{layer}.weight_int8")
    factor = builder.constant(scale.astype(dtype), f"{layer}.weight_scale")
    values = builder.node("Cast", [stored], layer=layer, dtype=dtype, attrs={"to": element})
    return builder.node("Mul", [values, factor], layer=layer, dtype=dtype)
