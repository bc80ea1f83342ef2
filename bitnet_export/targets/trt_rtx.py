"""Target trt-rtx: standard operators that NVIDIA's TensorRT-RTX compiles, with no GPU needed.

TensorRT-RTX takes no plugins, so TernaryMatMul becomes int4 weights with float16 products
(passes/lower_rtx.py). Engines are built ahead of time for named compute capabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bitnet_export import env, manifest
from bitnet_export.errors import MissingRequirement, UsageError
from bitnet_export.passes import FoldConstants, MergeSiblings, Pass
from bitnet_export.passes.lower_rtx import at_rtx_opset, int4_weights, lower_rtx
from bitnet_export.targets.base import BuildJob, Decision, Lowered, Target
from bitnet_export.targets.ort import attributes_of
from bitnet_export.targets.trt_build import TENSORRT_RTX, missing_for
from bitnet_export.targets.trt_engine import EnginePlan, make_engines, plan_profile
from bitnet_export.targets.trt_script import write_script

if TYPE_CHECKING:
    import onnx

    from bitnet_export.options import ExportOptions

Capability = tuple[int, int]
# What TensorRT-RTX 1.7 compiles for; Hopper (9.0) is not on its list.
CAPABILITIES: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
TURING: Capability = (7, 5)


class TrtRtxTarget(Target):
    """int4 weights, float16 arithmetic."""

    name = "trt-rtx"
    runs_on_cpu = False
    builds = True
    own_options = ("compute_capabilities", "portable_engine")

    def check_options(self, options: ExportOptions) -> None:
        """A wrong compute capability is refused before any work."""
        if options.triton is not None:
            raise UsageError(
                "Triton's TensorRT back end does not load engines of TensorRT-RTX",
                where="--triton",
                fix="use --target trt, ort or onnx",
            )
        super().check_options(options)
        capabilities(options)

    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """float16 at opset 21, siblings merged; the lowering itself follows in lower()."""
        from bitnet_export.passes.to_fp16 import to_fp16

        half, result = to_fp16(at_rtx_opset(model))
        lowered = Lowered(half, [result], parity_kinds=("fp16",), dtype="fp16")
        if options.dtype != "fp16":
            why = "TensorRT-RTX has no float32 matrix products for every card"
            lowered.decisions.append(Decision("dtype", "fp16", why))
        if any(at.activation_bits for at in attributes_of(model)):
            lowered.parity_kinds = ("float-activations", "fp16")
            why = "TensorRT-RTX takes no plugin that could quantize each row to int8"
            lowered.decisions.append(Decision("activations", "float16", why))
        if options.embeddings != "keep":
            why = "TensorRT has no operator that gathers quantized rows"
            lowered.decisions.append(Decision("embeddings", "keep", why))
        return [FoldConstants(), MergeSiblings()], lowered

    def lower(
        self,
        model: onnx.ModelProto,
        options: ExportOptions,
        opt_sizes: Mapping[str, int],
        on_pass: Callable[[str], None] = lambda name: None,
    ) -> Lowered:
        """The passes, then int4: onnx-graphsurgeon cannot export such constants."""
        lowered = super().lower(model, options, opt_sizes, on_pass)
        on_pass("lower-rtx")
        lowered.model, result = lower_rtx(lowered.model)
        lowered.passes.append(result)
        return lowered

    def build(self, job: BuildJob) -> None:
        """One engine a compute capability, or one for all of them with --portable-engine.

        Raises MissingRequirement where TensorRT-RTX is not installed, StageError where it refuses
        the model.
        """
        plan_profile(job)
        job.environment["build"] = {"runtime": TENSORRT_RTX}
        job.environment["plans"] = {
            plan.file: plan.as_dict() for plan in plan_engines(job.options, job)
        }
        write_script(job.directory, job.environment)
        if not job.options.engine:
            return
        gaps = missing_for(TENSORRT_RTX)
        if gaps:
            raise MissingRequirement(
                f"model.onnx and build_engine.sh are written; no engine was built: {gaps[0]}",
                where="--target trt-rtx",
                fix="install it here, or run build_engine.sh on a machine that has it; no GPU is "
                "needed. --no-engine makes the ONNX file alone a success",
            )
        make_engines(job.directory, job.environment, job.progress)


def plan_engines(options: ExportOptions, job: BuildJob) -> list[EnginePlan]:
    """Which engines to build, what their weights are, and why."""
    wanted = capabilities(options)
    weights = int4_weights(job.lowered.model)
    if not options.compute_capabilities and not options.portable_engine:
        found = _this_machine()
        why = "this machine's GPU" if found else "no GPU here; Turing is what most lack room on"
        job.decide("compute_capability", _text(wanted[0]), f"{why}; see --compute-capability")
    if options.portable_engine:
        groups = [wanted]
    else:
        groups = [(one,) for one in wanted]
    plans = []
    for group in groups:
        dense = TURING in group
        single = len(groups) == 1
        file = manifest.ENGINE if single else f"model-sm{group[0][0]}{group[0][1]}.engine"
        plans.append(EnginePlan(file, group, dense))
        if dense:
            cards = ", ".join(map(_text, group))
            job.decide(
                f"weights of {file}",
                "float16",
                f"TensorRT-RTX compiles no int4 for 7.5, so for {cards} the ternary layers take "
                f"{weights * 2 / 1e6:.1f} MB instead of {weights * 4.125 / 8e6:.1f} MB; --target "
                f"trt keeps them at 2 bits, {weights / 4e6:.1f} MB",
            )
    return plans


def capabilities(options: ExportOptions) -> tuple[Capability, ...]:
    """The compute capabilities asked for, else this machine's GPU, else 7.5; () for a portable
    engine of TensorRT-RTX's own choice (8.0 and newer). Raises UsageError."""
    if not options.compute_capabilities:
        if options.portable_engine:
            return ()
        return (_this_machine() or TURING,)
    return tuple(dict.fromkeys(_parse(text) for text in options.compute_capabilities))


def _this_machine() -> Capability | None:
    for gpu in env.gpus():
        major, _, minor = gpu["compute_capability"].partition(".")
        if (int(major), int(minor or 0)) in CAPABILITIES:
            return int(major), int(minor or 0)
    return None


def _parse(text: str) -> Capability:
    for known in CAPABILITIES:
        if text == _text(known):
            return known
    raise UsageError(
        "TensorRT-RTX builds no engine for it",
        where=f"--compute-capability {text}",
        fix=f"choose from {', '.join(map(_text, CAPABILITIES))}",
    )


def _text(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
