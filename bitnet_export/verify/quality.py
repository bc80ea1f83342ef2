"""How good is the ternary model? The user's own metric, else agreement with full precision.

No tolerance and no verdict here: the float and the ternary model differ on purpose, and a gate
(report/gates.py) says how much is too much.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bitnet_export.errors import InputError, StageError
from bitnet_export.verify.results import QualityBlock, QualityRow, finite

Feed = dict[str, np.ndarray]
Run = Callable[[Feed], Feed]
# A row of the metric table: name, value with itself, whether higher is better.
COSINE = ("cosine", 1.0, True)
EQUAL = ("equal values", 1.0, True)  # of outputs that are no floats: class numbers, flags
TOP1 = ("top-1 agreement", 1.0, True)
KL = ("KL divergence", 0.0, False)
SPEARMAN = ("similarity Spearman", 1.0, True)
MIN_SPEARMAN_ROWS = 4


def quality_loss(
    baseline: float | None, value: float | None, higher_is_better: bool = True
) -> float | None:
    """The part of ``baseline`` that was lost; negative: gained; None: cannot be said."""
    if baseline is None or value is None:
        return None
    lost = baseline - value if higher_is_better else value - baseline
    if baseline == 0:
        return 0.0 if lost == 0 else None
    return lost / abs(baseline)


def load_metric(spec: str) -> Callable[[Run, Any], float]:
    """ "package.module:function" -> the function; the working directory is searched, too."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise InputError(f"{spec!r} is not package.module:function", where="--metric")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"cannot import {module_name} ({type(error).__name__}: {error})",
            where="--metric",
            fix="run from the directory that holds it, or install it",
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(f"{module_name} has no function {function_name}", where="--metric")
    return function


def measure_metric(
    spec: str, baseline: Run, run: Run, data: Sequence[Feed], source: str = ""
) -> QualityBlock:
    """The user's metric(run, data) -> float of both models.

    Higher is better unless the function has an attribute ``lower_is_better``. Raises InputError
    where there is no such function, StageError where it fails or returns no number.
    """
    metric = load_metric(spec)
    before, after = (_call_metric(metric, spec, one, data) for one in (baseline, run))
    higher = not getattr(metric, "lower_is_better", False)
    return QualityBlock(
        metric=spec,
        baseline=finite(before),
        value=finite(after),
        loss=quality_loss(finite(before), finite(after), higher),
        samples=count_samples(data),
        higher_is_better=higher,
        source=source,
    )


def _call_metric(metric: Callable[[Run, Any], float], spec: str, run: Run, data: Any) -> float:
    try:
        return float(metric(run, data))
    except Exception as error:
        raise StageError(
            f"the metric failed: {type(error).__name__}: {error}",
            where=spec,
            fix="it is called as metric(run, data) and returns a number; run(feeds) -> outputs",
        ) from error


def count_samples(data: Iterable[Feed]) -> int:
    """Rows in all batches, by the first array of each."""
    sizes = (next(iter(feed.values())).shape for feed in data if feed)
    return sum(shape[0] if shape else 1 for shape in sizes)


def measure_agreement(
    baseline: Run, run: Run, data: Sequence[Feed], source: str = ""
) -> QualityBlock:
    """How far the ternary outputs agree with the full-precision ones.

    Every float output gets its mean cosine; logits (by name) top-1 agreement and KL; embeddings
    (by name) Spearman's correlation of the pairwise similarities; any other output the part of
    its values that are equal. The first float output decides the headline. Padding, by an input
    named like a mask, is left out. Raises InputError without data.
    """
    if not data:
        raise InputError("no inputs to compare the two models on", fix="give --data or --input")
    collected: dict[str, _Outputs] = {}
    for feed in data:
        before, after = baseline(feed), run(feed)
        for name in before:
            if name not in after or np.asarray(before[name]).dtype.kind not in "biufOUS":
                continue
            if not before[name].size and not after[name].size:
                continue
            collected.setdefault(name, _Outputs(name)).add(before[name], after[name], feed)
    if not collected:
        raise InputError("the two models share no output of numbers")
    rows = [row for outputs in collected.values() for row in outputs.rows()]
    first = next((row for row in rows if row.metric != EQUAL[0]), rows[0])
    head = _headline([row for row in rows if row.output == first.output])
    return QualityBlock(
        metric=f"{head.metric} with full precision",
        baseline=head.baseline,
        value=head.value,
        loss=quality_loss(head.baseline, head.value, head.higher_is_better),
        samples=count_samples(data),
        higher_is_better=head.higher_is_better,
        rows=rows,
        source=source,
    )


def _headline(rows: list[QualityRow]) -> QualityRow:
    by_name = {row.metric: row for row in rows}
    for name, _, _ in (TOP1, SPEARMAN, COSINE):
        if name in by_name:
            return by_name[name]
    return rows[0]


