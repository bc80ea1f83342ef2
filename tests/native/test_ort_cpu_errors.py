"""What the ONNX Runtime CPU library says of models that are wrong, and that it survives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from bitnet_export import op

from .test_ort_cpu import Layer, library, open_session

__all__ = ["library"]

Change = Callable[[onnx.GraphProto], None]


def good() -> onnx.ModelProto:
    return onnx.load_model_from_string(Layer(op.TernaryAttributes(70, 18)).model())


def attribute(name: str, value: int) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        next(a for a in graph.node[0].attribute if a.name == name).i = value

    return change


def without(name: str) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        kept = [a for a in graph.node[0].attribute if a.name != name]
        del graph.node[0].attribute[:]
        graph.node[0].attribute.extend(kept)

    return change


def constant(name: str, value: np.ndarray) -> Change:
    def change(graph: onnx.GraphProto) -> None:
        next(t for t in graph.initializer if t.name == name).CopyFrom(
            numpy_helper.from_array(value, name)
        )

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (attribute("K", 0), "at least 1"),
        (attribute("K", 64), r"K=64, .* packed_weight is \[18, 32\]"),
        (attribute("N", -3), "at least 1"),
        (attribute("N", 0), "at least 1"),
        (attribute("N", 19), r"bias is \[18\], it must be \[N\]"),
        (attribute("group_size", 64), "a divisor of K"),
        (attribute("group_size", 35), r"scale \[18\]"),
        (attribute("activation_bits", 4), "activation_bits 0 or 8"),
        (without("K"), "needs the integer attribute K"),
        (without("N"), "needs the integer attribute N"),
        (constant("packed", np.zeros((18, 32), np.uint8)), "code 0"),
        (constant("packed", np.full((18, 31), 170, np.uint8)), r"packed_weight is \[18, 31\]"),
        (constant("scale", np.ones(17, np.float32)), r"scale \[17\]"),
        (constant("bias", np.ones((1, 18), np.float32)), r"bias is \[1, 18\]"),
    ],
)
def test_wrong_models_are_refused(library: Path, change: Change, said: str) -> None:
    model = good()
    change(model.graph)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    with pytest.raises(Exception, match=said) as refused:
        open_session(model.SerializeToString(), library)
    assert "TernaryMatMul" in str(refused.value)


def test_defaults_of_attributes(library: Path) -> None:
    layer, model = Layer(op.TernaryAttributes(70, 18)), good()
    without("group_size")(model.graph)
    without("activation_bits")(model.graph)
    x = layer.activations(1, 2)
    y = open_session(model.SerializeToString(), library).run(None, {"X": x})[0]
    np.testing.assert_array_equal(y, layer.reference(x))


def test_activations_of_another_size(library: Path) -> None:
    layer = Layer(op.TernaryAttributes(70, 18))
    session = open_session(layer.model(shape=None), library)
    with pytest.raises(Exception, match=r"layer\.0: X is \[2, 3, 71\], .* K=70"):
        session.run(None, {"X": np.zeros((2, 3, 71), np.float32)})
    session.run(None, {"X": np.zeros((2, 3, 70), np.float32)})


def test_an_unknown_path(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_CPU_PATH", "sse9")
    with pytest.raises(Exception, match="BITNET_CPU_PATH names no instruction path"):
        open_session(good().SerializeToString(), library)


integers = st.one_of(st.integers(-3, 200), st.sampled_from((2**31, 2**62, -(2**63), 2**63 - 1)))
shapes = st.lists(st.integers(0, 40), max_size=3)


@settings(max_examples=150, deadline=None)
@given(
    values=st.fixed_dictionaries(dict.fromkeys(("K", "N", "group_size"), integers)),
    bits=st.sampled_from((0, 8, 8, 3)),
    sizes=st.fixed_dictionaries({}, optional=dict.fromkeys(("packed", "scale", "bias"), shapes)),
    rows=st.integers(0, 3),
)
def test_nonsense_never_crashes(
    library: Path, values: dict[str, int], bits: int, sizes: dict[str, list[int]], rows: int
) -> None:
    model = good()
    for name, value in (values | {"activation_bits": bits}).items():
        attribute(name, value)(model.graph)
    for name, shape in sizes.items():
        dtype = np.uint8 if name == "packed" else np.float32
        constant(name, np.full(shape, 170 if name == "packed" else 1, dtype))(model.graph)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.ClearField("shape")
    try:
        session = open_session(model.SerializeToString(), library)
        k = values["K"]
        y = session.run(None, {"X": np.ones((rows, k), np.float32)})[0]
    except Exception as error:
        if "TernaryMatMul" not in str(error):
            raise
    else:
        assert y.shape == (rows, values["N"])
