"""report.json: its dataclasses. The measured rows come from verify/results.py.

What the keys mean stands beside them and, made from that, in docs/report.md. Reading and writing
is json_io.py's business, judging gates.py's, rendering that of html, markdown and junit.
"""

# ruff: noqa: RUF009 -- described() is dataclasses.field with documentation

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bitnet_export.verify.results import (
    EmbeddingRow,
    EngineSize,
    LayerRow,
    ParityRow,
    QualityBlock,
    QualityRow,
    SizeBlock,
    SizePart,
    SpeedRow,
    described,
)

__all__ = [
    "FAIL",
    "PASS",
    "SCHEMA_VERSION",
    "Decision",
    "EmbeddingRow",
    "EngineSize",
    "Environment",
    "FinetuneBlock",
    "FinetunePoint",
    "GateRow",
    "LayerRow",
    "ModelBlock",
    "ParityRow",
    "PassRow",
    "QualityBlock",
    "QualityRow",
    "Report",
    "SizeBlock",
    "SizePart",
    "SkipRow",
    "SpeedRow",
    "StageRow",
]

# Grows when a key goes away or changes its meaning; new optional keys leave it as it is.
SCHEMA_VERSION = 1
PASS, FAIL = "pass", "fail"


@dataclass(frozen=True, kw_only=True)
class ModelBlock:
    """What was exported, and into what."""

    name: str = described("file stem or Hugging Face model name")
    kind: str = described("kind of source: exported_program, state_dict, huggingface, onnx, pickle")
    target: str = described("`onnx`, `ort`, `trt` or `trt-rtx`")
    dtype: str = described("floating-point type of the output graph, fp32 or fp16", default="fp32")
    source: str = described("the source file or directory as given", default="")
    weights: int | None = described("weights of the model", "count", default=None)
    config: dict[str, Any] = described(
        "the ternary configuration: quantizer, granularity, activation_bits and so on",
        default=dict,
    )


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine and the versions a report was made with."""

    bitnet_export: str = described("version of this package")
    python: str = described("version of Python")
    platform: str = described("operating system and architecture")
    cpu: str = described("processor model", default="")
    cores: int = described("logical processors this process may use", "count", default=0)
    memory_bytes: int | None = described("main memory", "bytes", default=None)
    gpu: str = described("GPU model and driver; empty where there is none", default="")
    providers: list[str] = described("ONNX Runtime execution providers available", default=list)
    packages: dict[str, str] = described("versions of the libraries that matter", default=dict)


@dataclass(frozen=True, kw_only=True)
class SkipRow:
    """A place a pass looked at and left alone."""

    name: str = described("node or layer")
    reason: str = described("why it was left alone")


@dataclass(frozen=True, kw_only=True)
class PassRow:
    """One graph pass."""

    name: str = described("the pass, as `--skip-pass` takes it")
    rewritten: int = described("places it changed", "count")
    skipped: list[SkipRow] = described("places it left alone, each with its reason", default=list)
    notes: list[str] = described("what else it has to say", default=list)
    seconds: float | None = described("time it took", "s", default=None)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A choice the tool made by itself."""

    name: str = described("the option, `ort_kernel` for instance")
    choice: str = described("what was chosen")
    reason: str = described("why")


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage of the run."""

    name: str = described("the stage")
    seconds: float = described("time it took", "s")


@dataclass(frozen=True, kw_only=True)
class GateRow:
    """One gate. A gate that was asked for and could not be measured fails."""

    name: str = described("`parity`, `min_speedup`, `min_compression`, `max_quality_loss`, ...")
    value: float | None = described("what was measured; null where nothing was")
    limit: float | None = described("the limit; null where the gate has none")
    passed: bool = described("the gate's verdict", key="pass")
    detail: str = described("the verdict in words: what was compared, and what failed", default="")


@dataclass(frozen=True, kw_only=True)
class FinetunePoint:
    """One logged step of fine-tuning."""

    step: int = described("optimizer step, from 1", "count")
    loss: float | None = described("training loss at that step", default=None)
    evaluation: float | None = described("evaluation at that step", default=None)
    learning_rate: float | None = described("learning rate at that step", default=None)


@dataclass(frozen=True, kw_only=True)
class FinetuneBlock:
    """The fine-tuning that came before the export."""

    steps: int = described("optimizer steps taken", "count")
    seconds: float | None = described("wall time", "s", default=None)
    batch_size: int | None = described("samples a step", "count", default=None)
    metric: str = described("what `evaluation` means", default="loss")
    higher_is_better: bool = described("direction of that metric", default=False)
    best_step: int | None = described("step of the best evaluation", "count", default=None)
    best_value: float | None = described("the best evaluation", default=None)
    history: list[FinetunePoint] = described("the logged steps", default=list)


@dataclass(kw_only=True)
class Report:
    """One run, whole. Made with verdict "fail"; gates.judge fills gates and verdict."""

    schema_version: int = described("version of this schema", default=SCHEMA_VERSION)
    verdict: str = described("`pass` where every gate passed, else `fail`", default=FAIL)
    created: str = described("when the report was made, ISO 8601 in UTC", default="")
    command: str = described("the command that repeats the run", default="")
    model: ModelBlock = described("what was exported")
    environment: Environment = described("the machine and the versions")
    size: SizeBlock | None = described("file size; null where not measured", default=None)
    speed: list[SpeedRow] = described("latency by shape", default=list)
    parity: list[ParityRow] = described("agreement of the implementations", default=list)
    quality: QualityBlock | None = described(
        "float against ternary; null where not measured", default=None
    )
    embeddings: list[EmbeddingRow] = described(
        "what storing embeddings and heads in 8 or 4 bits changed in them", default=list
    )
    layers: list[LayerRow] = described("every layer and what became of it", default=list)
    passes: list[PassRow] = described("the graph passes, in order", default=list)
    gates: list[GateRow] = described("the gates", default=list)
    finetune: FinetuneBlock | None = described(
        "fine-tuning; null where there was none", default=None
    )
    decisions: list[Decision] = described("choices the tool made by itself", default=list)
    stages: list[StageRow] = described("time by stage", default=list)
    warnings: list[str] = described("what the user should know", default=list)

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return self.verdict == PASS
