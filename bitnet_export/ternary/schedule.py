"""How fast a run learns: the learning rate by model size and by step, and the optimizer."""

from __future__ import annotations

import math

import torch
from torch import nn

# (parameters up to, learning rate): tiny nets, tens of millions. Above: FinetuneConfig.large_lr.
LEARNING_RATES = ((1_000_000, 2e-3), (60_000_000, 4e-4))
BETAS = (0.9, 0.98)


def default_lr(model: nn.Module, large: float) -> float:
    """A learning rate by the model's size; ``large`` for one that is larger than all limits."""
    size = sum(p.numel() for p in model.parameters())
    return next((lr for limit, lr in LEARNING_RATES if size <= limit), large)


def factor(step: int, steps: int, warmup: float, shape: str = "linear") -> float:
    """What the learning rate is multiplied by at a step, counted from 0: linear up over the first
    ``warmup`` part, then down to 0, in a line or a half cosine."""
    up = max(1, round(warmup * steps))
    if step < up:
        return (step + 1) / up
    done = (step - up) / max(1, steps - up)
    return 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done


def adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay: latent weights have no reason to shrink."""
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0.0, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for all parameters from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
