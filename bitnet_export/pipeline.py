"""The stages in order: load, ternarize, export, lower, verify, measure, report.

Each ``run_*`` function is one command of the tool and one call of the Python API. What a stage
does is in its own package; here they only follow one another. How a finished directory is
checked and measured is in assess.py.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_export import assess, compress, history, manifest, onnx_io, shapes
from bitnet_export.errors import InputError, MissingRequirement, UsageError
from bitnet_export.export_run import (
    ExportRun,
    Stages,
    check_batch,
    drop_intermediate,
    load_model,
    on_step,
    own_tokenizer,
    pick_recipe,
    ternary_config,
)
from bitnet_export.options import (
    BenchOptions,
    ExportOptions,
    FinetuneOptions,
    Progress,
    SilentProgress,
    VerifyOptions,
)
from bitnet_export.output_dir import check_replaceable, staged
from bitnet_export.targets.session import cpu_advice

if TYPE_CHECKING:
    from bitnet_export.report.schema import Report
    from bitnet_export.ternary.parallel import Group


def run_export(options: ExportOptions, progress: Progress | None = None) -> Report:
    """Model file -> verified deployment directory, with its report.

    The directory appears whole or not at all, also when a gate fails (the report says which).
    Raises BitnetExportError subclasses; MissingRequirement after writing what could be made.
    """
    from bitnet_export import targets
    from bitnet_export.passes.base import check_skippable
    from bitnet_export.targets import trt_triton
    from bitnet_export.targets.trt_environment import engine_runs_here

    progress = progress or SilentProgress()
    stage = Stages(progress)
    directory = options.directory
    check_replaceable(directory, options.overwrite)
    check_skippable(options.skip_passes)
    target = targets.target_for(options.target)
    target.check_options(options)
    if options.compress and options.target not in ("onnx", "ort"):
        raise UsageError(
            "an engine is built and run from plain files",
            where=f"--compress --target {options.target}",
            fix="leave --compress out; targets onnx and ort have it",
        )
    with stage("load", str(options.model)):
        loaded = load_model(options, progress)
        recipe = pick_recipe(options, loaded, progress)
        options = replace(options, embeddings=options.embeddings or recipe[0].embeddings)
        opt_sizes = shapes.opt_sizes(loaded, options)
        if options.target in ("trt", "trt-rtx"):
            shapes.check_profile(loaded, options, opt_sizes)
    if options.triton is not None:
        trt_triton.check_repository(options.triton, loaded.name, options.overwrite)
    missing: MissingRequirement | None = None
    with staged(directory, options.overwrite) as out:
        work = ExportRun(out, options, loaded, stage, recipe)
        ternary_model = work.make_ternary()
        with stage("lower", options.target):
            lowered = target.lower(
                ternary_model, options, opt_sizes, on_pass=lambda name: progress.update(0, 0, name)
            )
            work.store_kept(lowered)
            onnx_io.write_model(lowered.model, out / manifest.MODEL)
            onnx_io.check_model(lowered.model, manifest.MODEL)
        for decision in lowered.decisions:
            progress.note(f"{decision.name}: {decision.choice} ({decision.reason})")
        job = work.build_job(lowered, opt_sizes)
        if target.builds:
            try:
                with stage("build", options.target):
                    target.build(job)
            except MissingRequirement as error:
                missing = error  # what was made is kept; said at the end
        if options.triton is not None:
            trt_triton.write_repository(job, loaded.name)
        if options.compress:
            with stage("compress", "zstd"):
                compress.compress_model(out / manifest.MODEL)
        work.write_manifest(lowered, opt_sizes, job.environment)
        report = work.assess(lowered, target.runs_on_cpu or engine_runs_here(job.environment))
        if not options.keep_intermediate:
            drop_intermediate(out)
    if missing is not None:
        raise missing
    return report


def run_finetune(options: FinetuneOptions, progress: Progress | None = None) -> Path:
    """Model file + data -> a ternary model file (torch.export program), the teacher's own weights
    made ternary and trained to answer as it does. Returns the file; its weights are exactly
    {-s, 0, +s}, which ``export`` recognises and keeps.

    Processes that torchrun or accelerate started share the work; rank 0 writes the file.
    """
    from bitnet_export.ternary.parallel import joined

    with joined(options.device) as group:
        return _finetune_together(options, progress or SilentProgress(), group)


def _finetune_together(options: FinetuneOptions, progress: Progress, group: Group) -> Path:
    import torch

    from bitnet_export.load import save
    from bitnet_export.ternary import convert, prepare, to_linear
    from bitnet_export.ternary.distill import finetune

    stage = Stages(progress)
    output = options.file
    if options.data is None:
        raise UsageError(
            "fine-tuning needs data",
            where="finetune",
            fix="pass --data FILE.npz, a safetensors file, or a directory of text with --tokenizer",
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    with stage("load", str(options.model)):
        loaded = load_model(options, progress)
    if loaded.module is None:
        raise InputError(
            "an ONNX file cannot be trained",
            where=str(options.model),
            fix="fine-tune the PyTorch model it came from (bitnet_export.save writes it)",
        )
    recipe, _ = pick_recipe(options, loaded, progress)
    ternary = ternary_config(recipe, options, loaded)
    with stage("ternarize", ternary.quantizer):
        teacher = copy.deepcopy(loaded.module).to(options.device)
        prepare(loaded.module, ternary)
        loaded.module.to(options.device)
    config = recipe.finetune_config(
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        temperature=options.temperature,
        labels=options.labels,
        eval_every=options.eval_every,
        checkpoint_dir=options.checkpoint_dir,
        resume=options.resume,
        patience=options.patience,
        accumulate=options.accumulate,
        recompute=options.recompute,
        parallel=options.parallel,
        bf16=options.bf16 or None,
        max_length=options.max_length,
        seed=options.seed,
    )
    check_batch(loaded, config.batch_size)
    with stage("fine-tune", f"{config.steps} steps"):
        result = finetune(
            loaded.module,
            teacher,
            options.data,
            config,
            eval_data=options.eval_data,
            tokenizer=options.tokenizer or own_tokenizer(options.model),
            progress=on_step(progress),
        )
    for text in result.missing:
        progress.note(f"not in the loss: {text}")
    if not group.leads:
        return output
    with stage("save", str(output)):
        convert(loaded.module.cpu())
        to_linear(loaded.module)
        save(loaded.module, output, loaded.example_inputs, assess.named_axes(loaded))
    best = result.best
    progress.note(f"held-out loss {best['loss']:.4g} at step {int(best['step'])}")
    block = history.finetune_block(result, config)
    history.write_history(output, options.model, ternary.activation_bits, block, recipe.name)
    return output


def run_verify(options: VerifyOptions, progress: Progress | None = None) -> Report:
    """Check a directory that an export wrote, on this machine; rewrite its report.

    Raises InputError where the directory is damaged or was written without its intermediates.
    """
    stage = Stages(progress or SilentProgress())
    with stage("load", str(options.directory)):
        subject = assess.open_directory(options)
    report = assess.previous_report(subject)
    with stage("verify"):
        report.parity, report.warnings = [], []
        sizes = assess.shapes_of(subject)
        assess.verify(report, subject, sizes, options.gates.atol, options.per_layer)
    with stage("quality"):
        assess.measure_quality(report, subject, options.metric, options.metric_data or options.data)
    assess.measure_sizes(report, subject)
    report.stages = list(stage.rows)
    report = assess.judge(report, options.gates, parity=True)
    assess.write(report, options.directory)
    return report


def run_bench(options: BenchOptions, progress: Progress | None = None) -> Report:
    """Time a directory that an export wrote against full precision; rewrite its report."""
    stage = Stages(progress or SilentProgress())
    with stage("load", str(options.directory)):
        subject = assess.open_directory(options)
    report = assess.previous_report(subject)
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
    report = assess.judge(report, options.gates, parity=False)
    assess.write(report, options.directory)
    return report
