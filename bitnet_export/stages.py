"""Which stage of a run is under way: told to the progress display, timed for the report."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bitnet_export.options import Progress

if TYPE_CHECKING:
    from bitnet_export.report.schema import StageRow
    from bitnet_export.ternary.finetune_config import StepInfo


# Resident memory from which garbage is looked for between stages, which takes some 0.2 s.
COLLECTED_BYTES = 2_000_000_000


class Stages:
    """Tells the progress display which stage runs, and keeps how long each took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.rows: list[StageRow] = []

    @contextmanager
    def __call__(self, name: str, detail: str = "") -> Iterator[None]:
        from bitnet_export.report.schema import StageRow

        self.progress.stage(name, detail)
        collect_garbage()
        started = time.perf_counter()
        yield
        self.rows.append(StageRow(name=name, seconds=time.perf_counter() - started))


def collect_garbage() -> None:
    """Modules and graphs refer to themselves, and Python counts objects, not bytes: what the last
    stage left of a large model would lie beside what the next one makes of it."""
    if (resident_memory() or 0) > COLLECTED_BYTES:
        gc.collect()


def resident_memory() -> int | None:
    """Bytes of this process in memory; None where the system does not tell."""
    from bitnet_export.verify.memory import resident_bytes

    return resident_bytes()


def on_step(progress: Progress) -> Callable[[StepInfo], None]:
    """Shows fine-tuning's steps on the progress display."""

    def tell(step: StepInfo) -> None:
        detail = f"loss {step.loss:.4g}"
        if step.evaluation:
            detail += f", held out {step.evaluation['loss']:.4g}"
        progress.update(step.step, step.steps, detail)

    return tell
