"""``bitnet-export bench DIR``: latency of a deployment against full precision."""

from __future__ import annotations

from typing import Any

import click

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import show_report
from bitnet_export.cli.progress import make_progress
from bitnet_export.cli.values import GroupedCommand, option

MEASURE = "Measurement"


@click.command("bench", cls=GroupedCommand)
@click.argument("directory", type=shared.FILE)
@option(
    "--baseline",
    group=MEASURE,
    type=shared.FILE,
    metavar="FILE.onnx",
    help="Full-precision ONNX file. [default: the one the export kept]",
)
@option(
    "--shape",
    "shapes",
    group=MEASURE,
    multiple=True,
    metavar="batch=1,sequence=16",
    help="Sizes of the dynamic axes. Repeatable. [default: those of the export]",
)
@option(
    "--threads",
    group=MEASURE,
    type=click.IntRange(min=1),
    multiple=True,
    metavar="N",
    help="Threads of the runtime. Repeatable: each is measured.",
)
@option(
    "--samples",
    group=MEASURE,
    type=click.IntRange(min=5),
    default=50,
    help="Timed runs of each side and shape, interleaved.",
)
@shared.gate_options(parity=False)
@shared.run_options(threads=False)
def command(**values: Any) -> int:
    """Measure DIRECTORY, which an export wrote: medians over interleaved runs of both models."""
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    run = options.BenchOptions(gates=shared.take_gates(values), **values)
    progress = make_progress(quiet)
    try:
        from bitnet_export.pipeline import run_bench

        report = run_bench(run, progress)
    finally:
        progress.close()
    return show_report(report, as_json=as_json, directory=run.directory)
