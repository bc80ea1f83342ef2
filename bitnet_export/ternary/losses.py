"""What the student is asked to match, and the measure of how well it does.

Logits: KL divergence at a temperature. Embeddings: cosine of mean-pooled vectors. Inside: mean
squared error of each block's hidden states, relative to the teacher's mean square so that every
block weighs alike. Only modules and tensors; nothing here knows a model family.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitnet_export.ternary.layers import BitLinear

# First numbered container in a path: encoder.layer.3.output.dense -> encoder.layer.3
_BLOCK = re.compile(r"^((?:.*?\.)?\d+)\.")


def primary_output(outputs: Any) -> tuple[str, Tensor]:
    """A model's main output: (name, tensor). logits before last_hidden_state before the first
    floating point tensor there is."""
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
    raise TypeError(f"the model returns no floating point tensor, only {list(named)}")


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
        kept = not isinstance(dict(student.named_modules()).get(linears[-1]), BitLinear)
        if kept and last.out_features == output.shape[-1]:
            return "logits"
    return "embedding"


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor:
    """logits [..., C] -> T^2 KL(teacher || student), the mean over (unmasked) positions."""
    s = F.log_softmax(student.float() / temperature, dim=-1)
    t = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(s, t, reduction="none", log_target=True).sum(-1)
    return _mean(divergence, mask) * temperature**2


def cosine_distance(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """[B, E], or [B, S, E] mean-pooled under mask [B, S] -> mean of 1 - cos."""
    s, t = pool(student.float(), mask), pool(teacher.float(), mask)
    return (1 - F.cosine_similarity(s, t, dim=-1)).mean()


def relative_mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """mean (s - t)^2 / mean t^2 over (unmasked) positions."""
    s, t = student.float(), teacher.float()
    if s.dim() < 2:
        return F.mse_loss(s, t) / t.square().mean().clamp_min(1e-6)
    error = (s - t).square().mean(-1)
    return _mean(error, mask) / _mean(t.square().mean(-1), mask).clamp_min(1e-6)


def pool(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, E] -> [B, E], the mean over unmasked positions; other ranks are flattened to 2-D."""
    if x.dim() != 3:
        return x.flatten(1)
    if mask is None or mask.shape != x.shape[:2]:
        return x.mean(1)
    weight = mask.to(x.dtype)[..., None]
    return (x * weight).sum(1) / weight.sum(1).clamp_min(1)


def _mean(per_position: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over all positions, or over those where a mask of the same shape is set."""
    if mask is None or mask.shape != per_position.shape:
        return per_position.mean()
    weight = mask.to(per_position.dtype)
    return (per_position * weight).sum() / weight.sum().clamp_min(1)


class Capture(AbstractContextManager["Capture"]):
    """Collects the outputs of the named modules: ``capture.take()`` -> tensors in call order."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        self.seen: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Capture:
        for name in self.names:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[Tensor]:
        """What was seen since the last take."""
        tensors = [t for _, t in self.seen]
        self.seen.clear()
        return tensors

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point():
                self.seen.append((name, output))

        return hook


def hidden_sites(student: nn.Module, run: Any) -> list[str]:
    """Paths of the modules whose outputs are compared. run: calls the student once.

    The repeated blocks of a ModuleList or Sequential that hold ternary layers, if they are called
    as modules; in a flattened model (an exported program) the last ternary layer of each block;
    in a model without blocks every ternary layer.
    """
    ternary = [path for path, m in student.named_modules() if isinstance(m, BitLinear)]
    blocks = _repeated_blocks(student, ternary)
    with Capture(student, [*blocks, *ternary]) as capture, torch.no_grad():
        run()
        called = list(dict.fromkeys(name for name, _ in capture.seen))
    if any(block in called for block in blocks):
        return [name for name in called if name in blocks]
    last_of_block = {_block_of(name): name for name in called if name in ternary}
    return list(last_of_block.values())


def _repeated_blocks(student: nn.Module, ternary: list[str]) -> list[str]:
    """Children of the outermost containers whose children are two or more of one class."""
    blocks: list[str] = []
    for path, module in student.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < 2:
            continue
        if any(path.startswith(f"{block}.") for block in blocks):
            continue
        kinds = {type(child) for child in module}
        prefix = f"{path}." if path else ""
        names = [f"{prefix}{name}" for name, _ in module.named_children()]
        holds = [n for n in names if any(t.startswith(f"{n}.") for t in ternary)]
        if len(kinds) == 1 and len(holds) == len(names):
            blocks += names
    return blocks


def _block_of(path: str) -> str:
    """The block a layer belongs to; itself if it is in none."""
    match = _BLOCK.match(path)
    return match.group(1) if match else path
