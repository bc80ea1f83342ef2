"""Small graphs made by hand with onnx.helper, and how the pass tests run them."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import onnx_io, op, packing
from bitnet_export.passes import run_passes

ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}


def value(name, shape, dtype="float32"):
    return helper.make_tensor_value_info(name, ELEMENT[dtype], shape)


def node(op_type, inputs, outputs, layer="", **attributes):
    """A node whose name is its first output's, with a module path where given."""
    attributes.setdefault("name", f"{op_type}_{outputs[0]}")
    made = helper.make_node(op_type, inputs, outputs, **attributes)
    if layer:
        entry = onnx.StringStringEntryProto(key=onnx_io.LAYER_KEY, value=layer)
        made.metadata_props.append(entry)
    return made


def model(nodes, inputs, outputs, constants=None, opset=20):
    """inputs, outputs: value(...) rows. Checked before it is returned."""
    op.register_schema()
    domains = {n.domain for n in nodes} - {""}
    graph = helper.make_graph(
        nodes,
        "test",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(d, 1 if d else opset) for d in ("", *domains)],
        ir_version=10,
    )
    onnx_io.attach_functions(made)
    onnx.checker.check_model(made, full_check=True)
    return made


def ternary_case(k, n, *, scale="channel", group_size=0, bits=8, bias=True, seed=0):
    """(attributes, trits [N, K], scale, bias or None) of a layer; row 0 is all zeros."""
    rng = np.random.default_rng(seed)
    at = op.TernaryAttributes(K=k, N=n, group_size=group_size, activation_bits=bits)
    trits = rng.integers(-1, 2, (n, k)).astype(np.int8)
    if n > 1:
        trits[0] = 0
    shape = {"tensor": (1,), "channel": (n,), "group": (n, at.groups)}[scale]
    scales = rng.uniform(0.02, 0.2, shape).astype(np.float32)
    return at, trits, scales, rng.standard_normal(n).astype(np.float32) if bias else None


def ternary_layer(name, x, y, case, constants, dtype="float32"):
    """A TernaryMatMul node; its operands go into ``constants``."""
    at, trits, scale, bias = case
    operands = {
        f"{name}.packed_weight": packing.pack(trits),
        f"{name}.scale": scale,
        f"{name}.bias": np.zeros(at.N, np.float32) if bias is None else bias,
    }
    constants |= operands
    return node(op.OP_TYPE, [x, *operands], [y], name, domain=op.DOMAIN, **at.as_dict())


def ternary_model(case, x_shape=("batch", None), dtype="float32"):
    """x -> TernaryMatMul -> y. None in x_shape stands for K."""
    constants = {}
    layer = ternary_layer("layer", "x", "y", case, constants)
    shape = [case[0].K if d is None else d for d in x_shape]
    out = [*shape[:-1], case[0].N]
    return model([layer], [value("x", shape, dtype)], [value("y", out, dtype)], constants)


def reference(x, case):
    at, trits, scale, bias = case
    return op.reference_ternary_matmul(x, packing.pack(trits), scale, bias, attributes=at)


def run(made, *, optimize=True, **feeds):
    """All outputs by name, from ONNX Runtime on one thread."""
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def apply(made, *passes, skip=()):
    """(model after the passes, checked; results of the passes)."""
    after, results = run_passes(made, list(passes), skip=skip)
    onnx_io.check_model(after, "after the passes")
    return after, results


def ops(made):
    return [n.op_type for n in made.graph.node]


def layers(made):
    return [onnx_io.node_layer(n) for n in made.graph.node]


def initializers(made):
    return {t.name: numpy_helper.to_array(t) for t in made.graph.initializer}


def reasons(result):
    return {s.where: s.reason for s in result.skipped}


def x_of(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)
