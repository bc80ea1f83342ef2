"""How closely two implementations must agree, by what differs between them, and why.

A tolerance is relative to the largest absolute value of the reference output, so that it means
the same for logits and for embeddings. Exactness of the integer part is no matter of
tolerance: tests/ compare it bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bitnet_export.errors import InputError


@dataclass(frozen=True)
class Tolerance:
    """max_abs <= relative x max|reference| (or atol, where given), cosine >= min_cosine.

    same_dtype: whether float outputs must be of one type, too.
    """

    relative: float
    min_cosine: float
    basis: str
    atol: float | None = None
    same_dtype: bool = True


TOLERANCES = {
    "exact": Tolerance(0.0, 0.999999, "the same integers and the same float operations"),
    "function": Tolerance(
        2e-3,
        0.9999,
        "the same float32 formula summed in another order; that noise may flip single int8 "
        "activations by one step, each about 1/(127 sqrt(K)) of a layer's output",
    ),
    "int8": Tolerance(
        2e-3,
        0.9999,
        "exact integer sums per row, rescaled in another order; single int8 activations may flip",
    ),
    "int8-tensor": Tolerance(
        5e-2,
        0.99,
        "one activation scale a tensor instead of one a row: rows far below the largest lose bits",
    ),
    "2bit": Tolerance(
        5e-2,
        0.99,
        "MatMulNBits (accuracy level 4) quantizes activations per block of 128 instead of per "
        "row: 0.5-0.9 % a layer, adding up over the layers",
    ),
    "fp16": Tolerance(
        2e-2,
        0.999,
        "float16 keeps 11 bits between layers; flips of int8 activations follow",
        same_dtype=False,
    ),
    "embeddings-int8": Tolerance(
        2e-2, 0.999, "embeddings in int8 blocks: up to 0.4 % of each block's largest weight"
    ),
    "embeddings-int4": Tolerance(
        2e-1, 0.97, "embeddings in int4 blocks: up to 7 % of each block's largest weight"
    ),
}


def tolerance_for(*kinds: str, atol: float | None = None) -> Tolerance:
    """The tolerance of a pair that differs in all of ``kinds``: errors and angles add up.

    atol: the user's absolute limit, in place of the relative one. Raises InputError for a kind
    that is not in TOLERANCES.
    """
    unknown = [kind for kind in kinds if kind not in TOLERANCES]
    if unknown or not kinds:
        raise InputError(f"no tolerance for {unknown or 'nothing'}", fix=f"use {list(TOLERANCES)}")
    parts: Sequence[Tolerance] = [TOLERANCES[kind] for kind in kinds]
    basis = "; ".join(part.basis for part in parts)
    return Tolerance(
        relative=sum(part.relative for part in parts),
        min_cosine=1 - sum(1 - part.min_cosine for part in parts),
        basis=f"--atol {atol:g} was asked for" if atol is not None else basis,
        atol=atol,
        same_dtype=all(part.same_dtype for part in parts),
    )
