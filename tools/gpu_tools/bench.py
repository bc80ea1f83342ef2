"""Times the kernels against cuBLAS on one card: CUDA events over a graph, cold weights.

A graph holds one launch for each of several copies of the weights, together larger than the L2
cache, so that every launch reads its weights from memory, as a layer in a model does. All
numbers of a shape come from the same process; raw samples are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from .cublas import BASELINES, Baseline, CuBlas
from .library import FLOAT16, Library, Shape

SHAPES = ((2560, 6912), (6912, 2560), (4096, 4096), (4096, 14336), (768, 3072), (384, 1536))
ROWS = (1, 2, 4, 8, 16, 64, 256)
SAMPLES = 11
MIN_ROTATION_BYTES = 32 << 20
LAUNCHES = 24  # at least, in a graph: makes one replay long beside its own launch
NAIVE = 7


def copies_past_cache(weight_bytes: int, cache_bytes: int, budget: int = 2 << 30) -> int:
    """How many copies of the weights to rotate: four times the L2 cache, within a budget."""
    wanted = -(-max(4 * cache_bytes, MIN_ROTATION_BYTES) // weight_bytes)
    return max(2, min(wanted, budget // weight_bytes))


def time_graph(torch: Any, launches: list[Callable[[], None]]) -> list[float]:
    """Microseconds a launch, one value for each of SAMPLES replays of a graph of all launches."""
    repeat = -(-LAUNCHES // len(launches))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for launch in launches:  # warm up outside the graph: lazy module loading, heuristics
            launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeat):
            for launch in launches:
                launch()
    graph.replay()
    samples = []
    for _ in range(SAMPLES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / (repeat * len(launches)))
    return samples


def copy_bandwidth(torch: Any) -> float:
    """GB/s of a device-to-device copy, read and write counted: the card's practical limit."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    samples = time_graph(torch, [lambda: target.copy_(source)])
    return 2 * source.numel() / statistics.median(samples) / 1e3


def random_case(torch: Any, shape: Shape, copies: int, device: str = "cuda") -> dict[str, Any]:
    """Device tensors for one shape. K must be a multiple of 64: no padding to fill in."""
    assert shape.k % 64 == 0, "benchmark shapes have no padding"
    weight = torch.zeros(copies, shape.n, shape.k // 4, dtype=torch.uint8, device=device)
    for position in range(4):  # codes 1, 2, 3 in every field, as packing.py makes them
        codes = torch.randint(1, 4, weight.shape, dtype=torch.uint8, device=device)
        weight |= codes << (2 * position)
    x = torch.randn(shape.m, shape.k, device=device, dtype=torch.float16)
    scale = torch.rand(shape.scale_count, device=device) * 0.1 + 0.01
    y = torch.empty((shape.m, shape.n), device=device, dtype=torch.float16)
    return {"x": x, "w": weight, "scale": scale, "y": y}


def launcher(
    torch: Any, library: Library, family: int, shape: Shape, case: dict[str, Any], workspace: Any
) -> Callable[[int], Callable[[], None]]:
    """copy index -> a function that enqueues one launch on torch's current stream."""

    def for_copy(index: int) -> Callable[[], None]:
        weight = case["w"][index % len(case["w"])]
        pointers = (case["x"].data_ptr(), weight.data_ptr(), case["scale"].data_ptr(), 0)
        all_pointers = (*pointers, case["y"].data_ptr(), workspace.data_ptr())

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            library.launch(family, shape, FLOAT16, all_pointers, workspace.numel(), stream)

        return launch

    return for_copy


def check_family(torch: Any, got: Any, want: Any, shape: Shape) -> str | None:
    """A problem with a family's output against the naive kernel's, or None.

    int8 sums are exact and rounded in one order: equal bits. Float sums differ by their order:
    within 2 spacings of fp16 beside the rounding of K fp32 additions.
    """
    if torch.isnan(got).any():
        return "left poison in its output"
    if shape.activation_bits:
        return None if torch.equal(got, want) else "differs from the naive kernel"
    bound = 2.0**-9 * want.float().abs() + shape.k * 2.0**-22
    return (
        None if ((got.float() - want.float()).abs() <= bound).all() else "is off the naive kernel"
    )


def bench_shape(torch: Any, library: Library, shape: Shape, cache_bytes: int) -> dict[str, Any]:
    """Every family on one shape: raw microseconds, GB/s, and problems found on the way."""
    weight_bytes = shape.n * (-(-shape.k // 64) * 16)
    case = random_case(torch, shape, copies_past_cache(weight_bytes, cache_bytes))
    size = max(256, library.workspace_bytes(shape, FLOAT16))
    workspace = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    results: dict[str, Any] = {}
    outputs: dict[int, Any] = {}
    for family in sorted(library.families(shape, FLOAT16), reverse=True):  # naive first
        make = launcher(torch, library, family, shape, case, workspace)
        case["y"].fill_(float("nan"))
        make(0)()
        torch.cuda.synchronize()
        outputs[family] = case["y"].clone()
        entry: dict[str, Any] = {"problem": None}
        if family != NAIVE:
            entry["problem"] = check_family(torch, outputs[family], outputs[NAIVE], shape)
            samples = time_graph(torch, [make(i) for i in range(len(case["w"]))])
            entry |= summary(samples, traffic(shape))
            results[library.family_name(family)] = entry
    return results


def bench_baseline(
    torch: Any, blas: CuBlas, baseline: Baseline, m: int, k: int, n: int, cache_bytes: int
) -> dict[str, Any] | None:
    """One cuBLAS baseline on one shape, or None where cuBLAS refuses it."""
    dtype, out = getattr(torch, baseline.dtype), getattr(torch, baseline.out)
    copies = copies_past_cache(n * k * dtype.itemsize, cache_bytes)
    weights = torch.ones(copies, n, k, device="cuda", dtype=dtype)
    x, y = torch.ones(m, k, device="cuda", dtype=dtype), torch.empty(m, n, device="cuda", dtype=out)

    def make(index: int) -> Callable[[], None]:
        def launch() -> None:
            blas.set_stream(torch.cuda.current_stream().cuda_stream)
            blas.multiply(baseline, x, weights[index], y)

        return launch

    try:
        samples = time_graph(torch, [make(i) for i in range(copies)])
    except OSError:
        return None
    return summary(samples, n * k * dtype.itemsize + m * (k * dtype.itemsize + n * out.itemsize))


def traffic(shape: Shape) -> int:
    """Bytes a launch must move: packed weights, fp16 x and y, fp32 scales."""
    weights = shape.n * (-(-shape.k // 64) * 16)
    return weights + 2 * shape.m * (shape.k + shape.n) + 4 * shape.scale_count


def summary(samples: list[float], moved: int) -> dict[str, Any]:
    """Median microseconds and GB/s beside the raw samples."""
    median = statistics.median(samples)
    return {"us": median, "gb_per_s": moved / median / 1e3, "samples_us": samples}


def bench_all(torch: Any, library: Library, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """All shapes, rows and both activation kinds, with every baseline."""
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    blas, rows = CuBlas(torch), []
    for k, n in SHAPES:
        for m in ROWS:
            baselines = {
                b.name: bench_baseline(torch, blas, b, m, k, n, cache_bytes) for b in BASELINES
            }
            for bits in (8, 0):
                shape = Shape(m, k, n, 0, bits)
                families = bench_shape(torch, library, shape, cache_bytes)
                rows.append({"m": m, "k": k, "n": n, "activation_bits": bits,
                             "families": families, "baselines": baselines})  # fmt: skip
        say(f"benchmarked (K, N) = ({k}, {n})")
    return rows
