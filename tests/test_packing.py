"""The bit layout: golden vectors, round trips and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_export import packing
from bitnet_export.errors import InputError


def test_golden_row():
    # element 0 in the low bits: codes 1, 2, 3, 2 -> 0b10_11_10_01; the rest is padding.
    packed = packing.pack([[-1, 0, 1, 0, 1]])
    assert packed.shape == (1, 16)
    assert packed[0, :3].tolist() == [0b10111001, 0b10101011, packing.PADDING_BYTE]
    assert packing.as_int32(packed)[0, 0] == np.int32(np.uint32(0xAAAAABB9).view(np.int32))


@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 99))
def test_round_trip(n, k, seed):
    trits = np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)
    packed = packing.pack(trits)
    assert packed.shape == (n, packing.packed_row_bytes(k))
    assert np.array_equal(packing.unpack(packed, k), trits)
    assert np.array_equal(packing.from_int32(packing.as_int32(packed)), packed)
    assert np.array_equal(packing.unpack(packing.repad(packed, k, 128), k), trits)
    assert packing.repad(packed, k, 128).shape[1] % 32 == 0


@pytest.mark.parametrize(
    "weights",
    [np.zeros((0, 4)), np.zeros((4, 0)), np.zeros(4), [[2]], [[0.5]], [[np.nan]]],
    ids=["no rows", "K=0", "rank 1", "two", "half", "nan"],
)
def test_pack_refuses(weights):
    with pytest.raises(InputError):
        packing.pack(weights)


def test_unpack_refuses_code_zero_and_short_rows():
    with pytest.raises(InputError, match="code 0"):
        packing.unpack(np.zeros((1, 16), np.uint8), 3)
    with pytest.raises(InputError, match="does not fit"):
        packing.unpack(np.full((1, 16), 170, np.uint8), 65)
