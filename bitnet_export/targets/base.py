"""What a target is: a list of passes, what it decides and requires, and how it is compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from bitnet_export.errors import UsageError
from bitnet_export.passes import Pass, PassResult, run_passes

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from bitnet_export.options import ExportOptions


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
    given. requires: package -> the oldest version that runs it.
    """

    model: onnx.ModelProto
    passes: list[PassResult]
    decisions: list[Decision] = field(default_factory=list)
    parity_kinds: tuple[str, ...] = ("exact",)
    requires: dict[str, str] = field(default_factory=dict)


class Target(ABC):
    """One back end."""

    name: ClassVar[str]
    # Whether the outputs can be compared and timed under ONNX Runtime on this machine's CPU.
    runs_on_cpu: ClassVar[bool] = True

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
        lowered.model, results = run_passes(
            source, passes, skip=options.skip_passes, on_pass=on_pass
        )
        lowered.passes += results
        return lowered

    def build(self, directory: Path, options: ExportOptions) -> None:
        """Make what else the target needs beside model.onnx, in ``directory``. Nothing here."""


def target_for(name: str) -> Target:
    """The target of that name. Raises UsageError for an unknown one."""
    from bitnet_export.targets.onnx import OnnxTarget
    from bitnet_export.targets.ort import OrtTarget
    from bitnet_export.targets.trt import TrtTarget

    targets: dict[str, type[Target]] = {t.name: t for t in (OnnxTarget, OrtTarget, TrtTarget)}
    if name not in targets:
        raise UsageError(
            f"{name!r} is no target", where="--target", fix=f"choose from {', '.join(targets)}"
        )
    return targets[name]()


def embeddings_kind(options: ExportOptions) -> tuple[str, ...]:
    """The tolerance kind that quantized embeddings add."""
    skipped = "quantize-embeddings" in options.skip_passes or options.embeddings == "keep"
    return () if skipped else (f"embeddings-{options.embeddings}",)


def embedding_passes(options: ExportOptions, *, contrib: bool) -> list[Pass]:
    """The embedding pass the options ask for."""
    from bitnet_export.passes import QuantizeEmbeddings

    bits = {"int8": 8, "int4": 4}.get(options.embeddings)
    return [QuantizeEmbeddings(bits, contrib=contrib)] if bits else []
