"""Profiles: derived, given, refused, checked."""

import pytest

from bitnet_export.errors import InputError, UsageError
from bitnet_export.targets.trt_profile import (
    check_shapes,
    describe,
    fits,
    is_static,
    make_profile,
    trtexec_shapes,
)

TEXT = {
    "ids": {"dtype": "int64", "shape": ["batch", "sequence"]},
    "mask": {"dtype": "int64", "shape": ["batch", "sequence"]},
}
OPT = {"batch": 1, "sequence": 16}


def test_what_is_left_open_is_derived():
    profile = make_profile(TEXT, {}, OPT, {}, {})
    assert profile["ids"] == {"min": [1, 1], "opt": [1, 16], "max": [8, 512]}
    assert profile["mask"] == profile["ids"]


def test_the_models_own_limit_holds():
    profile = make_profile(TEXT, {}, OPT, {}, {"sequence": 64})
    assert profile["ids"]["max"] == [8, 64]


def test_a_long_context_is_not_the_default():
    profile = make_profile(TEXT, {}, OPT, {}, {"sequence": 131072})
    assert profile["ids"]["max"] == [8, 512]


def test_an_opt_beyond_the_reach_widens_it():
    profile = make_profile(TEXT, {}, {"batch": 32, "sequence": 700}, {}, {})
    assert profile["ids"]["max"] == [32, 700]


def test_what_is_given_is_kept():
    low, high = {"batch": 2}, {"batch": 4, "sequence": 32}
    profile = make_profile(TEXT, low, OPT, high, {})
    # The derived opt, 1, moves into the range that was given.
    assert profile["ids"] == {"min": [2, 1], "opt": [2, 16], "max": [4, 32]}


@pytest.mark.parametrize(
    ("low", "opt", "high", "said"),
    [
        ({"batch": 4}, OPT, {"batch": 2}, "axis batch: min 4"),
        ({}, {"batch": 9, "sequence": 16}, {"batch": 2}, "opt 9, max 2"),
        ({"sequence": 20}, {"batch": 1, "sequence": 16}, {}, "axis sequence: min 20, opt 16"),
    ],
    ids=str,
)
def test_sizes_out_of_order_are_refused(low, opt, high, said):
    with pytest.raises(UsageError, match=said) as error:
        make_profile(TEXT, low, opt, high, {}, asked_opt=opt)
    assert "min <= opt <= max" in error.value.fix


def test_more_than_the_model_takes_is_refused():
    with pytest.raises(UsageError, match="more than the 64"):
        make_profile(TEXT, {}, OPT, {"sequence": 65}, {"sequence": 64})


def test_an_axis_without_a_size_is_refused():
    with pytest.raises(InputError, match="axis 'sequence' is not known"):
        make_profile(TEXT, {}, {"batch": 1}, {}, {})


def test_static_models():
    profile = make_profile({"x": {"shape": [1, 3, 8]}}, {}, {}, {}, {})
    assert is_static(profile)
    assert trtexec_shapes(profile) == []
    assert describe(profile) == "x 1x3x8"


def test_trtexec_form():
    profile = make_profile(TEXT, {}, OPT, {}, {})
    assert trtexec_shapes(profile) == [
        "--minShapes=ids:1x1,mask:1x1",
        "--optShapes=ids:1x16,mask:1x16",
        "--maxShapes=ids:8x512,mask:8x512",
    ]
    assert describe(profile).startswith("ids 1x1..1x16..8x512, mask")


@pytest.mark.parametrize("shape", [(1, 1), (8, 512), (3, 17)])
def test_shapes_inside(shape):
    check_shapes(make_profile(TEXT, {}, OPT, {}, {}), {"ids": shape})


@pytest.mark.parametrize("shape", [(0, 1), (9, 16), (1, 513), (16,), (1, 1, 1)])
def test_shapes_outside(shape):
    profile = make_profile(TEXT, {}, OPT, {}, {})
    assert not fits(profile, {"ids": shape})
    with pytest.raises(InputError, match=r"takes \[1, 1\] to \[8, 512\]"):
        check_shapes(profile, {"ids": shape})
