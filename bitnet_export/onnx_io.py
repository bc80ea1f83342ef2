"""ONNX files in and out: external data, atomic writes, and graphs for the passes. How the bytes of
external tensors are read and written is in onnx_tensors.py.

The module path of every layer travels as ``metadata_props["bitnet.layer"]`` on its nodes.
onnx-graphsurgeon drops node metadata and functions, so both are carried around it here: layer
paths as a Python attribute of its nodes, function bodies made anew on the way out.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from bitnet_export import onnx_tensors, op
from bitnet_export.errors import InputError, StageError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

LAYER_KEY = "bitnet.layer"
# Where torch's dynamo exporter writes the module path of a node.
SCOPES_KEY = "pkg.torch.onnx.name_scopes"
IR_VERSION = 10
# Above this, tensors go to a file beside the model: protobuf ends at 2 GB.
EXTERNAL_DATA_BYTES = 1_500_000_000
EXTERNAL_SUFFIX = ".data"
# Initializers up to this size can matter to shape inference: shapes, axes, slice bounds.
_SMALL_TENSOR_BYTES = 4096
_LAYER_ATTRIBUTE = "_bitnet_layer"
# torch's older exporter names nodes "/encoder/layer.0/query/MatMul".
_SCRIPT_NAME = re.compile(r"^/(?P<path>.+)/[A-Za-z]+(_\d+)?$")


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file; tensors outside of it stay where they are (onnx_tensors.values maps them).

    Raises InputError where it is none, or its external data is not whole.
    """
    import onnx

    op.register_schema()
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        onnx_tensors.anchor(model, Path(path))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    except Exception as error:
        raise InputError(
            "is no ONNX model, or a truncated one",
            where=str(path),
            fix="export or copy the file again",
        ) from error
    if not model.graph.node and not model.graph.initializer:
        raise InputError("holds no graph: empty or truncated", where=str(path))
    return model


def model_opset(model: onnx.ModelProto) -> int:
    """The default-domain opset a model imports."""
    return next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 1)


def initializer_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers, the bulk of a file."""
    return sum(onnx_tensors.tensor_bytes(t) for t in model.graph.initializer)


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write ``model`` whole or not at all; beyond 1.5 GB its tensors go to ``path``.data.

    ``model`` keeps its tensors; those that are in ``path``.data already stay there. Raises
    StageError where the files cannot be written; what stood at ``path`` before is then still there.
    """
    external = initializer_bytes(model) > EXTERNAL_DATA_BYTES
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
        _save(model, temporary / path.name, data_file(path), external)
        if (temporary / data_file(path).name).exists():
            os.replace(temporary / data_file(path).name, data_file(path))
        os.replace(temporary / path.name, path)
        if not external:
            data_file(path).unlink(missing_ok=True)
    except OSError as error:
        raise StageError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            fix="free some space or choose another directory",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def data_file(path: Path) -> Path:
    """Where the tensors of a large model at ``path`` lie."""
    return path.with_name(path.name + EXTERNAL_SUFFIX)


def _save(model: onnx.ModelProto, path: Path, data: Path, external: bool) -> None:
    """Write a model to ``path`` and, unless they are in ``data`` already, its tensors beside it."""
    import onnx

    if not external:
        onnx.save_model(onnx_tensors.with_data_inside(model), os.fspath(path))
        return
    written = onnx_tensors.named_beside(model, data)
    if written is None:
        written = onnx_tensors.with_data_in(model, path.with_name(data.name))
    onnx.save_model(written, os.fspath(path))


def check_model(model: onnx.ModelProto, where: str) -> None:
    """Run onnx's checker; a failure is a StageError naming ``where``.

    The checker serializes the model, which protobuf refuses above 2 GB: a model beyond the limit
    of one file is checked without its large tensors.
    """
    import onnx

    op.register_schema()
    large = initializer_bytes(model) > EXTERNAL_DATA_BYTES
    try:
        onnx.checker.check_model(skeleton(model) if large else model, full_check=True)
    except Exception as error:
        raise StageError(
            f"a model was made that onnx's checker refuses: {first_line(error)}", where=where
        ) from error


def skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with its large initializers turned into inputs of their type: all that checking
    and shape inference need, at no cost in memory.
    """
    import onnx

    bare = onnx.ModelProto(
        ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions
    )
    graph = model.graph
    bare.graph.name = graph.name or "graph"
    for field in ("node", "input", "output", "value_info", "sparse_initializer"):
        getattr(bare.graph, field).extend(getattr(graph, field))
    inputs = {value.name for value in graph.input}
    for tensor in graph.initializer:
        outside = onnx_tensors.is_outside(tensor)
        if onnx_tensors.tensor_bytes(tensor) <= _SMALL_TENSOR_BYTES and not outside:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            bare.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
    return bare


def infer_shapes(model: onnx.ModelProto) -> dict[str, onnx.ValueInfoProto]:
    """What onnx's shape inference finds out, by tensor name; {} where it gives up."""
    import onnx

    op.register_schema()
    try:
        inferred = onnx.shape_inference.infer_shapes(skeleton(model), data_prop=True).graph
    except Exception:  # an odd foreign model: the passes go by what it says itself
        return {}
    return {v.name: v for v in (*inferred.value_info, *inferred.input, *inferred.output)}


@contextmanager
def quiet_graphsurgeon() -> Iterator[None]:
    """onnx-graphsurgeon prints its warnings to stdout, where the command line's output belongs."""
    from onnx_graphsurgeon.logger import G_LOGGER

    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = before


