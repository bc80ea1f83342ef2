"""Store the weights of convolutions that are ternary as 2-bit codes.

They run as floating-point convolutions all the same: a chain of standard operators on constants
gives the dense weight back, bit for bit, and ONNX Runtime folds it when the session is created.
Which weights are ternary is read from the values, so convolutions of any origin qualify.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, packing
from bitnet_export.passes.base import Builder, Pass, PassResult, constant_values, is_op

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Below this many weights the nodes of the chain outweigh what the codes save.
SMALLEST = 1024


class PackConvolutions(Pass):
    """Conv(x, W) -> Conv(x, Reshape(unpack(codes) * scale)) where W is ternary."""

    name = "pack-convolutions"
    requires = "constants folded"
    ensures = "convolutions whose weights are ternary for each output hold 2-bit codes"

    def run(self, graph: gs.Graph) -> PassResult:
        """Pack every ternary weight, once however many convolutions share it."""
        result = PassResult()
        builder = Builder(graph)
        done: dict[int, Any] = {}
        for node in [n for n in graph.nodes if is_op(n, "Conv", "ConvTranspose")]:
            layer, weight = onnx_io.layer_of(node), constant_values(node.inputs[1])
            if node.op != "Conv" or weight is None or weight.size < SMALLEST:
                continue
            key = id(node.inputs[1])
            if key not in done:
                found = channel_trits(weight)
                done[key] = None if found is None else _unpack(builder, layer, weight, *found)
            if done[key] is None:
                result.skip(layer, "weights are not ternary")
                continue
            node.inputs[1] = done[key]
            result.rewritten += 1
            kernel = "x".join(map(str, weight.shape[2:]))
            result.notes.append(f"{layer}: ternary weights, runs as floating point Conv {kernel}")
        return result


def channel_trits(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """weight [N, ...] -> (trits [N, K] int8, scale [N] in its dtype) with trits * scale equal to
    it bit for bit, or None where it is not ternary."""
    if weight.dtype not in (np.float32, np.float16):
        return None
    rows = weight.reshape(weight.shape[0], -1)
    scale = np.abs(rows).max(1)
    trits = np.sign(rows)
    if rows.shape[1] < 2 or not np.array_equal(trits * scale[:, None], rows):
        return None
    return trits.astype(np.int8), scale


def _unpack(
    builder: Builder, layer: str, weight: np.ndarray, trits: np.ndarray, scale: np.ndarray
) -> Any:
    """The dense weight, computed by constant nodes in the graph."""
    n, k = trits.shape
    u8, i64, dense = np.uint8, np.int64, weight.dtype
    to = {np.dtype(np.float32): 1, np.dtype(np.float16): 10}[dense]

    def node(op_type: str, *inputs: Any, dtype: Any, **attrs: Any) -> Any:
        hint = f"unpack.{op_type}"
        return builder.node(op_type, inputs, layer=layer, dtype=dtype, attrs=attrs, hint=hint)

    packed = builder.constant(packing.pack(trits)[..., None], f"{layer}.packed_weight")
    shifted = node(
        "BitShift", packed, builder.literal([0, 2, 4, 6], u8), dtype=u8, direction="RIGHT"
    )
    codes = node("BitwiseAnd", shifted, builder.literal([3], u8), dtype=u8)
    rows = node("Reshape", codes, builder.literal([n, -1], i64), dtype=u8)
    begin, end, axis = (builder.literal([v], i64) for v in (0, k, 1))
    cut = node("Slice", rows, begin, end, axis, dtype=u8)
    wide = node("Cast", cut, dtype=dense, to=to)
    centred = node("Sub", wide, builder.literal(packing.ZERO_CODE, dense), dtype=dense)
    scales = builder.constant(scale[:, None], f"{layer}.scale")
    scaled = node("Mul", centred, scales, dtype=dense)
    return node("Reshape", scaled, builder.literal(weight.shape, i64), dtype=dense)
