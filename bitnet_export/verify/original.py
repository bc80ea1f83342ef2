"""Does the model that was given run at all, and on which shapes?

A file made elsewhere may hold sizes that its exporter took from its example, a reshape to 7 tokens
under a dynamic axis, or operators that no runtime here has. To find that out first keeps a wrong
--input apart from a fault of this tool, and leaves shapes out that the original refuses, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_export.errors import InputError, StageError, first_line
from bitnet_export.targets.session import open_session
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.runners import run_frugally, run_session


def refused_cases(path: Path, cases: Sequence[Case], threads: int | None = None) -> dict[str, str]:
    """The labels of the cases that the ONNX file at ``path`` breaks on, each with the reason.

    Raises StageError where it does not load.
    """
    session = open_session(path, threads=threads, frugal=run_frugally(path))
    reasons = {}
    for case in cases:
        try:
            run_session(session, case.feeds)
        except Exception as error:
            reasons[case.label] = first_line(error)
    return reasons


def check_original(path: Path, case: Case, source: Path, threads: int | None = None) -> None:
    """Raise InputError unless the model runs on the case that everything is measured at.

    path: the model as it was read from ``source``, which the message names.
    """
    try:
        reasons = refused_cases(path, [case], threads)
    except StageError as error:
        raise InputError(
            error.what.replace("the model", "it as it is"),
            where=str(source),
            fix="mend it, or export it for what ONNX Runtime has on a CPU",
        ) from error
    if case.label not in reasons:
        return
    shapes = ", ".join(f"{name} {_shape(value)}" for name, value in case.feeds.items())
    raise InputError(
        f"the model as it is does not run on {shapes}: {reasons[case.label]}",
        where=str(source),
        fix="pass the sizes it takes, numbers for those that are fixed in it, as in "
        + " ".join(f"--input {name}:{_spec(value)}" for name, value in case.feeds.items())
        + "; or real inputs with --data FILE.npz",
    )


def _shape(value: Any) -> str:
    return f"[{', '.join(map(str, value.shape))}]"


def _spec(value: Any) -> str:
    """A value's shape and dtype as --input takes them, the batch by name."""
    sizes = ["batch" if i == 0 else str(size) for i, size in enumerate(value.shape)]
    return f"{'x'.join(sizes)}:{value.dtype}"
