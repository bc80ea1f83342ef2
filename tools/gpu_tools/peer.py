"""Times microsoft/BitNet's GPU kernel beside ours, on its own shapes: gpu_check --peer LIB.

LIB is the libbitnet.so that its gpu/bitnet_kernels makes (docs/performance.md has the command);
nothing of it is part of this repository. It exports one function for W2A8 decoding,

    void bitlinear_int8xint2(int8 x[K], int8 w[N, K/4] in an order of its own, bf16 y[N],
                             bf16 x_scale[1], bf16 w_scale[at most 6], int M, N, K, stream)

which knows M = 1 and the ten layers below, and prints and does nothing for others. Its weights
here are random bytes, which is enough to time it; what it computes is not checked. It takes
activations that are int8 already, ours quantizes float16 ones within the time measured.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from .bench import bench_shape
from .library import Library, Shape
from .timing import cache_size, copies_past_cache, summary, time_graph

# (K, N), as its dispatch names them.
SHAPES = ((2560, 2560), (2560, 3840), (2560, 13824), (6912, 2560), (3200, 3200), (3200, 4800),
          (3200, 20480), (10240, 3200), (27648, 5120), (5120, 55296))  # fmt: skip
FUNCTION = "bitlinear_int8xint2"
ARGUMENTS = (*[ctypes.c_void_p] * 5, *[ctypes.c_int] * 3, ctypes.c_void_p)
WEIGHT_SCALES = 6


class Peer:
    """The other library. Raises OSError where it does not load, AttributeError where it has no
    such function."""

    def __init__(self, path: Path) -> None:
        self._function = getattr(ctypes.CDLL(str(path.absolute())), FUNCTION)
        self._function.argtypes = ARGUMENTS
        self._function.restype = None

    def launch(
        self, x: int, w: int, y: int, scales: tuple[int, int], k: int, n: int, stream: int
    ) -> None:
        """Enqueue; addresses are plain integers. scales: of the activations, of the weights."""
        self._function(x, w, y, *scales, 1, n, k, stream)


def bench_peer(torch: Any, peer: Peer, k: int, n: int, cache_bytes: int) -> dict[str, Any]:
    """The other kernel on one layer, M = 1 -> its timing, or the problem."""
    copies = copies_past_cache(n * k // 4, cache_bytes)
    weights = torch.randint(0, 256, (copies, n, k // 4), dtype=torch.uint8, device="cuda")
    x = torch.randint(-127, 128, (k,), dtype=torch.int8, device="cuda")
    y = torch.full((n,), float("nan"), dtype=torch.bfloat16, device="cuda")
    scales = [torch.ones(c, dtype=torch.bfloat16, device="cuda") for c in (1, WEIGHT_SCALES)]

    def make(index: int) -> Any:
        pointers = x.data_ptr(), weights[index].data_ptr(), y.data_ptr()
        scale_pointers = scales[0].data_ptr(), scales[1].data_ptr()

        def launch() -> None:
            stream = torch.cuda.current_stream().cuda_stream
            peer.launch(*pointers, scale_pointers, k, n, stream)

        return launch

    make(0)()
    torch.cuda.synchronize()
    if torch.isnan(y).any():  # it reports no errors: a launch that failed leaves the poison
        return {"problem": "wrote no output: built for another compute capability?"}
    samples = time_graph(torch, [make(i) for i in range(copies)])
    return {"problem": None, **summary(samples, n * k // 4 + k + 2 * n)}


def bench_all_shapes(
    torch: Any, peer: Peer, library: Library, seconds: float
) -> list[dict[str, Any]]:
    """Both kernels on every layer that the time allows: {k, n, peer, ours, ratio}; ratio: its
    time over ours, None where one has no time."""
    end, cache_bytes = time.monotonic() + seconds, cache_size(torch)
    rows: list[dict[str, Any]] = []
    for k, n in SHAPES:
        if time.monotonic() > end:
            break
        theirs = bench_peer(torch, peer, k, n, cache_bytes)
        families = bench_shape(torch, library, Shape(1, k, n, 0, 8), cache_bytes)
        name = min(families, key=lambda family: families[family].get("us", float("inf")))
        ours = {"family": name, **families[name]}
        ratio = theirs["us"] / ours["us"] if "us" in theirs and "us" in ours else None
        rows.append({"k": k, "n": n, "peer": theirs, "ours": ours, "ratio": ratio})
    return rows
