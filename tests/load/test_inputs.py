"""--input syntax and the values that example inputs get."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_export.errors import InputError
from bitnet_export.load.inputs import InputSpec, make_inputs, parse_input_spec, parse_input_specs


@pytest.mark.parametrize(
    ("text", "dims", "dtype"),
    [
        ("ids:1x128:int64", (1, 128), "int64"),
        ("ids:batchxseq:int64", ("batch", "seq"), "int64"),
        ("x:batchx64", ("batch", 64), "float32"),
        ("x:8", (8,), "float32"),
        ("x:batch,max_length", ("batch", "max_length"), "float32"),
        ("model.x:Nx3x224x224:float16", ("N", 3, 224, 224), "float16"),
        ("x:batch:bool", ("batch",), "bool"),
        ("onnx::Gemm_0:1x64", (1, 64), "float32"),
        ("input:0:batchx64:float16", ("batch", 64), "float16"),
    ],
)
def test_parse(text, dims, dtype):
    spec = parse_input_spec(text)
    assert (spec.dims, spec.dtype) == (dims, dtype)
    assert text.startswith(f"{spec.name}:{dims[0]}")


@pytest.mark.parametrize(
    "text",
    ["ids", "ids:", ":1x2", "ids:1x2:int99", "ids:0x2", "ids:1x-2", "i d:1", "x:1xx2", "a:b:c:d"],
)
def test_parse_refuses(text):
    with pytest.raises(InputError, match="--input"):
        parse_input_spec(text)


@given(
    st.lists(st.one_of(st.integers(1, 999), st.sampled_from(["batch", "seq", "n_2"])), min_size=1),
    st.sampled_from(["float32", "int64", "bool"]),
)
def test_flag_is_the_inverse_of_parse(dims, dtype):
    spec = InputSpec("x", tuple(dims), dtype)
    assert parse_input_spec(spec.flag().removeprefix("--input ")) == spec


def test_given_twice():
    with pytest.raises(InputError, match="twice"):
        parse_input_specs(["x:1", "x:2"])


def test_values_are_plausible():
    specs = [
        InputSpec("input_ids", ("batch", "seq"), "int64", high=7),
        InputSpec("attention_mask", ("batch", "seq"), "int64"),
        InputSpec("token_type_ids", ("batch", "seq"), "int64"),
        InputSpec("position_ids", ("batch", "seq"), "int64"),
        InputSpec("x", ("batch", 3), "float16"),
    ]
    notes = []
    inputs = make_inputs(specs, note=notes.append)
    assert list(inputs) == [s.name for s in specs]
    ids = inputs["input_ids"]
    assert 0 <= ids.min() < ids.max() < 7
    assert (inputs["attention_mask"] == 1).all()
    assert (inputs["token_type_ids"] == 0).all()
    assert torch.equal(inputs["position_ids"][1], torch.arange(ids.shape[1]))
    assert inputs["x"].dtype == torch.float16
    assert min(ids.shape) >= 2  # torch.export specializes 0 and 1
    assert ids.shape[0] != ids.shape[1]
    assert not notes


def test_unknown_range_is_said():
    notes = []
    inputs = make_inputs([InputSpec("codes", (4, 50), "int64")], note=notes.append)
    assert set(inputs["codes"].unique().tolist()) == {0, 1}
    assert "codes" in notes[0]
    assert "--data" in notes[0]


def test_limit_bounds_dynamic_axes():
    inputs = make_inputs([InputSpec("ids", ("batch", "seq"), "int64", high=3)], limit=5)
    assert inputs["ids"].shape == (2, 5)
