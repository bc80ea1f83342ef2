"""Checkpoints of a fine-tuning run: written whole or not at all, and found again for resuming.

A checkpoint holds the student, the optimizer, the best weights, the step and the history
(run_state.py). There is no random state in it: each step seeds itself (distill.py), so a resumed
run repeats the uninterrupted one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from bitnet_export.errors import InputError, UsageError

KEPT = 2
_FORMAT = 2


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Write state as step-<step>.pt and drop all but the newest KEPT."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{state['step']:07d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        torch.save({"format": _FORMAT, **state}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in _found(directory)[:-KEPT]:
        old.unlink(missing_ok=True)
    return path


def load_newest(directory: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The newest checkpoint. Raises UsageError if there is none or if it is of a run with other
    settings than fingerprint, InputError if it cannot be read."""
    found = _found(directory)
    if not found:
        raise UsageError(
            "there is no checkpoint to resume from",
            where=str(directory),
            fix="start without resume; checkpoints are written every checkpoint_every steps",
        )
    path = found[-1]
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
    except Exception as e:
        raise InputError(
            f"the checkpoint cannot be read ({type(e).__name__})",
            where=str(path),
            fix="delete it; the one before it is used then",
        ) from e
    if state.get("format") != _FORMAT:
        raise UsageError(
            "another version of bitnet-export wrote this checkpoint",
            where=str(path),
            fix="finish the run with that version, or start again in another directory",
        )
    before = state.get("fingerprint", {})
    changed = [name for name, value in fingerprint.items() if before.get(name) != value]
    if changed:
        name = changed[0]
        raise UsageError(
            f"it was written with {name}={before.get(name)!r}, this run has {fingerprint[name]!r}",
            where=str(path),
            fix="use the same settings, or another checkpoint directory",
        )
    return state


def _found(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.pt"))
