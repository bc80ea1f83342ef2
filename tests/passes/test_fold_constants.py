"""fold-constants: what is folded, what must not be, and that nothing is printed."""

import numpy as np
import pytest
from onnx import TensorProto

from bitnet_export.passes import FoldConstants
from tests.passes.graphs import (
    apply,
    initializers,
    model,
    node,
    ops,
    reasons,
    run,
    value,
    x_of,
)

X, Y = value("x", ["batch", 64]), value("y", ["batch", 8])


def test_a_transpose_that_carries_a_layer_path_is_folded(capsys):
    w = x_of(8, 64)
    made = model(
        [
            node("Transpose", ["w"], ["wt"], "fc", perm=[1, 0]),
            node("MatMul", ["x", "wt"], ["y"], "fc"),
        ],
        [X],
        [Y],
        {"w": w},
    )
    after, (result,) = apply(made, FoldConstants())
    assert ops(after) == ["MatMul"]
    assert result.rewritten == 1
    assert np.array_equal(initializers(after)["wt"], w.T)
    x = x_of(3, 64, seed=1)
    assert np.array_equal(run(made, x=x)["y"], run(after, x=x)["y"])
    assert capsys.readouterr().out == ""  # onnx-graphsurgeon would print


def test_random_numbers_stay_random():
    made = model(
        [node("RandomNormal", [], ["r"], shape=[8]), node("Add", ["x", "r"], ["y"])],
        [value("x", ["batch", 8])],
        [Y],
    )
    after, (result,) = apply(made, FoldConstants())
    assert ops(after) == ["RandomNormal", "Add"]
    assert reasons(result) == {"RandomNormal_r": "makes random numbers"}


def test_a_tied_embedding_is_not_stored_twice():
    made = model(
        [
            node("Gather", ["table", "ids"], ["h"]),
            node("Transpose", ["table"], ["head"], perm=[1, 0]),
            node("MatMul", ["h", "head"], ["y"]),
        ],
        [value("ids", ["batch"], "int64")],
        [value("y", ["batch", 50])],
        {"table": x_of(50, 64)},
    )
    after, (result,) = apply(made, FoldConstants())
    assert ops(after) == ["Gather", "Transpose", "MatMul"]
    assert list(initializers(after)) == ["table"]
    assert reasons(result) == {"table": "an embedding and a weight, stored once"}


@pytest.mark.parametrize("kind", ["tensor", "channel", "blocked"])
def test_quantized_weights_of_a_product_become_floats(kind):
    q = np.random.default_rng(0).integers(-1, 2, (64, 8)).astype(np.int8)
    scale = {"tensor": np.float32(0.3), "channel": x_of(8), "blocked": x_of(2, 8)}[kind]
    attributes = {"tensor": {}, "channel": dict(axis=1), "blocked": dict(axis=0, block_size=32)}
    made = model(
        [
            node("DequantizeLinear", ["q", "scale"], ["w"], **attributes[kind]),
            node("MatMul", ["x", "w"], ["y"]),
        ],
        [X],
        [Y],
        {"q": q, "scale": scale},
        opset=21,
    )
    after, _ = apply(made, FoldConstants())
    assert ops(after) == ["MatMul"]
    x = x_of(3, 64, seed=1)
    # ONNX Runtime's optimizer would quantize the activations of the unfolded form.
    want = run(made, optimize=False, x=x)["y"]
    np.testing.assert_allclose(run(after, x=x)["y"], want, rtol=1e-5, atol=1e-5)


def test_a_zero_point_counts():
    q = np.random.default_rng(0).integers(0, 256, (64, 8)).astype(np.uint8)
    made = model(
        [node("DequantizeLinear", ["q", "s", "z"], ["w"]), node("MatMul", ["x", "w"], ["y"])],
        [X],
        [Y],
        {"q": q, "s": np.float32(0.1), "z": np.uint8(128)},
    )
    after, _ = apply(made, FoldConstants())
    x = x_of(3, 64, seed=1)
    want = run(made, optimize=False, x=x)["y"]
    np.testing.assert_allclose(run(after, x=x)["y"], want, rtol=1e-4, atol=1e-4)


def test_quantized_tensors_of_other_operators_keep_their_size():
    made = model(
        [node("DequantizeLinear", ["q", "s"], ["b"]), node("Add", ["x", "b"], ["y"])],
        [value("x", ["batch", 8])],
        [Y],
        {"q": np.arange(8, dtype=np.int8), "s": np.float32(0.1)},
    )
    after, _ = apply(made, FoldConstants())
    assert ops(after) == ["DequantizeLinear", "Add"]


def test_skip_pass_leaves_it_out():
    made = model(
        [node("Cast", ["w"], ["wf"], to=TensorProto.FLOAT), node("MatMul", ["x", "wf"], ["y"])],
        [X],
        [Y],
        {"w": x_of(64, 8, dtype=np.float64)},
    )
    after, (result,) = apply(made, FoldConstants(), skip=["fold-constants"])
    assert ops(after) == ["Cast", "MatMul"]
    assert result.notes == ["left out with --skip-pass"]


def test_large_weights_are_folded_without_being_serialized(monkeypatch):
    """onnx-graphsurgeon hands what it folds to ONNX Runtime as one message, which ends at 2 GB."""
    n = 256
    w = x_of(n, n).astype(np.float16)
    made = model(
        [
            node("Cast", ["w"], ["wide"], "fc", to=TensorProto.FLOAT),
            node("Transpose", ["wide"], ["turned"], "fc"),
            node("Identity", ["turned"], ["wt"], "fc"),
            node("MatMul", ["x", "wt"], ["y"], "fc"),
        ],
        [value("x", ["batch", n])],
        [value("y", ["batch", n])],
        {"w": w},
    )

    def refused(*args, **kwargs):
        raise RuntimeError("past 2 GB")

    monkeypatch.setattr("onnxruntime.InferenceSession", refused)
    after, (result,) = apply(made, FoldConstants())
    monkeypatch.undo()
    assert ops(after) == ["MatMul"]
    assert result.rewritten == 3
    assert np.array_equal(initializers(after)["wt"], w.T.astype(np.float32))
    x = x_of(3, n, seed=1)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-5, atol=1e-4)
