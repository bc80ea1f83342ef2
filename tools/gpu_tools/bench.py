"""Times the kernels against cuBLAS, shape by shape: all numbers of a shape from one process.

Every output is checked before its kernel is timed: ours against the naive kernel, cuBLAS's
against torch. How a launch is timed is timing.py's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from .cublas import BASELINES, Baseline, CuBlas
from .library import FLOAT16, LaunchError, Library, Shape
from .timing import Launch, cache_size, copies_past_cache, summary, time_graph

SHAPES = ((2560, 6912), (6912, 2560), (4096, 4096), (4096, 14336), (768, 3072), (384, 1536))
ROWS = (1, 2, 4, 8, 16, 64, 256)
# Group scales are flushed inside the main loops: what that costs shows beside the same shapes
# without. int8 activations.
GROUP_SIZE, GROUPED_SHAPES, GROUPED_ROWS = 128, ((2560, 6912), (768, 3072)), (1, 8, 16, 256)
NAIVE = 7


def random_weights(torch: Any, copies: int, shape: Shape, device: str) -> Any:
    """uint8 [copies, N, K/4] of random codes 1, 2, 3. K must be a multiple of 64: no padding."""
    assert shape.k % 64 == 0, "benchmark shapes have no padding"
    weight = torch.zeros(copies, shape.n, shape.k // 4, dtype=torch.uint8, device=device)
    for position in range(4):
        codes = torch.randint(1, 4, weight.shape, dtype=torch.uint8, device=device)
        weight |= codes << (2 * position)
    return weight


def random_case(torch: Any, shape: Shape, copies: int, device: str = "cuda") -> dict[str, Any]:
    """Device tensors for one shape."""
    x = torch.randn(shape.m, shape.k, device=device, dtype=torch.float16)
    scale = torch.rand(shape.scale_count, device=device) * 0.1 + 0.01
    y = torch.empty((shape.m, shape.n), device=device, dtype=torch.float16)
    return {"x": x, "w": random_weights(torch, copies, shape, device), "scale": scale, "y": y}


def launcher(
    torch: Any, library: Library, family: int, shape: Shape, case: dict[str, Any], workspace: Any
) -> Callable[[int], Launch]:
    """copy index -> a function that enqueues one launch on torch's current stream."""

    def for_copy(index: int) -> Launch:
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

    int8 sums without group scales are exact and rounded in one order: equal bits. Float sums
    differ by their order: within 2 spacings of fp16 beside the rounding of K fp32 additions.
    """
    if torch.isnan(got).any():
        return "left poison in its output"
    if shape.activation_bits and not shape.group_size:
        return None if torch.equal(got, want) else "differs from the naive kernel"
    bound = 2.0**-9 * want.float().abs() + shape.k * 2.0**-22
    good = bool(((got.float() - want.float()).abs() <= bound).all())
    return None if good else "is off the naive kernel"


def bench_shape(torch: Any, library: Library, shape: Shape, cache_bytes: int) -> dict[str, Any]:
    """Every family on one shape: raw microseconds, GB/s, and problems found on the way."""
    weight_bytes = shape.n * (-(-shape.k // 64) * 16)
    case = random_case(torch, shape, copies_past_cache(weight_bytes, cache_bytes))
    size = max(256, library.workspace_bytes(shape))
    workspace = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    results: dict[str, Any] = {}
    outputs: dict[int, Any] = {}
    for family in sorted(library.families(shape, FLOAT16), reverse=True):  # naive first
        make = launcher(torch, library, family, shape, case, workspace)
        entry: dict[str, Any] = {"problem": None}
        try:
            case["y"].fill_(float("nan"))
            make(0)()
            torch.cuda.synchronize()
            outputs[family] = case["y"].clone()
            if family == NAIVE:
                continue
            want = outputs.get(NAIVE)
            entry["problem"] = (
                check_family(torch, outputs[family], want, shape)
                if want is not None
                else "cannot be checked: the naive kernel failed"
            )
            samples = time_graph(torch, [make(i) for i in range(len(case["w"]))])
            entry |= summary(samples, traffic(shape))
        except (LaunchError, RuntimeError) as error:
            entry["problem"] = f"failed: {error}"
        results[library.family_name(family)] = entry
    return results


def baseline_operands(
    torch: Any, baseline: Baseline, m: int, k: int, n: int, copies: int
) -> tuple[Any, Any, Any]:
    """(weights [copies, N, K], x [M, K], y [M, N]) of random values: what a card draws, and with
    it its clock, depends on them."""
    dtype, out = getattr(torch, baseline.dtype), getattr(torch, baseline.out)
    if baseline.dtype == "int8":
        weights, x = (
            torch.randint(-127, 128, size, dtype=dtype, device="cuda")
            for size in ((copies, n, k), (m, k))
        )
    else:
        weights, x = (
            torch.randn(size, dtype=dtype, device="cuda") for size in ((copies, n, k), (m, k))
        )
    return weights, x, torch.zeros(m, n, device="cuda", dtype=out)


def bench_baseline(
    torch: Any, blas: CuBlas, baseline: Baseline, m: int, k: int, n: int, cache_bytes: int
) -> dict[str, Any] | None:
    """One cuBLAS baseline on one shape, or None where cuBLAS refuses it; without "us" where it
    failed."""
    itemsize = {"float16": 2, "float32": 4, "int8": 1}[baseline.dtype]
    copies = copies_past_cache(n * k * itemsize, cache_bytes)
    weights, x, y = baseline_operands(torch, baseline, m, k, n, copies)

    def make(index: int) -> Launch:
        def launch() -> None:
            blas.set_stream(torch.cuda.current_stream().cuda_stream)
            blas.multiply(baseline, x, weights[index], y)

        return launch

    try:
        make(0)()
        torch.cuda.synchronize()
        problem = check_baseline(x, weights[0], y)
        samples = time_graph(torch, [make(i) for i in range(copies)])
    except OSError:
        return None
    except RuntimeError as error:
        return {"problem": f"failed: {error}"}
    moved = n * k * itemsize + m * (k * itemsize + n * y.element_size())
    return {"problem": problem, **summary(samples, moved)}


def check_baseline(x: Any, w: Any, y: Any) -> str | None:
    """A problem with y = x . w^T, or None: a wrong call would be timed as well."""
    want = x.float() @ w.float().T
    error = (y.float() - want).abs().max().item()
    return None if error <= 1e-2 * want.abs().max().item() else f"is off by {error:.3g}"


def traffic(shape: Shape) -> int:
    """Bytes a launch must move: packed weights, fp16 x and y, fp32 scales."""
    weights = shape.n * (-(-shape.k // 64) * 16)
    return weights + 2 * shape.m * (shape.k + shape.n) + 4 * shape.scale_count


def cells() -> Iterator[tuple[int, int, int]]:
    """(M, K, N) in the order of what matters, should time run out."""
    for m in ROWS:
        for k, n in SHAPES:
            yield m, k, n


def grouped_cells() -> Iterator[tuple[int, int, int]]:
    """(M, K, N) that are timed with group scales, too."""
    for m in GROUPED_ROWS:
        for k, n in GROUPED_SHAPES:
            yield m, k, n


def bench_grouped(
    torch: Any, library: Library, seconds: float, rows: list[dict[str, Any]]
) -> list[tuple[int, int, int]]:
    """The kernels alone, with a scale for each GROUP_SIZE weights: appended to ``rows``. Returns
    the cells there was no time for."""
    end, cache_bytes = time.monotonic() + seconds, cache_size(torch)
    waiting = list(grouped_cells())
    while waiting and time.monotonic() < end:
        m, k, n = waiting.pop(0)
        families = bench_shape(torch, library, Shape(m, k, n, GROUP_SIZE, 8), cache_bytes)
        rows.append({"m": m, "k": k, "n": n, "activation_bits": 8, "group_size": GROUP_SIZE,
                     "families": families, "baselines": {}})  # fmt: skip
    return waiting


def bench_all(
    torch: Any,
    library: Library,
    seconds: float,
    rows: list[dict[str, Any]],
    say: Callable[[str], None],
    blas: CuBlas | None = None,
) -> list[tuple[int, int, int]]:
    """All shapes, rows of x and both activation kinds, with every baseline: appended to ``rows``,
    where they are safe from what happens later. Returns the cells there was no time for."""
    end = time.monotonic() + seconds
    cache_bytes, blas = cache_size(torch), blas or CuBlas(torch)
    waiting = list(cells())
    while waiting and time.monotonic() < end:
        m, k, n = waiting.pop(0)
        baselines = {
            b.name: bench_baseline(torch, blas, b, m, k, n, cache_bytes) for b in BASELINES
        }
        for bits in (8, 0):
            families = bench_shape(torch, library, Shape(m, k, n, 0, bits), cache_bytes)
            rows.append({"m": m, "k": k, "n": n, "activation_bits": bits,
                         "families": families, "baselines": baselines})  # fmt: skip
        if (k, n) == SHAPES[-1]:
            say(f"  benchmarked M = {m}")
    return waiting
