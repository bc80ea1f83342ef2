"""Raise the opset of a foreign model to what the passes and the function body use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_export import onnx_io, op
from bitnet_export.errors import InputError, UsageError, first_line

if TYPE_CHECKING:
    import onnx


def raise_opset(model: onnx.ModelProto, asked: int | None = None) -> onnx.ModelProto:
    """The model at opset ``asked``, or at 18 where it is older and nothing is asked.

    Raises UsageError where ``asked`` is too old or lies below the model's own, InputError where
    onnx's version converter cannot.
    """
    from onnx import version_converter

    found = onnx_io.model_opset(model)
    if asked is not None:
        op.check_opset(asked)
        if asked < found:
            raise UsageError(
                f"the model is at opset {found}, which is not lowered",
                where=f"--opset {asked}",
                fix=f"leave --opset out, or pass {found} or more",
            )
    wanted = asked or max(found, op.OLDEST_OPSET)
    if wanted == found:
        return model
    try:
        converted = version_converter.convert_version(onnx_io.skeleton(model), wanted)
    except Exception as error:
        raise InputError(
            f"the model is at opset {found} and cannot be converted to {wanted}: "
            f"{first_line(error)}",
            fix=f"export it again with opset {wanted}",
        ) from error
    _bring_back(model, converted)
    _restore_tensors(model, converted)
    return converted


def _restore_tensors(model: onnx.ModelProto, converted: onnx.ModelProto) -> None:
    """The converter serializes its model, which ends at 2 GB, so that large tensors went past it as
    inputs: they become initializers again, in the order they had."""
    inputs = {value.name for value in model.graph.input}
    tensors = {t.name: t for t in model.graph.initializer}
    made = [t for t in converted.graph.initializer if t.name not in tensors]
    kept = [v for v in converted.graph.input if v.name in inputs or v.name not in tensors]
    changed = {t.name: t for t in converted.graph.initializer if t.name in tensors}
    for field, content in (
        ("initializer", [*(changed.get(name, t) for name, t in tensors.items()), *made]),
        ("input", kept),
    ):
        converted.graph.ClearField(field)
        getattr(converted.graph, field).extend(content)


def _bring_back(model: onnx.ModelProto, converted: onnx.ModelProto) -> None:
    """The converter drops functions and metadata; that of nodes may hold module paths."""
    converted.metadata_props.extend(model.metadata_props)
    known = {(f.domain, f.name) for f in converted.functions}
    converted.functions.extend(f for f in model.functions if (f.domain, f.name) not in known)
    metadata = {n.output[0]: n.metadata_props for n in model.graph.node if n.output}
    for node in converted.graph.node:
        if node.output and not node.metadata_props:
            node.metadata_props.extend(metadata.get(node.output[0], ()))
