"""Parity: do two implementations of one ternary model put out the same?

Polygraphy runs them (Comparator.run) and pairs their outputs (compare_accuracy); the comparison
itself is our own, because Polygraphy's takes equal NaNs for agreement and tolerances in absolute
numbers. Float against ternary is no parity but quality (quality.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.comparator import Comparator, IterationResult, RunResults
from polygraphy.logger import G_LOGGER

from bitnet_export.errors import InputError, StageError
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.results import ParityRow, finite
from bitnet_export.verify.runners import save_results
from bitnet_export.verify.tolerances import Tolerance, tolerance_for

Implementation = Any  # a Polygraphy BaseRunner, or RunResults saved earlier


@dataclass(frozen=True)
class Pair:
    """Two implementations by name, and what differs between them (keys of TOLERANCES).

    layers: ternary layers of the model, which the tolerance grows with; None: many.
    """

    reference: str
    other: str
    kinds: tuple[str, ...]
    layers: int | None = None

    @property
    def label(self) -> str:
        """``torch ternary -> onnx function``."""
        return f"{self.reference} -> {self.other}"


@dataclass(frozen=True)
class Difference:
    """One output compared. False where it fails, so that Polygraphy counts it as a mismatch."""

    max_abs: float
    cosine: float
    limit: float
    scale: float
    reason: str

    def __bool__(self) -> bool:
        return not self.reason


def run_parity(
    implementations: Mapping[str, Implementation],
    pairs: Sequence[Pair],
    cases: Sequence[Case],
    *,
    atol: float | None = None,
    save: Mapping[str, Path] | None = None,
) -> list[ParityRow]:
    """Run every implementation on every case and compare the pairs, output by output.

    implementations: a Polygraphy runner (runners.py) or results saved earlier, on these same
    cases. save: files for the results of some, by name. A run that fails, a missing output, NaN
    or infinity on either side, another shape or dtype: each is a failed row. Raises InputError
    where there is nothing to compare.
    """
    if not pairs or not cases:
        raise InputError(f"nothing to compare: {len(pairs)} pairs, {len(cases)} input shapes")
    used = dict.fromkeys(name for pair in pairs for name in (pair.reference, pair.other))
    missing = [name for name in used if name not in implementations]
    if missing:
        raise InputError(f"no implementation named {', '.join(missing)}")
    files = save or {}
    outcomes = {n: _run(n, implementations[n], cases, files.get(n)) for n in used}
    rows = []
    for pair in pairs:
        tolerance = tolerance_for(*pair.kinds, layers=pair.layers, atol=atol)
        both = zip(outcomes[pair.reference], outcomes[pair.other], strict=True)
        for case, (reference, other) in zip(cases, both, strict=True):
            rows += compare_case(pair, case.label, reference, other, tolerance)
    return rows


Outcome = Any  # an IterationResult, or a str that says why there is none


def _run(
    name: str, implementation: Implementation, cases: Sequence[Case], save_to: Path | None
) -> list[Outcome]:
    """One outcome for each case."""
    if isinstance(implementation, RunResults):
        iterations: list[Outcome] = next(iter(implementation.values()), [])
        if len(iterations) != len(cases):
            raise InputError(
                f"holds {len(iterations)} saved results, there are {len(cases)} input shapes",
                where=name,
                fix="save them again with the same shapes, data and seed",
            )
        return list(iterations)
    try:
        results = _infer(implementation, cases)
    except Exception:  # find the case that failed; the others still count
        return [_run_alone(implementation, case) for case in cases]
    if save_to is not None:
        save_to.parent.mkdir(parents=True, exist_ok=True)
        save_results(results, save_to)
    return list(results[0][1])


def _run_alone(runner: BaseRunner, case: Case) -> Outcome:
    try:
        return _infer(runner, [case])[0][1][0]
    except Exception as error:
        return f"{runner.name} failed: {str(error).strip() or type(error).__name__}"


def _infer(runner: BaseRunner, cases: Sequence[Case]) -> RunResults:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), runner:
        names = list(runner.get_input_metadata(use_numpy_dtypes=False))
    feeds = []
    for case in cases:  # Polygraphy would feed the nearest name instead
        absent = [name for name in names if name not in case.feeds]
        if absent:
            raise StageError(f"no value for input {', '.join(absent)}", where=runner.name)
        feeds.append(OrderedDict((name, case.feeds[name]) for name in names))
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        return Comparator.run([runner], data_loader=feeds)


def compare_case(
    pair: Pair, label: str, reference: Outcome, other: Outcome, tolerance: Tolerance
) -> list[ParityRow]:
    """The rows of one pair on one case: one an output, or one that says what failed."""
    for outcome in (reference, other):
        if isinstance(outcome, str):
            return [_failed(pair, label, outcome, tolerance)]
    reference, other = _without_text(reference, other)
    results = RunResults([(pair.reference, [reference]), (pair.other, [other])])
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        accuracy = Comparator.compare_accuracy(results, compare_func=_compare_func(tolerance))
    differences = accuracy[0][(pair.reference, pair.other)][0]
    if not differences:
        return [_failed(pair, label, "no output to compare", tolerance)]
    return [parity_row(pair, label, name, d, tolerance) for name, d in differences.items()]


def _without_text(
    reference: IterationResult, other: IterationResult
) -> tuple[IterationResult, IterationResult]:
    """Both with outputs of text, which Polygraphy takes the mean of, as numbers: equal where the
    texts are."""
    sides = [OrderedDict(reference), OrderedDict(other)]
    for name in [n for n in sides[0] if n in sides[1]]:
        values = [np.asarray(side[name]) for side in sides]
        if any(v.dtype.kind in "OUS" for v in values):
            known = np.unique(np.concatenate([v.astype(str).ravel() for v in values]))
            for side, value in zip(sides, values, strict=True):
                side[name] = np.searchsorted(known, value.astype(str))
    first, second = (IterationResult(outputs=side) for side in sides)
    return first, second


def _failed(pair: Pair, label: str, reason: str, tolerance: Tolerance) -> ParityRow:
    nothing = Difference(np.nan, np.nan, np.nan, np.nan, reason)
    return parity_row(pair, label, "", nothing, tolerance)


def parity_row(pair: Pair, label: str, output: str, found: Difference, tol: Tolerance) -> ParityRow:
    return ParityRow(
        pair=pair.label,
        shape=label,
        output=output,
        max_abs=finite(found.max_abs),
        cosine=finite(found.cosine),
        tolerance=finite(found.limit),
        passed=bool(found),
        reason=found.reason,
        output_scale=finite(found.scale),
        relative_tolerance=None if tol.atol is not None else tol.relative,
        min_cosine=tol.min_cosine,
        basis=tol.basis,
    )


def _compare_func(tolerance: Tolerance) -> Callable[[Any, Any], OrderedDict[str, Difference]]:
    """A compare_func for Polygraphy: every output of either side, by name."""

    def compare_outputs(
        reference: IterationResult, other: IterationResult
    ) -> OrderedDict[str, Difference]:
        differences: OrderedDict[str, Difference] = OrderedDict()
        for name in dict.fromkeys([*reference, *other]):
            if name in reference and name in other:
                differences[name] = compare_arrays(reference[name], other[name], tolerance)
            else:
                where = "reference" if name not in reference else "other side"
                reason = f"the {where} has no output of this name"
                differences[name] = Difference(np.nan, np.nan, np.nan, np.nan, reason)
        return differences

    return compare_outputs


def compare_arrays(reference: np.ndarray, other: np.ndarray, tolerance: Tolerance) -> Difference:
    """Compare one output. Integer and bool outputs must be equal, whatever the tolerance."""
    reference, other = np.asarray(reference), np.asarray(other)
    reason = _incomparable(reference, other, tolerance.same_dtype)
    if reason:
        return Difference(np.nan, np.nan, np.nan, np.nan, reason)
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    scale, max_abs = float(np.abs(a).max()), float(np.abs(a - b).max())
    limit = tolerance.relative * scale if tolerance.atol is None else tolerance.atol
    if not np.issubdtype(reference.dtype, np.floating):
        limit = 0.0
    cosine = cosine_similarity(a, b)
    if max_abs > limit:
        reason = f"max_abs {max_abs:.3g} exceeds {limit:.3g}"
    elif cosine < tolerance.min_cosine and max_abs > 0 and tolerance.atol is None:
        reason = f"cosine {cosine:.6f} is below {tolerance.min_cosine:g}"
    return Difference(max_abs, cosine, limit, scale, reason)


def _incomparable(reference: np.ndarray, other: np.ndarray, same_dtype: bool) -> str:
    """Why two outputs cannot be compared at all, or ""."""
    both_float = reference.dtype.kind == other.dtype.kind == "f"
    if reference.dtype != other.dtype and (same_dtype or not both_float):
        return f"dtype {other.dtype} instead of {reference.dtype}"
    if reference.shape != other.shape:
        return f"shape {list(other.shape)} instead of {list(reference.shape)}"
    if not reference.size:
        return f"empty output, shape {list(reference.shape)}: nothing was compared"
    for side, array in (("reference", reference), ("other side", other)):
        bad = int((~np.isfinite(array)).sum()) if array.dtype.kind in "fc" else 0
        if bad:
            return f"{bad} of {array.size} values of the {side} are NaN or infinite"
    return ""


def cosine_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two flat vectors; 1 where both are zero, 0 where one is."""
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if norms == 0:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip(a @ b / norms, -1.0, 1.0))
