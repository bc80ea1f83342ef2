"""``bitnet-export export MODEL``: the whole way from a model to a verified deployment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import show_report
from bitnet_export.cli.progress import make_progress
from bitnet_export.cli.values import FRACTION, GroupedCommand, option

TARGET, GRAPH, SHAPES, CHECKS = "Target", "Graph", "Shapes", "Checks"


@click.command(
    "export",
    cls=GroupedCommand,
    epilog="Sizes and parts may be written as 5%, 0.05, 2x or 2.0.",
)
@click.argument("model", type=shared.FILE)
@option(
    "--target",
    "-t",
    group=TARGET,
    type=click.Choice(options.TARGETS),
    default="ort",
    help="onnx: any ONNX runtime. ort: ONNX Runtime, fast, nothing to compile. "
    "trt: TensorRT with the ternary plugin. trt-rtx: TensorRT-RTX.",
)
@option(
    "--output",
    "-o",
    group=TARGET,
    type=shared.FILE,
    metavar="DIR",
    help="Directory to write. [default: out/NAME-TARGET]",
)
@option("--force", "overwrite", group=TARGET, is_flag=True, help="Replace an earlier export.")
@option(
    "--dtype",
    group=TARGET,
    type=click.Choice(options.DTYPES),
    default="fp32",
    help="Floating point of everything that is not ternary.",
)
@option(
    "--engine/--no-engine",
    group=TARGET,
    default=True,
    help="Build the TensorRT engine as well (targets trt and trt-rtx).",
)
@option(
    "--compute-capability",
    "compute_capabilities",
    group=TARGET,
    multiple=True,
    metavar="7.5",
    help="Card that trt-rtx builds for, one engine each. Repeatable. [default: this machine's GPU, "
    "else 7.5]",
)
@option(
    "--portable-engine",
    group=TARGET,
    is_flag=True,
    help="trt-rtx: one engine for all --compute-capability, or for 8.0 and newer.",
)
@option(
    "--embed-plugin",
    group=TARGET,
    is_flag=True,
    help="trt: the engine carries the plugin library.",
)
@option(
    "--triton",
    group=TARGET,
    type=shared.FILE,
    metavar="DIR",
    help="Also write a Triton Inference Server model repository.",
)
@shared.model_options(
    "npz or safetensors with inputs by name: examples, to calibrate and measure quality on. "
    "With --finetune-steps also a directory of .txt files."
)
@option(
    "--kv-cache",
    "kv_cache",
    group=shared.MODEL,
    is_flag=True,
    help="A Hugging Face decoder's keys and values become inputs and outputs, for generation.",
)
@shared.ternary_options()
@option(
    "--finetune-steps",
    group=shared.TERNARY,
    type=click.IntRange(min=0),
    default=0,
    help="Distil for this many steps before the export; needs --data.",
)
@option(
    "--calibration",
    group=shared.TERNARY,
    type=click.Choice(options.CALIBRATIONS),
    default=None,
    help="Choose scales, or each trit as well, for the least error on --data. [default: trits with "
    "--data, none without]",
)
@option(
    "--sensitivity",
    group=shared.TERNARY,
    is_flag=True,
    help="Measure what each layer alone costs; the report draws it.",
)
@option(
    "--keep-budget",
    group=shared.TERNARY,
    type=FRACTION,
    help="Keep the most sensitive layers at int8, as long as that adds no more than this part of "
    "the layers' float32 bytes.",
)
@option(
    "--ort-kernel",
    group=GRAPH,
    type=click.Choice(options.ORT_KERNELS),
    default="auto",
    help="2bit for decoding, int8 for encoders; auto looks at the rows of --opt-shape.",
)
@option(
    "--activation-scale",
    group=GRAPH,
    type=click.Choice(options.ACTIVATION_SCALES),
    default="row",
    help="int8 kernel: a scale for each row (exact) or each tensor (faster).",
)
@option(
    "--embeddings",
    group=GRAPH,
    type=click.Choice(options.EMBEDDINGS),
    default=None,
    help="How embedding tables are stored. [default: by the recipe]",
)
@option(
    "--compress",
    group=GRAPH,
    is_flag=True,
    help="Keep model.onnx as model.onnx.zst, at about 1.57 bits a ternary weight; load_session and "
    "`bitnet-export unpack` decode it.",
)
@option("--opset", group=GRAPH, type=click.IntRange(min=18), help="ONNX opset. [default: 20]")
@option(
    "--skip-pass",
    "skip_passes",
    group=GRAPH,
    multiple=True,
    metavar="NAME",
    help="Leave an optional graph pass out. Repeatable; a wrong name lists them.",
)
@option(
    "--keep-intermediate/--no-keep-intermediate",
    group=GRAPH,
    default=True,
    help="Keep intermediate/: the full-precision and ternary ONNX that verify and bench use.",
)
@option(
    "--min-shape",
    "--min-shapes",
    "min_shapes",
    group=SHAPES,
    multiple=True,
    metavar="NAME:1x1",
    help="Smallest shape of an input (TensorRT profile). Repeatable.",
)
@option(
    "--opt-shape",
    "--opt-shapes",
    "opt_shapes",
    group=SHAPES,
    multiple=True,
    metavar="NAME:1x16",
    help="Shape to optimize for and to measure. Repeatable.",
)
@option(
    "--max-shape",
    "--max-shapes",
    "max_shapes",
    group=SHAPES,
    multiple=True,
    metavar="NAME:8x128",
    help="Largest shape of an input (TensorRT profile). Repeatable.",
)
@shared.metric_options(CHECKS)
@option("--verify/--no-verify", group=CHECKS, default=True, help="Compare the implementations.")
@option("--bench/--no-bench", group=CHECKS, default=True, help="Measure the speed.")
@shared.gate_options()
@shared.run_options()
def command(**values: Any) -> int:
    """Make MODEL ternary, deploy it for a target, verify, measure and report.

    MODEL: a file of bitnet_export.save, a state_dict or safetensors file (with --model), a
    Hugging Face directory, a GGUF file, or an ONNX file.
    """
    as_json, quiet = values.pop("as_json"), values.pop("quiet")
    ternary, gates = shared.take_ternary(values), shared.take_gates(values)
    run = options.ExportOptions(ternary=ternary, gates=gates, **values)
    check_model_exists(run.model)
    if run.finetune_steps and run.data is None:
        raise click.UsageError("--finetune-steps needs --data FILE.npz with training inputs")
    from bitnet_export.output_dir import check_replaceable

    run = replace(run, output=run.directory)
    check_replaceable(run.directory, run.overwrite)
    if run.skip_passes:
        from bitnet_export.passes.base import check_skippable

        check_skippable(run.skip_passes)
    progress = make_progress(quiet)
    try:
        from bitnet_export.pipeline import run_export

        report = run_export(run, progress)
    finally:
        progress.close()
    return show_report(report, as_json=as_json, directory=run.directory)


def check_model_exists(path: Path) -> None:
    """A first argument that is neither a command nor a path gets both explanations."""
    if path.exists():
        return
    from difflib import get_close_matches

    from bitnet_export.cli import COMMANDS

    close = get_close_matches(str(path), COMMANDS, n=1)
    hint = f" Did you mean the command {close[0]}?" if close else ""
    raise click.UsageError(f"there is no file, directory or command {str(path)!r}.{hint}")
