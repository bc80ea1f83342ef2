"""``bitnet-export convert MODEL --to hf-bitnet``: a ternary model as another checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.export_command import check_model_exists
from bitnet_export.cli.output import check_output_file
from bitnet_export.cli.progress import make_progress
from bitnet_export.cli.values import GroupedCommand, option

OUTPUT = "Output"


@click.command("convert", cls=GroupedCommand)
@click.argument("model", type=shared.FILE)
@option(
    "--to",
    group=OUTPUT,
    type=click.Choice(options.CHECKPOINTS),
    required=True,
    help="state-dict: weights to train on from, .safetensors or .pt. hf-bitnet: Hugging Face "
    "directory with packed trits. huggingface: the same with plain weights.",
)
@option(
    "--output",
    "-o",
    group=OUTPUT,
    type=shared.FILE,
    metavar="PATH",
    help="File or directory to write. [default: NAME-weights.safetensors, NAME-hf-bitnet, "
    "NAME-huggingface]",
)
@option("--force", "overwrite", group=OUTPUT, is_flag=True, help="Replace an existing file.")
@option(
    "--base",
    group=OUTPUT,
    type=shared.FILE,
    metavar="DIR",
    help="Hugging Face directory the model was fine-tuned from. [default: what finetune recorded]",
)
@shared.model_options("npz or safetensors with example inputs by name.")
@option("--json", "as_json", group=shared.RUN, is_flag=True, help="Print the result as JSON.")
@option(
    "--quiet", "-q", group=shared.RUN, is_flag=True, help="Only warnings on stderr, no progress."
)
def command(**values: Any) -> None:
    """Write MODEL, whose layers are ternary, as a checkpoint that others read.

    MODEL: what finetune wrote, a Hugging Face BitNet directory, a GGUF file with TQ1_0 or TQ2_0
    tensors, or any other model file with ternary weights. Trits and scales are kept exactly.
    """
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    run = options.ConvertOptions(**values)
    check_model_exists(run.model)
    run = replace(run, output=run.path)
    if run.to == "state-dict":
        check_output_file(run.path, run.overwrite)
    progress = make_progress(quiet)
    try:
        from bitnet_export.convert_run import run_convert

        written = run_convert(run, progress)
    finally:
        progress.close()
    click.echo(
        json.dumps({"to": run.to, "path": str(written)}) if as_json else f"written to {written}"
    )
