"""ONNX files, ours or foreign: checked, with example inputs read off the graph.

The graph itself is not changed or held here; the passes read it again from the path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bitnet_export import onnx_io, op
from bitnet_export.errors import InputError
from bitnet_export.load.inputs import DTYPES, InputSpec, make_inputs
from bitnet_export.load.model import LoadedModel
from bitnet_export.load.onnx_repair import nodes_of, repair, set_input_shapes

# Domains whose operators need no body in the file: ONNX Runtime's own and this package's.
KNOWN_DOMAINS = frozenset(
    {"com.microsoft", "com.microsoft.nchwc", "com.ms.internal.nhwc", op.DOMAIN, op.TRT_DOMAIN}
)
_STANDARD = {"": "", "ai.onnx": "", "ai.onnx.ml": "ai.onnx.ml"}


def load_onnx(path: Path) -> LoadedModel:
    """A checked ONNX file with inputs from its value infos; symbolic dimensions are dynamic.

    Raises InputError: damaged, an unknown operator, NaN weights, inputs that are no tensors.
    """
    model = _read(path)
    repaired = repair(model)
    _check_operators(model, str(path))
    _check_outputs(model, str(path))
    _check(model, path, repaired)
    _check_initializers(model, path)
    notes: list[str] = []
    specs = [_spec(value, model, str(path)) for value in _inputs(model)]
    if not specs:
        raise InputError("the graph has no inputs", where=str(path))
    return LoadedModel(
        name=path.stem,
        kind="onnx",
        source=path,
        onnx_path=path,
        example_inputs=make_inputs(specs, note=notes.append),
        dynamic_axes={s.name: s.dynamic_axes for s in specs if s.dynamic_axes},
        output_names=[o.name for o in model.graph.output],
        notes=notes,
    )


def read_onnx(
    path: Path, shapes: Mapping[str, Sequence[int | str]] | None = None
) -> onnx.ModelProto:
    """The whole model of a file that load_onnx accepts, mended likewise, its weights included.

    shapes: sizes and axis names of the inputs, None: the file's own. Raises InputError where it
    cannot be read.
    """
    model = onnx_io.read_model(path)
    repair(model)
    set_input_shapes(model, shapes or {})
    return model


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load_model(str(path), load_external_data=False)
    except Exception as e:  # protobuf's DecodeError lives in a private module
        raise InputError(
            f"the ONNX file is truncated or damaged ({e})",
            where=str(path),
            fix="copy or write it again",
        ) from e


def _check_operators(model: onnx.ModelProto, where: str) -> None:
    """Every operator is standard at the model's opset, one of a known domain, or a function."""
    versions = {i.domain: i.version for i in model.opset_import}
    functions = {(f.domain, f.name) for f in model.functions}
    for node in nodes_of(model.graph):
        if node.domain in KNOWN_DOMAINS or (node.domain, node.op_type) in functions:
            continue
        place = f"{where}: node {node.name or node.output[0]}"
        domain = _STANDARD.get(node.domain)
        if domain is None:
            raise InputError(
                f"operator {node.op_type} of domain {node.domain} is not known",
                where=place,
                fix="put its function body into the model, or export without custom operators",
            )
        version = versions.get(node.domain, versions.get(domain, 1))
        if not onnx.defs.has(node.op_type, version, domain):
            raise InputError(
                f"operator {node.op_type} does not exist in opset {version}",
                where=place,
                fix=f"the file needs a newer onnx than {onnx.__version__}, or is damaged",
            )


def _check(model: onnx.ModelProto, path: Path, repaired: bool) -> None:
    """onnx's checker, on the file itself or, where it was mended, on the model without its large
    tensors (_check_initializers reads those)."""
    op.register_schema()
    try:
        # by path: models past 2 GB have external data
        onnx.checker.check_model(onnx_io.skeleton(model) if repaired else str(path))
    except onnx.checker.ValidationError as e:
        lines = str(e).splitlines()
        raise InputError(
            f"it is not a valid ONNX model: {lines[0] if lines else e}",
            where=str(path),
            fix=_how_to_mend(str(e)),
        ) from e


