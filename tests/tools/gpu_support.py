"""What the tests of gpu_check share: the kernels as a host library, and torch.cuda over the CPU.

CpuTorch stands for a CUDA build of torch: "device" tensors are host tensors, a stream runs its
work at once, and events read the host's clock. What is issued during a capture runs right away
and a replay runs nothing: times mean nothing, but operands, calls and checks are real.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

from gpu_tools import library  # noqa: E402

PLUGINS = REPOSITORY / "plugins"


def build_emulated(folder):
    """bridge.cu and the kernels as a shared library for the host."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to compile the emulated kernels")
    path = folder / "libbridge.so"
    sources = [*sorted(library.KERNELS.glob("*.cu")), Path(library.__file__).with_name("bridge.cu")]
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-w"]
    includes = [f"-I{library.KERNELS}", f"-I{PLUGINS / 'emulation'}"]
    command = ["g++", *flags, "-DBITNET_EMULATION", *includes, "-o", str(path), "-x", "c++"]
    command += [*map(str, sources), str(PLUGINS / "emulation" / "scheduler.cpp")]
    subprocess.run(command, check=True)
    return library.Library(path)


class Event:
    def __init__(self, enable_timing=False):
        assert enable_timing, "elapsed_time needs it"
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None, "never recorded"

    def elapsed_time(self, end):
        return 1e3 * max(end.at - self.at, 1e-6)


class Graph:
    """Refuses what CUDA refuses: a replay before the capture ended, a capture within one."""

    capturing = False
    made = 0

    def __init__(self):
        self.ready = False

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert not Graph.capturing
        Graph.capturing = True

    def capture_end(self):
        assert Graph.capturing
        Graph.capturing, self.ready = False, True
        Graph.made += 1

    def replay(self):
        assert self.ready


class CpuTorch:
    """The module torch with a ``cuda`` that lies on the host."""

    def __init__(self):
        import torch

        self._torch = torch
        stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda other: None)
        self.cuda = SimpleNamespace(
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda s: nullcontext(),
            Event=Event,
            CUDAGraph=Graph,
            synchronize=self._synchronize,
            get_device_properties=lambda i: SimpleNamespace(L2_cache_size=1 << 4),
        )

    @staticmethod
    def _synchronize():
        assert not Graph.capturing, "CUDA refuses a synchronization during a capture"

    def __getattr__(self, name):
        found = getattr(self._torch, name)
        if name not in ("empty", "zeros", "ones", "full", "rand", "randn", "randint"):
            return found

        def make(*args, device=None, **kwargs):
            values = found(*args, **kwargs)
            memory = self._torch.empty(values.nbytes + 256, dtype=self._torch.uint8)
            start = -memory.data_ptr() % 256  # as CUDA aligns memory
            tensor = memory[start : start + values.nbytes].view(values.dtype).view(values.shape)
            return tensor.copy_(values)

        return make


class CpuBlas:
    """Stands for CuBlas: the same products by torch, and no int8, as on some cards."""

    def __init__(self):
        self.streams = []

    def set_stream(self, stream):
        self.streams.append(stream)

    def multiply(self, baseline, x, w, y):
        if baseline.dtype == "int8":
            raise OSError("cuBLAS status 15")
        y.copy_(x.float() @ w.float().T)
