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
_FORMAT = 3


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


def check_new(directory: Path) -> None:
    """Raise UsageError where an earlier run left checkpoints: the newest by number are kept, so
    those of a new run would go first, and resuming would go on with the earlier one."""
    found = _found(directory)
    if found:
        raise UsageError(
            f"it holds checkpoints of an earlier run ({found[-1].name})",
            where=str(directory),
            fix="go on with that run (resume), delete them, or choose another directory",
        )


def load_newest(directory: Path, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The newest checkpoint. Raises UsageError if there is none or if it is of a run with other
    settings than fingerprint, InputError if it cannot be read."""
    found = _found(directory)
    if not found:
        raise UsageError(
            "there is no checkpoint to resume from",
            where=str(directory),
            fix="start without resume; checkpoints are written at evaluations (eval_every)",
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
    names = [*fingerprint, *(name for name in before if name not in fingerprint)]
    changed = [name for name in names if before.get(name) != fingerprint.get(name)]
    if changed:
        name = changed[0]
        raise UsageError(
            f"it was written with {name}={before.get(name)!r}, "
            f"this run has {fingerprint.get(name)!r}",
            where=str(path),
            fix="use the same settings, or another checkpoint directory",
        )
    return state


def _found(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*.pt"))
