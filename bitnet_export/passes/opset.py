"""Raise the opset of a foreign model to what the passes and the function body use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_export import onnx_io
from bitnet_export.errors import InputError

if TYPE_CHECKING:
    import onnx

# BitwiseAnd and ReduceMax with axes as an input came with 18.
OLDEST_OPSET = 18


def raise_opset(model: onnx.ModelProto, asked: int | None = None) -> onnx.ModelProto:
    """The model at opset ``asked``, or at 18 where it is older. Raises InputError where onnx's
    version converter cannot."""
    from onnx import version_converter

    found = onnx_io.model_opset(model)
    wanted = max(asked or found, OLDEST_OPSET)
    if wanted <= found:
        return model
    try:
        return version_converter.convert_version(model, wanted)
    except Exception as error:
        raise InputError(
            f"the model is at opset {found} and cannot be converted to {wanted}: {error}",
            fix=f"export it again with opset {wanted}",
        ) from error
