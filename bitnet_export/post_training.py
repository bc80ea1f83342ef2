"""What an export does between "ternary" and "deployed" without training: find out which layers
are sensitive, keep some at int8, calibrate the others.

Chooses the inputs, tells the progress display and keeps rows for the report; the work itself is
ternary/sensitivity.py's and ternary/calibrate.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bitnet_export.errors import UsageError
from bitnet_export.options import ExportOptions, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from bitnet_export.load import LoadedModel
    from bitnet_export.report.schema import Decision, LayerRow
    from bitnet_export.ternary.calibrate import CalibratedLayer
    from bitnet_export.ternary.recipes import Recipe
    from bitnet_export.ternary.sensitivity import LayerSensitivity

# Samples looked at. Sensitivity runs the model once a layer, calibration twice in all.
CALIBRATION_SAMPLES, SENSITIVITY_SAMPLES = 128, 16
# Targets whose file can hold a kept layer's weights as int8.
INT8_TARGETS = ("onnx", "ort")


@dataclass
class PostTraining:
    """What was found and done, by layer path. kept: the layers that are no longer ternary."""

    sensitivity: list[LayerSensitivity] = field(default_factory=list)
    kept: list[LayerSensitivity] = field(default_factory=list)
    calibrated: list[CalibratedLayer] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    target: str = "ort"

    @property
    def kept_names(self) -> list[str]:
        """Paths of the kept layers."""
        return [row.name for row in self.kept]

    def rows(self, layers: list[LayerRow]) -> list[LayerRow]:
        """The report's layer rows with what is known of each; kept layers change their status."""
        found = {row.name: row for row in self.sensitivity}
        errors = {row.name: row for row in self.calibrated}
        kept = set(self.kept_names)
        result = []
        for row in layers:
            if row.name in found:
                seen = found[row.name]
                row = replace(row, sensitivity=seen.error, saved_bytes=seen.saved_bytes)
            if row.name in errors:
                made = errors[row.name]
                row = replace(row, plain_error=made.before**0.5, output_error=made.after**0.5)
            if row.name in kept:
                status, reason = self._kept_status(found[row.name])
                row = replace(row, status=status, reason=reason, saved_bytes=None)
            result.append(row)
        return result

    def _kept_status(self, row: LayerSensitivity) -> tuple[str, str]:
        why = f"changes the output by {row.error:.1%} if it alone is ternary"
        if self.target in INT8_TARGETS:
            return "int8", why
        return "kept", f"{why}; {self.target} stores no int8 layer"


def refine(
    loaded: LoadedModel, options: ExportOptions, recipe: Recipe, progress: Progress
) -> PostTraining:
    """Measure, keep and calibrate a prepared module in place, as far as options and recipe say."""
    from bitnet_export.report.schema import Decision

    done = PostTraining(target=options.target)
    method, why = _method(options, recipe)
    if method != "none" and options.calibration is None:
        batch = sample_inputs(loaded, options, 1)
        if batch is loaded.example_inputs:
            method, why = "none", f"{options.data} does not hold every input of the model"
        elif (fixed := loaded.fixed_batch) is not None and fixed < CALIBRATION_SAMPLES:
            method, why = "none", f"the model's batch is fixed at {fixed}, few to calibrate on"
    if options.sensitivity or options.keep_budget is not None:
        _measure(done, loaded, options, progress)
    if options.keep_budget is not None:
        _keep(done, loaded, options.keep_budget)
    if method != "none":
        _calibrate(done, loaded, options, method, progress)
        if not done.calibrated:
            method, why = "none", "every linear layer was ternary already"
        elif options.data is None or options.data.is_dir():
            why += ", on the example inputs: --data gives real ones"
    if options.data is not None or options.calibration is not None:
        done.decisions.append(Decision(name="calibration", choice=method, reason=why))
    for decision in done.decisions:
        progress.note(f"{decision.name}: {decision.choice} ({decision.reason})")
    return done


def wanted(options: ExportOptions, recipe: Recipe) -> bool:
    """Whether refine has anything to do or to say."""
    asked = (
        options.sensitivity or options.keep_budget is not None or options.calibration is not None
    )
    return asked or _method(options, recipe)[0] != "none"


