"""finetune: the full-precision model teaches its ternary copy; no labels needed.

The loop only. Losses are in losses.py, batches in data.py, checkpoints in checkpoint.py. Settings
that worked are the defaults: AdamW (0.9, 0.98), no weight decay, clip 1.0, 5 % warm-up, then
linear to 0.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_export.errors import StageError, UsageError
from bitnet_export.ternary import checkpoint, losses
from bitnet_export.ternary.data import Batch, Batches, as_samples, split
from bitnet_export.ternary.layers import BitLinear
from bitnet_export.ternary.swap import to_linear

OBJECTIVES = ("auto", "logits", "embedding", "mse")
# (parameters up to, learning rate): tiny nets, tens of millions, language models.
LEARNING_RATES = ((1_000_000, 2e-3), (60_000_000, 4e-4), (math.inf, 1e-4))


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a run.

    lr: None chooses by the number of parameters. objective: "auto" looks at the teacher's output.
    temperature: of the logits' KL. *_weight: factors of the loss terms; label_weight counts only
    if labels names an entry of the data. eval_every: steps, 0 means only at the end;
    checkpoint_every: the same, None means at every evaluation. bf16: None uses bfloat16 autocast
    where the CPU computes in it. dropout: keep the student's dropout on (off by default: the
    teacher's answers have none). train_embeddings: off by default, they stay as they are.
    teacher_cache_mb: keep the teacher's answers per batch up to this much memory; batches then
    keep their composition over epochs.
    """

    steps: int = 300
    batch_size: int = 32
    lr: float | None = None
    objective: str = "auto"
    temperature: float = 2.0
    logits_weight: float = 1.0
    hidden_weight: float = 1.0
    cosine_weight: float = 5.0
    label_weight: float = 1.0
    labels: str | None = None
    warmup: float = 0.05
    clip: float = 1.0
    eval_every: int = 50
    checkpoint_dir: Path | None = None
    checkpoint_every: int | None = None
    resume: bool = False
    bf16: bool | None = None
    dropout: bool = False
    train_embeddings: bool = False
    teacher_cache_mb: int = 0
    max_length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise UsageError(
                f"steps and batch_size must be at least 1, got {self.steps}, {self.batch_size}"
            )
        if self.objective not in OBJECTIVES:
            raise UsageError(f"objective must be one of {', '.join(OBJECTIVES)}")
        if self.lr is not None and not self.lr > 0:
            raise UsageError(f"lr must be positive, got {self.lr}")
        if self.resume and self.checkpoint_dir is None:
            raise UsageError("resume needs checkpoint_dir")


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
    (step, loss, agreement). best: the evaluation of least loss."""

    history: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    objective: str = ""
    lr: float = 0.0
    bf16: bool = False
    seconds: float = 0.0

    @property
    def best(self) -> dict[str, float]:
        """The evaluation row with the least held-out loss."""
        return min(self.evaluations, key=lambda row: row["loss"])


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    config: FinetuneConfig | None = None,
    *,
    eval_data: Any = None,
    tokenizer: str | Path | None = None,
    progress: Callable[[StepInfo], None] | None = None,
    label_loss: Callable[[Any, Tensor], Tensor] | None = None,
) -> FinetuneResult:
    """Train a prepared student, in place, to answer as the teacher does.

    teacher: the full-precision model; None takes the student's own float weights as they are now.
    data, eval_data: as data.as_samples; without eval_data the last tenth of data is held out.
    label_loss(outputs, labels): the task loss; default cross-entropy for integer labels, squared
    error for float ones.

    Raises UsageError if student was not prepared, StageError if the loss becomes NaN or Inf.
    """
    config = config or FinetuneConfig()
    if teacher is None:
        teacher = copy.deepcopy(student)
        to_linear(teacher)
    samples = as_samples(data, tokenizer, config.max_length)
    if eval_data is None:
        samples, held_out = split(samples)
    else:
        held_out = as_samples(eval_data, tokenizer, config.max_length)
    run = _Run(student, teacher, samples, held_out, config, label_loss)
    with run.modes(), torch.random.fork_rng(devices=[]):
        return run.train(progress)


class _Run:
    """One fine-tuning run: models, optimizer and batches."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        samples: Any,
        held_out: Any,
        config: FinetuneConfig,
        label_loss: Callable[[Any, Tensor], Tensor] | None,
    ) -> None:
        _check_student(student)
        self.student, self.teacher, self.config = student, teacher, config
        self.label_loss = label_loss or _default_label_loss
        self.arguments, self.by_name = _forward_arguments(student)
        seed, size = config.seed, config.batch_size
        fixed = config.teacher_cache_mb > 0
        self.batches = Batches(samples, size, self.arguments, seed, fixed)
        self.held_out = Batches(held_out, size, self.arguments, seed)
        self.bf16 = cpu_has_bf16() if config.bf16 is None else config.bf16
        self.result = FinetuneResult(bf16=self.bf16)
        self.lr = config.lr or default_lr(student)
        self.cache: dict[Any, Any] = {}
        self.cache_left = config.teacher_cache_mb * 2**20
        self.sites: list[str] = []
        self.objective = config.objective

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Dropout off (or on, if asked), the right parameters trainable; all put back after."""
        modules = [*self.student.modules(), *self.teacher.modules()]
        training = [(m, m.training) for m in modules]
        gradients = [(p, p.requires_grad) for p in self.student.parameters()]
        # Set one by one: the modules of exported programs refuse train() and eval().
        for module in modules:
            module.training = False
        for module in self.student.modules() if self.config.dropout else ():
            module.training = True
        frozen = set() if self.config.train_embeddings else _embedding_parameters(self.student)
        for p in self.student.parameters():
            p.requires_grad_(p.is_floating_point() and id(p) not in frozen)
        # torch's fused encoder returns nested tensors, which cannot be compared with the student's.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in training:
                module.training = mode
            for p, needed in gradients:
                p.requires_grad_(needed)
                p.grad = None

    def train(self, progress: Callable[[StepInfo], None] | None) -> FinetuneResult:
        """All steps, from the checkpoint on if resuming."""
        config, result = self.config, self.result
        self._settle_objective()
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        first = self._resume(optimizer) if config.resume else 0
        save_every = config.checkpoint_every
        save_every = config.eval_every if save_every is None else save_every
        result.objective, result.lr = self.objective, self.lr
        started = time.perf_counter()
        with losses.Capture(self.student, self.sites) as capture:
            for step in range(first, config.steps):
                row = self._step(step, optimizer, parameters, capture)
                result.history.append(row)
                done = step + 1
                evaluation = None
                if _due(done, config.eval_every, config.steps):
                    evaluation = {"step": float(done), **self.evaluate(capture)}
                    result.evaluations.append(evaluation)
                if config.checkpoint_dir and _due(done, save_every, config.steps):
                    checkpoint.save(config.checkpoint_dir, self._state(done, optimizer))
                if progress:
                    eta = (time.perf_counter() - started) / (done - first) * (config.steps - done)
                    progress(StepInfo(done, config.steps, row["loss"], row["lr"], eta, evaluation))
        result.seconds = time.perf_counter() - started
        return result

    def _step(
        self,
        step: int,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        capture: losses.Capture,
    ) -> dict[str, float]:
        """One optimizer step -> its history row. Seeded by the step, so that resuming is exact."""
        config = self.config
        torch.manual_seed(config.seed * 1_000_003 + step)
        lr = self.lr * _schedule(step, config.steps, config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        indices = self.batches.indices(step)
        terms, _ = self._losses(self.batches.collate(indices), capture, tuple(indices.tolist()))
        loss = torch.stack(list(terms.values())).sum()
        if not bool(torch.isfinite(loss)):
            raise StageError(
                f"the loss became {loss.item()} at step {step + 1}",
                where="finetune",
                fix=f"lower the learning rate (now {self.lr:g}), or check the data for NaN",
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        values = {name: float(term.detach()) for name, term in terms.items()}
        return {"step": float(step + 1), "loss": float(loss.detach()), "lr": lr, **values}

    def _losses(
        self, batch: Batch, capture: losses.Capture, key: Any
    ) -> tuple[dict[str, Tensor], float]:
        """(weighted loss terms, agreement with the teacher in [.., 1]) of a batch."""
        config, mask = self.config, batch.get("attention_mask")
        taught, taught_hidden = self._teach(batch, key)
        capture.take()
        with self._autocast():
            outputs = self._call(self.student, batch)
        answer = losses.primary_output(outputs)[1]
        hidden = capture.take()
        terms: dict[str, Tensor] = {}
        if self.objective == "logits":
            divergence = losses.kl_divergence(answer, taught, config.temperature, mask)
            terms["logits"] = config.logits_weight * divergence
            agreement = (answer.argmax(-1) == taught.argmax(-1)).float().mean()
        else:
            distance = losses.cosine_distance(answer, taught, mask)
            agreement = 1 - distance
            if self.objective == "embedding":
                terms["cosine"] = config.cosine_weight * distance
            if self.objective == "mse" or not hidden:
                terms["output"] = losses.relative_mse(answer, taught, mask)
        if hidden and config.hidden_weight:
            errors = [
                losses.relative_mse(s, t, mask) for s, t in zip(hidden, taught_hidden, strict=True)
            ]
            terms["hidden"] = config.hidden_weight * torch.stack(errors).mean()
        if config.labels:
            labels = batch[config.labels]
            terms["labels"] = config.label_weight * self.label_loss(outputs, labels)
        return terms, float(agreement.detach())

    def _teach(self, batch: Batch, key: Any) -> tuple[Tensor, list[Tensor]]:
        """The teacher's (answer, hidden states), from the cache if this batch was seen before."""
        if key in self.cache:
            return self.cache[key]
        with torch.inference_mode(), losses.Capture(self.teacher, self.sites) as capture:
            with self._autocast():
                answer = losses.primary_output(self._call(self.teacher, batch))[1]
            hidden = capture.take()
        # Cloned out of inference mode: autograd saves targets, which it cannot for such tensors.
        taught = answer.clone(), [t.clone() for t in hidden]
        size = sum(t.numel() * t.element_size() for t in (taught[0], *taught[1]))
        if key is not None and size <= self.cache_left:
            self.cache_left -= size
            self.cache[key] = taught
        return taught

    @torch.no_grad()
    def evaluate(self, capture: losses.Capture) -> dict[str, float]:
        """Held-out loss and agreement (top-1 for logits, cosine otherwise), means over samples."""
        total = agreed = count = 0.0
        for i, indices in enumerate(self.held_out.in_order()):
            key = ("eval", i) if self.config.teacher_cache_mb else None
            terms, agreement = self._losses(self.held_out.collate(indices), capture, key)
            total += float(sum(terms.values())) * len(indices)
            agreed += agreement * len(indices)
            count += len(indices)
        return {"loss": total / count, "agreement": agreed / count}

    def _settle_objective(self) -> None:
        """Look at one batch: which objective, and where hidden states can be compared."""
        batch = self.batches[0]
        if self.config.labels and self.config.labels not in batch:
            raise UsageError(
                f"the data has no entry {self.config.labels!r} for labels, only {sorted(batch)}",
                where="finetune",
            )
        with torch.no_grad():
            name, output = losses.primary_output(self._call(self.teacher, batch))
        if self.objective == "auto":
            self.objective = losses.choose_objective(name, output, self.teacher, self.student)
        self.sites = losses.hidden_sites(self.student, lambda: self._call(self.student, batch))

    def _call(self, model: nn.Module, batch: Batch) -> Any:
        """model(batch), by name; entries that forward does not take are left out."""
        labels = self.config.labels or "labels"
        inputs = {name: t for name, t in batch.items() if name != labels}
        if not self.by_name:
            return model(*inputs.values())
        if self.arguments:
            inputs = {name: t for name, t in inputs.items() if name in self.arguments}
        if not inputs:
            raise UsageError(
                f"the data has entries {sorted(batch)}, forward takes {self.arguments}",
                where="finetune",
                fix="name the arrays as forward's arguments",
            )
        extra = {"use_cache": False} if "use_cache" in self.arguments else {}
        return model(**inputs, **extra)

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.bf16)

    def _fingerprint(self) -> dict[str, Any]:
        """What must be equal for a resumed run to continue the same one."""
        left_out = {"checkpoint_dir", "checkpoint_every", "resume", "eval_every"}
        left_out |= {"teacher_cache_mb"} if self.config.teacher_cache_mb == 0 else set()
        settings = {k: v for k, v in asdict(self.config).items() if k not in left_out}
        return {**settings, "bf16": self.bf16, "samples": len(self.batches.samples)}

    def _state(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {
            "step": step,
            "student": self.student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": self.result.history,
            "evaluations": self.result.evaluations,
            "fingerprint": self._fingerprint(),
        }

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        assert self.config.checkpoint_dir is not None
        state = checkpoint.load_newest(self.config.checkpoint_dir, self._fingerprint())
        self.student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        self.result.history = state["history"]
        self.result.evaluations = state["evaluations"]
        return int(state["step"])


def default_lr(model: nn.Module) -> float:
    """A learning rate by the model's size."""
    size = sum(p.numel() for p in model.parameters())
    return next(lr for limit, lr in LEARNING_RATES if size <= limit)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def _schedule(step: int, steps: int, warmup: float) -> float:
    """Linear up over the first ``warmup`` part, then linear down to 0."""
    up = max(1, round(warmup * steps))
    if step < up:
        return (step + 1) / up
    return (steps - step) / max(1, steps - up)


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _check_student(student: nn.Module) -> None:
    layers = {path: m for path, m in student.named_modules() if isinstance(m, BitLinear)}
    if not layers:
        raise UsageError(
            "the student has no BitLinear layer", where="finetune", fix="call prepare(model) first"
        )
    for path, layer in layers.items():
        if layer.weight.dtype != torch.float32:
            raise UsageError(
                f"the weights are {layer.weight.dtype}; AdamW's small steps vanish in it",
                where=path,
                fix="call model.float() before prepare",
            )


def _forward_arguments(model: nn.Module) -> tuple[list[str], bool]:
    """(names of forward's arguments, whether to call by name). *args: positional, as they come."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return [], False
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    return names, True


def _embedding_parameters(model: nn.Module) -> set[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}


def _default_label_loss(outputs: Any, labels: Tensor) -> Tensor:
    answer = losses.primary_output(outputs)[1].float()
    if labels.is_floating_point():
        return F.mse_loss(answer.reshape(labels.shape), labels)
    return F.cross_entropy(answer.reshape(-1, answer.shape[-1]), labels.reshape(-1))
