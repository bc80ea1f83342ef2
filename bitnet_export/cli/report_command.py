"""``bitnet-export report DIR --baseline old.json``: a report as text, or against an older one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import show_report
from bitnet_export.cli.values import FRACTION, GroupedCommand, option
from bitnet_export.errors import EXIT_GATE_FAILED, EXIT_OK

if TYPE_CHECKING:
    from bitnet_export.report.schema import Report


DEFAULT_LIMIT = 0.05


@click.command("report", cls=GroupedCommand)
@click.argument("report", type=shared.FILE)
@option(
    "--baseline",
    group="Comparison",
    type=shared.FILE,
    metavar="OLD.json",
    help="Compare with this earlier report.",
)
@option(
    "--max-regression",
    group="Comparison",
    type=FRACTION,
    default=None,
    help="Fail if size, speed or quality got worse by more than this. [default: 5%]",
)
@option("--json", "as_json", group="Output", is_flag=True, help="Print JSON.")
@option("--markdown", group="Output", is_flag=True, help="Print Markdown, for a CI job's summary.")
def command(
    report: Path,
    baseline: Path | None,
    max_regression: float | None,
    as_json: bool,
    markdown: bool,
) -> int:
    """Show REPORT, a report.json or an exported directory; exit 1 if a gate failed in it.

    With --baseline, exit 1 if anything regressed.
    """
    from bitnet_export.report.json_io import load_report

    if as_json and markdown:
        raise click.UsageError("--json and --markdown: choose one of the two")
    if baseline is None and max_regression is not None:
        raise click.UsageError("--max-regression needs --baseline: nothing to have regressed from")
    current = load_report(_file(report))
    if baseline is not None:
        limit = DEFAULT_LIMIT if max_regression is None else max_regression
        return _compare(load_report(_file(baseline)), current, limit, as_json)
    if markdown:
        from bitnet_export.report.markdown import render_markdown

        click.echo(render_markdown(current))
        return EXIT_OK if current.passed else EXIT_GATE_FAILED
    return show_report(current, as_json=as_json)


def _file(path: Path) -> Path:
    return path / "report.json" if path.is_dir() else path


def _compare(old: Report, new: Report, limit: float, as_json: bool) -> int:
    from bitnet_export.report.compare import compare_reports, describe

    comparison = compare_reports(old, new, limit)
    if as_json:
        click.echo(json.dumps({"passed": comparison.passed, **asdict(comparison)}, indent=1))
    else:
        click.echo(describe(comparison))
    return EXIT_OK if comparison.passed else EXIT_GATE_FAILED
