"""``bitnet-export finetune MODEL --data FILE``: distil into a ternary model file."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import replace
from typing import Any

import click

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.export_command import check_model_exists
from bitnet_export.cli.output import check_output_file
from bitnet_export.cli.progress import make_progress
from bitnet_export.cli.values import GroupedCommand, option

TRAINING, SCALE, DATA = "Training", "Memory and processes", "Data"


@click.command("finetune", cls=GroupedCommand)
@click.argument("model", type=shared.FILE)
@option(
    "--output",
    "-o",
    group=shared.RUN,
    type=shared.FILE,
    metavar="FILE",
    help="The ternary model to write. [default: NAME-ternary.pt]",
)
@option("--force", "overwrite", group=shared.RUN, is_flag=True, help="Replace an existing file.")
@shared.model_options("npz, safetensors or a directory of .txt files to train on.")
@shared.ternary_options()
@option(
    "--steps",
    group=TRAINING,
    type=click.IntRange(min=1),
    help="Optimizer steps. [default: by the recipe]",
)
@option(
    "--batch-size",
    group=TRAINING,
    type=click.IntRange(min=1),
    help="Samples a step. [default: by the recipe]",
)
@option(
    "--lr",
    group=TRAINING,
    type=click.FloatRange(min=0, min_open=True),
    help="Learning rate. [default: by the recipe, or the number of parameters]",
)
@option(
    "--temperature",
    group=TRAINING,
    type=click.FloatRange(min=0, min_open=True),
    help="Softens the logits that are distilled. [default: by the recipe]",
)
@option(
    "--bf16",
    group=TRAINING,
    is_flag=True,
    help="Compute in bfloat16 where the processor can.",
)
@option(
    "--eval-every",
    group=TRAINING,
    type=click.IntRange(min=1),
    default=50,
    help="Steps between evaluations.",
)
@option(
    "--checkpoints",
    "checkpoint_dir",
    group=TRAINING,
    type=shared.FILE,
    metavar="DIR",
    help="Keep a checkpoint at every evaluation; without --resume, of a new run.",
)
@option(
    "--resume",
    group=TRAINING,
    is_flag=True,
    help="Go on from the newest checkpoint in --checkpoints, exactly.",
)
@option(
    "--patience",
    group=TRAINING,
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Stop after N evaluations without a new best. [default: never]",
)
@option(
    "--accumulate",
    group=SCALE,
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Work a batch off in N parts, to save memory.",
)
@option(
    "--recompute",
    group=SCALE,
    is_flag=True,
    help="Compute the blocks' activations twice instead of keeping them, to save memory.",
)
@option(
    "--parallel",
    group=SCALE,
    type=click.Choice(options.PARALLEL),
    default="ddp",
    help="Under torchrun or accelerate: each process has the whole model (ddp) or a part (fsdp).",
)
@option(
    "--device",
    group=SCALE,
    type=click.Choice(options.DEVICES),
    default="cpu",
    help="Where to train; cuda: one GPU a process.",
)
@option(
    "--labels",
    group=DATA,
    metavar="NAME",
    help="Array of --data with labels. [default: none, the full-precision model teaches]",
)
@option(
    "--eval-data",
    group=DATA,
    type=shared.FILE,
    metavar="FILE",
    help="Held-out inputs. [default: a part of --data]",
)
@option(
    "--tokenizer",
    group=DATA,
    type=shared.FILE,
    metavar="DIR",
    help="Hugging Face tokenizer for text. [default: MODEL, if it is a directory]",
)
@option(
    "--max-length",
    group=DATA,
    type=click.IntRange(min=2),
    default=128,
    help="Tokens a text is cut to.",
)
@shared.run_options()
def command(**values: Any) -> None:
    """Fine-tune MODEL as a ternary network against its own full-precision outputs.

    Writes a model file that `bitnet-export FILE` takes like any other. On several processes:
    torchrun --nproc-per-node 2 -m bitnet_export finetune MODEL ...
    """
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    run = options.FinetuneOptions(ternary=shared.take_ternary(values), **values)
    check_model_exists(run.model)
    if run.data is None:
        raise click.UsageError(
            "--data is missing: pass inputs by name, as --data FILE.npz (numpy.savez), a "
            "safetensors file, or a directory of .txt files with --tokenizer DIR"
        )
    if run.resume and run.checkpoint_dir is None:
        raise click.UsageError("--resume needs --checkpoints DIR, where the checkpoints are")
    run = replace(run, output=run.file)
    check_output_file(run.file, run.overwrite)
    leads = os.environ.get("RANK", "0") == "0"  # torchrun's; the others keep quiet
    progress = make_progress(quiet) if leads else options.SilentProgress()
    try:
        from bitnet_export.finetune_run import run_finetune

        written = run_finetune(run, progress)
    except KeyboardInterrupt:
        if run.checkpoint_dir is not None and any(run.checkpoint_dir.glob("step-*.pt")):
            progress.note(f"--resume goes on from the newest checkpoint in {run.checkpoint_dir}")
        raise
    finally:
        progress.close()
    if not leads:
        return
    if as_json:
        click.echo(json.dumps({"model": str(written)}))
    else:
        # The export compares with the original, which it reads as this run did.
        given = [word for spec in run.input_specs for word in ("--input", spec)]
        given = ["--model", run.factory, *given] if run.factory else []
        words = ["bitnet-export", str(written), "--target", "ort", *given]
        click.echo(f"written to {written}\nexport it with: {shlex.join(words)}")
