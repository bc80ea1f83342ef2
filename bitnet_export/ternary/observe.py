"""Seeing inside a model while it runs: where hidden states and attention projections come out.

Finds the modules worth comparing and collects their outputs with forward hooks. What is made of
them is in losses.py and objective.py; no model family is known here, only names and structure.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.ternary.layers import BitLayer

# First numbered container in a path: encoder.layer.3.output.dense -> encoder.layer.3
_BLOCK = re.compile(r"^((?:.*?\.)?\d+)\.")
# What attention projections are called, by the last part of their path.
_QUERY = ("query", "q_proj", "q_lin", "q", "to_q", "wq", "q_attn")
_KEY = ("key", "k_proj", "k_lin", "k", "to_k", "wk")
_VALUE = ("value", "v_proj", "v_lin", "v", "to_v", "wv")
_FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "Wqkv")


class Capture(AbstractContextManager["Capture"]):
    """Collects the outputs of the named modules: ``capture.take()`` -> tensors by path."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.model, self.names = model, names
        self.seen: list[tuple[str, Tensor]] = []
        self._handles: list[Any] = []
        self._listening = True

    def __enter__(self) -> Capture:
        for name in self.names:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.seen.clear()

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[tuple[str, Tensor]]]:
        """(what call returns, [(path, output)] in call order). Nothing is heard in between runs:
        recomputed blocks would be seen again during the backward pass."""
        self.seen.clear()
        self._listening = True
        try:
            result = call()
            return result, list(self.seen)
        finally:
            self._listening = False
            self.seen.clear()

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not self._listening:
                return
            if isinstance(output, tuple | list) and output:
                output = output[0]
            if isinstance(output, Tensor) and output.is_floating_point():
                self.seen.append((name, output))

        return hook


def hidden_sites(student: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Paths of the modules whose outputs are compared. run: calls the student once.

    The repeated blocks of a ModuleList or Sequential that hold ternary layers, if they are called
    as modules; in a flattened model (an exported program) the last ternary layer of each block;
    in a model without blocks every ternary layer.
    """
    ternary = ternary_paths(student)
    blocks = repeated_blocks(student)
    with Capture(student, [*blocks, *ternary]) as capture, torch.no_grad():
        called = list(dict.fromkeys(name for name, _ in capture.run(run)[1]))
    if any(block in called for block in blocks):
        return [name for name in called if name in blocks]
    last_of_block = {block_of(name): name for name in called if name in ternary}
    return list(last_of_block.values())


def projection_sites(model: nn.Module) -> list[str]:
    """Paths of the query, key and value projections of the last attention that has all three, or
    of its one fused projection; [] if there is none.

    One late layer, as in BitDistill (arXiv:2510.13998, section 3.3).
    """
    by_parent: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        role = _role(name)
        if role and isinstance(getattr(module, "weight", None), Tensor):
            by_parent.setdefault(parent, {})[role] = path
    for found in reversed(by_parent.values()):
        if all(role in found for role in ("query", "key", "value")):
            return [found[role] for role in ("query", "key", "value")]
        if "fused" in found:
            return [found["fused"]]
    return []


def ternary_paths(model: nn.Module) -> list[str]:
    """Paths of the ternary layers in training."""
    return [path for path, m in model.named_modules() if isinstance(m, BitLayer)]


def repeated_blocks(model: nn.Module) -> list[str]:
    """Children of the outermost containers whose children are two or more of one class, all with
    ternary layers."""
    ternary = ternary_paths(model)
    blocks: list[str] = []
    for path, module in model.named_modules():
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


def block_of(path: str) -> str:
    """The block a layer belongs to; itself if it is in none."""
    match = _BLOCK.match(path)
    return match.group(1) if match else path


def _role(name: str) -> str:
    roles = {"query": _QUERY, "key": _KEY, "value": _VALUE, "fused": _FUSED}
    return next((role for role, names in roles.items() if name in names), "")
