"""One look at a batch: what the teacher says, what the student says, and how far they differ.

Teacher answers (and remembers, if asked); Lesson turns a batch and the answer into loss terms.
Plan holds what is settled before the first step. The loss functions are in losses.py, where
outputs are collected in observe.py, and the loop in distill.py.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_export.errors import UsageError
from bitnet_export.ternary import losses, observe
from bitnet_export.ternary.calling import call
from bitnet_export.ternary.data import Batch
from bitnet_export.ternary.finetune_config import FinetuneConfig
from bitnet_export.ternary.layers import BitLayer
from bitnet_export.ternary.parallel import Group

LabelLoss = Callable[[Any, Tensor], Tensor]


class Answer(NamedTuple):
    """What a model said: its main output, hidden states by path and attention projections."""

    output: Tensor
    hidden: list[tuple[str, Tensor]]
    projections: list[Tensor]


@dataclass
class Plan:
    """What is compared, settled by looking at a few samples.

    objective: "logits", "embedding" or "mse". hidden, projections: module paths. energies: the
    teacher's mean square at "output" and at each path of hidden, by which errors are divided;
    "similarity": the variance of its similarities. missing: terms that do not apply, and why.
    """

    objective: str
    hidden: list[str]
    projections: list[str] = field(default_factory=list)
    energies: dict[str, float] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def sites(self) -> list[str]:
        """All paths whose outputs are collected."""
        return [*self.hidden, *(p for p in self.projections if p not in self.hidden)]

    def answer(self, outputs: Any, seen: list[tuple[str, Tensor]]) -> Answer:
        """A model's outputs and what was captured at the sites."""
        hidden = [(path, t) for path, t in seen if path in self.hidden]
        projections = [t for path, t in seen if path in self.projections]
        if len(self.projections) == 1:  # one fused query, key and value projection
            projections = [part for t in projections for part in t.chunk(3, dim=-1)]
        return Answer(losses.primary_output(outputs)[1], hidden, projections)


def settle(student: nn.Module, teacher: nn.Module, batch: Batch, config: FinetuneConfig) -> Plan:
    """Look at one batch of both models and decide what to compare and on which scale."""
    if config.labels and config.labels not in batch:
        raise UsageError(
            f"the data has no entry {config.labels!r} for labels, only {sorted(batch)}",
            where="finetune",
        )
    inputs = without_labels(batch, config)
    with torch.no_grad():
        name, output = losses.primary_output(call(teacher, inputs))
    objective = config.objective
    if objective == "auto":
        objective = choose_objective(name, output, teacher, student)
    there = {path for path, _ in teacher.named_modules()}
    hidden = observe.hidden_sites(student, lambda: call(student, inputs))
    plan = Plan(objective, [path for path in hidden if path in there])
    if config.relation_weight:
        # The teacher's nn.MultiheadAttention keeps its projections to itself.
        plan.projections = observe.projection_sites(teacher)
        if not plan.projections:
            plan.missing.append("relation: no attention with query, key and value projections")
    if config.similarity_weight and objective != "embedding":
        plan.missing.append("similarity: the output is no embedding")
    with torch.no_grad(), observe.Capture(teacher, plan.sites) as capture:
        answer = plan.answer(*capture.run(lambda: call(teacher, inputs)))
    _measure_energies(plan, answer, inputs.get("attention_mask"))
    return plan


def _measure_energies(plan: Plan, answer: Answer, mask: Tensor | None) -> None:
    for path, tensor in [("output", answer.output), *answer.hidden]:
        plan.energies[path] = losses.relative_to(losses.energy(tensor, mask))
    pooled = F.normalize(losses.pool(answer.output.float(), mask), dim=-1)
    upper = torch.triu_indices(len(pooled), len(pooled), 1)
    similarities = (pooled @ pooled.t())[upper[0], upper[1]]
    variance = similarities.var() if similarities.numel() > 1 else torch.tensor(1.0)
    plan.energies["similarity"] = losses.relative_to(variance)


def choose_objective(name: str, output: Tensor, teacher: nn.Module, student: nn.Module) -> str:
    """ "logits" if the output is called so or is as wide as a linear layer the student kept in
    float and that comes last (a head); "mse" for a single number; otherwise "embedding"."""
    if output.shape[-1] == 1:
        return "mse"
    if name == "logits":
        return "logits"
    linears = [path for path, m in teacher.named_modules() if isinstance(m, nn.Linear)]
    if name != "last_hidden_state" and linears:
        last = teacher.get_submodule(linears[-1])
        kept = not isinstance(dict(student.named_modules()).get(linears[-1]), BitLayer)
        if kept and last.out_features == output.shape[-1]:
            return "logits"
    return "embedding"


def without_labels(batch: Batch, config: FinetuneConfig) -> Batch:
    """The entries that can be inputs."""
    return {name: t for name, t in batch.items() if name != (config.labels or "labels")}


class Autocast:
    """``with autocast(): ...`` in bfloat16 on the models' device, or nothing."""

    def __init__(self, device: torch.device, bf16: bool) -> None:
        self.device, self.bf16 = device, bf16

    def __call__(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)


