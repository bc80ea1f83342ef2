"""What a fine-tuning run is told and what it gives back: plain data, no torch.

FinetuneConfig and the rows a run reports. The loop that reads them is in distill.py; which values
suit which kind of model is in recipes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from bitnet_export.errors import UsageError

OBJECTIVES = ("auto", "logits", "embedding", "mse")
SCHEDULES = ("linear", "cosine")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a run.

    steps, batch_size: optimizer steps, and samples in each over all processes and accumulated
    parts. lr: None chooses by the number of parameters, large_lr above 60 million. schedule: how it
    falls after the warm-up.
    objective: "auto" looks at the teacher's output. temperature: of the logits' KL.
    *_weight: factors of the loss terms (losses.py); label_weight counts only if labels names an
    entry of the data, relation_weight only where an attention's projections are found.
    eval_every: steps between held-out evaluations, 0 means only before and after. keep_best: end
    with the weights of the best evaluation. patience: stop after so many evaluations without a
    new best, 0 never. checkpoint_every: steps, None means at every evaluation.
    bf16: None uses bfloat16 autocast where the CPU computes in it. dropout: keep the student's
    dropout on (off by default: the teacher's answers have none). train_embeddings: off by
    default, they stay as they are. accumulate: parts a batch is worked off in, to save memory.
    recompute: forget the activations inside blocks and compute them again for the gradients.
    parallel: what several processes share, "ddp" or "fsdp" (parallel.py).
    teacher_cache_mb: keep the teacher's answers per batch up to this much memory; batches then
    keep their composition over epochs.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float | None = None
    large_lr: float = 4e-4
    schedule: str = "linear"
    objective: str = "auto"
    temperature: float = 2.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    cosine_weight: float = 5.0
    similarity_weight: float = 0.0
    relation_weight: float = 0.0
    label_weight: float = 1.0
    labels: str | None = None
    warmup: float = 0.05
    clip: float = 1.0
    eval_every: int = 50
    keep_best: bool = True
    patience: int = 0
    checkpoint_dir: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    bf16: bool | None = None
    dropout: bool = False
    train_embeddings: bool = False
    accumulate: int = 1
    recompute: bool = False
    parallel: str = "ddp"
    teacher_cache_mb: int = 0
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        weights = [name for name in vars(self) if name.endswith("_weight")]
        for name in ("patience", "eval_every", *weights):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise UsageError(f"warmup is a part of the steps, 0 to 1, got {self.warmup}")
        choices = {"objective": OBJECTIVES, "schedule": SCHEDULES, "parallel": PARALLEL}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UsageError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("lr", "large_lr"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise UsageError(f"{name} must be positive, got {rate}")
        if self.resume and self.checkpoint_dir is None:
            raise UsageError("resume needs checkpoint_dir")
        if self.patience and not self.eval_every:
            raise UsageError("patience counts evaluations: set eval_every, too")


@dataclass(frozen=True)
class StepInfo:
    """What progress is told after each step. evaluation: the held-out row if one was made."""

    step: int
    steps: int
    loss: float
    lr: float
    eta_seconds: float
    evaluation: dict[str, float] | None = None


@dataclass
class FinetuneResult:
    """history: a row per step (step, loss, lr and each loss term). evaluations: held-out rows
    (step, loss, agreement), step 0 before any training. best: the row of least loss, whose weights
    the student has. stopped_early: patience ran out before the last step. missing: terms of the
    loss that were asked for and do not apply to the model, with the reason."""

    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    objective: str = ""
    lr: float = 0.0
    bf16: bool = False
    seconds: float = 0.0
    processes: int = 1
    stopped_early: bool = False
    missing: list[str] = field(default_factory=list)

    @property
    def best(self) -> dict[str, float]:
        """The evaluation row with the least held-out loss."""
        return min(self.evaluations, key=lambda row: row["loss"])
