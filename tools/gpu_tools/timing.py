"""Times launches on one card: CUDA events over a graph, weights rotated past the L2 cache.

A graph holds one launch for each of several copies of the weights, together larger than the L2
cache, so that every launch reads its weights from memory, as a layer in a model does. What is
launched, and what the numbers are compared with, is bench.py's and peer.py's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

SAMPLES, FEW_SAMPLES = 11, 5
MIN_ROTATION_BYTES = 32 << 20
LAUNCHES = 24  # at least, in a graph: makes one replay long beside its own launch
# What one replay may take before rotations and samples are cut: a slow baseline must not eat the
# time of everything else.
LONG_REPLAY_MS, VERY_LONG_REPLAY_MS = 60.0, 150.0

Launch = Callable[[], None]


def copies_past_cache(weight_bytes: int, cache_bytes: int, budget: int = 2 << 30) -> int:
    """How many copies of the weights to rotate: four times the L2 cache, within a budget."""
    wanted = -(-max(4 * cache_bytes, MIN_ROTATION_BYTES) // weight_bytes)
    return max(2, min(wanted, budget // weight_bytes))


def cache_size(torch: Any) -> int:
    """Bytes of the card's L2 cache; as of the largest known where torch does not say."""
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 128 << 20


def plan_replays(launch_ms: float, copies: int) -> tuple[int, int]:
    """(rotations in a graph, samples) for launches of about launch_ms."""
    rotations = -(-LAUNCHES // copies)
    while rotations > 1 and rotations * copies * launch_ms > LONG_REPLAY_MS:
        rotations -= 1
    long = rotations * copies * launch_ms > VERY_LONG_REPLAY_MS
    return rotations, FEW_SAMPLES if long else SAMPLES


def time_graph(torch: Any, launches: list[Launch]) -> list[float]:
    """Microseconds a launch, one value for each replay of a graph of all launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what fills the operands
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        # Warm up outside the graph: modules are loaded lazily, which a capture does not allow.
        launches[0]()
        begin.record()
        for launch in launches:
            launch()
        end.record()
        end.synchronize()
        launch_ms = begin.elapsed_time(end) / len(launches)
        rotations, count = plan_replays(launch_ms, len(launches))
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for _ in range(rotations):
                for launch in launches:
                    launch()
        finally:
            graph.capture_end()
        samples = [
            _replay(graph, begin, end) / (rotations * len(launches)) for _ in range(count + 1)
        ]
    return samples[1:]  # the first replay uploads the graph


def _replay(graph: Any, begin: Any, end: Any) -> float:
    """Microseconds of one replay."""
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


def copy_bandwidth(torch: Any) -> float:
    """GB/s of a device-to-device copy, read and write counted: the card's practical limit."""
    source = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = time_graph(torch, [lambda: target.copy_(source)])
    return 2 * source.numel() / statistics.median(samples) / 1e3


def summary(samples: list[float], moved: int) -> dict[str, Any]:
    """Median microseconds and GB/s beside the raw samples."""
    median = statistics.median(samples)
    return {"us": median, "gb_per_s": moved / median / 1e3, "samples_us": samples}
