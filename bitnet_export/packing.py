"""The bit layout of ternary weights; the only place in the package that knows it.

A row of K trits becomes K'/4 bytes of 2-bit codes, code = w + 2 (1, 2, 3); element k sits in
bits 2(k mod 4) of byte k div 4. K' is K rounded up to a multiple of 64, one 16-byte load, and
the padding is code 2, weight 0. ``com.microsoft::MatMulNBits`` (bits=2) reads the same bytes,
with rows padded to whole blocks; TensorRT gets them viewed as little-endian int32.
The layout is drawn in docs/concepts.md and pinned by golden vectors in tests/golden.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_export.errors import InputError

CODES_PER_BYTE = 4
CODES_PER_WORD = 16
ROW_MULTIPLE = 64
ZERO_CODE = 2
PADDING_BYTE = 0b10101010

Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]
Int32Array = npt.NDArray[np.int32]


def padded_size(k: int, multiple: int = ROW_MULTIPLE) -> int:
    """K -> K', the number of codes stored for a row of K trits."""
    return -(-k // multiple) * multiple


def packed_row_bytes(k: int) -> int:
    """K -> bytes of one packed row, K'/4."""
    return padded_size(k) // CODES_PER_BYTE


def pack(trits: npt.ArrayLike, multiple: int = ROW_MULTIPLE) -> UInt8Array:
    """trits [N, K] in {-1, 0, 1}, any dtype -> packed_weight [N, K'/4] uint8.

    multiple: rows are padded to this many codes (64 here; MatMulNBits wants its block size).
    Raises InputError for another rank, an empty dimension or a value that is no trit.
    """
    w = np.asarray(trits)
    if w.ndim != 2 or 0 in w.shape:
        raise InputError(f"ternary weights must be [N, K] with N, K >= 1, got shape {w.shape}")
    if not np.isin(w, (-1, 0, 1)).all():
        raise InputError("ternary weights must hold only -1, 0 and 1")
    n, k = w.shape
    codes = np.full((n, padded_size(k, multiple)), ZERO_CODE, np.uint8)
    codes[:, :k] += w.astype(np.int8).view(np.uint8)  # wraps: 2 + (-1) == 1 in uint8
    first, second, third, fourth = (codes[:, i::CODES_PER_BYTE] for i in range(CODES_PER_BYTE))
    return np.asarray(first | second << 2 | third << 4 | fourth << 6, np.uint8)


def unpack(packed_weight: UInt8Array, k: int) -> Int8Array:
    """packed_weight [N, >= K/4] uint8 -> trits [N, K] int8.

    Raises InputError if the rows are too short for K or a code is 0, which no trit has.
    """
    packed = np.asarray(packed_weight)
    if packed.dtype != np.uint8 or packed.ndim != 2:
        raise InputError(
            f"packed_weight must be uint8 [N, K'/4], got {packed.dtype} {packed.shape}"
        )
    if k < 1 or packed.shape[1] * CODES_PER_BYTE < k:
        raise InputError(f"packed_weight has rows of {packed.shape[1]} bytes, K={k} does not fit")
    shifts = np.arange(0, 8, 2, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & 3
    codes = codes.reshape(packed.shape[0], -1)[:, :k]
    if not codes.all():
        raise InputError("packed_weight holds code 0, which stands for no trit: corrupt weights")
    return codes.astype(np.int8) - ZERO_CODE


def repad(packed_weight: UInt8Array, k: int, multiple: int) -> UInt8Array:
    """packed_weight [N, any] -> [N, padded_size(K, multiple)/4]; MatMulNBits wants 128."""
    n = packed_weight.shape[0]
    out = np.full((n, padded_size(k, multiple) // CODES_PER_BYTE), PADDING_BYTE, np.uint8)
    kept = min(out.shape[1], packed_weight.shape[1])
    out[:, :kept] = packed_weight[:, :kept]
    return out


def as_int32(packed_weight: UInt8Array) -> Int32Array:
    """packed_weight [N, K'/4] uint8 -> the same bytes as little-endian int32 [N, K'/16]."""
    return np.ascontiguousarray(packed_weight).view("<i4")


def from_int32(words: Int32Array) -> UInt8Array:
    """The inverse of as_int32."""
    return np.ascontiguousarray(words).view(np.uint8)
