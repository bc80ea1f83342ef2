"""Time contenders on one product in turns: open sessions once, then every number of rows.

A contender's product is checked before it is timed.
All contenders of a cell take turns in rounds of random order, so that other load hits them alike.
With one thread the clock is that thread's own processor time, which leaves out what other programs
take; with several it is the wall clock.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnxruntime as ort

from bitnet_export.errors import StageError
from bitnet_export.native import find_library
from bitnet_export.targets.session import STOP_SPINNING
from cpu_tools.contenders import Array, Contender, build_model

COLD_BYTES = 96 << 20  # of weights a contender rotates through: more than the L3 cache holds
SMALL = 1 << 20  # weights; the time of a session.run would show
# Of the largest output: int8 activations, by row, block or tensor, are off by some 1 %.
TOLERANCE, CHECKED_ROWS = 0.05, 4


@dataclass
class Cell:
    """One product and all its samples, in microseconds, by contender."""

    K: int
    N: int
    M: int
    threads: int
    cold: bool
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])


@dataclass(frozen=True)
class Group:
    """Cells that share their sessions: one shape, number of threads and place of the weights."""

    K: int
    N: int
    threads: int
    cold: bool
    rows: tuple[int, ...]


def random_trits(k: int, n: int) -> Array:
    """w [N, K] in {-1, 0, 1}, always the same."""
    return np.random.default_rng(0).integers(-1, 2, (n, k)).astype(np.int8)


def copies_for(contender: Contender, w: Array, cold: bool) -> int:
    """Hot: 1, or 4 small ones to share a session's own overhead. Cold: past every cache."""
    if not cold:
        return 4 if w.size < SMALL else 1
    return max(2, -(-COLD_BYTES // contender.weight_bytes(w)))


def open_session(contender: Contender, w: Array, copies: int, threads: int) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.add_session_config_entry(STOP_SPINNING, "1")  # contenders run in turns
    processors = usable_processors()
    if 1 < threads <= len(processors):
        others = ";".join(str(processor + 1) for processor in processors[1:threads])  # from 1 on
        settings.add_session_config_entry("session.intra_op_thread_affinities", others)
    settings.register_custom_ops_library(str(find_library("ort_cpu").path))
    model = build_model(contender, w, copies).SerializeToString()
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """This thread on the first of the processors, whose others have a session's threads: where
    there are no more the scheduler else puts two on one at times, for milliseconds."""
    before = usable_processors()
    if not 1 < threads <= len(before):
        yield
        return
    os.sched_setaffinity(0, before[:1])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def usable_processors() -> list[int]:
    """Those this thread may run on, [] where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def bind(session: ort.InferenceSession, x: Array) -> ort.IOBinding:
    """Inputs and outputs of the model, bound once for all its runs."""
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return binding


def check(name: str, binding: ort.IOBinding, x: Array, w: Array) -> None:
    """Raise StageError unless the first output is about x . w^T: a wrong product is no peer."""
    want = x[:CHECKED_ROWS] @ w.T.astype(np.float32)
    got = binding.get_outputs()[0].numpy()[:CHECKED_ROWS]
    error = float(np.abs(got - want).max() / np.abs(want).max())
    if not error <= TOLERANCE:
        n, k = w.shape
        raise StageError(
            f"its product is off by {error:.0%} of the largest output",
            where=f"{name}, K={k} N={n} M={len(x)}",
        )


def measure_group(
    group: Group, rounds: int, seconds: float, contenders: Sequence[Contender]
) -> Iterator[Cell]:
    """A filled cell for each number of rows, each contender for about `seconds` a round."""
    w = random_trits(group.K, group.N)
    copies = {c.name: copies_for(c, w, group.cold) for c in contenders}
    sessions = {c.name: open_session(c, w, copies[c.name], group.threads) for c in contenders}
    with pinned(group.threads):
        yield from _measure_rows(group, rounds, seconds, w, sessions, copies)


def _measure_rows(
    group: Group,
    rounds: int,
    seconds: float,
    w: Array,
    sessions: dict[str, ort.InferenceSession],
    copies: dict[str, int],
) -> Iterator[Cell]:
    for m in group.rows:
        x = np.random.default_rng(m).standard_normal((m, group.K)).astype(np.float32)
        bindings = {name: bind(session, x) for name, session in sessions.items()}
        runs = {name: partial(sessions[name].run_with_iobinding, b) for name, b in bindings.items()}
        cell = Cell(group.K, group.N, m, group.threads, group.cold, {name: [] for name in runs})
        loops = {}
        for name, run in runs.items():
            run()
            check(name, bindings[name], x, w)
            loops[name] = max(1, int(seconds / timed(run, 1, group.threads)))
        for _ in range(rounds):
            for name in random.sample(list(runs), len(runs)):
                taken = timed(runs[name], loops[name], group.threads)
                cell.samples[name].append(taken / copies[name] * 1e6)
        yield cell


def timed(run: Callable[[], None], loops: int, threads: int) -> float:
    """Seconds a run takes, the mean of `loops` in a row."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    for _ in range(loops):
        run()
    return (clock() - start) / loops
