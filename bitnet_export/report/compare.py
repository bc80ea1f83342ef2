"""Two reports of one model: has the new one got worse by more than allowed?

For CI: ``report --baseline old.json --max-regression 5%``. Reports of different models, targets,
shapes or machines are told apart: other models are refused, latencies of other machines are
listed as incomparable and not judged. Only ratios against each report's own full-precision run
and machine-independent sizes are ever compared across machines.
"""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_export.errors import InputError, UsageError
from bitnet_export.report.schema import FAIL, PASS, Report, SpeedRow

VERDICT = "verdict"


@dataclass(frozen=True)
class Change:
    """One quantity in both reports. change: relative; worse: the part of it that is a loss.

    A change with a ``note`` could not be compared and is not judged.
    """

    name: str
    old: float | None
    new: float | None
    worse: float = 0.0
    regressed: bool = False
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All changes, and whether any is a regression."""

    changes: list[Change]
    max_regression: float

    @property
    def passed(self) -> bool:
        """Whether nothing got worse by more than allowed, and something was compared."""
        return self.compared > 0 and not any(change.regressed for change in self.changes)

    @property
    def compared(self) -> int:
        """How many measured quantities could be compared."""
        return sum(not change.note for change in self.changes if change.name != VERDICT)


def parse_percentage(text: str) -> float:
    """``5%`` or ``0.05`` -> 0.05. Raises UsageError for anything else or below zero."""
    stripped = text.strip()
    try:
        value = float(stripped.removesuffix("%")) / (100 if stripped.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise UsageError(f"{text!r} is no percentage", where="--max-regression", fix="write 5%")
    return value


def compare_reports(old: Report, new: Report, max_regression: float = 0.05) -> Comparison:
    """Size, speedup, latency, quality loss and parity of ``new`` against ``old``.

    max_regression: the fraction any of them may get worse; for the quality loss, which is a
    fraction already, the amount it may grow. Raises InputError for reports of different models
    or targets.
    """
    _check_same_subject(old, new)
    changes = _size_changes(old, new, max_regression)
    changes += _speed_changes(old, new, max_regression)
    changes += _quality_changes(old, new, max_regression)
    changes.append(_verdict_change(old, new))
    return Comparison(changes, max_regression)


def _check_same_subject(old: Report, new: Report) -> None:
    for what in ("name", "target", "dtype"):
        before, after = getattr(old.model, what), getattr(new.model, what)
        if before != after:
            raise InputError(
                f"the baseline report is of {what} {before!r}, this one of {after!r}",
                where="--baseline",
                fix="compare reports of one model and target",
            )


def machine_class(report: Report) -> tuple[str, ...]:
    """What must be equal for milliseconds to mean the same."""
    e = report.environment
    return e.cpu, str(e.cores), e.gpu


def _judged(
    name: str, old: float | None, new: float | None, limit: float, *, higher_is_better: bool
) -> Change:
    """A change relative to ``old``; a quantity that is no longer measured is a regression."""
    if old is None:
        return Change(name, old, new, note="not in the baseline report")
    if new is None:
        return Change(name, old, new, worse=1.0, regressed=True)
    worse = (old - new) / abs(old) if higher_is_better else (new - old) / abs(old)
    return Change(name, old, new, worse=worse, regressed=worse > limit)


def _size_changes(old: Report, new: Report, limit: float) -> list[Change]:
    before, after = (float(r.size.bytes) if r.size else None for r in (old, new))
    if before is None and after is None:
        return []
    return [_judged("size (bytes)", before, after, limit, higher_is_better=False)]


def _key(row: SpeedRow) -> tuple[str, int, str]:
    return row.shape, row.threads, row.provider


def _speed_changes(old: Report, new: Report, limit: float) -> list[Change]:
    before, after = ({_key(row): row for row in r.speed} for r in (old, new))
    same_machine = machine_class(old) == machine_class(new)
    changes = []
    for key in dict.fromkeys([*before, *after]):
        label = f"{key[0]}, {key[1]} thread{'s' if key[1] != 1 else ''}, {key[2]}"
        b, a = before.get(key), after.get(key)
        ratios = (b.ratio if b else None, a.ratio if a else None)
        if a is None and new.speed:
            note = "this shape is not in the new report"
            changes.append(Change(f"speedup at {label}", *ratios, note=note))
        elif same_machine or b is None or a is None:
            changes.append(_judged(f"speedup at {label}", *ratios, limit, higher_is_better=True))
        else:
            changes.append(Change(f"speedup at {label}", *ratios, note=_other_machine(old, new)))
        if b and a and same_machine:
            name = f"latency at {label} (ms)"
            changes.append(_judged(name, b.ms, a.ms, limit, higher_is_better=False))
    return changes


def _other_machine(old: Report, new: Report) -> str:
    names = ["/".join(filter(None, machine_class(r))) or "unknown" for r in (old, new)]
    return f"incomparable: other machine ({names[0]}, now {names[1]})"


def _quality_changes(old: Report, new: Report, limit: float) -> list[Change]:
    before, after = old.quality, new.quality
    if before is None:
        return []
    name = f"quality loss, {before.metric}"
    if after is not None and after.metric != before.metric:
        note = f"incomparable: the metric is now {after.metric}"
        return [Change(name, before.loss, after.loss, note=note)]
    if before.loss is None:
        return [Change(name, None, after.loss if after else None, note="not in the baseline")]
    if after is None or after.loss is None:
        return [Change(name, before.loss, None, worse=1.0, regressed=True)]
    worse = after.loss - before.loss
    return [Change(name, before.loss, after.loss, worse=worse, regressed=worse > limit)]


def _verdict_change(old: Report, new: Report) -> Change:
    """Whatever the percentages say: from pass to fail is a regression."""
    worse = old.passed and not new.passed
    return Change(
        VERDICT,
        float(old.passed),
        float(new.passed),
        worse=float(worse),
        regressed=worse,
    )


def describe(comparison: Comparison) -> str:
    """A Markdown table of the changes, the verdict first."""
    word = "no regression" if comparison.passed else "REGRESSION"
    if not comparison.compared:
        word = "nothing could be compared"
    lines = [
        f"**{word}** beyond {100 * comparison.max_regression:.3g} % of the baseline report",
        "",
    ]
    lines += ["| | baseline | now | worse by | |", "|---|---:|---:|---:|---|"]
    for change in comparison.changes:
        status = change.note or ("regressed" if change.regressed else "ok")
        worse = "" if change.note else f"{max(change.worse, 0):.1%}"
        cells = [_number(value) for value in (change.old, change.new)]
        if change.name == VERDICT:
            cells, worse = [PASS if value else FAIL for value in (change.old, change.new)], ""
        lines.append(f"| {' | '.join([change.name, *cells, worse, status])} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
