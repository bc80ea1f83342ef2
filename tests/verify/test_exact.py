"""Every layer on its own input: integers are exact, and a single wrong trit is found."""

import dataclasses

import numpy as np
import pytest

from bitnet_export.errors import StageError
from bitnet_export.verify.exact import check_layers
from bitnet_export.verify.feeds import make_cases
from tests.verify import models


@pytest.fixture
def function(tmp_path):
    return models.write(tmp_path / "function.onnx", "ternary")


def check(function, path, *kinds):
    cases = make_cases([{"batch": 1}, {"batch": 5}], models.example(), models.AXES)
    return check_layers(function, path, cases, kinds)


def test_the_function_body_is_exact(function):
    rows = check(function, function, "int8")
    assert [row.shape for row in rows] == ["batch=1", "batch=5"]
    assert all(row.passed for row in rows)
    assert all(row.relative_tolerance < 1e-5 for row in rows)


@pytest.mark.parametrize(("form", "kind"), [("nbits", "2bit"), ("unpacked", "int8-tensor")])
def test_lowered_forms_are_within_their_own_tolerance(tmp_path, function, form, kind):
    path = models.write(tmp_path / "lowered.onnx", form)
    assert all(row.passed for row in check(function, path, kind))
    assert not any(row.passed for row in check(function, path, "int8"))


def test_layers_without_rows_have_nothing_to_compare(function):
    cases = make_cases([{"batch": 2}], models.example(), models.AXES)
    empty = dataclasses.replace(cases[0], feeds={k: v[:0] for k, v in cases[0].feeds.items()})
    assert check_layers(function, function, [empty], ("int8",)) == []
    assert len(check_layers(function, function, [empty, *cases], ("int8",))) == 1


@pytest.mark.parametrize("layer", models.LAYERS)
def test_one_wrong_trit_is_found_and_its_layer_named(tmp_path, function, layer):
    # An input that Relu leaves alone: the first layer's largest bias.
    column = int(np.argmax(models.weights()["first"][2]))

    def flip(name, w, scale, bias):
        w = w.copy()
        if name == layer:
            w[3, column] = 0 if w[3, column] else 1
        return w, scale, bias

    rows = check(function, models.write(tmp_path / "wrong.onnx", "ternary", edit=flip), "int8")
    failed = [row for row in rows if not row.passed]
    assert failed
    assert {row.output for row in failed} == {layer}


def test_a_model_without_the_layers_is_an_error(tmp_path, function):
    import onnx

    model = models.make_model("float")
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = f"z.{name}" if name in ("h", "h.relu", "y") else name
    model.graph.output[0].name = "z.y"
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(StageError, match="no ternary layer"):
        check(function, tmp_path / "other.onnx", "int8")
