"""Lower TernaryMatMul to what TensorRT-RTX builds: INT4 DequantizeLinear and a float16 MatMul.

TensorRT-RTX takes no plugins, but compiles 4-bit weights with a scale a block. A trit is one of
the sixteen int4 values, so the weights stay exact; four bits a weight instead of two is the
price, and activations stay float16 instead of int8. ``dense_weights`` is the second half, for
compute capability 7.5, whose compiler refuses int4: the same values as float16.

These work on the ModelProto: onnx-graphsurgeon cannot export int4 constants.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, onnx_tensors, op, packing
from bitnet_export.errors import StageError
from bitnet_export.passes.base import PassResult
from bitnet_export.passes.opset import raise_opset

if TYPE_CHECKING:
    import onnx

NAME = "lower-rtx"
# Weights along K that share a scale: 4 + 16/128 bits a weight. Smaller groups keep their own.
BLOCK = 128
# The first opset whose DequantizeLinear has block_size and int4.
OPSET = 21
SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


def lower_rtx(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    """model with bitnet::TernaryMatMul at opset 21 or newer -> (standard operators only, result).

    y = x . dequantize(int4 [K, N], float16 scale [ceil(K/block), N]) + bias, in float16, with
    casts around it where x is float32. Raises StageError where weights are computed.
    """
    started = time.perf_counter()
    lowered = type(model)()
    lowered.CopyFrom(model)
    result = PassResult(name=NAME)
    nodes, constants = list(lowered.graph.node), _constants(lowered)
    types = _element_types(lowered)
    layers = []
    del lowered.graph.node[:]
    for node in nodes:
        if node.op_type != op.OP_TYPE or node.domain != op.DOMAIN:
            lowered.graph.node.append(node)
            continue
        layers.append(_Layer(lowered, node, constants, types))
        layers[-1].lower(result)
    result.rewritten = len(layers)
    _drop_unused(lowered)
    onnx_io.attach_functions(lowered)
    if any(layer.at.activation_bits for layer in layers):
        result.notes.append("activations stay float16 where the model has int8 ones")
    result.seconds = time.perf_counter() - started
    return lowered, result


def at_rtx_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """model at opset 21 or newer. onnx's converter drops the layers' names; they are put back."""
    raised = raise_opset(model, max(OPSET, onnx_io.model_opset(model)))
    if raised is model:
        return model
    layers = {node.output[0]: onnx_io.node_layer(node) for node in model.graph.node}
    for node in raised.graph.node:
        layer = layers.get(node.output[0], "")
        if layer and not onnx_io.node_layer(node):
            node.metadata_props.add(key=onnx_io.LAYER_KEY, value=layer)
    onnx_io.attach_functions(raised)
    return raised


def dense_weights(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """lower_rtx's model -> (the same with float16 weights, how many). Every weight is one of
    {-s, 0, s} with s float16, so not a bit changes."""
    from onnx import numpy_helper

    dense = type(model)()
    dense.CopyFrom(model)
    constants = _constants(dense)
    nodes = list(dense.graph.node)
    del dense.graph.node[:]
    count = 0
    for node in nodes:
        if not is_int4_weight(node, constants):
            dense.graph.node.append(node)
            continue
        codes, scale = (onnx_tensors.values(constants[name]) for name in node.input[:2])
        block = next(a.i for a in node.attribute if a.name == "block_size")
        rows = np.repeat(scale, block, axis=0)[: codes.shape[0]]
        weight = codes.astype(np.float16) * rows
        dense.graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
        count += 1
    _drop_unused(dense)
    return dense, count


def int4_weights(model: onnx.ModelProto) -> int:
    """How many weights lower_rtx's model holds as int4."""
    constants = _constants(model)
    found = [n.input[0] for n in model.graph.node if is_int4_weight(n, constants)]
    return sum(int(np.prod(constants[name].dims)) for name in found)


