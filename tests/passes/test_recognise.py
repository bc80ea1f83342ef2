"""recognise-ternary keeps trits and scale to the bit; all else is left, with a reason."""

import numpy as np
import pytest

from bitnet_export import op, packing
from bitnet_export.errors import InputError
from bitnet_export.passes import Canonicalize, FoldConstants, RecogniseTernary
from tests.passes.graphs import (
    apply,
    initializers,
    layers,
    model,
    node,
    ops,
    reasons,
    reference,
    run,
    ternary_case,
    value,
    x_of,
)

PASSES = (FoldConstants(), Canonicalize(), RecogniseTernary())


def dense(case):
    """The case's weights [K, N] as a float matrix."""
    at, trits, scale, _ = case
    spread = np.repeat(scale, at.group_size, 1) if scale.ndim == 2 else scale[:, None]
    return np.ascontiguousarray((trits * spread).T.astype(np.float32))


def product(w, bias=None, add=None, dtype="float32"):
    """y = x w (+ bias), bias as the right-hand side of the Add."""
    k, n = w.shape
    constants = {"w": w}
    nodes = [node("MatMul", ["x", "w"], ["p" if bias is not None else "y"], "fc")]
    if bias is not None:
        constants["b"] = bias
        nodes.append(node("Add", ["p", "b"], ["y"], "fc"))
    return model(
        nodes, [value("x", ["batch", k], dtype)], [value("y", ["batch", n], dtype)], constants
    )


@pytest.mark.parametrize(
    ("scale", "group"), [("tensor", 0), ("channel", 0), ("group", 32), ("group", 128)]
)
@pytest.mark.parametrize(("k", "n"), [(128, 1), (256, 65)])
def test_weights_are_kept_exactly(scale, group, k, n):
    case = ternary_case(k, n, scale=scale, group_size=group)
    made = product(dense(case), case[3])
    after, results = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE]
    assert results[-1].rewritten == 1
    assert layers(after) == ["fc"]
    kept = initializers(after)
    trits = packing.unpack(kept["fc.packed_weight"], k)
    found = kept["fc.scale"]
    spread = np.repeat(found, k // found.shape[1], 1) if found.ndim == 2 else found[:, None]
    assert np.array_equal(trits * spread, dense(case).T)
    assert np.array_equal(kept["fc.bias"], case[3])
    x = x_of(3, k, seed=1)
    np.testing.assert_allclose(run(after, x=x)["y"], reference(x, case), rtol=1e-6, atol=1e-5)


def test_float16_weights():
    case = ternary_case(64, 5)
    w = dense(case).astype(np.float16)
    after, _ = apply(product(w, dtype="float16"), *PASSES)
    kept = initializers(after)
    trits = packing.unpack(kept["fc.packed_weight"], 64)
    assert np.array_equal((trits * kept["fc.scale"][:, None]).astype(np.float16), w.T)
    x = x_of(3, 64, seed=1, dtype=np.float16)
    y = run(after, x=x)["y"]
    assert y.dtype == np.float16
    # float16 keeps 11 bits, of sums of up to about 5; int8 activations cost 1/127 of the largest.
    np.testing.assert_allclose(y, x.astype(np.float32) @ w.astype(np.float32), atol=0.05)


@pytest.mark.parametrize(
    "bias", [x_of(5), x_of(1, 5), x_of(1), np.float32(2)], ids=lambda b: str(b.shape)
)
def test_any_form_of_bias_goes_in(bias):
    case = ternary_case(64, 5)
    made = product(dense(case), bias)
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE]
    x = x_of(3, 64, seed=1)
    without = reference(x, (*case[:3], None))
    np.testing.assert_allclose(run(after, x=x)["y"], without + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [x_of(3, 1), x_of(1, 1, 5)], ids=["by row", "adds a dimension"])
