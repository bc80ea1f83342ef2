"""What a run consists of: taking it down whole, putting it back, and what tells one from another.

Weights and optimizer state as plain CPU tensors by name, whatever they are spread over, so that
one process can go on where two stopped and the other way round. Files are checkpoint.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.ternary.finetune_config import FinetuneConfig
from bitnet_export.ternary.layers import BitLayer
from bitnet_export.ternary.parallel import put, whole

State = dict[str, Any]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name, each once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# Settings that may be others when a run is resumed: where and how often it looks and writes, and
# how the work is shared out, which changes nothing but rounding.
_FREE = {"checkpoint_dir", "checkpoint_every", "resume", "eval_every", "patience"}
_FREE |= {"parallel", "accumulate", "recompute"}
_FREE |= {"teacher_cache_mb"}  # only whether there is one decides what batches are


def fingerprint(student: nn.Module, config: FinetuneConfig, found: State) -> State:
    """What must be equal for a resumed run to continue the same one: settings, what the run found
    out by itself, and how each layer is made ternary."""
    settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
    layers = {path: m.spec for path, m in student.named_modules() if isinstance(m, BitLayer)}
    return settings | found | {f"layer {path}": spec.text for path, spec in layers.items()}


def gather(tensors: Mapping[str, Tensor], here: bool) -> dict[str, Tensor]:
    """Plain CPU copies, one after the other. All processes take part; only where ``here`` is true
    they are kept."""
    kept = {}
    for name, value in tensors.items():
        plain = whole(value)
        if here:
            kept[name] = plain
    return kept


def take_weights(model: nn.Module, here: bool = True) -> dict[str, Tensor]:
    """The state dict as plain tensors."""
    return gather(model.state_dict(), here)


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Undo take_weights. Raises KeyError if an entry is missing."""
    for name, value in model.state_dict().items():
        put(value, weights[name])


def take_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, here: bool = True) -> State:
    """{parameter: {entry: tensor}} of the parameters the optimizer has seen a gradient of."""
    return {
        name: gather(optimizer.state[p], here)
        for name, p in trainable(model).items()
        if p in optimizer.state
    }


def put_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Undo take_optimizer, before the optimizer's first step."""
    for name, p in trainable(model).items():
        for entry, value in state.get(name, {}).items():
            like_parameter = value.shape == p.shape
            # Fused AdamW counts its steps where the parameter is, too.
            new = (
                torch.empty_like(p) if like_parameter else torch.empty_like(value, device=p.device)
            )
            put(new, value)
            optimizer.state[p][entry] = new.detach()


def copy_into(target: nn.Module, source: nn.Module, here: bool) -> None:
    """source's weights into target, one after the other, where ``here`` is true.

    All processes take part; none holds a second copy of the whole model while it lasts.
    """
    entries = target.state_dict()
    for name, value in source.state_dict().items():
        plain = whole(value)
        if here:
            put(entries[name], plain)


class Best:
    """The trained weights at the best evaluation so far, each process keeping its own part."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.loss, self.step = float("inf"), 0
        self.weights: dict[str, Tensor] = {}

    def see(self, loss: float, step: int) -> bool:
        """Whether these weights are better than any before; they are remembered then."""
        if not loss < self.loss:
            return False
        self.loss, self.step = loss, step
        self.weights = {n: p.detach().clone() for n, p in trainable(self.model).items()}
        return True

    def restore(self) -> None:
        """Back to the best weights."""
        with torch.no_grad():
            for name, p in trainable(self.model).items():
                if name in self.weights:
                    p.copy_(self.weights[name])

    def take(self, step: int, here: bool = True) -> State:
        """For a checkpoint of ``step``; without the weights where they are that step's."""
        weights = {} if self.step == step else gather(self.weights, here)
        return {"loss": self.loss, "step": self.step, "weights": weights}

    def put(self, state: State) -> None:
        """Undo take; the model has the checkpoint's weights already."""
        self.see(state["loss"], state["step"])
        for name, value in state["weights"].items():
            put(self.weights[name], value)