def _how_to_mend(reason: str) -> str:
    """What helps against a complaint of onnx's checker."""
    if "Field 'shape'" in reason or "Field 'type'" in reason:
        return "give every input and output a type and a shape (unknown sizes may be names)"
    if "of TensorProto" in reason:  # external data: not there, outside the directory, a link
        return "copy the data file to the place beside the model that the model names"
    return "export the model again, or mend it"


def _check_initializers(model: onnx.ModelProto, path: Path) -> None:
    """No NaN in weights, no empty matrix where a product reads one, external data all there.

    Other tensors may be empty (Resize's roi, an empty cache) or hold NaN (what missing values are
    replaced by) for good reasons.
    """
    weights = {name for node in nodes_of(model.graph) for name in _weights_of(node)}
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 2 and 0 in tensor.dims and tensor.name in weights:
            raise InputError(
                f"{tensor.name} has shape {list(tensor.dims)}: a layer with K = 0 or N = 0",
                where=str(path),
            )
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not outside and tensor.name not in weights:
            continue
        try:
            values = onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as e:
            raise InputError(
                f"the data of {tensor.name} cannot be read ({e})",
                where=str(path),
                fix="external data files must lie next to the model, whole",
            ) from e
        if tensor.name in weights and values.dtype.kind == "f" and np.isnan(values).any():
            raise InputError(
                f"{tensor.name} holds NaN values",
                where=str(path),
                fix="the training diverged or the file is damaged; use an earlier checkpoint",
            )


def _weights_of(node: onnx.NodeProto) -> list[str]:
    """The inputs of a node that hold what was trained: not shapes, indices or replacements."""
    if node.op_type in ("Gather", "MatMul"):
        return list(node.input[:2])
    products = ("Gemm", "Conv", "ConvTranspose", "Add", "LayerNormalization", "LSTM", "GRU")
    return list(node.input) if node.op_type in (*products, "BatchNormalization") else []


def _check_outputs(model: onnx.ModelProto, where: str) -> None:
    """Raise InputError for an output that is no tensor: nothing here could compare it."""
    for value in model.graph.output:
        kind = value.type.WhichOneof("value") or "tensor_type"
        if kind != "tensor_type":
            zipmap = any(n.op_type == "ZipMap" and value.name in n.output for n in model.graph.node)
            raise InputError(
                f"output {value.name} is of {kind.replace('_', ' ')}, not a tensor",
                where=where,
                fix="convert it again with options={'zipmap': False}"
                if zipmap
                else "take it off the model's outputs, or put out the tensors in it",
            )


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The graph's inputs without those that only give an initializer a default."""
    constants = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in constants]


def _spec(value: onnx.ValueInfoProto, model: onnx.ModelProto, where: str) -> InputSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type" or not value.type.tensor_type.HasField("shape"):
        raise InputError(
            f"input {value.name} is no tensor of known rank ({kind})",
            where=where,
            fix="export the model with tensor inputs and their shapes",
        )
    tensor = value.type.tensor_type
    dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
    if dtype not in DTYPES:
        raise InputError(
            f"input {value.name} has element type {'text' if dtype == 'object' else dtype}",
            where=where,
            fix=f"cut that part off: inputs may be {', '.join(DTYPES)}",
        )
    dims = tuple(_dim(d, i, value.name) for i, d in enumerate(tensor.shape.dim))
    return InputSpec(value.name, dims, dtype, high=_vocabulary(value.name, model))


def _dim(dim: Any, position: int, name: str) -> int | str:
    if dim.HasField("dim_value") and dim.dim_value > 0:
        return int(dim.dim_value)
    return str(dim.dim_param) or ("batch" if position == 0 else f"{name}_dim{position}")


def _vocabulary(name: str, model: onnx.ModelProto) -> int | None:
    """Rows of the table that the input, or a cast of it, indexes by Gather."""
    rows = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2}
    aliases = {name}
    for node in model.graph.node:
        if node.op_type in ("Cast", "Identity") and node.input[0] in aliases:
            aliases.update(node.output)
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.input[1] in aliases:
            return rows.get(node.input[0])
    return None
