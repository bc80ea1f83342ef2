"""Output heads of language models: the last product, onto the vocabulary, with 8 or 4 bits.

A head is a fifth of a small decoder's weights and all of it is read for every token. As
MatMulNBits it reads 8 or 4 bits a weight, with the codes and scales of quantize_embeddings.py.
Only ONNX Runtime has that operator; NBITS_BODY, attached to the model, is the same in standard
operators for any other runtime. ONNX Runtime prefers its own kernel to the body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import Builder, constant_values, is_op

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

CONTRIB, NBITS = "com.microsoft", "MatMulNBits"
# Smaller last layers (classifiers) cost little and decide everything.
MIN_HEAD_WEIGHTS = 1 << 20
ACCURACY_LEVEL = 4  # int8 activations; others run hundreds of times slower
# What may stand between the product and an output of the model.
_PASSES_ON = ("Cast", "Identity", "Add")


@dataclass(frozen=True)
class QuantizedTable:
    """codes [rows, dim * bits / 8] uint8 and scale [rows, dim / block], both constants."""

    codes: Any
    scale: Any
    bits: int
    rows: int
    dim: int
    block: int
    dtype: Any


@dataclass(frozen=True)
class Head:
    """A MatMul(x, W [K, N]): source is W, or the table [N, K] whose Transpose is W; readers are
    the nodes through which the head reads it."""

    product: gs.Node
    source: Any
    readers: tuple[gs.Node, ...]
    tied: bool

    @property
    def layer(self) -> str:
        """Module path."""
        return onnx_io.layer_of(self.product)

    def rows(self) -> np.ndarray:
        """The weights as [N, K]."""
        values = constant_values(self.source)
        assert values is not None
        return values if is_op(self.readers[0], "Transpose") else values.T


def find_heads(graph: gs.Graph) -> list[Head]:
    """Products with a constant matrix of a million weights and more whose result, perhaps cast
    or with a bias, is an output of the graph; wider than deep, as a vocabulary is."""
    outputs = {id(tensor) for tensor in graph.outputs}
    heads = []
    for node in graph.nodes:
        if not is_op(node, "MatMul") or not _is_output(node.outputs[0], outputs):
            continue
        source, readers = _weights(node)
        shape = None if source is None else source.shape
        if source is None or shape is None or len(shape) != 2 or source.dtype != np.float32:
            continue
        rows, columns = shape if is_op(readers[0], "Transpose") else reversed(shape)
        if rows < columns or rows * columns < MIN_HEAD_WEIGHTS:
            continue
        tied = any(is_op(reader, "Gather") for reader in source.outputs)
        heads.append(Head(node, source, readers, tied))
    return heads


def _weights(product: gs.Node) -> tuple[Any, tuple[gs.Node, ...]]:
    """(the constant behind the right-hand side, the node that reads it), or (None, ())."""
    right = product.inputs[1]
    if constant_values(right) is not None:
        return right, (product,)
    if len(right.inputs) != 1 or not is_op(right.inputs[0], "Transpose"):
        return None, ()
    transpose = right.inputs[0]
    alone = all(reader is product for reader in right.outputs)
    if not alone or constant_values(transpose.inputs[0]) is None:
        return None, ()
    return transpose.inputs[0], (transpose,)


def _is_output(tensor: Any, outputs: set[int]) -> bool:
    if id(tensor) in outputs:
        return True
    readers = tensor.outputs
    return (
        len(readers) == 1
        and is_op(readers[0], *_PASSES_ON)
        and _is_output(readers[0].outputs[0], outputs)
    )


def rewrite_head(builder: Builder, head: Head, table: QuantizedTable) -> None:
    """The product becomes MatMulNBits over the table's codes, which ONNX Runtime reshapes once,
    when a session is created."""
    x, y, layer = head.product.inputs[0], head.product.outputs[0], head.layer
    blocks = table.dim // table.block
    shape = builder.literal([table.rows, blocks, table.block * table.bits // 8], np.int64)
    codes = builder.node("Reshape", [table.codes, shape], layer=layer, dtype=np.uint8)
    head.product.outputs.clear()
    builder.node(
        NBITS,
        [x, codes, table.scale],
        layer=layer,
        dtype=table.dtype,
        output=y,
        domain=CONTRIB,
        attrs={
            "K": table.dim,
            "N": table.rows,
            "bits": table.bits,
            "block_size": table.block,
            "accuracy_level": ACCURACY_LEVEL,
        },
    )


_UNPACK = {
    4: """
  pairs = Unsqueeze(B, last)
  shifts = Constant <value = uint8[2] {0, 4}>()
  low = Constant <value = uint8[1] {15}>()
  shifted = BitShift <direction: string = "RIGHT"> (pairs, shifts)
  codes = BitwiseAnd(shifted, low)
""",
    8: """
  codes = Identity(B)
""",
}

_BODY = """
<domain: "com.microsoft", opset_import: ["" : {opset}]>
MatMulNBits <K, N, bits, block_size, accuracy_level> (A, B, scales) => (Y)
{{
  last = Constant <value_ints = [-1]>()
{unpack}
  values = Cast <to = 1> (codes)
  zero_point = Constant <value = float {{{zero}.0}}>()
  centred = Sub(values, zero_point)
  by_block = Constant <value_ints = [0, 0, -1]>()
  blocks = Reshape(centred, by_block)
  block_scales = Unsqueeze(scales, last)
  scaled = Mul(blocks, block_scales)
  by_row = Constant <value_ints = [0, -1]>()
  rows = Reshape(scaled, by_row)
  weight = Transpose <perm = [1, 0]> (rows)
  Y = MatMul(A, weight)
}}
"""


def attach_nbits_body(model: onnx.ModelProto) -> None:
    """Give MatMulNBits, where the model has it, a function body in standard operators, in place.

    K must be whole blocks, as rewrite_head leaves it, and all nodes of one number of bits.
    """
    from onnx import parser

    nodes = [n for n in model.graph.node if n.op_type == NBITS and n.domain == CONTRIB]
    bits = {a.i for node in nodes for a in node.attribute if a.name == "bits"}
    for function in [f for f in model.functions if f.name == NBITS]:
        model.functions.remove(function)
    if len(bits) != 1:
        return
    (width,) = bits
    text = _BODY.format(
        opset=onnx_io.model_opset(model), unpack=_UNPACK[width].strip("\n"), zero=1 << (width - 1)
    )
    model.functions.append(parser.parse_function(text))
