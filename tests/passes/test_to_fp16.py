"""to_fp16: float16 between layers, float32 at the ends and in the norms, and right numbers."""

import numpy as np
import onnx
import pytest

from bitnet_export import onnx_io, op
from bitnet_export.passes import QuantizeEmbeddings
from bitnet_export.passes.to_fp16 import to_fp16
from tests.passes.graphs import (
    apply,
    initializers,
    model,
    node,
    ops,
    reasons,
    run,
    ternary_case,
    ternary_layer,
    value,
    x_of,
)


def convert(made):
    after, result = to_fp16(made)
    onnx_io.check_model(after, "fp16")
    assert all(o.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for o in after.graph.output)
    return after, result


def ternary_input_types(made):
    types = onnx_io.infer_shapes(made)
    return [
        types[n.input[0]].type.tensor_type.elem_type
        for n in made.graph.node
        if n.op_type == op.OP_TYPE
    ]


def block(with_outputs=()):
    """x -> Relu -> ternary a -> Relu -> ternary b -> LayerNormalization (norm) -> Sigmoid -> y."""
    constants = {"g": np.ones(64, np.float32), "c": np.zeros(64, np.float32)}
    nodes = [
        node("Sigmoid", ["x"], ["x1"]),
        ternary_layer("a", "x1", "a.y", ternary_case(64, 32), constants),
        node("Relu", ["a.y"], ["r"]),
        ternary_layer("b", "r", "b.y", ternary_case(32, 64, seed=1), constants),
        node("LayerNormalization", ["b.y", "g", "c"], ["n"], "block.norm"),
        node("Sigmoid", ["n"], ["y"]),
    ]
    outputs = [value("y", ["batch", 64]), *(value(o, ["batch", None]) for o in with_outputs)]
    return model(nodes, [value("x", ["batch", 64])], outputs, constants)


def test_ternary_layers_take_float16_without_casts_between():
    made = block()
    after, result = convert(made)
    assert result.rewritten == 2
    assert ternary_input_types(after) == [onnx.TensorProto.FLOAT16] * 2
    # in, out, and around the LayerNormalization
    assert ops(after).count("Cast") <= 4
    scales = [v for k, v in initializers(after).items() if k.endswith(("scale", "bias"))]
    assert {v.dtype.name for v in scales} == {"float32"}
    x = x_of(5, 64)
    # 11 bits between the layers, and an int8 activation may round the other way.
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], atol=2e-2)


def test_norms_stay_float32():
    after, _ = convert(block())
    types = onnx_io.infer_shapes(after)
    (norm,) = [n for n in after.graph.node if n.op_type == "LayerNormalization"]
    assert types[norm.output[0]].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert onnx_io.node_layer(norm) == "block.norm"


@pytest.mark.parametrize("outputs", [("a.y",), ("b.y",), ("a.y", "b.y")], ids=str)
def test_ternary_outputs_that_are_model_outputs_stay_float32(outputs):
    constants = {}
    nodes = [
        node("Sigmoid", ["x"], ["x1"]),
        ternary_layer("a", "x1", "a.y", ternary_case(64, 32), constants),
        node("Relu", ["a.y"], ["r"]),
        ternary_layer("b", "r", "b.y", ternary_case(32, 64, seed=1), constants),
        node("Softmax", ["b.y"], ["s"]),
        node("Relu", ["b.y"], ["y"]),
    ]
    widths = {"a.y": 32, "b.y": 64, "s": 64, "y": 64}
    names = [*outputs, "s", "y"]
    made = model(
        nodes,
        [value("x", ["batch", 64])],
        [value(o, ["batch", widths[o]]) for o in names],
        constants,
    )
    after, result = convert(made)
    assert result.rewritten == 2
    x = x_of(5, 64)
    before, now = run(made, x=x), run(after, x=x)
    for name in names:
        assert now[name].dtype == np.float32
        np.testing.assert_allclose(now[name], before[name], atol=2e-2)


def test_a_layer_fed_by_a_norm_keeps_float32():
    constants = {"g": np.ones(64, np.float32), "c": np.zeros(64, np.float32)}
    nodes = [
        node("LayerNormalization", ["x", "g", "c"], ["n"], "norm"),
        ternary_layer("a", "n", "a.y", ternary_case(64, 32), constants),
        node("Relu", ["a.y"], ["y"]),
    ]
    made = model(nodes, [value("x", ["batch", 64])], [value("y", ["batch", 32])], constants)
    after, result = convert(made)
    assert result.rewritten in (0, 1)
    if not result.rewritten:
        assert reasons(result) == {"a": "its input is float32"}
    x = x_of(5, 64)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], atol=2e-2)


def test_nodes_without_names():
    made = block()
    for n in made.graph.node:
        n.name = ""
    after, result = convert(made)
    assert result.rewritten == 2
    types = onnx_io.infer_shapes(after)
    (norm,) = [n for n in after.graph.node if n.op_type == "LayerNormalization"]
    assert types[norm.output[0]].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_embeddings_are_quantized_after_it():
    made = model(
        [node("Gather", ["table", "ids"], ["h"]), node("Relu", ["h"], ["y"])],
        [value("ids", ["n"], "int64")],
        [value("y", ["n", 128])],
        {"table": x_of(300, 128)},
    )
    half, _ = convert(made)
    after, (result,) = apply(half, QuantizeEmbeddings(8, contrib=False))
    assert result.rewritten == 1
    ids = np.array([1, 2])
    np.testing.assert_allclose(run(after, ids=ids)["y"], run(made, ids=ids)["y"], atol=3e-2)


def test_large_weights_are_rounded_as_the_converter_rounds_them():
    from onnxruntime.transformers.float16 import convert_np_to_float16

    from bitnet_export.passes.to_fp16 import to_half

    odd = [0.0, -0.0, 1e-9, -1e-9, 6e-8, 1e5, -1e5, 65504.0, np.inf, -np.inf, np.nan, 0.1]
    array = np.concatenate([np.float32(odd), np.random.default_rng(0).standard_normal(5000)])
    array = array.astype(np.float32).reshape(-1, 4)
    want = convert_np_to_float16(array)
    got = to_half(array)
    assert got.dtype == np.float16
    assert got.shape == array.shape
    np.testing.assert_array_equal(got, want)
