"""A report in at most twenty lines of Markdown, for a CI job's summary. Renders, judges nothing."""

from __future__ import annotations

from bitnet_export.report.schema import Report
from bitnet_export.report.text import (
    headline,
    megabytes,
    milliseconds,
    number,
    percent,
    plural,
    times,
)

MAX_LINES = 20
MAX_SPEED_ROWS = 5
MAX_FAILURES = 4
MAX_ENGINE_ROWS = 2


def render_markdown(report: Report) -> str:
    """Report -> Markdown, at most twenty lines."""
    word = "PASS" if report.passed else "FAIL"
    lines = [f"## {word}: {_cell(report.model.name)} → {report.model.target}", ""]
    lines += [f"{_cell(headline(report))}.", ""]
    lines += _table(report)
    lines += _failures(report)
    if report.warnings:
        lines += [
            "",
            f"{plural(len(report.warnings), 'warning')}, the first: {_cell(report.warnings[0])}",
        ]
    return "\n".join(lines[:MAX_LINES]) + "\n"


def _table(report: Report) -> list[str]:
    rows = []
    if report.size:
        s = report.size
        label = f"size, {s.baseline_dtype} to ternary"
        rows.append((label, megabytes(s.baseline_bytes), megabytes(s.bytes), times(s.ratio)))
        for e in s.engines[:MAX_ENGINE_ROWS]:
            label = f"engine {e.file}, {e.weights} weights"
            rows.append((label, "", megabytes(e.bytes), times(e.ratio)))
    for row in report.speed[:MAX_SPEED_ROWS]:
        label = f"ms, {row.shape}, {row.threads} thr."
        rows.append((label, milliseconds(row.baseline_ms), milliseconds(row.ms), times(row.ratio)))
    if report.quality:
        q = report.quality
        loss = f"{percent(q.loss)} lost"
        rows.append((q.metric, number(q.baseline), number(q.value), loss))
    if not rows:
        return []
    head = ["| | full precision | ternary | |", "|---|---:|---:|---:|"]
    return head + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _failures(report: Report) -> list[str]:
    failed = [gate for gate in report.gates if not gate.passed]
    if not failed:
        return ["", f"All {len(report.gates)} gates passed."] if report.gates else []
    shown = [f"- **{gate.name}**: {_cell(gate.detail)}" for gate in failed[:MAX_FAILURES]]
    return ["", f"{len(failed)} of {len(report.gates)} gates failed:", *shown]


def _cell(text: str) -> str:
    """One line that cannot break a table."""
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= 300 else f"{flat[:297]}..."
