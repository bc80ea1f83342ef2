"""Lower TernaryMatMul to ONNX Runtime's int8 products: encoders, prefill, any larger M.

The file keeps the 2-bit codes. A chain of standard operators on constants unpacks them; ONNX
Runtime folds it once, when the session is created, and prepacks the int8 matrix. Activations are
uint8 with zero point 128 (signed ones take a slow path there), scaled per row exactly as
TernaryMatMul does, or per tensor on request, which is one fused operator and a little faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import op
from bitnet_export.packing import CODES_PER_BYTE, PADDING_BYTE
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

CONTRIB = "com.microsoft"
# A trit of 1 as unpacked: a power of two, which comes off the scale without rounding. Sums stay
# below 2^31 (255 * 64 * op.MAX_EXACT_K), and two products below 2^15, in which AVX2 adds them.
UNIT = 64


def unit(K: int) -> int:
    """What a trit of 1 is where there are K inputs: UNIT, or 1 where sums could leave int32."""
    return UNIT if op.MAX_EXACT_K >= K else 1


class LowerInt8(Pass):
    """TernaryMatMul -> QuantizeLinear + MatMulIntegerToFloat, or DynamicQuantizeMatMul."""

    name = "lower-int8"
    requires = "TernaryMatMul nodes"
    ensures = "TernaryMatMuls with int8 activations and no group scales are int8 products"
    optional = False

    def __init__(self, activation_scale: str = "row") -> None:
        self.activation_scale = activation_scale

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite what the integer operators can express."""
        result = PassResult()
        shared = _Shared()
        builder = Builder(graph)
        for node in ternary_nodes(graph):
            if node.attributes.group_size:
                result.skip(node.layer, "group scales have no integer operator; it runs as 2-bit")
            elif not node.attributes.activation_bits:
                result.skip(node.layer, "float activations have no integer operator")
            else:
                self._lower(builder, node, shared)
                result.rewritten += 1
        return result

    def _lower(self, builder: Builder, t: TernaryNode, shared: _Shared) -> None:
        layer = t.layer
        weight = unpack_in_graph(builder, t, shared.weights)
        scale = (t.scale.reshape(()) if t.scale.size == 1 else t.scale) / np.float32(
            unit(t.attributes.K)
        )
        scale = builder.constant(scale.astype(np.float32), f"{layer}.scale")
        weight_zero = builder.literal(0, np.int8)
        t.node.outputs.clear()
        x, y = float32_ends(builder, t, shared.inputs)
        bias = None if t.bias is None else builder.constant(t.bias, f"{layer}.bias")
        if self.activation_scale == "tensor":
            builder.node(
                "DynamicQuantizeMatMul",
                [x, weight, scale, weight_zero, *([] if bias is None else [bias])],
                layer=layer,
                dtype=np.float32,
                output=y,
                domain=CONTRIB,
            )
            return
        if id(x) not in shared.quantized:
            shared.quantized[id(x)] = quantize_rows(builder, x, layer)
        xq, a = shared.quantized[id(x)]
        one, x_zero = builder.literal(1.0, np.float32), builder.literal(128, np.uint8)
        sums = builder.node(
            "MatMulIntegerToFloat",
            [xq, weight, one, scale, x_zero, weight_zero],
            layer=layer,
            dtype=np.float32,
            domain=CONTRIB,
        )
        # The bias stays an Add: ONNX Runtime fuses it with the Gelu or residual after it.
        last = y if bias is None else None
        product = builder.node("Mul", [sums, a], layer=layer, dtype=np.float32, output=last)
        if bias is not None:
            builder.node("Add", [product, bias], layer=layer, dtype=np.float32, output=y)


@dataclass
class _Shared:
    """What several layers use, by the id of the tensor it is made from: inputs cast to float32,
    inputs quantized, weights unpacked."""

    inputs: dict[int, Any] = field(default_factory=dict)
    quantized: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    weights: dict[tuple[int, int], Any] = field(default_factory=dict)


def quantize_rows(builder: Builder, x: Any, layer: str) -> tuple[Any, Any]:
    """x [..., K] float -> (xq [..., K] uint8 with zero point 128, a [..., 1]); op.py's numerics."""
    f32 = np.float32

    def node(op_type: str, *inputs: Any, **kwargs: Any) -> Any:
        return builder.node(op_type, inputs, layer=layer, dtype=kwargs.pop("dtype", f32), **kwargs)

    magnitude = node("Abs", x)
    last_axis = builder.literal([-1], np.int64)
    row_max = node("ReduceMax", magnitude, last_axis, attrs={"keepdims": 1})
    # ReduceMax drops NaN, and a NaN row would come out as numbers. A sum of magnitudes keeps it,
    # and is never below the largest of them, so the Min changes nothing else.
    row_sum = node("ReduceSum", magnitude, last_axis, attrs={"keepdims": 1})
    peak = node("Min", row_max, row_sum, hint="row_max_or_nan")
    s = node("Max", peak, builder.literal(op.ABSMAX_FLOOR, f32))
    a = node("Div", s, builder.literal(op.INT8_MAX, f32), hint="activation_scale")
    scaled = node("Div", x, a, hint="scaled")
    one, zero = builder.literal(1.0, f32), builder.literal(128, np.uint8)
    xq = node("QuantizeLinear", scaled, one, zero, dtype=np.uint8)
    return xq, a


def unpack_in_graph(builder: Builder, t: TernaryNode, done: dict[tuple[int, int], Any]) -> Any:
    """packed_weight [N, K'/4] uint8 -> int8 [K, N], unit(K) times the trits, computed by
    constant nodes in the graph.

    ONNX Runtime keeps what every one of these nodes puts out as long as the session lives, so that
    few of them see whole bytes: 4 of a weight, where a plain shift, mask, Cast and Sub took 14. The
    codes become two's complement while they are packed (code ^ 2: -1 is 3), and land in the highest
    bits of a byte, where their sign is the byte's.
    done: the weights unpacked before, by packed tensor and K; layers may share one.
    """
    at = t.attributes
    packed = builder.constant(t.packed_weight, f"{t.layer}.packed_weight")
    if (id(packed), at.K) in done:
        return done[id(packed), at.K]

    def node(op_type: str, *inputs: Any, dtype: Any = np.uint8, **attrs: Any) -> Any:
        hint = f"unpack.{op_type}"
        return builder.node(op_type, inputs, layer=t.layer, dtype=dtype, attrs=attrs, hint=hint)

    def literal(values: Any, dtype: Any = np.uint8) -> Any:
        return builder.literal(values, dtype)

    signed = node("BitwiseXor", packed, literal([PADDING_BYTE]))
    columns = node("Transpose", signed, perm=[1, 0])
    apart = node("Unsqueeze", columns, literal([1], np.int64))
    shifted = node("BitShift", apart, literal([[6], [4], [2], [0]]), direction="LEFT")
    highest = node("BitwiseAnd", shifted, literal([0b11000000]))
    rows = node("Reshape", highest, literal([-1, at.N], np.int64))
    if t.packed_weight.shape[1] * CODES_PER_BYTE > at.K:
        rows = node("Slice", rows, *(literal([v], np.int64) for v in (0, at.K, 0)))
    result = node("Cast", rows, dtype=np.int8, to=3)
    if unit(at.K) == 1:
        wide = node("Cast", result, dtype=np.int32, to=6)
        trits = node("Div", wide, literal(UNIT, np.int32), dtype=np.int32)
        result = node("Cast", trits, dtype=np.int8, to=3)
    done[id(packed), at.K] = result
    return done[id(packed), at.K]
