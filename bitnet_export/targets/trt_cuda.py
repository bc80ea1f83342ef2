"""The few CUDA runtime calls that running an engine needs beyond Polygraphy's wrapper.

Polygraphy finds and loads libcudart and does memory and streams; graphs, events and versions are
called through the same library here. Every function raises on a CUDA error.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from bitnet_export.errors import MissingRequirement, StageError

# cudaStreamCaptureModeThreadLocal: another thread's allocations do not break the capture.
CAPTURE_THREAD_LOCAL = 1

_INT, _POINTER, _TEXT = ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p
# Result and arguments of what is called here. A test compares them with cuda_runtime_api.h.
SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cudaGetErrorName": (_TEXT, (_INT,)),
    "cudaGetErrorString": (_TEXT, (_INT,)),
    "cudaRuntimeGetVersion": (_INT, (_POINTER,)),
    "cudaGetDeviceCount": (_INT, (_POINTER,)),
    "cudaStreamBeginCapture": (_INT, (_POINTER, _INT)),
    "cudaStreamEndCapture": (_INT, (_POINTER, _POINTER)),
    "cudaGraphInstantiateWithFlags": (_INT, (_POINTER, _POINTER, ctypes.c_ulonglong)),
    "cudaGraphDestroy": (_INT, (_POINTER,)),
    "cudaGraphLaunch": (_INT, (_POINTER, _POINTER)),
    "cudaGraphExecDestroy": (_INT, (_POINTER,)),
    "cudaEventCreate": (_INT, (_POINTER,)),
    "cudaEventRecord": (_INT, (_POINTER, _POINTER)),
    "cudaEventSynchronize": (_INT, (_POINTER,)),
    "cudaEventElapsedTime": (_INT, (_POINTER, _POINTER, _POINTER)),
    "cudaEventDestroy": (_INT, (_POINTER,)),
}


def library() -> Any:
    """libcudart. Raises MissingRequirement where there is none."""
    try:
        from polygraphy import cuda

        # A handle of our own: signatures set on Polygraphy's would change its calls, too.
        return _with_signatures(cuda.wrapper().handle._name)
    except Exception as error:
        raise MissingRequirement(
            f"the CUDA runtime library was not found: {error}",
            fix="install the CUDA runtime (pip install nvidia-cuda-runtime-cu12)",
        ) from error


@functools.cache
def _with_signatures(name: str) -> Any:
    runtime = ctypes.CDLL(name)
    for function, (result, arguments) in SIGNATURES.items():
        getattr(runtime, function).restype = result
        getattr(runtime, function).argtypes = arguments
    return runtime


def check(status: int, call: str) -> None:
    """Raise StageError with CUDA's own words where a call failed."""
    if status:
        raise StageError(f"{call} failed: {error_text(status)}", where="CUDA")


def error_text(status: int) -> str:
    """ "cudaErrorNoDevice (100): no CUDA-capable device is detected"."""
    runtime = library()
    name = runtime.cudaGetErrorName(status).decode()
    return f"{name} ({status}): {runtime.cudaGetErrorString(status).decode()}"


def runtime_version() -> str:
    """The CUDA runtime's version, "12.8"."""
    found = ctypes.c_int()
    check(library().cudaRuntimeGetVersion(ctypes.byref(found)), "cudaRuntimeGetVersion")
    return f"{found.value // 1000}.{found.value % 1000 // 10}"


def require_gpu() -> None:
    """Raise MissingRequirement, with CUDA's reason, unless a GPU can be used."""
    count = ctypes.c_int()
    status = library().cudaGetDeviceCount(ctypes.byref(count))
    if status or not count.value:
        reason = error_text(status) if status else "CUDA lists no device"
        raise MissingRequirement(
            f"no NVIDIA GPU can be used here: {reason}",
            fix="run it on a machine with a GPU and its driver; the model.onnx of targets ort and "
            "onnx runs on a CPU",
        )


class Graph:
    """Work captured on a stream once, launched many times."""

    def __init__(self, stream: Any, enqueue: Any) -> None:
        """stream: Polygraphy's. enqueue: called once, issues the work on the stream."""
        self._cuda, self._stream = library(), ctypes.c_void_p(stream.ptr)
        graph, self._executable = ctypes.c_void_p(), ctypes.c_void_p()
        begin = self._cuda.cudaStreamBeginCapture
        check(begin(self._stream, CAPTURE_THREAD_LOCAL), "cudaStreamBeginCapture")
        try:
            enqueue()
        finally:
            end = self._cuda.cudaStreamEndCapture(self._stream, ctypes.byref(graph))
        check(end, "cudaStreamEndCapture")
        make = self._cuda.cudaGraphInstantiateWithFlags
        check(make(ctypes.byref(self._executable), graph, 0), "cudaGraphInstantiateWithFlags")
        check(self._cuda.cudaGraphDestroy(graph), "cudaGraphDestroy")

    def launch(self) -> None:
        """Issue the captured work on its stream."""
        check(self._cuda.cudaGraphLaunch(self._executable, self._stream), "cudaGraphLaunch")

    def free(self) -> None:
        """Release the graph."""
        if self._executable:
            self._cuda.cudaGraphExecDestroy(self._executable)
            self._executable = ctypes.c_void_p()


class Timer:
    """Milliseconds of work on a stream, by CUDA events."""

    def __init__(self, stream: Any) -> None:
        self._cuda, self._stream = library(), ctypes.c_void_p(stream.ptr)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            check(self._cuda.cudaEventCreate(ctypes.byref(event)), "cudaEventCreate")

    def time(self, work: Any) -> float:
        """work() issues work on the stream -> the milliseconds it took on the GPU."""
        begin, end = self._events
        check(self._cuda.cudaEventRecord(begin, self._stream), "cudaEventRecord")
        work()
        check(self._cuda.cudaEventRecord(end, self._stream), "cudaEventRecord")
        check(self._cuda.cudaEventSynchronize(end), "cudaEventSynchronize")
        elapsed = ctypes.c_float()
        check(
            self._cuda.cudaEventElapsedTime(ctypes.byref(elapsed), begin, end),
            "cudaEventElapsedTime",
        )
        return elapsed.value

    def free(self) -> None:
        """Release the events."""
        for event in self._events:
            self._cuda.cudaEventDestroy(event)
