"""Make a float32 model float16, with norms and Softmax kept in float32.

ONNX Runtime's own converter does the work; what is added here is that TernaryMatMul takes
float16 activations directly (its scale and bias stay float32) instead of casts around it. Inputs
and outputs of the model stay float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitnet_export import onnx_io, onnx_tensors, op
from bitnet_export.errors import MissingRequirement, StageError, first_line
from bitnet_export.passes.base import Builder, PassResult

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

NAME = "to-fp16"
# Weights above it go past the converter; so many of their numbers at a time.
_LARGE_BYTES, _BLOCK = 4096, 1 << 22
KEPT_OPS = ("LayerNormalization", "RMSNormalization", "Softmax", "Pow", "ReduceMean")


def to_fp16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    """float32 model -> (float16 model, what was converted).

    Raises MissingRequirement without onnxruntime, StageError where its converter fails.
    """
    try:
        from onnxruntime.transformers import float16
    except ImportError as error:
        raise MissingRequirement(
            "--dtype fp16 uses ONNX Runtime's converter, which is not installed",
            fix="pip install 'bitnet-export[ort]'",
        ) from error
    copy = _without_data(model)
    layers = _name_every_node(copy)
    try:
        converted = float16.convert_float_to_float16(
            copy,
            keep_io_types=True,
            disable_shape_infer=True,
            op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_OPS, op.OP_TYPE],
            node_block_list=[name for name, layer in layers.items() if _is_norm(layer)],
        )
    except Exception as error:
        raise StageError(
            f"the model cannot be made float16: {first_line(error)}",
            where="--dtype fp16",
            fix="leave --dtype out",
        ) from error
    converted.functions.extend(model.functions)
    _restore_data(converted, model)
    graph = onnx_io.to_graph(converted)
    builder = Builder(graph)
    result = PassResult(name=NAME, notes=["norms and softmax stay in float32"])
    for node in [n for n in graph.nodes if n.op == op.OP_TYPE and n.domain == op.DOMAIN]:
        if _bypass_input_cast(node):
            _make_output_half(graph, builder, node)
            result.rewritten += 1
        else:
            result.skip(onnx_io.layer_of(node), "its input is float32")
    graph.cleanup().toposort()
    return onnx_io.from_graph(graph, model), result


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without functions, with its types inferred, in which a single number stands for each
    large weight: the converter infers types from a serialized model, which ends at 2 GB, and takes
    ten times a weight's bytes to convert it."""
    copy = onnx_tensors.bare_copy(model)
    del copy.functions[:]
    for tensor in model.graph.initializer:
        if _is_large_float(tensor):
            copy.graph.initializer.add(
                name=tensor.name, data_type=tensor.data_type, dims=[1], raw_data=bytes(4)
            )
        else:
            copy.graph.initializer.append(
                onnx_tensors.inside(tensor) if onnx_tensors.is_outside(tensor) else tensor
            )
    known = {v.name for v in (*copy.graph.value_info, *copy.graph.input, *copy.graph.output)}
    found = onnx_io.infer_shapes(model)
    known |= {tensor.name for tensor in model.graph.initializer}
    copy.graph.value_info.extend(v for name, v in found.items() if name not in known)
    return copy


def _is_large_float(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == 1 and onnx_tensors.tensor_bytes(tensor) > _LARGE_BYTES


def _restore_data(converted: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Put the weights back, in the type that the converter gave them, in place."""
    from onnx import TensorProto, numpy_helper

    originals = {t.name: t for t in model.graph.initializer if _is_large_float(t)}
    stubs = list(converted.graph.initializer)
    del converted.graph.initializer[:]
    for stub in stubs:
        tensor = originals.get(stub.name, stub)
        if tensor is not stub and stub.data_type == TensorProto.FLOAT16:
            tensor = numpy_helper.from_array(to_half(onnx_tensors.values(tensor)), stub.name)
        converted.graph.initializer.append(tensor)
    values = [v for v in converted.graph.value_info if v.name not in originals]
    del converted.graph.value_info[:]
    converted.graph.value_info.extend(values)


def to_half(array: np.ndarray) -> np.ndarray:
    """float32 -> float16, with the ends that the converter has: no number becomes 0 or infinite
    that was not. Block by block, for the sake of memory."""
    flat, half = array.reshape(-1), np.empty(array.size, np.float16)
    least, most = np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    for start in range(0, flat.size, _BLOCK):
        block = flat[start : start + _BLOCK]
        finite = np.isfinite(block)
        size = np.where(finite & (block != 0), np.clip(np.abs(block), least, most), np.abs(block))
        half[start : start + _BLOCK] = np.copysign(size, block)
    return half.reshape(array.shape)


def _name_every_node(model: onnx.ModelProto) -> dict[str, str]:
    """Node name -> layer; nodes without a name of their own, or with a taken one, get one, because
    the converter goes by names."""
    layers: dict[str, str] = {}
    for i, node in enumerate(model.graph.node):
        layer = onnx_io.node_layer(node)
        if not node.name or node.name in layers:
            node.name = f"bitnet.node.{i}"
        layers[node.name] = layer
    return layers


def _is_norm(layer: str) -> bool:
    return "norm" in layer.rsplit(".", 1)[-1].lower()


def _bypass_input_cast(node: gs.Node) -> bool:
    """Take X from before its Cast from float16, if there is one; whether X is float16 now."""
    x = node.inputs[0]
    producer = x.inputs[0] if x.inputs else None
    if producer is not None and producer.op == "Cast" and producer.inputs[0].dtype == np.float16:
        node.inputs[0] = producer.inputs[0]
    return bool(node.inputs[0].dtype == np.float16)


def _make_output_half(graph: gs.Graph, builder: Builder, node: gs.Node) -> None:
    """Y has X's type. Casts of it to float16 go; whatever still wants float32 gets a Cast."""
    y, layer = node.outputs[0], onnx_io.layer_of(node)
    half = builder.variable_like(f"{y.name}.half", y, node.attrs["N"], np.float16)
    node.outputs = [half]
    for cast in [n for n in y.outputs if n.op == "Cast" and n.outputs[0].dtype == np.float16]:
        result = cast.outputs[0]
        if any(result is output for output in graph.outputs):
            cast.inputs = [half]
            continue
        for consumer in list(result.outputs):
            consumer.inputs = [half if t is result else t for t in consumer.inputs]
        cast.inputs.clear()
        cast.outputs.clear()
        # The converter gave Y's name to the cast's result: verify finds layers by it.
        half.name, result.name = result.name, half.name
    if y.outputs or any(y is output for output in graph.outputs):
        builder.node(
            "Cast", [half], layer=layer, dtype=np.float32, attrs={"to": 1}, output=y, hint="float32"
        )
