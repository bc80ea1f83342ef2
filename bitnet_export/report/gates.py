"""Gates: from measured rows to a verdict.

A gate that was asked for and could not be measured fails; a run that compared nothing fails,
too. Thresholds come from the user, measurements from verify/; comparing two reports is
compare.py's business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from bitnet_export.report.schema import FAIL, PASS, GateRow, ParityRow, Report


class Limits(Protocol):
    """What options.GateOptions has; None: not gated."""

    @property
    def min_speedup(self) -> float | None: ...
    @property
    def min_compression(self) -> float | None: ...
    @property
    def max_quality_loss(self) -> float | None: ...


@dataclass(frozen=True)
class GateLimits:
    """Limits for callers without options; ratios over full precision, loss as a fraction."""

    min_speedup: float | None = None
    min_compression: float | None = None
    max_quality_loss: float | None = None


def judge(report: Report, limits: Limits | None = None, *, parity: bool = True) -> Report:
    """``report`` with its gates evaluated and its verdict set.

    parity False: the run did not verify (a benchmark), so that no parity rows are no failure;
    rows that are there count all the same.
    """
    gates = evaluate(report, limits or GateLimits(), parity=parity)
    verdict = PASS if gates and all(gate.passed for gate in gates) else FAIL
    return replace(report, gates=gates, verdict=verdict)


def evaluate(report: Report, limits: Limits, *, parity: bool = True) -> list[GateRow]:
    """Every gate that applies, judged."""
    gates = [_finite_gate(report)]
    if parity or report.parity:
        gates.append(_parity_gate(report.parity))
    if limits.min_speedup is not None:
        gates.append(_speed_gate(report, limits.min_speedup))
    if limits.min_compression is not None:
        gates.append(_compression_gate(report, limits.min_compression))
    if limits.max_quality_loss is not None:
        gates.append(_quality_gate(report, limits.max_quality_loss))
    return gates


def left_out(report: Report, limits: Limits) -> list[tuple[GateRow, str]]:
    """The limits that ``report`` was judged by and ``limits`` does not have, with a line on each.

    A run is judged by its own limits alone: the command line in a CI job then says all that its
    exit code stands for, and limits given once never reach into later runs.
    """
    rows = [row for row in report.gates if getattr(limits, row.name, 0) is None]
    return [(row, _left_out_text(row)) for row in rows]


def _left_out_text(row: GateRow) -> str:
    verdict = "passed" if row.passed else "failed"
    limit = _shown(row.name, row.limit or 0.0)
    start = left_out_start(row.name)
    return f"{start} {limit}, which the run before {verdict}; give it again to have it judged"


def left_out_start(name: str) -> str:
    """How the line on a gate that is left out begins."""
    return f"not judged: --{name.replace('_', '-')}"


def _parity_gate(rows: list[ParityRow]) -> GateRow:
    failed = [row for row in rows if not row.passed]
    passed = bool(rows) and not failed
    if not rows:
        detail = "nothing was compared"
    elif failed:
        first = failed[0]
        detail = f"{first.pair} at {first.shape}, {first.output or 'run'}: {first.reason}"
        detail = f"{len(failed)} of {len(rows)} comparisons failed; {detail}"
    else:
        detail = f"{len(rows)} comparisons within tolerance"
    return GateRow(name="parity", value=float(len(failed)), limit=0.0, passed=passed, detail=detail)


def _finite_gate(report: Report) -> GateRow:
    """NaN or infinity anywhere in what was measured, whatever the limits; or nothing measured."""
    bad = [f"{row.pair}, {row.output}" for row in report.parity if "NaN" in row.reason]
    rows = report.quality.rows if report.quality else []
    bad += [f"{row.metric} of {row.output}" for row in rows if row.value is None]
    if report.quality and report.quality.value is None and not rows:
        bad.append(report.quality.metric)
    measured = bool(report.parity or report.quality or report.speed or report.size)
    looked = report.parity or report.quality
    clean = "no NaN and no infinity" if looked else "no output was looked at"
    detail = f"NaN or infinite: {'; '.join(bad)}" if bad else clean
    return GateRow(
        name="finite",
        value=float(len(bad)),
        limit=0.0,
        passed=measured and not bad,
        detail=detail if measured else "nothing was measured",
    )


def _speed_gate(report: Report, limit: float) -> GateRow:
    """The slowest shape decides."""
    name = "min_speedup"
    if not report.speed:
        return _not_measured(name, limit, "speed was not measured")
    worst = min(report.speed, key=lambda row: row.ratio)
    detail = f"{worst.ratio:.2f}x at {worst.shape}, {_threads(worst.threads)}, the slowest shape"
    return _judged(name, worst.ratio, limit, worst.ratio >= limit, detail)


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _compression_gate(report: Report, limit: float) -> GateRow:
    name = "min_compression"
    if report.size is None:
        return _not_measured(name, limit, "size was not measured")
    ratio = report.size.ratio
    detail = f"{ratio:.2f}x smaller than the {report.size.baseline_dtype} file"
    return _judged(name, ratio, limit, ratio >= limit, detail)


def _quality_gate(report: Report, limit: float) -> GateRow:
    name, quality = "max_quality_loss", report.quality
    if quality is None or quality.loss is None:
        return _not_measured(name, limit, "the loss of quality could not be measured")
    values = f"{quality.metric} {quality.value:.4g}, full precision {quality.baseline:.4g}"
    detail = f"{100 * quality.loss:.3g} % lost: {values}"
    return _judged(name, quality.loss, limit, quality.loss <= limit, detail)


def _judged(name: str, value: float, limit: float, passed: bool, detail: str) -> GateRow:
    """A row of a measured gate; where it failed the limit is named, for who only sees the line."""
    if not passed:
        detail += f"; the limit is {_shown(name, limit)}"
    return GateRow(name=name, value=value, limit=limit, passed=passed, detail=detail)


def _shown(name: str, limit: float) -> str:
    """A limit as the command line takes it: 10% or 1.5x."""
    return f"{100 * limit:.4g}%" if name.startswith("max") else f"{limit:.4g}x"


def _not_measured(name: str, limit: float, detail: str) -> GateRow:
    return GateRow(name=name, value=None, limit=limit, passed=False, detail=detail)
