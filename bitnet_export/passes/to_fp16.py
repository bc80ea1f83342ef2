"""Make a float32 model float16, with norms and Softmax kept in float32.

ONNX Runtime's own converter does the work; what is added here is that TernaryMatMul takes
float16 activations directly (its scale and bias stay float32) instead of casts around it. Inputs
and outputs of the model stay float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, op
from bitnet_export.errors import MissingRequirement
from bitnet_export.passes.base import PassResult

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

NAME = "to-fp16"
KEPT_OPS = ("LayerNormalization", "RMSNormalization", "Softmax", "Pow", "ReduceMean")


def to_fp16(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassResult]:
    """float32 model -> (float16 model, what was converted). Needs onnxruntime."""
    try:
        from onnxruntime.transformers import float16
    except ImportError as error:
        raise MissingRequirement(
            "--dtype fp16 uses ONNX Runtime's converter, which is not installed",
            fix="pip install 'bitnet-export[ort]'",
        ) from error
    layers = {n.name: onnx_io.node_layer(n) for n in model.graph.node}
    functions = list(model.functions)
    copy = type(model)()
    copy.CopyFrom(model)
    del copy.functions[:]
    converted = float16.convert_float_to_float16(
        copy,
        keep_io_types=True,
        op_block_list=[*float16.DEFAULT_OP_BLOCK_LIST, *KEPT_OPS, op.OP_TYPE],
        node_block_list=[name for name, layer in layers.items() if _is_norm(layer)],
    )
    converted.functions.extend(functions)
    graph = onnx_io.to_graph(converted)
    ternary = [n for n in graph.nodes if n.op == op.OP_TYPE]
    for node in ternary:
        _bypass_input_cast(node)
        _bypass_output_cast(node)
    graph.cleanup().toposort()
    result = PassResult(name=NAME, rewritten=sum(n.inputs[0].dtype == np.float16 for n in ternary))
    result.notes.append("norms and softmax stay in float32")
    return onnx_io.from_graph(graph, model), result


def _is_norm(layer: str) -> bool:
    return "norm" in layer.rsplit(".", 1)[-1].lower()


def _is_cast(node: gs.Node, dtype: Any) -> bool:
    return node.op == "Cast" and node.attrs.get("to") in (dtype, np.dtype(dtype).type)


def _bypass_input_cast(node: gs.Node) -> None:
    x = node.inputs[0]
    if x.inputs and x.inputs[0].op == "Cast" and x.inputs[0].inputs[0].dtype == np.float16:
        node.inputs[0] = x.inputs[0].inputs[0]


def _bypass_output_cast(node: gs.Node) -> None:
    """TernaryMatMul's output has its input's type: its casts to float16 go, others stay."""
    y = node.outputs[0]
    if node.inputs[0].dtype != np.float16:
        return
    y.dtype = np.dtype(np.float16)
    for cast in [n for n in y.outputs if n.op == "Cast"]:
        if cast.outputs[0].dtype == np.float16:
            for consumer in list(cast.outputs[0].outputs):
                consumer.inputs = [y if t is cast.outputs[0] else t for t in consumer.inputs]
            cast.outputs.clear()
