"""Operators of other domains that are called like standard ones are left alone."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bitnet_export import onnx_io
from bitnet_export.passes import (
    Canonicalize,
    FoldConstants,
    PackConvolutions,
    RecogniseTernary,
    run_passes,
)
from tests.passes.graphs import model, node, run, value, x_of


def trits(*shape):
    return (np.random.default_rng(0).integers(-1, 2, shape) * 0.5).astype(np.float32)


@pytest.mark.parametrize(
    ("op_type", "x", "w"), [("Gemm", (2, 64), (64, 32)), ("MatMul", (2, 64), (64, 32))]
)
def test_a_function_of_the_same_name(op_type, x, w):
    """Its body negates the product, so that taking it for the operator shows."""
    made = model(
        [node(op_type, ["x", "w"], ["y"])], [value("x", x)], [value("y", (2, 32))], {"w": trits(*w)}
    )
    made.graph.node[0].domain = "mine"
    body = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Neg", ["c"], ["d"])]
    made.functions.append(
        helper.make_function("mine", op_type, ["a", "b"], ["d"], body, made.opset_import[:1])
    )
    made.opset_import.append(helper.make_opsetid("mine", 1))
    after, results = run_passes(made, [FoldConstants(), Canonicalize(), RecogniseTernary()])
    assert [(n.domain, n.op_type) for n in after.graph.node] == [("mine", op_type)]
    assert not any(r.rewritten for r in results)
    feeds = {"x": x_of(*x)}
    assert np.array_equal(run(after, **feeds)["y"], run(made, **feeds)["y"])


def test_blocked_convolutions_of_onnxruntime():
    """Their weights are in another order, which packing would take for channels."""
    made = model(
        [node("Conv", ["x", "w"], ["y"])],
        [value("x", (1, 32, 4, 4))],
        [value("y", (1, 48, 2, 2))],
        {"w": trits(48, 32, 3, 3)},
    )
    made.graph.node[0].domain = "com.microsoft.nchwc"
    made.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    _, (result,) = run_passes(made, [PackConvolutions()])
    assert result.rewritten == 0


def test_somebody_elses_ternary_matmul_gets_no_body_of_ours():
    made = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", (2, 64))],
        [value("y", (2, 32))],
        {"w": trits(64, 32)},
    )
    made.graph.node[0].op_type, made.graph.node[0].domain = "TernaryMatMul", "mine"
    onnx_io.attach_functions(made)
    assert not made.functions


def test_text_survives_a_pass():
    names = np.array(["a", "b", "ü"], object)
    made = model(
        [node("Gather", ["names", "i"], ["y"])],
        [value("i", (2,), "int64")],
        [helper.make_tensor_value_info("y", TensorProto.STRING, (2,))],
        {"names": names},
    )
    made.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value_strings=["é"]))
    made.graph.output.append(helper.make_tensor_value_info("more", TensorProto.STRING, (1,)))
    after, _ = run_passes(made, [FoldConstants(), Canonicalize()])
    found = run(after, i=np.array([2, 0]))
    assert list(found["y"]) == ["ü", "a"]
    assert list(found["more"]) == ["é"]