def test_an_addend_that_is_no_bias_stays_an_add(bias):
    case = ternary_case(64, 5)
    shape = np.broadcast_shapes((3, 5), bias.shape)
    made = model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        [value("x", [3, 64])],
        [value("y", shape)],
        {"w": dense(case), "b": bias},
    )
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE, "Add"]
    assert run(after, x=x_of(3, 64))["y"].shape == shape


def test_the_product_may_be_an_output_itself():
    case = ternary_case(64, 5)
    made = model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", "b"], ["y"])],
        [value("x", ["batch", 64])],
        [value("p", ["batch", 5]), value("y", ["batch", 5])],
        {"w": dense(case), "b": x_of(5)},
    )
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE, "Add"]
    got = run(after, x=x_of(2, 64))
    np.testing.assert_allclose(got["y"] - got["p"], np.tile(x_of(5), (2, 1)), atol=1e-5)


@pytest.mark.parametrize("other", ["x2", "p"], ids=["two dynamic operands", "with itself"])
def test_an_add_of_computed_tensors_stays(other):
    case = ternary_case(64, 5)
    made = model(
        [node("MatMul", ["x", "w"], ["p"]), node("Add", ["p", other], ["y"])],
        [value("x", ["batch", 64]), value("x2", ["batch", 5])],
        [value("y", ["batch", 5])],
        {"w": dense(case)},
    )
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE, "Add"]
    x, x2 = x_of(2, 64), x_of(2, 5, seed=3)
    product_ = reference(x, (*case[:3], None))
    want = product_ + (x2 if other == "x2" else product_)
    np.testing.assert_allclose(run(after, x=x, x2=x2)["y"], want, rtol=1e-5, atol=1e-5)


