"""Latency of engines: the ternary one against a full-precision one, by CUDA events on one GPU.

The counterpart of speed.py for the TensorRT targets. The baseline is an engine of the same
builder, profile and precision, made from the full-precision ONNX and kept beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from bitnet_export import manifest, onnx_io
from bitnet_export.options import Progress
from bitnet_export.targets.trt_build import TENSORRT_RTX, Request, build_engine
from bitnet_export.targets.trt_environment import choose_engine, this_machine
from bitnet_export.targets.trt_session import EngineSession, open_engine
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.results import SpeedRow
from bitnet_export.verify.speed import speed_row

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
        before_ms, after_ms = time_interleaved(timers, samples, seed)
        provider = engine.get_providers()[0]
        name = f"{record.dtype} engine"
        rows.append(speed_row(case.label, 0, name, provider, before_ms, after_ms))
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
