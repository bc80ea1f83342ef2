"""The report of a directory that an export wrote, brought up to date by a later verify or bench.

What the new run measures takes the place of what the report had; here is what may stay, and which
limits count. Measuring is assess.py's, the verdict report/gates.py's.
"""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from bitnet_export.assess import command_line, judge

if TYPE_CHECKING:
    from bitnet_export.options import GateOptions, Progress
    from bitnet_export.report.schema import Report
    from bitnet_export.subject import Subject


def previous_report(subject: Subject, progress: Progress) -> Report:
    """The report of the directory, with this run's time, command and machine.

    Latencies of another machine are taken out: they would stand under this one's name.
    """
    from dataclasses import replace

    from bitnet_export import env
    from bitnet_export.report.compare import machine_class
    from bitnet_export.report.json_io import load_report
    from bitnet_export.report.schema import Environment

    before = load_report(subject.directory / "report.json")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    environment = Environment(**env.describe())
    report = replace(before, created=now, command=command_line(), environment=environment)
    if report.speed and machine_class(before) != machine_class(report):
        progress.note(
            f"speed was measured on another machine ({before.environment.cpu}, "
            f"{before.environment.cores} cores) and is taken out of the report; bench measures it"
        )
        report.speed = []
    return report


def judge_again(report: Report, gates: GateOptions, progress: Progress, *, parity: bool) -> Report:
    """The report judged by the limits of this run; says which of the run before no longer count,
    and keeps that in the report where one had failed."""
    from bitnet_export.report.gates import left_out, left_out_start

    again = tuple(left_out_start(name) for name, limit in vars(gates).items() if limit is not None)
    report.warnings = [text for text in report.warnings if not text.startswith(again)]
    for row, text in left_out(report, gates):
        if row.passed:
            progress.note(text)
        else:
            progress.warn(text)
            report.warnings.append(text)
    return judge(report, gates, parity=parity)
