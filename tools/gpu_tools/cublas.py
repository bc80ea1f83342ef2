"""cuBLAS as baseline: y[M, N] = x[M, K] . w[N, K]^T by cublasGemmEx, through ctypes.

The library is the one torch has loaded, so that the baseline is what a PyTorch user gets. torch
itself offers no pedantic mode, hence the direct calls. Values of the enums are cublas_api.h's and
library_types.h's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OP_N, OP_T = 0, 1
R_32F, R_16F, R_8I, R_32I = 0, 2, 3, 10
COMPUTE_32F, COMPUTE_32F_PEDANTIC, COMPUTE_32I = 68, 69, 72
DEFAULT_ALGORITHM = -1


_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_OPERAND = (_POINTER, _INT, _INT)  # address, type, leading dimension
# Arguments; every function returns a status. bench.py compares the products with torch's.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cublasCreate_v2": (_POINTER,),
    "cublasSetStream_v2": (_POINTER, _POINTER),
    "cublasSetWorkspace_v2": (_POINTER, _POINTER, ctypes.c_size_t),
    "cublasGemmEx": (
        *(_POINTER, _INT, _INT, _INT, _INT, _INT),  # handle, transposed?, m, n, k
        *(_POINTER, *_OPERAND, *_OPERAND),  # alpha, A, B
        *(_POINTER, *_OPERAND, _INT, _INT),  # beta, C, compute type, algorithm
    ),
}


@dataclass(frozen=True)
class Baseline:
    """One way to multiply. dtype, out: names of torch dtypes; the rest are cuBLAS enums."""

    name: str
    dtype: str
    out: str
    input_type: int
    output_type: int
    compute: int


BASELINES = (
    Baseline("cublas_fp16", "float16", "float16", R_16F, R_16F, COMPUTE_32F),
    Baseline("cublas_fp16_pedantic", "float16", "float16", R_16F, R_16F, COMPUTE_32F_PEDANTIC),
    Baseline("cublas_fp32", "float32", "float32", R_32F, R_32F, COMPUTE_32F),
    Baseline("cublas_int8", "int8", "int32", R_8I, R_32I, COMPUTE_32I),
)


def loaded_library() -> str:
    """Path of the libcublas this process has mapped. Raises OSError where there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if "/libcublas.so" in path:
            return path
    raise OSError("libcublas is not loaded: torch is not a CUDA build, or not initialized")


class CuBlas:
    """A handle on torch's current device, with a workspace of its own for graph capture."""

    def __init__(self, torch: Any) -> None:
        torch.ones(8, 8, device="cuda") @ torch.ones(8, 8, device="cuda")  # loads the library
        self._c = ctypes.CDLL(loaded_library())
        for name, arguments in SIGNATURES.items():
            getattr(self._c, name).argtypes = arguments
        self._handle = ctypes.c_void_p()
        self._check(self._c.cublasCreate_v2(ctypes.byref(self._handle)))
        self._workspace = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")

    def _check(self, status: int) -> None:
        if status:
            raise OSError(f"cuBLAS status {status}")

    def set_stream(self, stream: int) -> None:
        """Enqueue on this stream from now on; resets the workspace, so it is set again."""
        self._check(self._c.cublasSetStream_v2(self._handle, ctypes.c_void_p(stream)))
        pointer = ctypes.c_void_p(self._workspace.data_ptr())
        size = ctypes.c_size_t(self._workspace.numel())
        self._check(self._c.cublasSetWorkspace_v2(self._handle, pointer, size))

    def multiply(self, baseline: Baseline, x: Any, w: Any, y: Any) -> None:
        """Enqueue y = x . w^T; x [M, K], w [N, K], y [M, N] contiguous torch tensors.

        Row-major y is column-major y^T = w . x^T: the left operand is w, transposed.
        """
        (m, k), n = x.shape, w.shape[0]
        scalar = ctypes.c_int if baseline.compute == COMPUTE_32I else ctypes.c_float
        one, zero = scalar(1), scalar(0)

        def pointer(tensor: Any) -> ctypes.c_void_p:
            return ctypes.c_void_p(tensor.data_ptr())

        self._check(
            self._c.cublasGemmEx(
                self._handle, OP_T, OP_N, n, m, k,
                ctypes.byref(one), pointer(w), baseline.input_type, k,
                pointer(x), baseline.input_type, k,
                ctypes.byref(zero), pointer(y), baseline.output_type, n,
                baseline.compute, DEFAULT_ALGORITHM,
            )
        )  # fmt: skip
