"""Latency of two ONNX files against each other: one runtime, one set of options, one set of feeds.

Both sessions stay open and take turns in shuffled order, so that a busy spell of the machine
hits both alike. Every sample is kept. Resident memory, on request, is measured in fresh
processes by memory.py. Gates on the result are report/gates.py's.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_export.env import usable_cores
from bitnet_export.errors import InputError
from bitnet_export.targets.session import CPU, open_session
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.memory import measure_memory
from bitnet_export.verify.results import SpeedRow
from bitnet_export.verify.size import measure_size

WARM_UP_RUNS = 3
WARM_UP_SECONDS = 0.3
MIN_SAMPLES = 11
# Beyond the samples asked for, fast models run on until so much time has gone by: their medians
# get steadier for free.
SETTLE_SECONDS = 0.5
MAX_SAMPLES = 1000


def measure_speed(
    baseline_path: Path | str,
    path: Path | str,
    cases: Sequence[Case],
    *,
    threads: int | None = None,
    provider: str = CPU,
    samples: int = 50,
    budget_s: float = 20.0,
    memory: bool = False,
    native: Path | None = None,
    seed: int = 0,
    on_case: Callable[[str], None] = lambda label: None,
) -> list[SpeedRow]:
    """One row a case.

    threads: intra-op threads of both sessions, None: all usable cores. samples: timed runs of
    each side, fewer (never below 11) where ``budget_s`` seconds a case run out. Raises
    InputError without cases, and what open_session raises. native: a library of custom operators
    to run the output with.
    """
    if not cases or samples < 1:
        raise InputError(f"nothing to time: {len(cases)} input shapes, {samples} samples")
    count = threads or usable_cores()
    paths = (baseline_path, path)
    libraries = (None, native)
    sessions = [
        open_session(p, threads=count, provider=provider, native=library, takes_turns=True)
        for p, library in zip(paths, libraries, strict=True)
    ]
    name = f"{measure_size(baseline_path).dtype} ONNX"
    rows = []
    for case in cases:
        on_case(case.label)
        runs = [_bind(s, case, p) for s, p in zip(sessions, paths, strict=True)]
        before, after = time_interleaved(runs, samples=samples, budget_s=budget_s, seed=seed)
        used = [measure_memory(p, case.feeds, count) if memory else None for p in paths]
        row = speed_row(case.label, count, name, provider, before, after)
        rows.append(replace(row, baseline_memory_bytes=used[0], memory_bytes=used[1]))
    return rows


def _bind(session: Any, case: Case, path: Path | str) -> Callable[[], Any]:
    """A call without arguments: the feeds are picked once, outside the timing."""
    wanted = {i.name for i in session.get_inputs()}
    if unknown := sorted(wanted - case.feeds.keys()):
        raise InputError(
            f"takes {', '.join(unknown)}, which the other model has no input for",
            where=str(path),
            fix=f"compare with a model that takes {', '.join(case.feeds)}",
        )
    feeds = {k: np.ascontiguousarray(v) for k, v in case.feeds.items() if k in wanted}
    return lambda: session.run(None, feeds)


def time_interleaved(
    runs: Sequence[Callable[[], Any]], *, samples: int, budget_s: float, seed: int = 0
) -> list[list[float]]:
    """Milliseconds of every call, one list for each of ``runs``; a round calls each once."""
    for run in runs:
        _warm_up(run)
    rng = random.Random(seed)
    order = list(range(len(runs)))
    taken: list[list[float]] = [[] for _ in runs]
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        while _goes_on(len(taken[0]), time.perf_counter() - started, samples, budget_s):
            rng.shuffle(order)
            for i in order:
                begin = time.perf_counter_ns()
                runs[i]()
                taken[i].append((time.perf_counter_ns() - begin) / 1e6)
    finally:
        if collecting:
            gc.enable()
    return taken


def _warm_up(run: Callable[[], Any]) -> None:
    """The first runs allocate arenas and prepack; the clock of the processor needs longer."""
    started = time.perf_counter()
    for done in range(MAX_SAMPLES):
        if done >= WARM_UP_RUNS and time.perf_counter() - started > WARM_UP_SECONDS:
            return
        run()


def _goes_on(done: int, elapsed: float, samples: int, budget_s: float) -> bool:
    if done < min(samples, MIN_SAMPLES):
        return True
    if elapsed > budget_s:
        return False
    return done < samples or (elapsed < SETTLE_SECONDS and done < MAX_SAMPLES)


def speed_row(
    label: str,
    threads: int,
    baseline: str,
    provider: str,
    before: Sequence[float],
    after: Sequence[float],
) -> SpeedRow:
    """Milliseconds of two sides -> their percentiles and ratio, the samples beside them."""
    before_50, before_90, before_99 = np.percentile(before, (50, 90, 99)).tolist()
    after_50, after_90, after_99 = np.percentile(after, (50, 90, 99)).tolist()
    return SpeedRow(
        shape=label,
        threads=threads,
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
        provider=provider,
    )
