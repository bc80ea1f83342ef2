"""The weights of an exported model on their way to disk, past the 2 GB that protobuf can hold.

torch's exporter refers to the module's own tensors until its model is made a protobuf message,
which copies them all. Here they are written to a file one by one, and the message only names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import onnx_io, onnx_tensors
from bitnet_export.errors import StageError

if TYPE_CHECKING:
    import onnx


def write_tensors(model: Any, data: Path) -> onnx.ModelProto:
    """An onnx_ir model -> the same as protobuf. Where it is large its tensors are in ``data``, to
    which it refers by the whole path (onnx_io.write_model leaves them there); else in the message.

    ``model`` has no tensors afterwards. Raises StageError where they cannot be written.
    """
    import onnx_ir as ir

    try:
        _write_large(model.graph, data)
        return ir.to_proto(model)
    finally:
        _forget_tensors(model.graph)


def _write_large(graph: Any, data: Path) -> None:
    weights = [v for v in graph.initializers.values() if v.const_value is not None]
    if sum(v.const_value.nbytes for v in weights) <= onnx_io.EXTERNAL_DATA_BYTES:
        return
    _fold_transposes(graph)
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        with data.open("wb") as file:
            for value in weights:
                tensor = value.const_value
                if tensor.nbytes >= onnx_tensors.SMALLEST_OUTSIDE:
                    value.const_value = _moved(tensor, value.name, file, data.absolute())
    except OSError as error:
        raise StageError(
            f"cannot be written: {error.strerror or error}",
            where=str(data),
            fix="free some space or choose another directory",
        ) from error


def _forget_tensors(graph: Any) -> None:
    """onnxscript's optimizer keeps the last graph it saw, which keeps the module's weights: after a
    full-precision export they would stay in memory for good."""
    made = (value for node in graph for value in node.outputs)
    replaced = getattr(graph.inputs, "_ref_counter", ())  # inputs that the graph once had
    for value in (*graph.inputs, *graph.initializers.values(), *made, *replaced):
        value.const_value = None


def _moved(tensor: Any, name: str, file: Any, path: Path) -> Any:
    """Append a tensor to a file -> the same tensor, there."""
    import onnx_ir as ir

    offset = onnx_tensors.aligned(file.tell(), tensor.nbytes)
    file.seek(offset)
    file.write(tensor.tobytes())
    return ir.ExternalTensor(
        str(path),
        offset,
        file.tell() - offset,
        tensor.dtype,
        shape=tensor.shape,
        name=name,
        base_dir="",
    )


def _fold_transposes(graph: Any) -> None:
    """Weights that are only read transposed are stored so, in place: a runtime would otherwise hold
    all of them twice while it loads the model."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if weight is None or weight.name not in graph.initializers or weight.const_value is None:
            continue
        result, tensor = node.outputs[0], weight.const_value
        perm = node.attributes.get_ints("perm", [1, 0])
        if len(tensor.shape) != 2 or list(perm) != [1, 0]:
            continue
        if len(weight.uses()) > 1 or result.is_graph_output():
            continue
        weight.const_value = _transposed(tensor)
        weight.shape = weight.const_value.shape
        for user, position in list(result.uses()):
            user.replace_input_with(position, weight)
        graph.remove(node, safe=True)


def _transposed(tensor: Any) -> Any:
    """A matrix transposed when it is written."""
    import onnx_ir as ir

    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().T.copy()),
        dtype=tensor.dtype,
        shape=ir.Shape([tensor.shape[1], tensor.shape[0]]),
        name=tensor.name,
    )
