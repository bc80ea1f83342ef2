"""Write golden data for the kernel tests: awkward shapes and the NumPy reference's answers.

    python tools/make_golden.py OUT.bin            what the kernel ctest runs (build time)
    python tools/make_golden.py --small OUT.bin    the few cases kept in tests/golden
    python tools/make_golden.py --fresh SEED OUT.bin   the same shapes with other random data

The expected values are bitnet_export/op.py's. Beside each goes the error a correct kernel may
make there: none where the arithmetic is exact or its order is the op's contract, otherwise a
bound from the rounding of fp32 sums. The format is read by plugins/tests/kernels/golden.h:
little-endian, "BNGOLD1\\0", int32 count, then for each case ten int32 (m, k, n, group_size,
activation_bits, scale_count, has_bias, is_half, words of packed_weight, 0) and the arrays x,
packed_weight, scale, bias, y, tolerance (float32, [m, n]).
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitnet_export import op, packing

MAGIC = b"BNGOLD1\0"
FLOAT32_ROUNDING = 2.0**-24
FLOAT16_SPACING = 2.0**-10

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """One case, before its data. rows: what to put into the first rows of x."""

    m: int
    k: int
    n: int
    group_size: int = 0
    bits: int = 8
    scale: str = "channel"
    bias: bool = True
    half: bool = False
    rows: tuple[str, ...] = ()


def specs() -> Iterator[Spec]:
    """Every awkward shape of the kernel tests."""
    for bits in (8, 0):
        for half in (False, True):
            for m in (1, 2, 3, 5, 8, 9, 17, 33):
                yield Spec(m, 200, 65, bits=bits, half=half)
                yield Spec(m, 256, 3, group_size=64, bits=bits, half=half)
            # More rows than any tile has.
            yield Spec(70, 200, 9, bits=bits, half=half)
            yield Spec(131, 256, 3, group_size=64, bits=bits, half=half)
            for k, n in ((5, 1), (64, 3), (130, 65), (1000, 7)):
                yield Spec(2, k, n, bits=bits, half=half, scale="tensor", bias=False)
            for group in (32, 128):
                for m in (1, 3, 6, 17):
                    yield Spec(m, 384, 65, group_size=group, bits=bits, half=half)
            # Groups that straddle chunks, that only dp4a tiles follow, and that none does.
            for group in (96, 48, 3):
                yield Spec(3, 288, 5, group_size=group, bits=bits, half=half)
            yield Spec(20, 96, 4, group_size=32, bits=bits, half=half)  # half a chunk of padding
            yield Spec(5, 128, 9, group_size=128, bits=bits, half=half)  # one group: none
            bad = ("nan", "zero", "inf", "tiny", "ties", "huge")
            yield Spec(3, 192, 9, bits=bits, half=half, rows=bad[:3])  # quantized in the GEMV
            yield Spec(3, 192, 9, bits=bits, half=half, rows=bad[3:])
            yield Spec(7, 192, 9, bits=bits, half=half, rows=bad)
            yield Spec(20, 192, 9, bits=bits, half=half, rows=bad)
        # Several slices of shared memory, warps that share rows, splits along K.
        yield Spec(1, 4160, 130, bits=bits)
        yield Spec(1, 25000, 2, bits=bits)
        yield Spec(2, 13000, 2, bits=bits, scale="tensor")
        yield Spec(8, 6000, 5, bits=bits)
        yield Spec(7, 6016, 3, group_size=64, bits=bits)
        yield Spec(12, 4096, 70, group_size=128, bits=bits, half=True)
        yield Spec(40, 2048, 66, bits=bits, half=True)
        # Splits of an odd number of chunks, which end within a stage of the tile kernels.
        for group in (32, 64, 192):
            yield Spec(9, 1728, 66, group_size=group, bits=bits, half=group == 64)


def small_specs() -> Iterator[Spec]:
    """The cases committed to the repository: they pin layout and rounding for every language."""
    for bits in (8, 0):
        for half in (False, True):
            yield Spec(3, 70, 5, bits=bits, half=half, rows=("ties",))
            yield Spec(2, 64, 3, group_size=32, bits=bits, half=half, bias=False)
        # More than one stage of every kernel's main loop.
        yield Spec(4, 600, 9, bits=bits, half=True)
        yield Spec(17, 320, 20, group_size=64, bits=bits, half=True)


def fill_rows(x: Array, rows: tuple[str, ...], half: bool) -> None:
    """Put special rows into x [m, k], in place."""
    k = x.shape[1]
    for row, kind in enumerate(rows):
        if kind == "nan":
            x[row, k // 2] = np.nan
        elif kind == "zero":
            x[row] = 0.0
        elif kind == "inf":
            x[row, 1] = np.inf
        elif kind == "tiny":  # below the floor of the row scale, denormal in fp16
            x[row] *= 1e-7
        elif kind == "ties":  # x / a close to n + 1/2: the order of the division decides
            x[row] = np.arange(k) % 127 + 0.5
            x[row, 0] = 127.0
        elif kind == "huge":
            x[row] *= 1e3 if half else 1e36


def make_case(spec: Spec, rng: np.random.Generator) -> tuple[list[int], list[Array]]:
    """Spec -> (header, arrays) as written to the file."""
    at = op.TernaryAttributes(
        K=spec.k, N=spec.n, group_size=spec.group_size, activation_bits=spec.bits
    )
    x = rng.standard_normal((spec.m, spec.k)).astype(np.float32)
    fill_rows(x, spec.rows, spec.half)
    x = x.astype(np.float16 if spec.half else np.float32)
    trits = rng.integers(-1, 2, (spec.n, spec.k))
    packed = packing.pack(trits)
    shape = (spec.n, at.groups) if at.group_size else (1,) if spec.scale == "tensor" else (spec.n,)
    scale = rng.uniform(0.01, 0.1, shape).astype(np.float32)
    bias = rng.standard_normal(spec.n).astype(np.float32) if spec.bias else None
    with np.errstate(all="ignore"):
        y = op.reference_ternary_matmul(x, packed, scale, bias, attributes=at)
        tolerance = allowed_error(x, trits, scale, y, at)
    words = packing.as_int32(packed)
    header = [spec.m, spec.k, spec.n, spec.group_size, spec.bits, scale.size]
    header += [int(spec.bias), int(spec.half), words.size, 0]
    return header, [x, words, scale, *([bias] if bias is not None else []), y, tolerance]


def allowed_error(
    x: Array, trits: Array, scale: Array, y: Array, at: op.TernaryAttributes
) -> Array:
    """[m, n] float32: how far a correct kernel's y may lie from the reference's.

    Integer sums are exact and one scale is applied in the contract's order, so with int8
    activations and no groups the bits must agree. A sum of t fp32 terms in any order is off by
    at most t roundings of the sum of magnitudes; the terms are the groups' (int8) or all
    products (float). fp16 outputs add the spacing of fp16, where the fp32 value may round over.
    """
    if at.activation_bits and at.groups == 1:
        return np.zeros(y.shape, np.float32)
    if at.activation_bits:
        xq, a = op.quantize_activations(x)
        left, terms = xq.astype(np.float64), 2 * at.K // 32 + 4  # kernels flush each 32 weights
    else:
        left, a = x.astype(np.float64), np.ones((len(x), 1), np.float32)
        terms = at.K + at.groups + 4
    left = np.abs(left).reshape(len(x), at.groups, -1)
    right = np.abs(trits).reshape(len(trits), at.groups, -1).astype(np.float64)
    sums = np.einsum("mgk,ngk->mng", left, right, optimize=True)
    magnitude = (sums * np.abs(scale.reshape(-1, at.groups))).sum(-1) * np.abs(a)
    error = magnitude * terms * FLOAT32_ROUNDING + np.abs(y) * 2 * FLOAT32_ROUNDING
    if y.dtype == np.float16:
        error = error + np.abs(y.astype(np.float64)) * FLOAT16_SPACING + 2.0**-24
    return error.astype(np.float32)


def write(path: Path, cases: Iterator[Spec], seed: int) -> int:
    """Write all cases to path; returns how many."""
    rng = np.random.default_rng(seed)
    made = [make_case(spec, rng) for spec in cases]
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<i", len(made)))
        for header, arrays in made:
            file.write(struct.pack("<10i", *header))
            for array in arrays:
                file.write(np.ascontiguousarray(array).tobytes())
    return len(made)


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="only the committed cases")
    parser.add_argument("--fresh", type=int, metavar="SEED", help="seed of the random data")
    arguments = parser.parse_args()
    cases = small_specs() if arguments.small else specs()
    count = write(arguments.out, cases, 1 if arguments.fresh is None else arguments.fresh)
    print(f"{arguments.out}: {count} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
