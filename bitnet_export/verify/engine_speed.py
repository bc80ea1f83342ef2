"""Latency of engines: the ternary one against a full-precision one, by CUDA events on one GPU.

The counterpart of speed.py for the TensorRT targets. The baseline is an engine of the same
builder, profile and precision, made from the full-precision ONNX and kept beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_export import manifest, onnx_io
from bitnet_export.options import Progress
from bitnet_export.targets.trt_build import TENSORRT_RTX, Request, build_engine
from bitnet_export.targets.trt_environment import choose_engine, this_machine
from bitnet_export.targets.trt_session import EngineSession, open_engine
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.results import SpeedRow

BASELINE_ENGINE = f"{manifest.INTERMEDIATE}/baseline.engine"


def measure_engine_speed(
    directory: Path,
    record: manifest.Manifest,
    baseline: Path,
    cases: Sequence[Case],
    *,
    samples: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[SpeedRow]:
    """One row a case; ``threads`` is 0, for the GPU does the work.

    baseline: the full-precision ONNX. Raises MissingRequirement where the engine does not run
    here, StageError where the baseline's engine cannot be built.
    """
    engine = open_engine(directory, record)
    before = open_baseline(directory, record, baseline, progress)
    rows = []
    for case in cases:
        timers = [session.time(case.feeds, samples) for session in (before, engine)]
        taken = time_interleaved(timers, samples, seed)
        rows.append(_row(case.label, f"{record.dtype} engine", engine, taken))
    return rows


def open_baseline(
    directory: Path, record: manifest.Manifest, baseline: Path, progress: Progress | None
) -> EngineSession:
    """The full-precision engine, built on this machine the first time."""
    engines = record.environment["engines"]
    facts = next(iter(engines.values()))
    machine = this_machine(facts["runtime"])
    path = directory / BASELINE_ENGINE
    if not path.is_file():
        source = baseline
        if record.dtype == "fp16":
            from bitnet_export.passes.to_fp16 import to_fp16

            model = to_fp16(onnx_io.read_model(baseline))[0]
            source = onnx_io.write_model(model, directory / manifest.INTERMEDIATE / "fp16.onnx")
        choose_engine(engines, machine, directory)
        rtx = facts["runtime"] == TENSORRT_RTX
        profile = record.environment["profile"]
        cards = (machine.capability,) if rtx else ()
        request = Request(facts["runtime"], source.absolute(), path.absolute(), profile, cards)
        build_engine(request, progress)
    return EngineSession(path, facts["runtime"], record.environment["profile"])


def time_interleaved(
    timers: Sequence[Callable[[], float]], samples: int, seed: int = 0
) -> list[list[float]]:
    """Each timer's milliseconds, ``samples`` times; the two take turns in shuffled order."""
    rng = random.Random(seed)
    order = list(range(len(timers)))
    taken: list[list[float]] = [[] for _ in timers]
    for _ in range(samples):
        rng.shuffle(order)
        for i in order:
            taken[i].append(timers[i]())
    return taken


def _row(label: str, baseline: str, engine: Any, taken: list[list[float]]) -> SpeedRow:
    before, after = taken
    before_50, before_90, before_99 = np.percentile(before, (50, 90, 99)).tolist()
    after_50, after_90, after_99 = np.percentile(after, (50, 90, 99)).tolist()
    return SpeedRow(
        shape=label,
        threads=0,
        baseline=baseline,
        baseline_ms=before_50,
        ms=after_50,
        ratio=before_50 / after_50,
        baseline_p90_ms=before_90,
        baseline_p99_ms=before_99,
        p90_ms=after_90,
        p99_ms=after_99,
        baseline_samples_ms=[round(value, 5) for value in before],
        samples_ms=[round(value, 5) for value in after],
        provider=engine.get_providers()[0],
    )