def refuse_onnx(options: ExportOptions) -> None:
    """Raise UsageError if an ONNX input is asked for what needs the PyTorch model."""
    asked = {
        "--sensitivity": options.sensitivity,
        "--keep-budget": options.keep_budget is not None,
        "--calibration": options.calibration not in (None, "none"),
        "--finetune-steps": options.finetune_steps > 0,
    }
    for flag, given in asked.items():
        if given:
            raise UsageError(
                f"{flag} needs the layers of a PyTorch model; this is an ONNX file",
                where=str(options.model),
                fix="export the model it came from (bitnet_export.save writes it), or leave "
                f"{flag} out",
            )


def _method(options: ExportOptions, recipe: Recipe) -> tuple[str, str]:
    """The calibration method and why. It needs real inputs: random ones would mislead it."""
    if options.calibration is not None:
        return options.calibration, "asked for"
    if options.data is None or options.data.is_dir():
        return "none", "no --data with arrays to calibrate on"
    if options.finetune_steps:
        return "none", "training starts better from the model's own weights"
    if recipe.calibration == "none":
        return "none", f"the recipe {recipe.name} leaves it out"
    return (
        recipe.calibration,
        f"on {CALIBRATION_SAMPLES} samples of {options.data}, quality sees them, too",
    )


def _measure(
    done: PostTraining, loaded: LoadedModel, options: ExportOptions, progress: Progress
) -> None:
    from bitnet_export.ternary.sensitivity import measure

    batch = sample_inputs(loaded, options, SENSITIVITY_SAMPLES)
    assert loaded.module is not None
    done.sensitivity = measure(loaded.module, batch, _teller(progress, "sensitivity of "))


def _keep(done: PostTraining, loaded: LoadedModel, budget: float) -> None:
    from bitnet_export.report.schema import Decision
    from bitnet_export.ternary.layers import BitLayer
    from bitnet_export.ternary.sensitivity import choose_kept, keep_layers

    done.kept = choose_kept(done.sensitivity, budget)
    assert loaded.module is not None
    keep_layers(loaded.module, done.kept_names)
    whole = sum(row.float_bytes for row in done.sensitivity)
    spent = sum(row.extra_bytes for row in done.kept)
    if done.kept and not any(isinstance(m, BitLayer) for m in loaded.module.modules()):
        raise UsageError(
            f"all {len(done.kept)} layers fit into {budget:.4g}, so that none would be ternary",
            where="--keep-budget",
            fix=f"int8 for all of them adds {spent / whole:.1%}: give less than that",
        )
    cost = f"{spent / 1e6:.2f} MB, {spent / max(whole, 1):.2%} of {whole / 1e6:.2f} MB of layers"
    reason = f"most output error a byte first: {', '.join(done.kept_names) or 'none fits'}; {cost}"
    if done.kept and done.target not in INT8_TARGETS:
        reason += f"; in floating point, {done.target} stores no int8 layer"
    choice = f"{len(done.kept)} of {len(done.sensitivity)} layers"
    done.decisions.append(Decision(name="keep_budget", choice=choice, reason=reason))


def _calibrate(
    done: PostTraining,
    loaded: LoadedModel,
    options: ExportOptions,
    method: str,
    progress: Progress,
) -> None:
    from bitnet_export.ternary.calibrate import calibrate

    batch = sample_inputs(loaded, options, CALIBRATION_SAMPLES)
    assert loaded.module is not None
    tell = _teller(progress, "calibrating ")
    done.calibrated = calibrate(loaded.module, batch, method, seed=options.seed, on_layer=tell)


def sample_inputs(loaded: LoadedModel, options: ExportOptions, count: int) -> Mapping[str, Tensor]:
    """One batch spread over --data: at most ``count`` samples, or as many as a fixed batch takes;
    without data the example inputs."""
    import numpy as np
    import torch

    from bitnet_export.load import load_data

    if options.data is None or options.data.is_dir():
        return loaded.example_inputs
    data = load_data(options.data)
    if any(name not in data.arrays for name in loaded.example_inputs):
        return loaded.example_inputs  # a cache, say, that only the example inputs fill
    size = loaded.fixed_batch or min(count, len(data))
    rows = np.linspace(0, len(data) - 1, size).astype(int)
    return {
        name: torch.as_tensor(data.arrays[name][rows]).to(example.dtype)
        for name, example in loaded.example_inputs.items()
    }


def _teller(progress: Progress, prefix: str) -> Any:
    return lambda done, total, name: progress.update(done, total, f"{prefix}{name}")
