"""Mixtures of experts as linear layers, which can become ternary like any other.

transformers keeps a layer's experts in two weights of three dimensions and multiplies by slices of
them, which neither swaps nor exports. LinearExperts holds the same numbers in one nn.Linear a
projection and computes what they computed; each expert sees only the tokens that chose it. Any
architecture built on transformers' experts interface is meant (Mixtral, Qwen MoE, gpt-oss, OLMoE,
DeepSeek and more). join_experts and restore_experts lead back to transformers' form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.errors import InputError

DOWN = "down_proj"


class Expert(nn.Module):
    """One expert: up_proj or, with its gate, gate_up_proj; then down_proj."""

    def __init__(self, up_name: str, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.up_name = up_name
        self.add_module(up_name, up)
        self.down_proj = down

    def forward(self, x: Tensor, gating: Gating) -> Tensor:
        """x [T, H] -> [T, H]."""
        return self.down_proj(gating(getattr(self, self.up_name)(x)))


class Gating(nn.Module):
    """What stands between an expert's projections: the experts module, without its weights."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """[T, 2 I] -> [T, I], or [T, I] -> [T, I] where there is no gate."""
        of: Any = self.experts
        y: Tensor = of._apply_gate(x) if of.has_gate else of.act_fn(x)
        return y


class LinearExperts(nn.Module):
    """In the place of a transformers experts module; expert e is the child named str(e).

    forward: hidden_states [T, H], top_k_index [T, k] int64, top_k_weights [T, k] -> [T, H].
    An index that is no expert's (padding has such) adds nothing.
    """

    def __init__(self, experts: Any, *, copy: bool = True) -> None:
        super().__init__()
        self.transposed = bool(experts.is_transposed)
        self.up_name = "gate_up_proj" if experts.has_gate else "up_proj"
        self.count = int(getattr(experts, self.up_name).shape[0])
        for e in range(self.count):
            up, down = (_linear(experts, name, e, copy) for name in (self.up_name, DOWN))
            self.add_module(str(e), Expert(self.up_name, up, down))
        self.gating = Gating(experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for e in range(self.count):
            rows, choice = torch.where(top_k_index == e)
            y = getattr(self, str(e))(hidden_states[rows], self.gating)
            y = y * top_k_weights[rows, choice, None]
            result = result.index_add(0, rows, y.to(result.dtype))
        return result

    def join(self, tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
        """State dict entries of this module at ``path`` -> with the names and shapes they have in
        transformers' own module: weights [E, out, in] ([E, in, out] if transposed), biases
        [E, out]. The other entries are kept."""
        joined = dict(tensors)
        for name in (self.up_name, DOWN):
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                keys = [f"{path}.{e}.{name}.{kind}" for e in range(self.count)]
                if keys[0] not in joined:
                    continue
                parts = [joined.pop(key) for key in keys]
                if kind == "weight" and self.transposed:
                    parts = [part.T for part in parts]
                joined[f"{path}.{name}{suffix}"] = torch.stack(parts)
        return joined


def _linear(experts: Any, name: str, e: int, copy: bool) -> nn.Linear:
    """Expert e's projection, on memory of its own or, not copy, a view of all experts'."""
    weight, bias = getattr(experts, name)[e], getattr(experts, f"{name}_bias", None)
    weight = weight.T if experts.is_transposed else weight
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = _parameter(weight, copy)
    if bias is not None:
        made.bias = _parameter(bias[e], copy)
    return made


def _parameter(tensor: Tensor, copy: bool) -> nn.Parameter:
    tensor = tensor.detach()
    return nn.Parameter(tensor.contiguous().clone() if copy else tensor)


def is_experts(module: nn.Module) -> bool:
    """Whether it is one of transformers' experts modules."""
    kind = type(module).__module__
    return kind.startswith("transformers.") and hasattr(module, "_is_expert_parallel")


def split_experts(model: nn.Module) -> list[str]:
    """Replace every experts module of transformers by LinearExperts, in place; -> their paths.

    One module at a time is copied, then its own weights are let go. Raises InputError for
    experts of a form that is not known.
    """
    found = _find(model)
    for path, module in found:
        new = LinearExperts(module)
        for name in (new.up_name, DOWN):
            delattr(module, name)
            if hasattr(module, f"{name}_bias"):
                delattr(module, f"{name}_bias")
        model.set_submodule(path, new.train(module.training))
    return [path for path, _ in found]


@contextmanager
def experts_split(model: nn.Module) -> Iterator[None]:
    """split_experts for as long as the context lasts, on the model's own weights."""
    found = _find(model)
    try:
        for path, module in found:
            model.set_submodule(path, LinearExperts(module, copy=False).train(module.training))
        yield
    finally:
        for path, module in found:
            model.set_submodule(path, module)


def restore_experts(model: nn.Module) -> None:
    """Undo split_experts, in place: transformers' own modules, with the weights as they are now."""
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, LinearExperts)]
    for path, module in found:
        prefix = "experts"
        entries = {f"{prefix}.{name}": p.detach() for name, p in module.named_parameters()}
        whole = module.gating.experts
        for name, tensor in module.join(entries, prefix).items():
            setattr(whole, name.removeprefix(f"{prefix}."), nn.Parameter(tensor))
        model.set_submodule(path, whole.train(module.training))


def join_experts(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict entries of a model with LinearExperts -> those of transformers' own model."""
    for path, module in model.named_modules():
        if isinstance(module, LinearExperts):
            tensors = module.join(tensors, path)
    return tensors


def _find(model: nn.Module) -> list[tuple[str, nn.Module]]:
    found = [(path, m) for path, m in model.named_modules() if is_experts(m)]
    # Those inside a LinearExperts' gating have no weights left.
    found = [(path, m) for path, m in found if hasattr(m, DOWN)]
    for path, module in found:
        odd = [n for n in ("has_post_expert_norm",) if getattr(module, n, False)]
        if odd or getattr(module, DOWN).ndim != 3:
            raise InputError(
                f"its experts ({type(module).__name__}) have a form that is not supported",
                where=path or type(model).__name__,
                fix="rewrite them as one nn.Linear a projection and expert",
            )
    return found
