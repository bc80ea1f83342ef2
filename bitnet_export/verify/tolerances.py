"""How closely two whole models must agree, by what differs between them, and why.

A tolerance is relative to the largest absolute value of the reference output, so that it means
the same for logits and for embeddings. It grows with the number of ternary layers: one int8
activation that rounds the other way changes a layer's output by 1/(127 sqrt(K)), and a deep
network amplifies that. Measured on a 36-layer encoder, ternary without training: outputs agree
to 3e-7 where nothing flips, and differ by 2 % of the range of the hidden states and 10 % of
the pooled ones (a range of 0.2) where something does, whatever it was: another batch size in
one library, or another kernel. Pooled vectors then turn by up to a cosine of 0.994 (fine-tuned
MiniLM, four comparisons of up to three sentences), so that 0.98 is asked of deep models. Whole
models are thus a check for gross faults; that every layer is exact on its own input is checked by
exact.py, with tolerances of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_export.errors import InputError

# From so many ternary layers on, flips have spread everywhere and no longer add up.
DEEP_LAYERS = 32


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


@dataclass(frozen=True)
class Kind:
    """What a kind of difference may cost: the relative tolerance of one layer and of a deep
    model, and the cosine that must hold; deep_cosine: for a deep model, None: the same one.
    """

    single: float
    deep: float
    min_cosine: float
    basis: str
    same_dtype: bool = True
    deep_cosine: float | None = None

    def relative(self, layers: int | None) -> float:
        """The relative tolerance of a model of so many ternary layers; None: a deep one."""
        return _by_depth(self.single, self.deep, layers)

    def cosine(self, layers: int | None) -> float:
        """The least cosine, likewise."""
        deep = self.min_cosine if self.deep_cosine is None else self.deep_cosine
        return _by_depth(self.min_cosine, deep, layers)


def _by_depth(single: float, deep: float, layers: int | None) -> float:
    """From one layer's limit to a deep model's, linearly in the layers."""
    if layers is None or layers >= DEEP_LAYERS:
        return deep
    return single + (deep - single) * max(layers - 1, 0) / (DEEP_LAYERS - 1)


_FLIPS = "single int8 activations may round the other way, which a deep model amplifies"

TOLERANCES = {
    "exact": Kind(0.0, 0.0, 0.999999, "the same integers and the same float operations"),
    "function": Kind(
        2e-3,
        0.15,
        0.995,
        f"the same float32 formula, summed in another order; {_FLIPS}",
        deep_cosine=0.98,
    ),
    "int8": Kind(
        2e-3,
        0.15,
        0.995,
        f"exact integer sums per row, rescaled in another order; {_FLIPS}",
        deep_cosine=0.98,
    ),
    "int8-tensor": Kind(
        5e-2,
        0.25,
        0.98,
        "one activation scale a tensor instead of one a row: rows far below the largest lose bits",
    ),
    "2bit": Kind(
        3e-2,
        0.2,
        0.98,
        "MatMulNBits (accuracy level 4) quantizes activations per block of 128 instead of per "
        "row: 0.5-0.9 % a layer, adding up over the layers",
    ),
    "float-activations": Kind(
        3e-2,
        0.2,
        0.98,
        "activations stay floating point where the reference rounds them to int8 per row: "
        "0.5-0.9 % a layer, adding up over the layers",
    ),
    "fp16": Kind(
        1e-2, 0.15, 0.99, f"float16 keeps 11 bits between layers; {_FLIPS}", same_dtype=False
    ),
    "quantized": Kind(
        5e-2,
        0.2,
        0.98,
        "the model itself rounds activations to integers: a value at the edge between two falls "
        "on either side, a whole step apart",
    ),
    "embeddings-int8": Kind(
        2e-2, 0.15, 0.985, "embeddings in int8 blocks: up to 0.4 % of each block's largest weight"
    ),
    "embeddings-int4": Kind(
        2e-1, 0.25, 0.96, "embeddings in int4 blocks: up to 7 % of each block's largest weight"
    ),
}


def tolerance_for(*kinds: str, layers: int | None = None, atol: float | None = None) -> Tolerance:
    """The tolerance of a pair that differs in all of ``kinds``: errors and angles add up.

    layers: ternary layers of the model, None: many. atol: the user's absolute limit, in place of
    the relative one. Raises InputError for a kind that is not in TOLERANCES.
    """
    unknown = [kind for kind in kinds if kind not in TOLERANCES]
    if unknown or not kinds:
        raise InputError(f"no tolerance for {unknown or 'nothing'}", fix=f"use {list(TOLERANCES)}")
    parts = [TOLERANCES[kind] for kind in kinds]
    basis = "; ".join(part.basis for part in parts)
    return Tolerance(
        relative=sum(part.relative(layers) for part in parts),
        min_cosine=1 - sum(1 - part.cosine(layers) for part in parts),
        basis=f"--atol {atol:g} was asked for" if atol is not None else basis,
        atol=atol,
        same_dtype=all(part.same_dtype for part in parts),
    )
