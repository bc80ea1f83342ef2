"""The stages in order: load, ternarize, export, lower, verify, measure, report.

Each ``run_*`` function is one command of the tool and one call of the Python API. What a stage
does is in its own package; here they only follow one another. How a finished directory is
checked and measured is in assess.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bitnet_export import assess, compress, manifest, onnx_io, reopened, shapes
from bitnet_export.errors import InputError, MissingRequirement, UsageError
from bitnet_export.export_run import ExportRun, drop_intermediate
from bitnet_export.opening import load_model, pick_recipe, reference_onnx
from bitnet_export.options import (
    BenchOptions,
    ExportOptions,
    Progress,
    SilentProgress,
    VerifyOptions,
)
from bitnet_export.output_dir import check_replaceable, staged
from bitnet_export.stages import Stages
from bitnet_export.subject import open_directory, shapes_of
from bitnet_export.targets.session import cpu_advice

if TYPE_CHECKING:
    from bitnet_export.report.schema import Report
    from bitnet_export.targets import Target


def run_export(options: ExportOptions, progress: Progress | None = None) -> Report:
    """Model file -> verified deployment directory, with its report.

    The directory appears whole or not at all, also when a gate fails (the report says which).
    Raises BitnetExportError subclasses; MissingRequirement after writing what could be made.
    """
    from bitnet_export import targets
    from bitnet_export.targets import trt_triton

    stage = Stages(progress or SilentProgress())
    target = targets.target_for(options.target)
    _check_options(options, target)
    with stage("load", str(options.model)):
        loaded = load_model(options, stage.progress)
        recipe = pick_recipe(options, loaded, stage.progress)
        options = replace(options, embeddings=options.embeddings or recipe[0].embeddings)
        opt_sizes = shapes.opt_sizes(loaded, options)
        if options.target in ("trt", "trt-rtx"):
            shapes.check_profile(loaded, options, opt_sizes)
    if options.triton is not None:
        trt_triton.check_repository(options.triton, loaded.name, options.overwrite)
    with staged(options.directory, options.overwrite) as out:
        work = ExportRun(out, options, loaded, stage, recipe)
        report, missing = _write_directory(work, target, opt_sizes)
    if missing is not None:
        raise missing
    return report


def _check_options(options: ExportOptions, target: Target) -> None:
    """What can be refused before the model is read."""
    from bitnet_export.passes.base import check_skippable
    from bitnet_export.verify.quality import load_metric

    check_replaceable(options.directory, options.overwrite)
    check_skippable(options.skip_passes)
    target.check_options(options)
    if options.metric is not None:
        load_metric(options.metric)
        if not options.verify:
            raise UsageError(
                "nothing is measured without verification",
                where="--metric --no-verify",
                fix="leave one of the two out",
            )
    _check_data_file(options.metric_data, "--metric-data")
    if not options.finetune_steps:  # which may be on text
        _check_data_file(options.data, "--data")
    if options.compress and options.target not in ("onnx", "ort"):
        raise UsageError(
            "an engine is built and run from plain files",
            where=f"--compress --target {options.target}",
            fix="leave --compress out; targets onnx and ort have it",
        )


def _check_data_file(path: Path | None, option: str) -> None:
    """Raise InputError for data that quality cannot be measured on: no file, or a directory."""
    if path is None or path.is_file():
        return
    if path.is_dir():
        raise InputError(
            "it is a directory; what is calibrated and measured on are arrays by input name",
            where=f"{option} {path}",
            fix="write them to an npz file (numpy.savez) or a safetensors file; text is for "
            "fine-tuning alone",
        )
    raise InputError("there is no such file", where=f"{option} {path}")


def _write_directory(
    work: ExportRun, target: Target, opt_sizes: dict[str, int]
) -> tuple[Report, MissingRequirement | None]:
    """Everything the directory holds; and what was missing to build the target's engine, if
    something was: the rest is kept then."""
    from bitnet_export.targets import trt_triton
    from bitnet_export.targets.trt_environment import engine_runs_here

    options, stage, missing = work.options, work.stage, None
    ternary_model = work.make_ternary()
    with stage("lower", options.target):
        lowered = target.lower(
            ternary_model, options, opt_sizes, on_pass=lambda p: stage.progress.update(0, 0, p)
        )
        del ternary_model  # no large model stays in memory longer than somebody needs it
        work.store_kept(lowered)
        onnx_io.write_model(lowered.model, work.out / manifest.MODEL)
        onnx_io.check_model(lowered.model, manifest.MODEL)
    for decision in lowered.decisions:
        stage.progress.note(f"{decision.name}: {decision.choice} ({decision.reason})")
    job = work.build_job(lowered, opt_sizes)
    if target.builds:
        try:
            with stage("build", options.target):
                target.build(job)
        except MissingRequirement as error:
            missing = error
    if options.triton is not None:
        trt_triton.write_repository(job, work.loaded.name)
    if options.compress:
        with stage("compress", "zstd"):
            compress.compress_model(work.out / manifest.MODEL)
    work.write_manifest(lowered, opt_sizes, job.environment)
    lowered.model = onnx_io.skeleton(lowered.model)
    report = work.assess(lowered, target.runs_on_cpu or engine_runs_here(job.environment))
    if not options.keep_intermediate:
        drop_intermediate(work.out)
    return report, missing


def run_verify(options: VerifyOptions, progress: Progress | None = None) -> Report:
    """Check a directory that an export wrote, on this machine; rewrite its report.

    Raises InputError where the directory is damaged or was written without its intermediates.
    """
    from bitnet_export.verify.quality import load_metric

    stage = Stages(progress or SilentProgress())
    _check_data_file(options.data, "--data")
    _check_data_file(options.metric_data, "--metric-data")
    if options.metric is not None:
        load_metric(options.metric)
    with stage("load", str(options.directory)):
        subject = open_directory(options)
    report = reopened.previous_report(subject, stage.progress)
    with stage("verify"):
        report.parity, report.warnings = [], []
        sizes = shapes_of(subject)
        assess.verify(
            report,
            subject,
            sizes,
            options.gates.atol,
            options.per_layer,
            on_step=lambda text: stage.progress.update(0, 0, text),
        )
    data = options.metric_data or options.data
    with stage("quality"), _reference_folder(options) as folder:
        reference = None
        if options.reference is not None:
            reference = Path(folder) / "reference.onnx"
            model = reference_onnx(options, subject.record, stage.progress)
            onnx_io.write_model(model, reference)
        assess.measure_quality(report, subject, options.metric, data, reference)
    assess.measure_sizes(report, subject)
    report.stages = list(stage.rows)
    report = reopened.judge_again(report, options.gates, stage.progress, parity=True)
    assess.write(report, options.directory)
    return report


def _reference_folder(options: VerifyOptions) -> AbstractContextManager[str]:
    """For the model of --reference, which may be large: where there is room for the others, not in
    /tmp, which is memory on many machines."""
    if options.reference is None:
        return nullcontext("")
    return TemporaryDirectory(prefix=".reference-", dir=options.directory)


def run_bench(options: BenchOptions, progress: Progress | None = None) -> Report:
    """Time a directory that an export wrote against full precision; rewrite its report."""
    from bitnet_export.load.detect import detect

    if options.baseline is not None and detect(options.baseline) != "onnx":
        raise InputError(
            "the baseline is no ONNX file", where=f"--baseline {options.baseline}", fix="pass one"
        )
    stage = Stages(progress or SilentProgress())
    with stage("load", str(options.directory)):
        subject = open_directory(options)
    report = reopened.previous_report(subject, stage.progress)
    with stage("bench"):
        report.speed = []
        for threads in options.threads or (None,):
            subject.threads = threads
            assess.bench(
                report,
                subject,
                baseline=options.baseline,
                shapes=options.shapes,
                samples=options.samples,
                on_case=lambda c: stage.progress.update(0, 0, c),
            )
    advice = cpu_advice(subject.record.target)
    if advice:
        stage.progress.note(advice)
    assess.measure_sizes(report, subject)
    report.stages = list(stage.rows)
    report = reopened.judge_again(report, options.gates, stage.progress, parity=False)
    assess.write(report, options.directory)
    return report