class _Outputs:
    """One output of both models, gathered over the batches: vectors [rows, D] and pooled rows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.floats = True
        self.comparable = True
        self._vectors: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        self._pooled: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, before: np.ndarray, after: np.ndarray, feed: Feed) -> None:
        """Take one batch. Arrays of more than two dimensions are [batch, positions.., D]; those
        that are no floats are compared value by value, which takes no D. A shape that depends on
        the values, as of a list of detections, may differ: then nothing can be said."""
        self.floats = np.issubdtype(before.dtype, np.floating)
        self.comparable &= before.shape == after.shape
        if not self.comparable:
            return
        if before.dtype.kind in "OUS":  # text: as numbers that are equal where it is
            before, after = np.ones(before.shape), (before == after).astype(np.float64)
        if not self.floats:
            before, after = before[..., None], after[..., None]
        for side, array in enumerate((before, after)):
            array = np.asarray(array, np.float64)
            array = array.reshape(1, -1) if array.ndim < 2 else array
            kept = _kept_positions(array, feed)
            flat = array.reshape(array.shape[0], -1, array.shape[-1])
            weights = kept[..., None].astype(np.float64)
            pooled = (flat * weights).sum(1) / np.maximum(weights.sum(1), 1)
            self._vectors[side].append(flat[kept])
            self._pooled[side].append(pooled)

    def rows(self) -> list[QualityRow]:
        """The metrics that suit this output."""
        if not self.comparable:
            return [self._row(COSINE if self.floats else EQUAL, None)]
        before, after = (np.concatenate(side) for side in self._vectors)
        if not self.floats:
            return [self._row(EQUAL, float((before == after).mean()))]
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            return [self._row(COSINE, None)]  # nothing can be said, and nothing passes
        found = [(COSINE, mean_cosine(before, after))]
        if is_logits(self.name) and before.shape[1] > 1:
            found.append((TOP1, float((before.argmax(1) == after.argmax(1)).mean())))
            found.append((KL, kl_divergence(before, after)))
        pooled = [np.concatenate(side) for side in self._pooled]
        if is_embedding(self.name) and len(pooled[0]) >= MIN_SPEARMAN_ROWS:
            found.append((SPEARMAN, similarity_spearman(pooled[0], pooled[1])))
        return [self._row(metric, value) for metric, value in found]

    def _row(self, metric: tuple[str, float, bool], value: float | None) -> QualityRow:
        name, itself, higher = metric
        return QualityRow(
            metric=name,
            output=self.name,
            baseline=itself,
            value=None if value is None else finite(value),
            higher_is_better=higher,
        )


def is_logits(name: str) -> bool:
    """Whether an output is called like class scores."""
    return any(word in name.lower() for word in ("logit", "score", "prob"))


def is_embedding(name: str) -> bool:
    """Whether an output is called like an embedding or hidden state."""
    return any(word in name.lower() for word in ("embed", "hidden", "pool"))


def _kept_positions(array: np.ndarray, feed: Feed) -> np.ndarray:
    """[batch, positions] bool: all, or where the feed's mask of that shape says so."""
    shape = array.shape[:-1]
    mask = next((v for k, v in feed.items() if "mask" in k.lower() and v.shape == shape), None)
    kept = np.ones(shape, bool) if mask is None else np.asarray(mask).astype(bool)
    return kept.reshape(shape[0], -1)


def mean_cosine(before: np.ndarray, after: np.ndarray) -> float:
    """before, after [rows, D] -> mean cosine of the rows; a row that is zero twice counts 1."""
    norms = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    both_zero = ~before.any(1) & ~after.any(1)
    dots = (before * after).sum(1)
    return float(np.where(both_zero, 1.0, dots / np.where(norms == 0, 1, norms)).mean())


def kl_divergence(before: np.ndarray, after: np.ndarray) -> float:
    """Logits [rows, C] -> mean KL(softmax(before) || softmax(after)) in nats."""
    p, q = _log_softmax(before), _log_softmax(after)
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def similarity_spearman(before: np.ndarray, after: np.ndarray) -> float:
    """Embeddings [rows, D] -> Spearman correlation of their pairwise cosines, as search uses them.

    nan where all similarities of one side are equal.
    """
    upper = np.triu_indices(len(before), k=1)
    ranks = [_ranks(_cosines(side)[upper]) for side in (before, after)]
    centred = [r - r.mean() for r in ranks]
    norm = np.linalg.norm(centred[0]) * np.linalg.norm(centred[1])
    return float(centred[0] @ centred[1] / norm) if norm else float("nan")


def _cosines(x: np.ndarray) -> np.ndarray:
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit @ unit.T


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = counts.cumsum()
    return (ends - (counts - 1) / 2)[inverse]
