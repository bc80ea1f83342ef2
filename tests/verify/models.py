"""Small ONNX models the verify tests share: two linear layers in float, ternary and lowered form,
with or without an embedding in front. Made by hand, so that nothing of the exporter is needed.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import onnx_io, op, packing

K, N, VOCABULARY = 256, 128, 40
LAYERS = ("first", "second")


def weights(seed=0):
    """Per layer: trits [N, K], scale [N], bias [N]; the second layer is [N, N]."""
    rng = np.random.default_rng(seed)
    shapes = {"first": (N, K), "second": (N, N)}
    return {
        name: (
            rng.integers(-1, 2, (n, k)).astype(np.int8),
            rng.uniform(0.02, 0.06, n).astype(np.float32),
            rng.standard_normal(n).astype(np.float32),
        )
        for name, (n, k) in shapes.items()
    }


def layer_node(op_type, inputs, outputs, layer, **attributes):
    node = helper.make_node(op_type, inputs, outputs, **attributes)
    node.metadata_props.append(onnx.StringStringEntryProto(key=onnx_io.LAYER_KEY, value=layer))
    return node


def float_layer(name, x, y, w, scale, bias):
    dense = (w * scale[:, None]).T.astype(np.float32)
    nodes = [
        layer_node("MatMul", [x, f"{name}.w"], [f"{y}.matmul"], name),
        layer_node("Add", [f"{y}.matmul", f"{name}.b"], [y], name),
    ]
    return nodes, {f"{name}.w": dense, f"{name}.b": bias}


def ternary_layer(name, x, y, w, scale, bias):
    attributes = op.TernaryAttributes(K=w.shape[1], N=w.shape[0]).as_dict()
    names = [f"{name}.packed", f"{name}.scale", f"{name}.b"]
    node = layer_node(op.OP_TYPE, [x, *names], [y], name, domain=op.DOMAIN, **attributes)
    return [node], dict(zip(names, (packing.pack(w), scale, bias), strict=True))


def nbits_layer(name, x, y, w, scale, bias):
    n, k = w.shape
    blocks = k // 128
    packed = packing.repad(packing.pack(w), k, 128).reshape(n, blocks, 32)
    names = [f"{name}.packed", f"{name}.scale"]
    inputs = [x, *names, "", "", f"{name}.b"]
    attributes = dict(K=k, N=n, bits=2, block_size=128, accuracy_level=4)
    node = layer_node("MatMulNBits", inputs, [y], name, domain="com.microsoft", **attributes)
    scales = np.repeat(scale[:, None], blocks, 1)
    return [node], dict(zip([*names, f"{name}.b"], (packed, scales, bias), strict=True))


def unpacked_layer(name, x, y, w, scale, bias):
    """The int8 form with packed bytes in the file, unpacked by constant nodes."""
    n, k = w.shape
    constants = {
        f"{name}.packed": packing.pack(w),
        f"{name}.shifts": np.array([0, 2, 4, 6], np.uint8),
        f"{name}.mask": np.array([3], np.uint8),
        f"{name}.shape": np.array([n, k], np.int64),
        f"{name}.axis": np.array([2], np.int64),
        f"{name}.zero": np.uint8(2),
        f"{name}.scale": scale,
        f"{name}.b": bias,
    }
    p = f"{y}."
    nodes = [
        layer_node("Unsqueeze", [f"{name}.packed", f"{name}.axis"], [p + "u"], name),
        layer_node("BitShift", [p + "u", f"{name}.shifts"], [p + "s"], name, direction="RIGHT"),
        layer_node("BitwiseAnd", [p + "s", f"{name}.mask"], [p + "c"], name),
        layer_node("Reshape", [p + "c", f"{name}.shape"], [p + "r"], name),
        layer_node("Transpose", [p + "r"], [p + "t"], name, perm=[1, 0]),
        layer_node("DynamicQuantizeLinear", [x], [p + "xq", p + "a", p + "z"], name),
        layer_node("MatMulInteger", [p + "xq", p + "t", p + "z", f"{name}.zero"], [p + "i"], name),
        layer_node("Cast", [p + "i"], [p + "f"], name, to=TensorProto.FLOAT),
        layer_node("Mul", [p + "f", p + "a"], [p + "m"], name),
        layer_node("Mul", [p + "m", f"{name}.scale"], [p + "n"], name),
        layer_node("Add", [p + "n", f"{name}.b"], [y], name),
    ]
    return nodes, constants


FORMS = {
    "float": float_layer,
    "ternary": ternary_layer,
    "nbits": nbits_layer,
    "unpacked": unpacked_layer,
}


def make_model(form, *, embedding=False, seed=0, edit=None):
    """x [batch, K] (or ids [batch] with an embedding) -> y [batch, N]: first, Relu, second.

    edit(layer, trits, scale, bias) may change a layer's weights.
    """
    nodes, constants = [], {}
    if embedding:
        table = np.random.default_rng(7).standard_normal((VOCABULARY, K)).astype(np.float32)
        constants["table"] = table
        nodes.append(helper.make_node("Gather", ["table", "x"], ["x.embedded"]))
    tensors = {"first": ("x.embedded" if embedding else "x", "h"), "second": ("h.relu", "y")}
    for name, parts in weights(seed).items():
        parts = edit(name, *parts) if edit else parts
        added, values = FORMS[form](name, *tensors[name], *parts)
        nodes += added
        constants |= values
        if name == "first":
            nodes.append(helper.make_node("Relu", ["h"], ["h.relu"]))
    kind = TensorProto.INT64 if embedding else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        form,
        [helper.make_tensor_value_info("x", kind, ["batch"] if embedding else ["batch", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    if form == "ternary":
        op.register_schema()
        opsets.append(helper.make_opsetid(op.DOMAIN, op.OP_VERSION))
    functions = [op.function_body(20)] if form == "ternary" else []
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def write(path, form, **options):
    onnx.save(make_model(form, **options), path)
    return path


def example(batch=2, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((batch, K)).astype(np.float32)}


AXES = {"x": {0: "batch"}}