def is_int4_weight(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    """Whether node dequantizes constant int4 weights."""
    from onnx import TensorProto

    return (
        node.op_type == "DequantizeLinear"
        and node.input[0] in constants
        and constants[node.input[0]].data_type == TensorProto.INT4
    )


class _Layer:
    """One TernaryMatMul on its way to standard operators."""

    def __init__(
        self,
        model: onnx.ModelProto,
        node: onnx.NodeProto,
        constants: dict[str, onnx.TensorProto],
        types: dict[str, int],
    ) -> None:
        from onnx import TensorProto

        self.graph, self.node = model.graph, node
        self.name = onnx_io.node_layer(node) or node.name or node.output[0]
        missing = [name for name in node.input[1:] if name and name not in constants]
        if missing:
            raise StageError(f"TernaryMatMul with computed {missing[0]}", where=self.name)
        arrays = [onnx_tensors.values(constants[name]) for name in node.input[1:] if name]
        fields = ("K", "N", "group_size", "activation_bits")
        self.at = op.TernaryAttributes(**{a.name: a.i for a in node.attribute if a.name in fields})
        self.trits = packing.unpack(arrays[0], self.at.K)
        self.scale = arrays[1].astype(np.float32)
        self.bias = arrays[2] if len(arrays) > 2 and arrays[2].any() else None
        self.is_half = types.get(node.input[0]) == TensorProto.FLOAT16
        # A constant's name never collides: it begins with the unique name of the layer's output.
        self.prefix = node.output[0]

    def lower(self, result: PassResult) -> None:
        """Append the nodes and constants that replace the layer."""
        from onnx import TensorProto

        x, y = self.node.input[0], self.node.output[0]
        if not self.is_half:
            x = self._add("Cast", [x], "x16", to=TensorProto.FLOAT16)
        last = y if self.is_half else f"{self.prefix}.y16"
        weight = self._weight(result)
        if self.bias is None:
            self._add("MatMul", [x, weight], output=last)
        else:
            product = self._add("MatMul", [x, weight], "product")
            bias = self._constant(self.bias.astype(np.float16), "bias16")
            self._add("Add", [product, bias], output=last)
        if not self.is_half:
            self._add("Cast", [last], output=y, to=TensorProto.FLOAT)

    def _weight(self, result: PassResult) -> str:
        """The dequantized weight [K, N]."""
        from onnx import TensorProto, helper

        block = self.at.group_size or BLOCK
        codes = pack_int4(self.trits.T)
        name = f"{self.prefix}.int4"
        tensor = helper.make_tensor(name, TensorProto.INT4, [self.at.K, self.at.N], codes, raw=True)
        self.graph.initializer.append(tensor)
        scale = self._block_scales(block)
        tiny = int(((scale != 0) & (np.abs(scale) < SMALLEST_NORMAL)).sum())
        half = scale.astype(np.float16)
        if tiny or not np.isfinite(half).all():
            result.warnings.append(
                f"{self.name}: scales down to {np.abs(scale).min():.2g} lose precision in float16"
            )
        inputs = [name, self._constant(half, "scale16")]
        return self._add("DequantizeLinear", inputs, "weight", axis=0, block_size=block)

    def _block_scales(self, block: int) -> np.ndarray:
        """scale [1], [N] or [N, groups] -> [ceil(K/block), N]."""
        blocks = -(-self.at.K // block)
        if self.at.group_size:
            return self.scale.T
        return np.broadcast_to(self.scale.reshape(1, -1), (blocks, self.at.N))

    def _constant(self, values: np.ndarray, suffix: str) -> str:
        from onnx import numpy_helper

        name = f"{self.prefix}.{suffix}"
        tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
        self.graph.initializer.append(tensor)
        return name

    def _add(
        self, op_type: str, inputs: list[str], suffix: str = "", output: str = "", **attrs: Any
    ) -> str:
        from onnx import helper

        out = output or f"{self.prefix}.{suffix}"
        node = helper.make_node(op_type, inputs, [out], name=f"{out}:{op_type}", **attrs)
        node.metadata_props.add(key=onnx_io.LAYER_KEY, value=self.name)
        self.graph.node.append(node)
        return out


def pack_int4(trits: np.ndarray) -> bytes:
    """int8 in [-8, 7], any shape -> ONNX INT4 bytes, row-major, first element in the low half."""
    flat = np.ascontiguousarray(trits).reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return (flat[0::2] | flat[1::2] << 4).tobytes()


def _constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Tensor -> element type, as far as shape inference knows it."""
    known = {v.name: v for v in (*model.graph.input, *model.graph.value_info)}
    known |= onnx_io.infer_shapes(onnx_io.skeleton(model))
    return {name: v.type.tensor_type.elem_type for name, v in known.items()}


def _drop_unused(model: onnx.ModelProto) -> None:
    """Remove initializers and value infos that no node reads or makes any more."""
    read = {name for node in model.graph.node for name in _inputs(node)}
    read |= {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    made = {name for node in model.graph.node for name in node.output}
    infos = [value for value in model.graph.value_info if value.name in made]
    del model.graph.value_info[:]
    model.graph.value_info.extend(infos)
    used = {node.domain for node in model.graph.node} | {""}
    imports = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)


def _inputs(node: onnx.NodeProto) -> list[str]:
    """What a node reads, the bodies of If, Loop and Scan included."""
    names = list(node.input)
    for attribute in node.attribute:
        bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
        for body in bodies:
            names += [name for inner in body.node for name in _inputs(inner)]
            names += [value.name for value in body.output]
    return names
