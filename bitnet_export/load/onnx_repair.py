"""Foreign ONNX files brought into the form that checker, passes and runtimes agree on.

What is mended here runs in ONNX Runtime, or means one thing only, but is refused or misread by
some part of the way: function calls, repeated node names, wrong or missing shapes. What a graph
computes is never changed. What cannot be mended is left for onnx_file.py's checks to name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import onnx

from bitnet_export import onnx_io, op
from bitnet_export.errors import InputError, first_line

# Whose functions are bodies of operators that runtimes have: to be called, not inlined.
_OPERATORS = {op.DOMAIN, op.TRT_DOMAIN, "com.microsoft"}
_OLDEST_IR_WITHOUT_INPUTS = 4


def repair(model: onnx.ModelProto) -> bool:
    """Mend ``model`` in place; whether anything was wrong.

    Works on a model whose external data is not loaded, too.
    """
    changes = [
        _spell_default_domain(model),
        _make_dense(model),
        _constants_need_no_inputs(model),
        _inline_functions(model),
        *[_number_repeated_names(graph) for graph in _graphs(model.graph)],
        _correct_types(model),
        _open_dimensions(model),
    ]
    return any(changes)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """All nodes, those in subgraphs of If, Loop and Scan too."""
    for one in _graphs(graph):
        yield from one.node


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _spell_default_domain(model: onnx.ModelProto) -> bool:
    """The default domain has two names, "" and "ai.onnx"; onnx wants one throughout a file."""
    nodes = [n for n in nodes_of(model.graph) if n.domain == "ai.onnx"]
    nodes += [n for f in model.functions for n in f.node if n.domain == "ai.onnx"]
    for node in nodes:
        node.ClearField("domain")
    imports = [i for i in model.opset_import if i.domain == "ai.onnx"]
    has_default = any(i.domain == "" for i in model.opset_import)
    for one in imports:
        if has_default:
            model.opset_import.remove(one)
        else:
            one.domain = ""
    return bool(nodes or imports)


def _make_dense(model: onnx.ModelProto) -> bool:
    """Sparse initializers, which onnx-graphsurgeon takes for float64, as ordinary ones."""
    import numpy as np

    sparse = model.graph.sparse_initializer
    found = bool(sparse)
    for tensor in sparse:
        values = onnx.numpy_helper.to_array(tensor.values)
        where = onnx.numpy_helper.to_array(tensor.indices)
        dense = np.zeros(tuple(tensor.dims), values.dtype)
        if where.ndim == 1:  # positions in the flattened tensor, else a row of coordinates each
            dense.reshape(-1)[where] = values
        else:
            dense[tuple(where.T)] = values
        model.graph.initializer.append(onnx.numpy_helper.from_array(dense, tensor.values.name))
    model.graph.ClearField("sparse_initializer")
    return found


def _constants_need_no_inputs(model: onnx.ModelProto) -> bool:
    """Before IR version 4 every initializer had to be an input as well; runtimes do not insist."""
    inputs = {value.name for value in model.graph.input}
    if model.ir_version >= _OLDEST_IR_WITHOUT_INPUTS or all(
        t.name in inputs for t in model.graph.initializer
    ):
        return False
    model.ir_version = _OLDEST_IR_WITHOUT_INPUTS
    return True


def _inline_functions(model: onnx.ModelProto) -> bool:
    """Calls of the file's own functions become the nodes of their bodies: layers are in them.

    Inlining serializes the model, which protobuf refuses past 2 GB: large tensors are left out.
    Raises InputError for a function that does not go with the model's opset.
    """
    from onnx import inliner

    own = [f for f in model.functions if f.domain not in _OPERATORS]
    if not own:
        return False
    bare = onnx_io.skeleton(model)
    bare.ClearField("functions")
    bare.functions.extend(own)
    fits = [_use_opset(f, onnx_io.model_opset(model)) for f in bare.functions]
    if not all(fits):  # which takes the type of everything that a function reads
        for tensor in bare.graph.initializer:
            bare.graph.value_info.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        known = {v.name for v in (*bare.graph.value_info, *bare.graph.input, *bare.graph.output)}
        found = onnx_io.infer_shapes(bare)
        bare.graph.value_info.extend(v for name, v in found.items() if name not in known)
    try:
        inlined = inliner.inline_local_functions(bare, convert_version=not all(fits))
    except RuntimeError as error:
        raise InputError(
            f"a function of the model cannot be inlined: {first_line(error)}",
            where=", ".join(f"{f.domain}::{f.name}" for f in own[:3]),
            fix="export the model again without functions",
        ) from error
    for field in ("node", "value_info"):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(getattr(inlined.graph, field))
    kept = [f for f in model.functions if f.domain in _OPERATORS]
    model.ClearField("functions")
    model.functions.extend(kept)
    return True


def _use_opset(function: onnx.FunctionProto, opset: int) -> bool:
    """Whether the function could be put at the model's opset: where none of its standard operators
    changed in between."""
    default = [i for i in function.opset_import if i.domain == ""]
    standard = [node.op_type for node in function.node if not node.domain]
    for one in default:
        before, after = ([_since(o, v) for o in standard] for v in (one.version, opset))
        if before != after:
            return False
        one.version = opset
    return True


def _since(operator: str, opset: int) -> int:
    """The opset that an operator's definition in ``opset`` is from, 0 where it has none."""
    try:
        return int(onnx.defs.get_schema(operator, opset, "").since_version)
    except onnx.defs.SchemaError:
        return 0


