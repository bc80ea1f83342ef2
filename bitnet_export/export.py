"""torch -> ONNX, with one bitnet::TernaryMatMul a frozen layer and its module path on each node.

Modules are replaced before export (ternary/), so nothing has to be found again in the graph. What
happens to the graph afterwards is the passes' business.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import onnx_io, op
from bitnet_export.axes import is_sum
from bitnet_export.errors import StageError, first_line
from bitnet_export.export_attention import four_axes, simplify_attention
from bitnet_export.export_tensors import write_tensors
from bitnet_export.load.inputs import without_size_one

if TYPE_CHECKING:
    import onnx
    import torch

DEFAULT_OPSET = 20


def export_module(
    module: torch.nn.Module,
    example_inputs: Mapping[str, torch.Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    *,
    axis_limits: Mapping[str, int] | None = None,
    opset: int | None = None,
    output_names: Sequence[str] | None = None,
    data: Path | None = None,
) -> onnx.ModelProto:
    """Export ``module`` in eval mode, ternary layers included, through torch.onnx (dynamo).

    example_inputs: by name, in forward's order. dynamic_axes: {"ids": {0: "batch"}}; the rest is
    fixed to the example's sizes. output_names: None calls them "output", or "output_0" and so on,
    so that the dense and the ternary export of one module agree. axis_limits: the largest size of
    an axis, by name. data: where the tensors of a model past 1.5 GB go, without ever being in
    memory twice; the model then refers to that file (onnx_tensors.py). TernaryLinear layers become
    TernaryMatMul nodes with the function body attached. Raises StageError naming the layer where
    torch says it.
    """
    import torch

    opset = opset or DEFAULT_OPSET
    op.check_opset(opset)
    op.register_schema()
    inputs = without_size_one(example_inputs, dynamic_axes)
    try:
        with _quiet(), torch.no_grad(), four_axes():
            program = torch.onnx.export(
                module.eval(),
                args=(),
                kwargs=inputs,
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(output_names) if output_names else None,
                dynamic_shapes=_dynamic_shapes(inputs, dynamic_axes, axis_limits or {}),
                custom_translation_table=_translation_table(),
                verbose=False,
            )
    except Exception as error:
        raise StageError(
            f"torch could not export the model: {first_line(error)}",
            where=type(module).__name__,
            fix="check that the module runs on its example inputs and has no data-dependent "
            "control flow; BITNET_EXPORT_DEBUG=1 shows torch's own account",
        ) from error
    assert program is not None
    model = program.model_proto if data is None else write_tensors(program.model, data)
    simplify_attention(model)
    _name_layers(model)
    _name_sums(model, dynamic_axes)
    if not output_names:
        _name_outputs(model)
    onnx_io.attach_functions(model)
    model.ir_version = onnx_io.IR_VERSION
    model.producer_name = "bitnet-export"
    onnx_io.check_model(model, "export")
    return model


def _dynamic_shapes(
    inputs: Mapping[str, torch.Tensor],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    limits: Mapping[str, int],
) -> dict[str, dict[int, Any]] | None:
    """Axis names -> torch.export dims; equal names are one dim."""
    if not any(dynamic_axes.values()):
        return None
    names = {n for axes in dynamic_axes.values() for n in axes.values()}
    dims = {name: _dim(name, limits.get(name)) for name in names}
    return {
        name: {axis: dims[n] for axis, n in dynamic_axes.get(name, {}).items()} for name in inputs
    }


def _dim(name: str, limit: int | None) -> Any:
    """The sum of two axes has no name in torch: it is found out while the model is traced."""
    import torch

    return torch.export.Dim.AUTO if is_sum(name) else torch.export.Dim(name, max=limit)


def _name_sums(model: onnx.ModelProto, dynamic_axes: Mapping[str, Mapping[int, str]]) -> None:
    """Axes that are sums get their names, which torch makes up where it had none."""
    for value in model.graph.input:
        for axis, name in dynamic_axes.get(value.name, {}).items():
            if is_sum(name):
                value.type.tensor_type.shape.dim[axis].dim_param = name


def _translation_table() -> dict[Any, Any]:
    """How torch.onnx writes our custom op: one node, attributes and all."""
    import torch
    from onnxscript import values

    from bitnet_export.ternary import torch_op  # noqa: F401  registers the custom op

    domain = values.Opset(op.DOMAIN, op.OP_VERSION)
    ternary_matmul = values.Op(domain, op.OP_TYPE)
    standard = values.Opset("", DEFAULT_OPSET)

    def translate(
        x: Any,
        packed_weight: Any,
        scale: Any,
        bias: Any,
        K: int,
        N: int,
        group_size: int,
        activation_bits: int,
    ) -> Any:
        if bias is None:
            import numpy as np
            import onnx

            zeros = onnx.numpy_helper.from_array(np.zeros(N, np.float32))
            bias = standard.Constant(value=zeros)
        return ternary_matmul(
            x,
            packed_weight,
            scale,
            bias,
            K=K,
            N=N,
            group_size=group_size,
            activation_bits=activation_bits,
        )

    return {torch.ops.bitnet.ternary_matmul.default: translate}


def _name_layers(model: onnx.ModelProto) -> None:
    """Keep each node's module path, and drop the rest of the exporter's metadata: stack traces
    name files of the machine that exported, and outweigh the graph."""
    import onnx

    for node in model.graph.node:
        layer = _conv_path(node) or onnx_io.node_layer(node)
        del node.metadata_props[:]
        if layer:
            node.metadata_props.append(
                onnx.StringStringEntryProto(key=onnx_io.LAYER_KEY, value=layer)
            )
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del value.metadata_props[:]
    del model.metadata_props[:], graph.metadata_props[:]


def _conv_path(node: onnx.NodeProto) -> str:
    """The module path of a convolution, by its weight; "" for other nodes.

    The exporter folds a batch norm into the convolution before it and gives the node the norm's
    path. Only the name is at stake: the weight is that of the node whatever it is called.
    """
    if node.op_type != "Conv" or not node.input[1].endswith(".weight"):
        return ""
    return node.input[1].removesuffix(".weight")


def _name_outputs(model: onnx.ModelProto) -> None:
    """The exporter names outputs after the last operator, which ternarizing changes."""
    import onnx

    outputs = model.graph.output
    for i, value in enumerate(outputs):
        name = "output" if len(outputs) == 1 else f"output_{i}"
        model.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
        value.name = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx prints its progress and warns about its own internals; the pipeline reports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