def test_a_product_read_by_several_nodes():
    case = ternary_case(64, 5)
    made = model(
        [
            node("MatMul", ["x", "w"], ["p"]),
            node("Add", ["p", "b"], ["y"]),
            node("Relu", ["p"], ["z"]),
        ],
        [value("x", ["batch", 64])],
        [value("y", ["batch", 5]), value("z", ["batch", 5])],
        {"w": dense(case), "b": x_of(5)},
    )
    after, _ = apply(made, *PASSES)
    assert sorted(ops(after)) == ["Add", "Relu", op.OP_TYPE]
    x = x_of(2, 64)
    without = reference(x, (*case[:3], None))
    got = run(after, x=x)
    np.testing.assert_allclose(got["z"], np.maximum(without, 0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(got["y"], without + x_of(5), rtol=1e-5, atol=1e-5)


def test_a_weight_two_products_share_is_packed_once():
    case = ternary_case(64, 64)
    made = model(
        [node("MatMul", ["x", "w"], ["h"], "a"), node("MatMul", ["h", "w"], ["y"], "b")],
        [value("x", ["batch", 64])],
        [value("y", ["batch", 64])],
        {"w": dense(case)},
    )
    after, _ = apply(made, *PASSES)
    packed = [v for v in initializers(after).values() if v.dtype == np.uint8]
    assert ops(after) == [op.OP_TYPE] * 2
    assert len(packed) == 1


def test_an_initializer_listed_as_an_input_is_a_weight():
    case = ternary_case(64, 5)
    made = product(dense(case))
    made.graph.input.append(value("w", [64, 5]))
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE]
    assert [i.name for i in after.graph.input] == ["x"]


def test_stored_as_integers_and_a_scale():
    """How a foreign exporter would write it: int8 trits behind a DequantizeLinear."""
    case = ternary_case(64, 5)
    made = model(
        [
            node("DequantizeLinear", ["q", "s"], ["w"], axis=0),
            node("Transpose", ["w"], ["wt"], perm=[1, 0]),
            node("MatMul", ["x", "wt"], ["y"], "fc"),
        ],
        [value("x", ["batch", 64])],
        [value("y", ["batch", 5])],
        {"q": case[1], "s": case[2]},
    )
    after, _ = apply(made, *PASSES)
    assert ops(after) == [op.OP_TYPE]
    kept = initializers(after)
    assert np.array_equal(packing.unpack(kept["fc.packed_weight"], 64), case[1])
    assert np.array_equal(kept["fc.scale"][1:], case[2][1:])  # row 0 is all zeros: any scale does


def test_reasons_for_what_it_leaves():
    def constant(name, w):
        return node("MatMul", ["x", name], [f"y.{name}"], name), {name: w}

    weights = {
        "dense": x_of(64, 5),
        "batched": x_of(2, 64, 5),
        "double": x_of(64, 5),
        "zeros": np.zeros((64, 5), np.float32),
    }
    nodes, constants = [], {}
    for name in ("dense", "batched", "zeros"):
        made, added = constant(name, weights[name])
        nodes.append(made)
        constants |= added
    nodes.append(node("MatMul", ["left.w", "x"], ["y.left"], "left"))
    nodes.append(node("MatMul", ["d", "double"], ["y.double"], "double"))
    constants |= {"left.w": x_of(4, 3), "double": weights["double"].astype(np.float64)}
    made = model(
        nodes,
        [value("x", [3, 64]), value("d", [3, 64], "float64")],
        [
            value("y.dense", [3, 5]),
            value("y.batched", [2, 3, 5]),
            value("y.zeros", [3, 5]),
            value("y.left", [4, 64]),
            value("y.double", [3, 5], "float64"),
        ],
        constants,
    )
    after, results = apply(made, *PASSES)
    assert ops(after) == ["MatMul"] * 5
    assert reasons(results[-1]) == {
        "dense": "weights are not ternary",
        "zeros": "weights are not ternary",
        "batched": "the weight is [2, 64, 5], not one matrix",
        "left": "the constant is the left-hand operand",
        "double": "the weight is float64, not float32 or float16",
    }


def test_nan_weights_name_the_layer():
    w = x_of(64, 5)
    w[3, 2] = np.nan
    with pytest.raises(InputError, match=r"^fc: the weights hold NaN or Inf"):
        apply(product(w), *PASSES)


def test_bodies_of_control_flow_are_listed():
    case = ternary_case(64, 5)
    from onnx import helper

    bodies = {
        f"{kind}_branch": helper.make_graph(
            [node("MatMul", ["x", "w"], [kind], name=f"in_{kind}")],
            kind,
            [],
            [helper.make_tensor_value_info(kind, 1, None)],
        )
        for kind in ("then", "else")
    }
    made = model(
        [node("MatMul", ["x", "w"], ["p"], "fc"), node("If", ["c"], ["z"], **bodies)],
        [value("x", ["batch", 64]), value("c", [], "bool")],
        [value("p", ["batch", 5]), value("z", ["batch", 5])],
        {"w": dense(case)},
    )
    after, results = apply(made, *PASSES)
    assert sorted(ops(after)) == ["If", op.OP_TYPE]
    why = "inside the body of an If, Loop or Scan"
    assert reasons(results[-1]) == {"in_then": why, "in_else": why}
    x = x_of(2, 64)
    got = run(after, x=x, c=np.array(True))
    np.testing.assert_allclose(got["z"], x @ dense(case), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "metadata", "expected"),
    [
        ("/encoder/layer.0/query/MatMul", "", "encoder.layer.0.query"),
        ("/encoder/fc/MatMul_1", "", "encoder.fc"),
        ("MatMul_7", "", "MatMul_7"),
        ("node_1", "['', 'encoder', 'encoder.fc', 'matmul']", "encoder.fc"),
        ("node_1", "not a list", "node_1"),
    ],
)
def test_module_paths_of_foreign_exporters(name, metadata, expected):
    case = ternary_case(64, 5)
    made = product(dense(case))
    matmul = made.graph.node[0]
    del matmul.metadata_props[:]
    matmul.name = name
    if metadata:
        entry = matmul.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.name_scopes", metadata
    after, _ = apply(made, *PASSES)
    assert layers(after) == [expected]