def _number_repeated_names(graph: onnx.GraphProto) -> bool:
    """ONNX Runtime refuses two nodes of one name; onnx does not mind."""
    taken = {node.name for node in graph.node}
    seen: set[str] = set()
    changed = False
    for node in graph.node:
        if node.name in seen:
            numbered = (f"{node.name}_{i}" for i in itertools.count(1))
            node.name = next(name for name in numbered if name not in taken)
            taken.add(node.name)
            changed = True
        elif node.name:
            seen.add(node.name)
    return changed


def _correct_types(model: onnx.ModelProto) -> bool:
    """Declared types that contradict the graph, or are missing from outputs, become inferred ones.

    Editors leave them behind. Only what shape inference is sure of is replaced: another element
    type, number of dimensions or size.
    """
    bare = onnx_io.skeleton(model)
    del bare.graph.value_info[:]
    for value in bare.graph.output:
        value.ClearField("type")
    found = onnx_io.infer_shapes(bare)
    changed = False
    for values in (model.graph.value_info, model.graph.output):
        for value in values:
            inferred = found.get(value.name)
            if inferred is not None and _contradicts(value.type, inferred.type):
                value.type.CopyFrom(inferred.type)
                changed = True
    return changed


def _contradicts(declared: onnx.TypeProto, inferred: onnx.TypeProto) -> bool:
    """Whether both cannot be true, or ``declared`` says less than an output has to."""
    if not inferred.HasField("tensor_type") or not inferred.tensor_type.HasField("shape"):
        return False
    if not declared.HasField("tensor_type"):
        return declared.WhichOneof("value") is None
    mine, other = declared.tensor_type, inferred.tensor_type
    if mine.elem_type != other.elem_type or not mine.HasField("shape"):
        return True
    if len(mine.shape.dim) != len(other.shape.dim):
        return True
    sizes = zip(mine.shape.dim, other.shape.dim, strict=True)
    return any(a.dim_value > 0 and b.dim_value > 0 and a.dim_value != b.dim_value for a, b in sizes)


def _open_dimensions(model: onnx.ModelProto) -> bool:
    """Dimensions of 0 and -1, which some exporters write for unknown ones, are unknown."""
    constants = {t.name for t in model.graph.initializer}
    changed = False
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if value.name not in constants and dim.HasField("dim_value") and dim.dim_value <= 0:
                dim.Clear()
                changed = True
    return changed


def set_input_shapes(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str]]) -> None:
    """Give inputs these sizes and axis names, and what was called by an old name the new one.

    They are the file's own, with names for what has none, or the user's of --input.
    """
    renamed: dict[str, int | str] = {}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, size in zip(dims, shapes.get(value.name, ()), strict=False):
            if dim.dim_param and dim.dim_param != size:
                renamed[dim.dim_param] = size
            _set_dim(dim, size)
    for value in (*model.graph.value_info, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in renamed:
                _set_dim(dim, renamed[dim.dim_param])


def _set_dim(dim: onnx.TensorShapeProto.Dimension, size: int | str) -> None:
    if isinstance(size, str):
        dim.dim_param = size
    else:
        dim.dim_value = size
