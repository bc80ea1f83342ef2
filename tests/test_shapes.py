"""Sizes of axes as the user writes them."""

import pytest

from bitnet_export.errors import UsageError
from bitnet_export.shapes import parse_case_label

KNOWN = {"batch": 1, "sequence": 16}


@pytest.mark.parametrize(
    ("label", "sizes"),
    [
        ("batch=4", {"batch": 4, "sequence": 16}),
        ("sequence=7,batch=2", {"batch": 2, "sequence": 7}),
    ],
)
def test_axes_left_out_keep_their_sizes(label, sizes):
    assert parse_case_label(label, KNOWN) == sizes


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("length=3", "no dynamic axis length[\\s\\S]*it has batch, sequence"),
        ("batch=0", "'batch=0' is no axis with a size[\\s\\S]*batch=1,sequence=16"),
        ("batch", "'batch' is no axis with a size"),
        ("8", "'8' is no axis with a size"),
    ],
)
def test_what_cannot_be_meant_is_refused(label, words):
    with pytest.raises(UsageError, match=words):
        parse_case_label(label, KNOWN)


def test_a_model_of_fixed_shape_takes_none():
    with pytest.raises(UsageError, match="leave --shape out"):
        parse_case_label("batch=2", {})
