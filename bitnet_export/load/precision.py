"""Modules with half, bfloat16 or double weights -> the same module in float32.

What is loaded is trained, calibrated and exported in float32, whatever it was saved in; --dtype
decides what is deployed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

# numpy has no bfloat16, small training steps vanish in half, runtimes have few float64 operators.
OTHER_FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float64})


def in_float32(module: nn.Module, examples: dict[str, torch.Tensor]) -> list[str]:
    """Put a module whose weights are of another floating point type, and the inputs in ``examples``
    that are, into float32, in place; -> notes, none where nothing had to be done."""
    found = {p.dtype for p in module.parameters()} & OTHER_FLOATS
    if not found:
        return []
    module.float()
    if isinstance(module, fx.GraphModule):
        _rewrite_graph(module)
    for name, tensor in examples.items():
        examples[name] = tensor.float() if tensor.dtype in OTHER_FLOATS else tensor
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
    return [f"its {names} weights are loaded as float32"]


def _rewrite_graph(module: fx.GraphModule) -> None:
    """Casts to the weights' type, tensors made in it, and constants that float() does not see."""
    for node in module.graph.nodes:
        node.args = map_aggregate(node.args, _other_to_float32)
        node.kwargs = map_aggregate(node.kwargs, _other_to_float32)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value = getattr(module.get_submodule(owner), name)
            if isinstance(value, torch.Tensor) and value.dtype in OTHER_FLOATS:
                setattr(module.get_submodule(owner), name, value.float())
    module.recompile()


def _other_to_float32(argument: Any) -> Any:
    is_other = isinstance(argument, torch.dtype) and argument in OTHER_FLOATS
    return torch.float32 if is_other else argument
