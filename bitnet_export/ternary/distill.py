"""finetune: the full-precision model teaches its ternary copy; no labels needed.

The loop only. Settings are in finetune_config.py, losses in objective.py and losses.py, batches in
data.py, the held-out loss in evaluation.py, checkpoints in run_state.py and checkpoint.py, several
processes in parallel.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.errors import StageError, UsageError
from bitnet_export.ternary import checkpoint, parallel, run_state, schedule
from bitnet_export.ternary.calling import call, forward_arguments
from bitnet_export.ternary.data import Batches, as_samples, lengths_of, split, trimmed
from bitnet_export.ternary.evaluation import CACHE_MB, HeldOut
from bitnet_export.ternary.finetune_config import FinetuneConfig, FinetuneResult, StepInfo
from bitnet_export.ternary.layers import BitLayer
from bitnet_export.ternary.losses import pool, primary_output
from bitnet_export.ternary.objective import (
    Autocast,
    LabelLoss,
    Lesson,
    Teacher,
    settle,
    without_labels,
)
from bitnet_export.ternary.recompute import recomputing

__all__ = ["FinetuneConfig", "FinetuneResult", "StepInfo", "finetune"]

Report = Callable[[StepInfo], None]
# Samples the plan is made from: enough for a scale, the same however many processes there are.
PLAN_SAMPLES = 32


def finetune(
    student: nn.Module,
    teacher: nn.Module | None,
    data: Any,
    config: FinetuneConfig | None = None,
    *,
    eval_data: Any = None,
    tokenizer: str | Path | None = None,
    progress: Report | None = None,
    label_loss: LabelLoss | None = None,
) -> FinetuneResult:
    """Train a prepared student, in place, to answer as the teacher does.

    teacher: the full-precision model; None takes the student's own float weights as they are now.
    data, eval_data: as data.as_samples; without eval_data the last tenth of data is held out.
    label_loss(outputs, labels): the task loss, a mean over the samples it is given; default
    cross-entropy for integer labels, squared error for float ones.

    Where torch.distributed is initialized the processes share every batch; all call finetune with
    the same models and data. Only rank 0 reports and writes; with parallel="fsdp" only its student
    is trained in the end.

    Raises UsageError if student was not prepared, StageError if the loss becomes NaN or Inf.
    """
    config = config or FinetuneConfig()
    _check_student(student)
    if config.checkpoint_dir and not config.resume:
        checkpoint.check_new(config.checkpoint_dir)
    if teacher is None:
        from bitnet_export.ternary.swap import to_linear

        teacher = copy.deepcopy(student)
        to_linear(teacher)
    samples = as_samples(data, tokenizer, config.max_length)
    if eval_data is None:
        samples, held_out = split(samples)
    else:
        held_out = as_samples(eval_data, tokenizer, config.max_length)
    with _modes(student, teacher, config), torch.random.fork_rng(devices=[]):
        run = _Run(student, teacher, samples, held_out, config, label_loss)
        with run.lesson.capture, recomputing(run.model, config.recompute):
            return run.train(progress)


class _Run:
    """One fine-tuning run: models, batches and optimizer, settled and ready to train."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        samples: Any,
        held_out: Any,
        config: FinetuneConfig,
        label_loss: LabelLoss | None,
    ) -> None:
        self.student, self.config, self.group = student, config, parallel.Group()
        names = forward_arguments(student) or []
        fixed = config.teacher_cache_mb > 0
        self.batches = Batches(samples, config.batch_size, names, config.seed, fixed)
        batches = Batches(held_out, config.batch_size, names, config.seed)
        self.group.parts(self.batches.indices(0), config.accumulate)  # complains early
        device = next(student.parameters()).device
        for source in (self.batches, batches):
            source.device = device
            source.trim = _takes_any_length(teacher, source, config)
        batches.drop_last = not _takes_remainder(teacher, batches, config)
        first = self.batches.collate(self.batches.indices(0)[:PLAN_SAMPLES])
        plan = settle(student, teacher, first, config)
        bf16 = config.bf16
        if bf16 is None:
            bf16 = device.type == "cpu" and cpu_has_bf16()
        autocast = Autocast(device, bf16)
        sharded = self.group.size > 1 and config.parallel == "fsdp"
        self.model = parallel.shard(student) if sharded else student
        teacher = parallel.shard(teacher, like=student) if sharded else teacher
        self.teacher = Teacher(teacher, plan, config, autocast, config.teacher_cache_mb)
        self.lesson = Lesson(self.model, plan, config, autocast, self.group, label_loss)
        self.engine = parallel.Engine(self.lesson, self.group, config.parallel)
        graded = Teacher(teacher, plan, config, autocast, CACHE_MB)
        self.held_out = HeldOut(batches, graded, self.lesson, self.group)
        self.lr = config.lr or schedule.default_lr(student, config.large_lr)
        self.parameters = list(run_state.trainable(self.model).values())
        self.optimizer = schedule.adamw(self.parameters, self.lr)
        self.best = run_state.Best(self.model)
        self.result = FinetuneResult(
            objective=plan.objective,
            lr=self.lr,
            bf16=bf16,
            processes=self.group.size,
            missing=plan.missing,
        )

    def train(self, progress: Report | None) -> FinetuneResult:
        """All steps, from the checkpoint on if resuming; ends with the best weights."""
        config, result = self.config, self.result
        self.started = time.perf_counter()
        first = self._resume() if config.resume else 0
        if not first:
            self._evaluate(0)
        begun = time.perf_counter()
        for step in range(first, config.steps):
            row = self._step(step)
            result.history.append(row)
            done = step + 1
            evaluation = None
            if _due(done, config.eval_every, config.steps):
                evaluation = self._evaluate(done)
            every = config.checkpoint_every
            every = config.eval_every if every is None else every
            if config.checkpoint_dir and _due(done, every, config.steps):
                self._save(config.checkpoint_dir, done)
            if progress and self.group.leads:
                eta = (time.perf_counter() - begun) / (done - first) * (config.steps - done)
                progress(StepInfo(done, config.steps, row["loss"], row["lr"], eta, evaluation))
            if self._ran_out_of_patience():
                result.stopped_early = done < config.steps
                break
        if config.keep_best:
            self.best.restore()
        if self.model is not self.student:
            run_state.copy_into(self.student, self.model, self.group.leads)
        result.seconds = self._seconds()
        return result

    def _step(self, step: int) -> dict[str, float]:
        """One optimizer step -> its history row. Seeded by the step, so that resuming is exact."""
        config, group = self.config, self.group
        torch.manual_seed((config.seed * 1_000_003 + step) * group.size + group.rank)
        shape = schedule.factor(step, config.steps, config.warmup, config.schedule)
        schedule.set_lr(self.optimizer, self.lr * shape)
        self.optimizer.zero_grad(set_to_none=True)
        parts = group.parts(self.batches.indices(step), config.accumulate)
        values: dict[str, Tensor] = {}
        for i, indices in enumerate(parts):
            batch = self.batches.collate(indices)
            taught = self.teacher.answer(batch, tuple(indices.tolist()))
            with self.engine.sharing(last=i == len(parts) - 1):
                terms, _ = self.engine.wrapped(batch, taught)
                (torch.stack(list(terms.values())).sum() / len(parts)).backward()
            for name, term in terms.items():
                share = term.detach().float() / (len(parts) * group.size)
                values[name] = values[name] + share if name in values else share
        totals = group.total(torch.stack(list(values.values()))).tolist()
        loss = sum(totals)
        if not torch.isfinite(torch.tensor(loss)):
            raise StageError(
                f"the loss became {loss} at step {step + 1}",
                where="finetune",
                fix=f"lower the learning rate (now {self.lr:g}), or check the data for NaN",
            )
        torch.nn.utils.clip_grad_norm_(self.parameters, config.clip)
        self.optimizer.step()
        named = dict(zip(values, totals, strict=True))
        return {"step": float(step + 1), "loss": loss, "lr": self.lr * shape, **named}

    def _evaluate(self, done: int) -> dict[str, float]:
        row = {"step": float(done), **self.held_out.evaluate()}
        self.result.evaluations.append(row)
        if self.config.keep_best:
            self.best.see(row["loss"], done)
        return row

    def _ran_out_of_patience(self) -> bool:
        rows = self.result.evaluations
        best = rows.index(self.result.best)
        return 0 < self.config.patience <= len(rows) - 1 - best

    def _fingerprint(self) -> dict[str, Any]:
        result, batches = self.result, self.batches
        found: dict[str, Any] = {"bf16": result.bf16, "teacher_cache": batches.fixed}
        found["samples"] = len(batches.samples)
        return run_state.fingerprint(self.student, self.config, found)

    def _save(self, directory: Path, step: int) -> None:
        here = self.group.leads
        state = {
            "step": step,
            "student": run_state.take_weights(self.model, here),
            "optimizer": run_state.take_optimizer(self.model, self.optimizer, here),
            "best": self.best.take(step, here),
            "history": self.result.history,
            "evaluations": self.result.evaluations,
            "seconds": self._seconds(),
            "fingerprint": self._fingerprint(),
        }
        if here:
            checkpoint.save(directory, state)
        self.group.wait()

    def _resume(self) -> int:
        assert self.config.checkpoint_dir is not None
        state = checkpoint.load_newest(self.config.checkpoint_dir, self._fingerprint())
        run_state.put_weights(self.model, state["student"])
        run_state.put_optimizer(self.model, self.optimizer, state["optimizer"])
        self.best.put(state["best"])
        self.result.history = state["history"]
        self.result.evaluations = state["evaluations"]
        self.started -= state["seconds"]
        return int(state["step"])

    def _seconds(self) -> float:
        """Time the run has taken, before it was interrupted included."""
        return time.perf_counter() - self.started