class Teacher:
    """The full-precision model's answers; up to cache_mb of those asked for by key are kept."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        config: FinetuneConfig,
        autocast: Autocast,
        cache_mb: int,
    ) -> None:
        self.model, self.plan, self.config, self.autocast = model, plan, config, autocast
        self.kept: dict[Hashable, Answer] = {}
        self.room = cache_mb * 2**20

    def answer(self, batch: Batch, key: Hashable = None) -> Answer:
        """The answer to a batch. key: names the batch; equal keys mean equal batches."""
        if key is not None and key in self.kept:
            return self.kept[key]
        inputs = without_labels(batch, self.config)
        capture = observe.Capture(self.model, self.plan.sites)
        with torch.no_grad(), capture, self.autocast():
            answer = self.plan.answer(*capture.run(lambda: call(self.model, inputs)))
        tensors = [answer.output, *(t for _, t in answer.hidden), *answer.projections]
        size = sum(t.numel() * t.element_size() for t in tensors)
        if key is not None and size <= self.room:
            self.room -= size
            self.kept[key] = answer
        return answer


class Lesson(nn.Module):
    """(batch, the teacher's answer) -> (weighted loss terms, agreement in [.., 1]).

    A module, so that DistributedDataParallel sees which parameters the loss reaches.
    """

    def __init__(
        self,
        student: nn.Module,
        plan: Plan,
        config: FinetuneConfig,
        autocast: Autocast,
        group: Group,
        label_loss: LabelLoss | None = None,
    ) -> None:
        super().__init__()
        self.student, self.plan, self.config = student, plan, config
        self.autocast, self.group = autocast, group
        self.label_loss = label_loss or default_label_loss
        self.capture = observe.Capture(student, plan.sites)

    def forward(
        self, batch: Batch, taught: Answer, shared: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One call of the student. agreement: top-1 for logits, else mean cosine. shared: the
        group's processes each have a part of the same batch."""
        inputs = without_labels(batch, self.config)
        with self.autocast():
            outputs, seen = self.capture.run(lambda: call(self.student, inputs))
        mask = inputs.get("attention_mask")
        said = self.plan.answer(outputs, seen)
        terms, agreement = self._output_terms(said, taught, mask, shared)
        terms |= self._inner_terms(said, taught, mask)
        if self.config.labels:
            labels = batch[self.config.labels]
            terms["labels"] = self.config.label_weight * self.label_loss(outputs, labels)
        return terms, agreement.detach()

    def _output_terms(
        self, said: Answer, taught: Answer, mask: Tensor | None, shared: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        config, plan = self.config, self.plan
        if plan.objective == "logits":
            divergence = losses.kl_divergence(said.output, taught.output, config.temperature, mask)
            same = said.output.argmax(-1) == taught.output.argmax(-1)
            agreement = losses.per_sample(same.float(), mask).mean()
            return {"logits": config.logits_weight * divergence}, agreement
        distance = losses.cosine_distance(said.output, taught.output, mask)
        terms: dict[str, Tensor] = {}
        if plan.objective == "embedding":
            terms["cosine"] = config.cosine_weight * distance
            if config.similarity_weight:
                error = self._similarity(said, taught, mask, shared)
                terms["similarity"] = config.similarity_weight * error
        if plan.objective == "mse" or not said.hidden:
            error = losses.squared_error(said.output, taught.output, mask)
            terms["output"] = error / plan.energies["output"]
        return terms, 1 - distance

    def _similarity(
        self, said: Answer, taught: Answer, mask: Tensor | None, shared: bool
    ) -> Tensor:
        """Similarities of this part's samples with those of all processes' parts."""
        mine = [losses.pool(answer.output.float(), mask) for answer in (said, taught)]
        everyone, first = self.group.gather_rows(mine) if shared else (mine, 0)
        error = losses.similarity_error(mine[0], mine[1], everyone[0], everyone[1], first)
        return error / self.plan.energies["similarity"]

    def _inner_terms(self, said: Answer, taught: Answer, mask: Tensor | None) -> dict[str, Tensor]:
        config, plan = self.config, self.plan
        terms: dict[str, Tensor] = {}
        if said.hidden and config.hidden_weight:
            errors = [
                losses.squared_error(s, t, mask) / plan.energies[path]
                for (path, s), (_, t) in zip(said.hidden, taught.hidden, strict=True)
            ]
            terms["hidden"] = config.hidden_weight * torch.stack(errors).mean()
        if said.projections and config.relation_weight:
            divergences = [
                losses.relation_divergence(s, t, mask)
                for s, t in zip(said.projections, taught.projections, strict=True)
            ]
            terms["relation"] = config.relation_weight * torch.stack(divergences).mean()
        return terms


def default_label_loss(outputs: Any, labels: Tensor) -> Tensor:
    """Cross-entropy for integer labels (-100: ignored), squared error for float ones."""
    answer = losses.primary_output(outputs)[1].float()
    if labels.is_floating_point():
        return F.mse_loss(answer.reshape(labels.shape), labels)
    return F.cross_entropy(answer.reshape(-1, answer.shape[-1]), labels.reshape(-1))
