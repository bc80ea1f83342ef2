"""``bitnet-export verify DIR``: does the deployment still compute what it should, here?"""

from __future__ import annotations

from typing import Any

import click

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import show_report
from bitnet_export.cli.progress import make_progress
from bitnet_export.cli.values import GroupedCommand, option

CHECKS = "Checks"


@click.command("verify", cls=GroupedCommand)
@click.argument("directory", type=shared.FILE)
@option(
    "--reference",
    group=CHECKS,
    type=shared.FILE,
    metavar="MODEL",
    help="Full-precision model to measure quality against, read as export reads it. "
    "[default: the one the export kept in DIRECTORY]",
)
@shared.model_options("npz or safetensors with inputs to measure quality on.")
@shared.metric_options(CHECKS)
@shared.gate_options()
@shared.run_options()
def command(**values: Any) -> int:
    """Check DIRECTORY, which an export wrote: hashes, versions, parity, and quality
    against full precision."""
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    run = options.VerifyOptions(gates=shared.take_gates(values), **values)
    progress = make_progress(quiet)
    try:
        from bitnet_export.pipeline import run_verify

        report = run_verify(run, progress)
    finally:
        progress.close()
    return show_report(report, as_json=as_json, directory=run.directory)
