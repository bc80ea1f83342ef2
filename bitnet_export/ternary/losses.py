"""What the student is asked to match, as functions of tensors.

Logits: KL divergence at a temperature. Embeddings: cosine of mean-pooled vectors, and the
similarities among a batch's. Inside: squared error of each block's hidden states, and the
relations among the positions that attention sees. Every loss is a mean over samples of a loss per
sample, so that a batch can be worked off in parts and by several processes. No modules here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet_export.errors import InputError

# Head size of the relations where the model's own is not known (arXiv:2012.15828 lets it differ).
RELATION_SIZE = 32
_ENERGY_FLOOR = 1e-6


def primary_output(outputs: Any) -> tuple[str, Tensor]:
    """A model's main output: (name, tensor). logits before last_hidden_state before the first
    floating point tensor there is. Raises InputError where there is none."""
    if isinstance(outputs, Tensor):
        return "output", outputs
    if isinstance(outputs, Mapping):
        named = dict(outputs)
    else:
        named = {f"output_{i}": value for i, value in enumerate(outputs)}
    tensors = {
        name: t for name, t in named.items() if isinstance(t, Tensor) and t.is_floating_point()
    }
    for name in ("logits", "last_hidden_state", *tensors):
        if name in tensors:
            return name, tensors[name]
    raise InputError(
        f"the model returns no floating point tensor, only {', '.join(named) or 'nothing'}",
        fix="let it return the logits or vectors that its answer is taken from",
    )


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """logits [B, .., C] -> T^2 KL(teacher || student), mean over (unmasked) positions, then B."""
    s = F.log_softmax(student.float() / temperature, dim=-1)
    t = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    return per_sample(divergence, mask).mean() * temperature**2


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """[B, E], or [B, S, E] mean-pooled under mask [B, S] -> mean of 1 - cos."""
    s, t = pool(student.float(), mask), pool(teacher.float(), mask)
    return (1 - F.cosine_similarity(s, t, dim=-1)).mean()


def squared_error(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """(s - t)^2, mean over features and (unmasked) positions, then over samples."""
    return energy(student.float() - teacher.float(), mask)


def energy(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, .., E] or [B] -> mean of x^2 over features and (unmasked) positions, then B."""
    square = x.float().square()
    return per_sample(square.mean(-1) if x.dim() > 1 else square, mask).mean()


def relative_to(scale: Tensor | float) -> float:
    """A teacher's energy as the divisor of an error, safe where the teacher says nothing."""
    return max(float(scale), _ENERGY_FLOOR)


def similarity_error(
    student: Tensor, teacher: Tensor, all_student: Tensor, all_teacher: Tensor, first: int
) -> Tensor:
    """Pooled vectors [b, E] of this part, [B, E] of the whole batch -> squared error of the cosine
    similarities between part and batch, mean over the pairs of two samples.

    first: row of the batch where the part begins. The batch's side is a constant, so each sample
    answers for its own vector and the gradient is the same however the batch is shared out.
    """
    cosines = [
        F.normalize(part.float(), dim=-1) @ F.normalize(whole.detach().float(), dim=-1).t()
        for part, whole in ((student, all_student), (teacher, all_teacher))
    ]
    error = (cosines[0] - cosines[1]).square()
    own = torch.arange(len(error), device=error.device)
    others = torch.ones_like(error)
    others[own, own + first] = 0
    return (error * others).sum(1).mean() / max(1, error.shape[1] - 1)


def relation_divergence(
    student: Tensor, teacher: Tensor, mask: Tensor | None, size: int = RELATION_SIZE
) -> Tensor:
    """Projections [B, S, D] -> KL between the relations softmax(x x^T / sqrt(size)) of the heads
    of that size, mean over heads and (unmasked) positions, then B (MiniLMv2, arXiv:2012.15828)."""
    s, t = _relations(student, mask, size), _relations(teacher, mask, size)
    divergence = F.kl_div(s, t, reduction="none", log_target=True).sum(-1).mean(1)
    return per_sample(divergence, mask).mean()


def _relations(x: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """[B, S, D] -> log softmax over keys, [B, heads, S, S]."""
    if x.shape[-1] % size:
        size = x.shape[-1]
    heads = x.float().unflatten(-1, (-1, size)).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / size**0.5
    if mask is not None and mask.shape == x.shape[:2]:
        scores = scores.masked_fill(mask[:, None, None, :] == 0, -1e4)
    return F.log_softmax(scores, dim=-1)


def pool(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, E] -> [B, E], the mean over unmasked positions; other ranks are flattened to 2-D."""
    if x.dim() != 3:
        return x.flatten(1)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def per_sample(per_position: Tensor, mask: Tensor | None) -> Tensor:
    """[B, ..] -> [B], the mean over positions, or over those where a mask of the shape is set."""
    if mask is None or mask.shape != per_position.shape:
        return per_position.flatten(1).mean(1) if per_position.dim() > 1 else per_position
    weight = mask.to(per_position.dtype)
    return (per_position * weight).sum(1) / weight.sum(1).clamp_min(1)
