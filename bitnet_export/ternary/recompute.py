"""Trading time for memory: activations inside blocks are computed again for the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from bitnet_export.errors import UsageError
from bitnet_export.ternary.observe import repeated_blocks


@contextmanager
def recomputing(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within it only the inputs of the model's repeated blocks are kept for the backward pass.

    Raises UsageError for a model without such blocks, a flattened (exported) one among them.
    """
    blocks = [model.get_submodule(path) for path in repeated_blocks(model)] if enabled else []
    if enabled and not blocks:
        raise UsageError(
            "the model has no repeated blocks, nothing could be recomputed",
            where="recompute",
            fix="leave it out, and save memory with more accumulated parts (accumulate)",
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own shows again
