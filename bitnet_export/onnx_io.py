"""ONNX files in and out: external data, atomic writes, and graphs for the passes.

The module path of every layer travels as ``metadata_props["bitnet.layer"]`` on its nodes.
onnx-graphsurgeon drops node metadata and functions, so both are carried around it here: layer
paths as a temporary attribute, function bodies made anew on the way out.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from bitnet_export import op
from bitnet_export.errors import InputError, StageError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

LAYER_KEY = "bitnet.layer"
IR_VERSION = 10
# Above this, tensors go to a file beside the model: protobuf ends at 2 GB.
EXTERNAL_DATA_BYTES = 1_500_000_000
EXTERNAL_SUFFIX = ".data"
_LAYER_ATTRIBUTE = "bitnet_layer"


def read_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data. Raises InputError where it is none."""
    import onnx

    op.register_schema()
    try:
        model = onnx.load(os.fspath(path))
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
    return sum(len(t.raw_data) or t.ByteSize() for t in model.graph.initializer)


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write ``model`` whole or not at all; beyond 1.5 GB its tensors go to ``path``.data."""
    import onnx

    path.parent.mkdir(parents=True, exist_ok=True)
    external = initializer_bytes(model) > EXTERNAL_DATA_BYTES
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    data = path.with_name(path.name + EXTERNAL_SUFFIX)
    try:
        if external:
            data.unlink(missing_ok=True)  # onnx appends to an existing data file
            onnx.save_model(
                model,
                os.fspath(temporary),
                save_as_external_data=True,
                location=data.name,
                size_threshold=1024,
            )
        else:
            onnx.save_model(model, os.fspath(temporary))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if external:
            data.unlink(missing_ok=True)
        raise
    return path


def check_model(model: onnx.ModelProto, where: str) -> None:
    """Run onnx's checker; a failure is a StageError naming ``where``."""
    import onnx

    op.register_schema()
    if initializer_bytes(model) > EXTERNAL_DATA_BYTES:
        return  # the checker serializes the model, which protobuf refuses above 2 GB
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise StageError(
            f"wrote a model that onnx's checker refuses: {error}", where=where
        ) from error


def to_graph(model: onnx.ModelProto) -> gs.Graph:
    """onnx -> onnx-graphsurgeon; each node's layer path in ``layer_of(node)``."""
    import onnx
    import onnx_graphsurgeon as gs

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    ours = [f for f in bare.functions if f.name == op.OP_TYPE]
    for function in ours:
        bare.functions.remove(function)
    for node in bare.graph.node:
        layer = node_layer(node)
        if layer:
            node.attribute.append(onnx.helper.make_attribute(_LAYER_ATTRIBUTE, layer))
    graph = gs.import_onnx(bare)
    graph.ir_version = IR_VERSION
    return graph


def from_graph(graph: gs.Graph, like: onnx.ModelProto) -> onnx.ModelProto:
    """onnx-graphsurgeon -> onnx, with layer paths, function bodies and ``like``'s metadata."""
    import onnx
    import onnx_graphsurgeon as gs

    _import_only_used_domains(graph)
    model = gs.export_onnx(graph)
    model.producer_name = "bitnet-export"
    model.metadata_props.extend(like.metadata_props)
    for node in model.graph.node:
        for attribute in list(node.attribute):
            if attribute.name == _LAYER_ATTRIBUTE:
                layer = onnx.helper.get_attribute_value(attribute).decode()
                node.metadata_props.append(onnx.StringStringEntryProto(key=LAYER_KEY, value=layer))
                node.attribute.remove(attribute)
    attach_functions(model)
    return model


def attach_functions(model: onnx.ModelProto) -> None:
    """Give every TernaryMatMul domain in use its function body, and no other."""
    for function in [f for f in model.functions if f.name == op.OP_TYPE]:
        model.functions.remove(function)
    used = {n.domain for n in model.graph.node if n.op_type == op.OP_TYPE}
    for domain in sorted(used):
        model.functions.append(op.function_body(model_opset(model), domain))


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
    """The module path on an ONNX node, or ""."""
    return next((p.value for p in node.metadata_props if p.key == LAYER_KEY), "")


def layer_of(node: gs.Node) -> str:
    """The module path a node came from, or its own name where it came from none."""
    return str(node.attrs.get(_LAYER_ATTRIBUTE) or node.name or node.outputs[0].name)


def set_layer(node: gs.Node, layer: str) -> gs.Node:
    """Record the module path a node stands for."""
    node.attrs[_LAYER_ATTRIBUTE] = layer
    return node
