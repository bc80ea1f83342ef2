"""Weights without a module: a state_dict or safetensors file and the factory that builds it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from bitnet_export.errors import InputError, UsageError
from bitnet_export.load.experts import split_experts

SHOWN_KEYS = 4


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file -> its tensors. Raises InputError if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as e:
        raise InputError(
            f"the safetensors file is truncated or damaged ({e})",
            where=str(path),
            fix="copy or write it again",
        ) from e


def build(factory: str | None, weights: Mapping[str, torch.Tensor], path: Path) -> nn.Module:
    """The factory's module with these weights in it, in eval mode.

    Raises UsageError for a factory that does not import or makes no module, InputError for
    weights that do not fit it.
    """
    if factory is None:
        raise UsageError(
            "it holds weights but no architecture",
            where=str(path),
            fix="pass --model package.module:function, a function that returns the untrained "
            "nn.Module; or write the model whole with bitnet_export.save",
        )
    module = _call(_resolve(factory), factory)
    if not weights.keys() <= module.state_dict().keys():
        split_experts(module)  # what it may have been when this was written
    _load(module, weights, path, factory)
    split_experts(module)
    return module.eval()


def _resolve(factory: str) -> object:
    module_name, colon, attribute = factory.partition(":")
    where = f"--model {factory}"
    if not colon or not module_name or not attribute:
        raise UsageError("it is not package.module:function", where=where)
    # A user runs this in the project's directory, which a console script's path leaves out.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        target: object = importlib.import_module(module_name)
    except Exception as e:
        raise UsageError(
            f"importing {module_name} failed: {type(e).__name__}: {e}",
            where=where,
            fix="run in the directory that holds the package, or set PYTHONPATH",
        ) from e
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise UsageError(f"{module_name} has no {attribute}", where=where)
        target = getattr(target, name)
    return target


def _call(target: object, factory: str) -> nn.Module:
    where = f"--model {factory}"
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise UsageError("it is neither a function nor a module class", where=where)
    try:
        made = target()
    except Exception as e:
        raise UsageError(
            f"calling it without arguments failed: {type(e).__name__}: {e}",
            where=where,
            fix="write a function without arguments that returns the module",
        ) from e
    if not isinstance(made, nn.Module):
        raise UsageError(f"it returned {type(made).__name__}, not an nn.Module", where=where)
    return made


def _load(module: nn.Module, weights: Mapping[str, torch.Tensor], path: Path, factory: str) -> None:
    own = module.state_dict()
    missing = [k for k in own if k not in weights]
    # safetensors drops all but one name of a tied tensor; the others come with it.
    tied = _tied_names(module)
    missing = [k for k in missing if not any(other in weights for other in tied.get(k, ()))]
    unexpected = [k for k in weights if k not in own]
    mismatched = [
        f"{k} (file {list(weights[k].shape)}, model {list(own[k].shape)})"
        for k in own
        if k in weights and own[k].shape != weights[k].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN_KEYS])}"
        + (", ..." if len(keys) > SHOWN_KEYS else "")
        for what, keys in (
            ("missing from the file", missing),
            ("not in the model", unexpected),
            ("of another shape", mismatched),
        )
        if keys
    ]
    if problems:
        raise InputError(
            f"the weights do not fit the module that {factory} builds\n  " + "\n  ".join(problems),
            where=str(path),
            fix="check that the factory builds the architecture these weights were trained with",
        )
    module.load_state_dict(weights, strict=False)


def _tied_names(module: nn.Module) -> dict[str, list[str]]:
    """{parameter path: its other paths} for parameters that have several."""
    paths: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(name)
    return {n: [m for m in group if m != n] for group in paths.values() for n in group}
