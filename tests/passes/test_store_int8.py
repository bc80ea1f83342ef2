"""StoreInt8: same numbers, a quarter of the bytes; what it cannot store it leaves with a reason."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import onnx_io
from bitnet_export.passes import run_passes
from bitnet_export.passes.store_int8 import StoreInt8, quantize

K, N = 24, 10


def graph(weight, gemm):
    attributes = {"transB": 1} if gemm else {}
    inputs = ["x", "w", "b"] if gemm else ["x", "w"]
    node = helper.make_node("Gemm" if gemm else "MatMul", inputs, ["y"], name="n", **attributes)
    entry = node.metadata_props.add()
    entry.key, entry.value = onnx_io.LAYER_KEY, "layer"
    tensors = [numpy_helper.from_array(weight, "w")]
    tensors += [numpy_helper.from_array(np.ones(N, np.float32), "b")] if gemm else []
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", N])
    made = helper.make_graph([node], "g", [x], [y], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def on_grid(gemm):
    """Weights that int8 holds exactly, [N, K] for Gemm and [K, N] for MatMul."""
    codes, scale = quantize(np.random.default_rng(0).normal(size=(N, K)).astype(np.float32), 1)
    weight = codes * scale
    return weight if gemm else np.ascontiguousarray(weight.T)


def run(model, x):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("gemm", [True, False])
def test_the_outputs_stay_and_the_weights_are_int8(gemm):
    model = graph(on_grid(gemm), gemm)
    stored, (result,) = run_passes(model, [StoreInt8(["layer"])])
    assert result.rewritten == 1
    kinds = {t.name: t.data_type for t in stored.graph.initializer}
    assert kinds["layer.weight_int8"] == TensorProto.INT8
    assert "w" not in kinds
    onnx.checker.check_model(stored)
    x = np.random.default_rng(1).normal(size=(3, K)).astype(np.float32)
    # Rounded once more in float32, over sums of 24 products.
    np.testing.assert_allclose(run(stored, x), run(model, x), rtol=1e-5, atol=1e-5)


def test_weights_off_the_grid_and_unknown_layers_are_left_with_a_reason():
    weight = np.random.default_rng(0).normal(size=(N, K)).astype(np.float32)
    stored, (result,) = run_passes(graph(weight, True), [StoreInt8(["layer", "gone"])])
    assert result.rewritten == 0
    assert {s.where: s.reason for s in result.skipped} == {
        "layer": "its weights are not on the int8 grid",
        "gone": "no product of that layer in the graph",
    }
    assert [t.data_type for t in stored.graph.initializer] == [TensorProto.FLOAT] * 2