@contextmanager
def _modes(student: nn.Module, teacher: nn.Module, config: FinetuneConfig) -> Iterator[None]:
    """Dropout off (or on, if asked), the right parameters trainable; all put back after."""
    modules = [*student.modules(), *teacher.modules()]
    training = [(m, m.training) for m in modules]
    gradients = [(p, p.requires_grad) for p in student.parameters()]
    # Set one by one: the modules of exported programs refuse train() and eval().
    for module in modules:
        module.training = False
    for module in student.modules() if config.dropout else ():
        # Batch norms go on with their running statistics, as the teacher's and in deployment.
        module.training = not isinstance(module, nn.modules.batchnorm._BatchNorm)
    frozen = set() if config.train_embeddings else _embedding_parameters(student)
    for p in student.parameters():
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


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))


def _takes_any_length(teacher: nn.Module, source: Batches, config: FinetuneConfig) -> bool:
    """Whether padding can be cut: the model takes the shortest samples without theirs, and says
    the same of them."""
    lengths = lengths_of(source.samples)
    if lengths is None:
        return False
    padded = source.collate(torch.tensor(lengths).argsort(stable=True)[:2])
    short = trimmed(padded)
    if all(short[name].shape == padded[name].shape for name in padded):
        return False
    answers = []
    for batch in (padded, short):
        try:
            with torch.no_grad():
                outputs = call(teacher, without_labels(batch, config))
        except Exception:  # whatever a model of fixed shapes raises
            return False
        answer = primary_output(outputs)[1].float()
        answers.append(pool(answer, batch["attention_mask"]) if answer.dim() == 3 else answer)
    long, cut = answers
    close = 1e-3 * float(long.abs().max())
    return long.shape == cut.shape and torch.allclose(long, cut, rtol=1e-2, atol=close)


def _takes_remainder(teacher: nn.Module, held_out: Batches, config: FinetuneConfig) -> bool:
    """Whether the model, whose batch may be fixed, answers a smaller last batch."""
    last = held_out.in_order()[-1]
    if len(last) == held_out.batch_size:
        return True
    try:
        with torch.no_grad():
            call(teacher, without_labels(held_out.collate(last), config))
    except Exception:  # whatever a model of fixed shapes raises
        return False
    return True


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _check_student(student: nn.Module) -> None:
    layers = {path: m for path, m in student.named_modules() if isinstance(m, BitLayer)}
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


def _embedding_parameters(model: nn.Module) -> set[int]:
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(p) for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
