"""What a target is: a list of passes, what it decides and requires, and how it is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bitnet_export.errors import UsageError
from bitnet_export.options import Progress, SilentProgress
from bitnet_export.passes import Pass, PassResult, run_passes

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from bitnet_export.options import ExportOptions


TARGET_OPTIONS = {
    "ort_kernel": "--ort-kernel",
    "activation_scale": "--activation-scale",
    "compute_capabilities": "--compute-capability",
    "portable_engine": "--portable-engine",
    "embed_plugin": "--embed-plugin",
    "triton": "--triton",
}


@dataclass(frozen=True)
class Decision:
    """A choice made for the user, and why."""

    name: str
    choice: str
    reason: str


@dataclass
class Lowered:
    """What a target made of a model.

    parity_kinds: keys of verify's tolerance table that say what differs from the model it was
    given. requires: package -> the oldest version that runs it. dtype: of what is not ternary,
    where it is not the one asked for.
    """

    model: onnx.ModelProto
    passes: list[PassResult]
    decisions: list[Decision] = field(default_factory=list)
    parity_kinds: tuple[str, ...] = ("exact",)
    requires: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None


@dataclass
class BuildJob:
    """What Target.build works on, and what it fills in.

    directory: being written, model.onnx is in it. inputs: as in the manifest. low, opt, high:
    axis sizes, low and high as far as the user gave them; asked_opt: those of opt the user gave;
    limits: the largest the model takes. environment: what the manifest records of the build.
    """

    directory: Path
    options: ExportOptions
    lowered: Lowered
    inputs: Mapping[str, Mapping[str, Any]]
    opt: Mapping[str, int]
    low: Mapping[str, int] = field(default_factory=dict)
    high: Mapping[str, int] = field(default_factory=dict)
    asked_opt: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    progress: Progress = field(default_factory=SilentProgress)
    environment: dict[str, Any] = field(default_factory=dict)

    def decide(self, name: str, choice: str, reason: str) -> None:
        """Record a choice made for the user, and say it."""
        self.lowered.decisions.append(Decision(name, choice, reason))
        self.progress.note(f"{name}: {choice} ({reason})")


class Target(ABC):
    """One back end."""

    name: ClassVar[str]
    # Whether the outputs can be compared and timed under ONNX Runtime on this machine's CPU.
    runs_on_cpu: ClassVar[bool] = True
    # Whether there is anything to build beside model.onnx.
    builds: ClassVar[bool] = False
    # Fields of TARGET_OPTIONS that it takes.
    own_options: ClassVar[tuple[str, ...]] = ("triton",)

    @abstractmethod
    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """The passes to run, and a Lowered with everything but their results."""

    def lower(
        self,
        model: onnx.ModelProto,
        options: ExportOptions,
        opt_sizes: Mapping[str, int],
        on_pass: Callable[[str], None] = lambda name: None,
    ) -> Lowered:
        """model with bitnet::TernaryMatMul nodes -> the model this target runs."""
        passes, lowered = self.plan(model, options, opt_sizes)
        source = lowered.model
        if has_half_layers(source):  # of its own accord, or made so by the plan
            lowered.dtype = "fp16"
            if "fp16" not in lowered.parity_kinds:
                lowered.parity_kinds += ("fp16",)
        if any(n.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") for n in source.graph.node):
            lowered.parity_kinds += ("quantized",)
        lowered.model, results = run_passes(
            source, passes, skip=options.skip_passes, on_pass=on_pass
        )
        lowered.passes += results
        return lowered

    def check_options(self, options: ExportOptions) -> None:
        """Raise UsageError for an option that this target does not take, before any work."""
        for field_name, flag in TARGET_OPTIONS.items():
            given = getattr(options, field_name) != getattr(type(options), field_name)
            if given and field_name not in self.own_options:
                raise UsageError(
                    f"--target {self.name} has no use for it", where=flag, fix="leave it out"
                )

    def build(self, job: BuildJob) -> None:  # noqa: B027  a hook
        """Make what else the target needs beside model.onnx. Nothing here; called where builds.

        Raises MissingRequirement where this machine lacks something; what was made stays.
        """


def target_for(name: str) -> Target:
    """The target of that name. Raises UsageError for an unknown one."""
    from bitnet_export.targets.onnx import OnnxTarget
    from bitnet_export.targets.ort import OrtTarget
    from bitnet_export.targets.trt import TrtTarget
    from bitnet_export.targets.trt_rtx import TrtRtxTarget

    known: tuple[type[Target], ...] = (OnnxTarget, OrtTarget, TrtTarget, TrtRtxTarget)
    targets = {target.name: target for target in known}
    if name not in targets:
        raise UsageError(
            f"{name!r} is no target", where="--target", fix=f"choose from {', '.join(targets)}"
        )
    return targets[name]()


def has_half_layers(model: onnx.ModelProto) -> bool:
    """Whether a TernaryMatMul of the model takes float16 activations."""
    from onnx import TensorProto

    from bitnet_export import onnx_io, op

    inputs = {n.input[0] for n in model.graph.node if n.op_type == op.OP_TYPE}
    known = onnx_io.infer_shapes(model)
    types = [known[name].type.tensor_type.elem_type for name in inputs if name in known]
    return TensorProto.FLOAT16 in types


def embeddings_kind(options: ExportOptions) -> tuple[str, ...]:
    """The tolerance kind that quantized embeddings add."""
    skipped = "quantize-embeddings" in options.skip_passes or options.embeddings == "keep"
    return () if skipped else (f"embeddings-{options.embeddings}",)


def embedding_passes(options: ExportOptions, *, contrib: bool) -> list[Pass]:
    """The embedding pass the options ask for."""
    from bitnet_export.passes import QuantizeEmbeddings

    bits = {"int8": 8, "int4": 4}.get(options.embeddings or "keep")
    return [QuantizeEmbeddings(bits, contrib=contrib)] if bits else []
