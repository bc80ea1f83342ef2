"""What a command prints on stdout about a report, and where it may write."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitnet_export.errors import EXIT_GATE_FAILED, EXIT_OK, UsageError

if TYPE_CHECKING:
    from bitnet_export.report.schema import Report, SizeBlock

MAX_ROWS = 8


def check_output_file(path: Path, overwrite: bool) -> None:
    """Raise UsageError if ``path`` exists and may not be replaced, or cannot be made: better now
    than when the work of an hour is to be written."""
    where = f"--output {path}"
    if path.is_dir():
        raise UsageError("it is a directory", where=where, fix="name a file")
    if path.exists() and not overwrite:
        raise UsageError("the file exists", where=where, fix="pass --force to replace it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise UsageError(f"{parent} is a file", where=where, fix="name a file in a directory")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"nothing can be written in {parent}", where=where, fix="choose another")


def show_report(report: Report, *, as_json: bool, directory: Path | None = None) -> int:
    """Print the report and return the exit code that its verdict means."""
    if as_json:
        from bitnet_export.report.json_io import to_json

        click.echo(to_json(report))
    else:
        click.echo("\n".join(summary(report)))
        if directory is not None:
            click.echo(f"written to {directory}/ (report: {directory / 'report.html'})")
    sys.stdout.flush()
    return EXIT_OK if report.passed else EXIT_GATE_FAILED


def summary(report: Report) -> list[str]:
    """The report in lines a terminal can hold."""
    from bitnet_export.report.text import megabytes, milliseconds, number, percent, smaller, times

    rows: list[tuple[str, ...]] = []
    if report.size:
        size = report.size
        rows.append(
            (
                "size",
                f"{megabytes(size.baseline_bytes)} {size.baseline_dtype}",
                megabytes(size.bytes),
                smaller(size.ratio),
            )
        )
        rows += _other_sizes(size)
    rows += [
        (
            f"{speed.shape}, {speed.threads} thread{'s' if speed.threads > 1 else ''}",
            f"{milliseconds(speed.baseline_ms)} ms",
            f"{milliseconds(speed.ms)} ms",
            f"{times(speed.ratio)} as fast",
        )
        for speed in report.speed[:MAX_ROWS]
    ]
    quality = report.quality
    if quality:
        loss = f"loss {percent(quality.loss)}"
        rows.append((quality.metric, number(quality.baseline), number(quality.value), loss))
    lines = [f"{report.model.name} -> {report.model.target}"]
    lines += align([("", "full precision", "ternary", ""), *rows]) if rows else []
    lines += _parity_line(report)
    failed = [gate for gate in report.gates if not gate.passed]
    lines += [f"FAILED {gate.name}: {gate.detail}" for gate in failed]
    passed = len(report.gates) - len(failed)
    return [*lines, f"{report.verdict.upper()}: {passed} of {len(report.gates)} gates passed"]


def _other_sizes(size: SizeBlock) -> list[tuple[str, ...]]:
    """The ratio over the floating-point type that the baseline is not in, and what compression
    did."""
    from bitnet_export.report.text import megabytes, smaller

    rows: list[tuple[str, ...]] = []
    for name, count in (("fp32", size.fp32_bytes), ("fp16", size.fp16_bytes)):
        if count is not None and name != size.baseline_dtype:
            ratio = smaller(count / size.bytes)
            rows.append(("", f"{megabytes(count)} {name}", megabytes(size.bytes), ratio))
    if size.unpacked_bytes is not None:
        codes = size.code_bits_per_weight
        detail = "" if codes is None else f"{codes:.2f} bits a ternary weight"
        rows.append((f"  {size.compression}, unpacked", "", megabytes(size.unpacked_bytes), detail))
    return rows


def _parity_line(report: Report) -> list[str]:
    if not report.parity:
        return ["parity: not checked"]
    good = sum(row.passed for row in report.parity)
    worst = max((row.max_abs for row in report.parity if row.max_abs is not None), default=None)
    largest = f", largest difference {worst:.2g}" if worst is not None else ""
    return [f"parity: {good} of {len(report.parity)} comparisons agree{largest}"]


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells -> lines with aligned columns, the first to the left, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join([first, *rest]).rstrip())
    return lines
