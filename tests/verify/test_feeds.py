"""Derived shapes and resized inputs."""

import numpy as np
import pytest
import torch

from bitnet_export.errors import InputError
from bitnet_export.verify.feeds import (
    axis_sizes,
    derive_shapes,
    label_of,
    make_case,
    make_cases,
    resize,
    write_arrays,
)

AXES = {"ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}}


def example(batch=2, sequence=16):
    ids = torch.arange(batch * sequence).reshape(batch, sequence) + 100
    return {"ids": ids, "attention_mask": torch.ones(batch, sequence, dtype=torch.int64)}


def test_shapes_hold_batch_one_and_odd_sizes():
    shapes = derive_shapes(example(), AXES)
    labels = ["batch=2,sequence=16", "batch=1,sequence=16", "batch=3,sequence=9"]
    assert [label_of(s) for s in shapes] == labels


def test_shapes_keep_to_min_opt_and_max():
    shapes = derive_shapes(
        example(), AXES, {"sequence": 4}, {"batch": 1, "sequence": 12}, {"batch": 2, "sequence": 6}
    )
    assert shapes[0] == {"batch": 1, "sequence": 12}
    assert {"batch": 2, "sequence": 6} in shapes
    assert {"batch": 1, "sequence": 4} in shapes
    odd = shapes[1]
    assert odd["batch"] <= 2
    assert 4 <= odd["sequence"] <= 6
    assert len({label_of(s) for s in shapes}) == len(shapes)


def test_static_model_has_one_shape():
    shapes = derive_shapes({"x": np.zeros((1, 4), np.float32)}, {})
    assert shapes == [{}]
    case = make_case({}, {"x": np.ones((1, 4), np.float32)}, {})
    assert case.label == "static"
    assert case.feeds["x"].shape == (1, 4)


def test_contradicting_sizes_are_refused():
    inputs = {**example(), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
    with pytest.raises(InputError, match="sequence"):
        derive_shapes(inputs, AXES)


@pytest.mark.parametrize("sizes", [(1, 16), (3, 9), (5, 40), (1, 1)])
def test_inputs_stay_plausible(sizes):
    wanted = dict(zip(("batch", "sequence"), sizes, strict=True))
    case = make_case(wanted, example(), AXES)
    assert axis_sizes(case.feeds, AXES) == wanted
    ids = case.feeds["ids"]
    assert ids.dtype == np.int64
    assert np.isin(ids, example()["ids"].numpy()).all()
    assert (case.feeds["attention_mask"] == 1).all()
    if sizes[1] > 2:
        assert len(np.unique(ids, axis=0)) == sizes[0]  # no two rows alike


def test_user_data_is_preferred():
    data = [{"ids": np.full((4, 32), 7), "other": np.zeros(3)}]
    case = make_case({"batch": 2, "sequence": 8}, example(), AXES, data=data)
    assert (case.feeds["ids"] == 7).all()
    assert set(case.feeds) == set(AXES)


def test_value_ranges_draw_within_and_repeat_with_the_seed():
    inputs = {"x": np.zeros((2, 6), np.float32), "ids": np.zeros((2, 6), np.int64)}
    axes = {"x": {0: "batch"}, "ids": {0: "batch"}}
    ranges = {"x": (-3.0, -2.0), "ids": (5, 9)}
    cases = make_cases([{"batch": 50}] * 2, inputs, axes, value_ranges=ranges, seed=4)
    x, ids = cases[0].feeds["x"], cases[0].feeds["ids"]
    assert x.dtype == np.float32
    assert x.shape == (50, 6)
    assert x.min() >= -3
    assert x.max() <= -2
    assert set(ids.ravel()) == {5, 6, 7, 8, 9}
    assert np.array_equal(x, cases[1].feeds["x"])


def test_nothing_to_tile_is_an_error_and_empty_stays_empty():
    empty = np.zeros((1, 0, 4), np.float32)
    assert resize(empty, "past", {1: 0}).shape == (1, 0, 4)
    with pytest.raises(InputError, match="past"):
        resize(empty, "past", {1: 3})


def test_arrays_of_any_name_are_written(tmp_path):
    arrays = {"file": np.arange(3), "allow_pickle": np.ones((2, 2), np.float16)}
    arrays["a/b:0"] = np.linspace(0, 1, 5)
    write_arrays(arrays, tmp_path / "arrays.npz")
    with np.load(tmp_path / "arrays.npz") as found:
        assert set(found.files) == set(arrays)
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