def to_graph(model: onnx.ModelProto) -> gs.Graph:
    """onnx -> onnx-graphsurgeon, types inferred where missing; ``layer_of(node)`` gives a node's
    layer path. An initializer that is also listed as an input becomes a plain constant. The bytes
    of constants stay ``model``'s until they are looked at.
    """
    import onnx_graphsurgeon as gs

    bare = onnx_tensors.bare_copy(model)
    for tensor in model.graph.initializer:
        bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    for function in [f for f in bare.functions if _is_body(f)]:
        bare.functions.remove(function)
    known = {v.name for v in bare.graph.value_info} | {v.name for v in bare.graph.output}
    for name, value in infer_shapes(model).items():
        if name not in known and value.type.HasField("tensor_type"):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param.startswith("unk__"):  # the inference's own invention
                    dim.ClearField("dim_param")
            bare.graph.value_info.append(value)
    layers = [node_layer(node) for node in bare.graph.node]
    with quiet_graphsurgeon():
        graph = gs.import_onnx(bare)
    tensors = graph.tensors()
    for tensor in model.graph.initializer:
        if isinstance(tensors.get(tensor.name), gs.Constant):
            tensors[tensor.name].values = _lazy_values(tensor)
    for node, layer in zip(graph.nodes, layers, strict=True):
        set_layer(node, layer)
    graph.ir_version = IR_VERSION
    return graph


def _lazy_values(tensor: onnx.TensorProto) -> Any:
    """What a gs.Constant holds until somebody looks at its values."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    class Values(LazyValues):
        def load(self) -> Any:
            return onnx_tensors.values(self.tensor)

    return Values(tensor)


def from_graph(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """onnx-graphsurgeon -> onnx, with layer paths, function bodies and ``like``'s metadata."""
    import onnx
    import onnx_graphsurgeon as gs

    _import_only_used_domains(graph)
    _keep_text(graph)
    with quiet_graphsurgeon():
        model = gs.export_onnx(graph)
    model.producer_name = "bitnet-export"
    model.metadata_props.extend(like.metadata_props)
    for source, node in zip(graph.nodes, model.graph.node, strict=True):
        layer = getattr(source, _LAYER_ATTRIBUTE, "")
        if layer:
            node.metadata_props.append(onnx.StringStringEntryProto(key=LAYER_KEY, value=layer))
    attach_functions(model)
    return model


def _keep_text(graph: gs.Graph) -> None:
    """onnx-graphsurgeon writes constants that were read as raw bytes, which text has no form of:
    those of text become what it reads lazily and writes as it is."""
    import numpy as np
    import onnx
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.ir.tensor import LazyValues

    for one in [graph, *graph.subgraphs(recursive=True)]:
        for name, tensor in one.tensors().items():
            if not isinstance(tensor, gs.Constant) or isinstance(tensor.dtype, int):
                continue  # an int is the ONNX number of a type that numpy has not
            if np.dtype(tensor.dtype).kind in "OUS":
                text = np.asarray(tensor.values, object)
                tensor.values = LazyValues(onnx.numpy_helper.from_array(text, name))


def attach_functions(model: onnx.ModelProto) -> None:
    """Give every TernaryMatMul domain in use its function body, and no other."""
    for function in [f for f in model.functions if _is_body(f)]:
        model.functions.remove(function)
    used = {n.domain for n in model.graph.node if n.op_type == op.OP_TYPE}
    used &= {op.DOMAIN, op.TRT_DOMAIN}
    for domain in sorted(used):
        model.functions.append(op.function_body(model_opset(model), domain))


def _is_body(function: onnx.FunctionProto) -> bool:
    """Whether it is TernaryMatMul's, not one of that name in somebody else's domain."""
    return function.name == op.OP_TYPE and function.domain in (op.DOMAIN, op.TRT_DOMAIN)


def _import_only_used_domains(graph: gs.Graph) -> None:
    used = {node.domain or "" for node in graph.nodes} | {""}
    for subgraph in graph.subgraphs(recursive=True):
        used |= {node.domain or "" for node in subgraph.nodes}
    for function in graph.functions:
        used |= {function.domain or ""} | {node.domain or "" for node in function.nodes}
    graph.import_domains = [
        i for i in graph.import_domains or [] if (i.domain or "") in used
    ] or None


def node_layer(node: onnx.NodeProto) -> str:
    """The module path on an ONNX node, ours or torch's, or ""."""
    metadata = {p.key: p.value for p in node.metadata_props}
    if LAYER_KEY in metadata:
        return metadata[LAYER_KEY]
    if SCOPES_KEY in metadata:
        return scope_path(metadata[SCOPES_KEY])
    script = _SCRIPT_NAME.match(node.name)
    return script["path"].replace("/", ".") if script else ""


def scope_path(scopes: str) -> str:
    """torch's ``name_scopes``, '["", "encoder", "encoder.query", "linear"]' -> "encoder.query"."""
    try:
        listed = ast.literal_eval(scopes)
        paths = [s for s in listed[:-1] if s and not s.startswith("_empty")]
    except (ValueError, SyntaxError, TypeError, AttributeError):
        return ""
    return str(paths[-1]) if paths else ""


def layer_of(node: gs.Node) -> str:
    """The module path a node came from, or its own name where it came from none."""
    return str(getattr(node, _LAYER_ATTRIBUTE, "") or node.name or node.outputs[0].name)


def set_layer(node: gs.Node, layer: str) -> gs.Node:
    """Record the module path a node stands for."""
    setattr(node, _LAYER_ATTRIBUTE, layer)
    return node
