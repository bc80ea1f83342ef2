"""Per-layer comparison finds the layer that broke; sparsity is counted on the trits."""

import numpy as np
import pytest

from bitnet_export.errors import InputError
from bitnet_export.verify.layers import (
    compare_layers,
    kernel_behind,
    layer_error,
    layer_weights,
    with_errors,
    with_weights,
)
from bitnet_export.verify.results import LayerRow
from tests.verify import models

ROWS = [LayerRow(name="first", status="ternary"), LayerRow(name="kept", status="kept")]


@pytest.fixture
def function(tmp_path):
    return models.write(tmp_path / "function.onnx", "ternary")


@pytest.mark.parametrize(
    ("form", "kernel"), [("nbits", "MatMulNBits"), ("unpacked", "MatMulInteger")]
)
def test_both_lowerings_are_close_everywhere(tmp_path, function, form, kernel):
    lowered = models.write(tmp_path / "lowered.onnx", form)
    errors = compare_layers(function, lowered, models.example(), threads=1)
    assert list(errors) == list(models.LAYERS)
    for error in errors.values():
        assert 0 < error.relative_error < 0.03
        assert error.cosine > 0.999
        assert error.kernel == kernel


def test_the_broken_layer_stands_out(tmp_path, function):
    def negate_second(name, w, scale, bias):
        return (-w if name == "second" else w), scale, bias

    lowered = models.write(tmp_path / "lowered.onnx", "nbits", edit=negate_second)
    errors = compare_layers(function, lowered, models.example(), threads=1)
    assert errors["first"].relative_error < 0.03
    assert errors["second"].relative_error > 0.3


def test_layers_are_found_by_path_where_tensors_were_renamed(tmp_path, function):
    import onnx

    model = models.make_model("nbits")
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "renamed" if name == "h" else name
    onnx.save(model, tmp_path / "renamed.onnx")
    errors = compare_layers(function, tmp_path / "renamed.onnx", models.example(), threads=1)
    assert list(errors) == list(models.LAYERS)
    assert errors["first"].relative_error < 0.03


def test_unrelated_model_is_refused(tmp_path, function):
    import onnx

    model = models.make_model("float")
    for node in model.graph.node:
        del node.metadata_props[:]
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = f"z.{name}" if name in ("h", "y") else name
    model.graph.output[0].name = "z.y"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(InputError, match=r"other\.onnx"):
        compare_layers(function, tmp_path / "other.onnx", models.example())


def test_error_of_broken_outputs_is_none():
    a = np.ones((2, 3), np.float32)
    assert layer_error(a, a).relative_error == 0
    assert layer_error(a, a * np.float32(np.nan)).relative_error is None
    assert layer_error(a, a[:1]).cosine is None
    assert layer_error(a * 0, a).relative_error is None
    assert layer_error(a * 0, a * 0).relative_error == 0


def test_weights_and_rows(function):
    found = layer_weights(function)
    trits = models.weights()["first"][0]
    assert found["first"].sparsity == (trits == 0).mean()
    assert (found["first"].inputs, found["first"].outputs) == (models.K, models.N)
    rows = with_weights(ROWS, found)
    assert rows[0].sparsity == found["first"].sparsity
    assert rows[1] == ROWS[1]
    error = layer_error(np.ones(4), np.ones(4) * 1.1, "MatMulNBits")
    rows = with_errors(rows, {"first": error})
    assert rows[0].relative_error == pytest.approx(0.1)
    assert rows[0].kernel == "MatMulNBits"
    assert rows[0].inputs == models.K
    assert rows[1] == ROWS[1]


def test_kernel_is_found_behind_a_split():
    from onnx import helper

    nodes = [
        helper.make_node("MatMulInteger", ["earlier", "w0"], ["x"]),
        helper.make_node("MatMulNBits", ["x", "w", "s"], ["wide"]),
        helper.make_node("Add", ["wide", "b"], ["sum"]),
        helper.make_node("Split", ["sum"], ["q", "k"]),
        helper.make_node("Relu", ["q2"], ["r"]),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert kernel_behind(model, "k") == "MatMulNBits"
    assert kernel_behind(model, "x") == "MatMulInteger"
    assert kernel_behind(model, "r") == ""
