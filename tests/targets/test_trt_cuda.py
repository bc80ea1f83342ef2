"""The CUDA calls of trt_cuda.py against the toolkit's own header and the real runtime library."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

from bitnet_export.errors import MissingRequirement
from bitnet_export.targets import trt_cuda
from tests.targets.trt_support import unavailable

ENUMS = ("cudaError_t", "enum cudaStreamCaptureMode")
HANDLES = ("cudaStream_t", "cudaEvent_t", "cudaGraph_t", "cudaGraphExec_t")


@pytest.fixture(scope="module")
def header():
    found = sorted(Path("/usr/local").glob("cuda*/include/cuda_runtime_api.h"))
    if not found:
        unavailable("there is no cuda_runtime_api.h: install the CUDA toolkit")
    return re.sub(r"/\*.*?\*/", "", found[-1].read_text(), flags=re.DOTALL)


def ctype_of(text):
    """A C type as the header has it -> the ctypes type it is passed as."""
    text = " ".join(text.replace("*", " * ").split())
    if text == "const char *":
        return ctypes.c_char_p
    if text.endswith("*") or text in HANDLES:
        return ctypes.c_void_p
    if text == "unsigned long long":
        return ctypes.c_ulonglong
    assert text in ("int", *ENUMS), text
    return ctypes.c_int


@pytest.mark.parametrize("name", sorted(trt_cuda.SIGNATURES))
def test_signatures_are_the_headers(header, name):
    declaration = re.search(
        rf"extern __host__ (?:__cudart_builtin__ )?([\w *]+?)\s*CUDARTAPI {name}\(([^;]*)\);",
        header,
    )
    assert declaration, f"no declaration of {name}"
    result, arguments = declaration.groups()
    arguments = re.sub(r"__dv\([^)]*\)", "", arguments)
    types = [re.sub(r"\s*\w+\s*$", "", argument) for argument in arguments.split(",")]
    assert (ctype_of(result), tuple(map(ctype_of, types))) == trt_cuda.SIGNATURES[name]


def test_the_capture_mode_is_the_headers(header):
    assert header
    types = sorted(Path("/usr/local").glob("cuda*/include/driver_types.h"))[-1]
    modes = re.search(
        r"enum\s+(?:__device_builtin__\s+)?cudaStreamCaptureMode\s*\{([^}]*)\}", types.read_text()
    )[1]
    assert re.search(rf"cudaStreamCaptureModeThreadLocal\s*=\s*{trt_cuda.CAPTURE_THREAD_LOCAL}\b",
                     modes)  # fmt: skip


def test_every_function_that_is_called_has_a_signature():
    source = Path(trt_cuda.__file__).read_text()
    called = set(re.findall(r"(?:_cuda|runtime|library\(\))\.(cuda\w+)", source))
    assert called <= set(trt_cuda.SIGNATURES)
    assert len(called) >= 12


def test_the_real_library_has_them_and_keeps_polygraphys_own_apart():
    try:
        runtime = trt_cuda.library()
    except MissingRequirement as error:
        pytest.skip(f"no libcudart here: {error.what[:60]}")
    from polygraphy import cuda

    assert tuple(runtime.cudaGraphLaunch.argtypes) == trt_cuda.SIGNATURES["cudaGraphLaunch"][1]
    assert cuda.wrapper().handle.cudaGraphLaunch.argtypes is None
    assert "cudaErrorNoDevice" in trt_cuda.error_text(100)
