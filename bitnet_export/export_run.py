"""One export under way: what is made in which order, and what has been found out so far."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import assess, history, manifest, onnx_io, post_training, shapes, subject
from bitnet_export.errors import InputError, UsageError
from bitnet_export.finetune_run import finetune_for_export
from bitnet_export.opening import (
    drop_fixed_axes,
    export_loaded,
    load_model,
    ternary_config,
    unmatched,
)
from bitnet_export.options import ExportOptions
from bitnet_export.stages import Stages

if TYPE_CHECKING:
    import onnx

    from bitnet_export.load import LoadedModel
    from bitnet_export.report.schema import Decision, FinetuneBlock, LayerRow, Report
    from bitnet_export.targets import BuildJob, Lowered
    from bitnet_export.ternary import LayerStatus
    from bitnet_export.ternary.recipes import Recipe


class ExportRun:
    """One export under way: the directory being filled and what has been found out so far."""

    def __init__(
        self,
        out: Path,
        options: ExportOptions,
        loaded: LoadedModel,
        stage: Stages,
        recipe: tuple[Recipe, str],
    ) -> None:
        self.out, self.options, self.loaded, self.stage = out, options, loaded, stage
        self.recipe, self.recipe_reason = recipe
        self.config = ternary_config(self.recipe, options, loaded)
        self.layers: list[LayerRow] = []
        self.pass_results: list[Any] = []
        self.warnings: list[str] = []
        self.finetuned: FinetuneBlock | None = None
        self.refined = post_training.PostTraining()

    def make_ternary(self) -> onnx.ModelProto:
        """Write intermediate/baseline.onnx and intermediate/ternary.onnx; return the latter."""
        from bitnet_export.verify.feeds import write_arrays

        if self.loaded.module is None:
            model = self._ternarize_onnx()
        else:
            model = self._ternarize_module()
        onnx_io.write_model(model, self.out / manifest.TERNARY)
        write_arrays(subject.input_arrays(self.loaded), self.out / subject.INPUTS)
        ternary = [row for row in self.layers if row.status == "ternary"]
        if not ternary:
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in self.layers[:5])
            raise InputError(
                "no layer became ternary" + (f" ({reasons})" if reasons else ""),
                where=str(self.options.model),
                fix=_why_none(model, reasons),
            )
        return model

    def _ternarize_module(self) -> onnx.ModelProto:
        from bitnet_export.ternary import convert, prepare
        from bitnet_export.ternary.sensitivity import round_int8

        loaded, options = self.loaded, self.options
        assert loaded.module is not None
        with self.stage("export full precision"):
            baseline = self._export(loaded, manifest.BASELINE)
            self.warnings += drop_fixed_axes(loaded, baseline)
            onnx_io.write_model(baseline, self.out / manifest.BASELINE)
            del baseline  # its weights, where it was small enough to hold them
            self._export_reference()
        with self.stage("ternarize", self.config.quantizer):
            teacher = copy.deepcopy(loaded.module) if options.finetune_steps else None
            statuses = prepare(loaded.module, self.config)
        self.warnings += unmatched(options.ternary, [s.name for s in statuses])
        if post_training.wanted(options, self.recipe):
            with self.stage("calibrate"):
                self.refined = post_training.refine(
                    loaded, options, self.recipe, self.stage.progress
                )
        if teacher is not None:
            with self.stage("fine-tune", f"{options.finetune_steps} steps"):
                self.finetuned = finetune_for_export(
                    loaded, teacher, self.recipe, options, self.stage.progress
                )
        if self.finetuned is not None:
            round_int8(loaded.module, self.refined.kept_names)
        convert(loaded.module)
        self.layers = self.refined.rows([_layer_row(s) for s in statuses])
        with self.stage("export ternary"):
            return self._fold_norms(self._export(loaded, manifest.TERNARY))

    def _fold_norms(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Batch norms behind ternary convolutions go into their scales, here already, so that a
        layer's output is the same tensor in every later form of the model."""
        from bitnet_export import passes

        if not any(node.op_type == "BatchNormalization" for node in model.graph.node):
            return model
        model, results = passes.run_passes(
            model, [passes.FoldBatchNorm()], skip=self.options.skip_passes
        )
        self.pass_results += results
        return model

    def _export_reference(self) -> None:
        """For a file that finetune wrote: quality is judged against what it was trained from."""
        found = history.read_history(self.options.model)
        if found is None:
            return
        _, self.finetuned, trained_bits = found
        if trained_bits != self.config.activation_bits:
            self.warnings.append(
                f"the model was fine-tuned with --activation-bits {trained_bits} and is exported "
                f"with {self.config.activation_bits}"
            )
        source = history.origin(self.options.model)
        assert source is not None
        try:
            original = load_model(replace(self.options, model=source), self.stage.progress)
        except UsageError as error:
            self.warnings.append(
                f"{source}, which this model was fine-tuned from, cannot be read "
                f"({error.what}); quality is judged against the fine-tuned weights themselves"
            )
            return
        model = self._export(original, assess.REFERENCE)
        onnx_io.write_model(model, self.out / assess.REFERENCE)

    def _export(self, loaded: LoadedModel, name: str) -> onnx.ModelProto:
        from bitnet_export.load import kv_cache

        newer = self.options.kv_cache and self.options.target in ("onnx", "ort")
        opset = self.options.opset or (kv_cache.OPSET if newer else None)
        return export_loaded(loaded, opset, path=self.out / name)

    def _ternarize_onnx(self) -> onnx.ModelProto:
        from bitnet_export import passes
        from bitnet_export.load.onnx_file import read_onnx
        from bitnet_export.report.schema import LayerRow

        assert self.loaded.onnx_path is not None
        post_training.refuse_onnx(self.options)
        axes = self.loaded.dynamic_axes
        given = {
            name: [axes.get(name, {}).get(i, size) for i, size in enumerate(value.shape)]
            for name, value in self.loaded.example_inputs.items()
        }
        model = read_onnx(self.loaded.onnx_path, given)
        with self.stage("ternarize", "ONNX"):
            model = passes.raise_opset(model, self.options.opset)
            onnx_io.write_model(model, self.out / manifest.BASELINE)
            self._check_original()
            dense = passes.TernarizeDense(self.config)
            ternary, results = passes.run_passes(
                model,
                [
                    passes.FoldConstants(),
                    passes.Canonicalize(),
                    passes.RecogniseTernary(self.config.activation_bits),
                    dense,
                    passes.FoldBatchNorm(),
                ],
                skip=self.options.skip_passes,
            )
        self.pass_results += results
        made = {name: how for result in results for name, how in result.ternarized.items()}
        kept = {s.where: s.reason for r in results[-3:-1] for s in r.skipped if s.where not in made}
        names = subject.ternary_layer_names(ternary)
        self.layers = [
            LayerRow(name=n, status="ternary", reason=made.get(n, "a TernaryMatMul already"))
            for n in names
        ]
        for name, reason in kept.items():
            status = "ternary" if passes.is_ternary_conv(reason) else "kept"
            self.layers.append(LayerRow(name=name, status=status, reason=reason))
        self.warnings += unmatched(self.options.ternary, [row.name for row in self.layers])
        return ternary

    def _check_original(self) -> None:
        """The file must run as it is on the inputs that all is measured with, if anything is."""
        from bitnet_export.verify.feeds import make_case
        from bitnet_export.verify.original import check_original

        if not (self.options.verify or self.options.bench):
            return
        sizes = shapes.opt_sizes(self.loaded, self.options)
        case = make_case(sizes, self.loaded.example_inputs, self.loaded.dynamic_axes)
        baseline = self.out / manifest.BASELINE
        check_original(baseline, case, self.options.model, self.options.threads)

    def store_kept(self, lowered: Lowered) -> None:
        """Layers kept at int8 get their weights stored so, where the target's file can hold it."""
        from bitnet_export import passes
        from bitnet_export.passes.store_int8 import StoreInt8

        if self.refined.kept and self.options.target in post_training.INT8_TARGETS:
            store = StoreInt8(self.refined.kept_names)
            lowered.model, results = passes.run_passes(lowered.model, [store])
            lowered.passes += results

    def build_job(self, lowered: Lowered, opt_sizes: dict[str, int]) -> BuildJob:
        """What the target's build starts from."""
        from bitnet_export.targets import BuildJob

        options, axes = self.options, self.loaded.dynamic_axes
        asked = {
            kind: shapes.parse_shapes(given, axes, f"--{kind}-shape")
            for kind, given in (
                ("min", options.min_shapes),
                ("opt", options.opt_shapes),
                ("max", options.max_shapes),
            )
        }
        return BuildJob(
            directory=self.out,
            options=options,
            lowered=lowered,
            inputs=subject.describe_graph(lowered.model, self.loaded)[0],
            opt=opt_sizes,
            low=asked["min"],
            high=asked["max"],
            asked_opt=asked["opt"],
            limits=self.loaded.axis_limits,
            progress=self.stage.progress,
        )

    def write_manifest(
        self, lowered: Lowered, opt_sizes: dict[str, int], environment: dict[str, Any]
    ) -> None:
        """Write manifest.json over the files made so far."""
        from bitnet_export import env

        loaded, options = self.loaded, self.options
        inputs, outputs = subject.describe_graph(lowered.model, loaded)
        record = manifest.Manifest(
            name=loaded.name,
            target=options.target,
            dtype=lowered.dtype or options.dtype,
            inputs=inputs,
            outputs=outputs,
            axis_limits=dict(loaded.axis_limits),
            opt_sizes=opt_sizes,
            parity_kinds=list(lowered.parity_kinds),
            runtime=env.package_versions(),
            requires=lowered.requires,
            environment=environment,
            model={"kind": loaded.kind, "source": str(options.model)},
        )
        files = [p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file()]
        record.files = manifest.record_files(self.out, sorted(files))
        manifest.write_manifest(record, self.out)

    def assess(self, lowered: Lowered, runs_here: bool) -> Report:
        """Verify, measure and judge; write the report beside the model."""
        options, loaded = self.options, self.loaded
        made = subject.Subject(
            directory=self.out,
            record=manifest.read_manifest(self.out),
            module=loaded.module,
            example_inputs=loaded.example_inputs,
            threads=options.threads,
            seed=options.seed,
        )
        report = assess.new_report(made, self.config, list(self.layers))
        report.finetune = self.finetuned
        report.decisions += [self._recipe_row(), *self.refined.decisions]
        assess.add_passes(report, [*self.pass_results, *lowered.passes], lowered.decisions)
        if options.verify:
            with self.stage("verify"):
                sizes = shapes.verify_shapes(loaded, options)
                assess.verify(
                    report,
                    made,
                    sizes,
                    options.gates.atol,
                    options.per_layer,
                    on_step=lambda text: self.stage.progress.update(0, 0, text),
                )
        # What follows runs the files; a large model leaves its room to them.
        made.module = loaded.module = None
        if options.verify:
            with self.stage("quality"):
                assess.measure_quality(
                    report, made, options.metric, options.metric_data or options.data
                )
        assess.measure_sizes(report, made)
        if options.bench and runs_here:
            with self.stage("bench"):
                assess.bench(report, made, on_case=lambda c: self.stage.progress.update(0, 0, c))
        report.warnings += self._warnings(report)
        for text in report.warnings:
            self.stage.progress.warn(text)
        report.stages = list(self.stage.rows)
        report = assess.judge(report, options.gates, parity=options.verify)
        assess.write(report, self.out)
        return report

    def _recipe_row(self) -> Decision:
        from bitnet_export.report.schema import Decision

        return Decision(name="recipe", choice=self.recipe.name, reason=self.recipe_reason)

    def _warnings(self, report: Report) -> list[str]:
        found = [*self.warnings, *(w for result in self.pass_results for w in result.warnings)]
        if self.finetuned is None and report.quality is not None and not self._all_exact():
            agreement = assess.agreement_text(report.quality)
            found.append(
                f"ternarized without training: {agreement}. Fine-tuning recovers most of the loss: "
                f"bitnet-export finetune {self.options.model} --data YOUR_DATA.npz -o ternary.pt"
            )
        return found

    def _all_exact(self) -> bool:
        return all("already ternary" in r.reason for r in self.layers if r.status == "ternary")


def _layer_row(status: LayerStatus) -> LayerRow:
    from bitnet_export.report.schema import LayerRow

    return LayerRow(name=status.name, status=status.status, reason=status.reason)


def _why_none(model: onnx.ModelProto, reasons: str) -> str:
    """What to do about a model in which nothing became ternary."""
    integer = ("MatMulInteger", "QLinearMatMul", "QGemm", "ConvInteger", "QLinearConv")
    found = {n.op_type for n in model.graph.node} & {*integer, "MatMulNBits", "QAttention"}
    found |= {n.op_type for n in model.graph.node if n.op_type.startswith("DynamicQuantize")}
    if found:
        return f"it is quantized already ({', '.join(sorted(found))}): pass the model before that"
    if "not float32 or float16" in reasons:
        return "export the model in float32"
    return "the model needs linear layers; see --include and --exclude"


def drop_intermediate(out: Path) -> None:
    shutil.rmtree(out / manifest.INTERMEDIATE, ignore_errors=True)
