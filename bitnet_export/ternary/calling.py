"""Calling any model on a batch of named tensors, and nothing else.

Exported programs and hand-written modules take their inputs by name or by position; language
models also have a cache that only costs memory here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bitnet_export.errors import UsageError


def forward_arguments(model: nn.Module) -> list[str] | None:
    """Names of forward's arguments; None where it takes ``*args`` and must be called in order."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def call(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
    """model(batch) by name, entries that forward does not take left out; by position if it has to
    be, or if no entry is called as an argument and their number fits.

    Raises UsageError if nothing in the batch can be an input.
    """
    names = forward_arguments(model)
    if names is None:
        return model(*batch.values())
    inputs = {name: value for name, value in batch.items() if name in names}
    if inputs:
        extra = {"use_cache": False} if "use_cache" in names else {}
        return model(**inputs, **extra)
    if len(batch) > len(names):
        raise UsageError(
            f"the data has entries {sorted(batch)}, forward takes {', '.join(names)}",
            fix="name the arrays as forward's arguments",
        )
    return model(*batch.values())
