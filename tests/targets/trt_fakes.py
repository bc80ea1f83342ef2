"""Stand-ins for what needs a GPU: the CUDA runtime and TensorRT's runtime API.

HostCuda stands for libcudart as Polygraphy wraps it: "device" memory is host memory, a stream
runs its work at once, and work issued during a capture runs only when its graph is launched, as
CUDA has it. FakeTensorRT stands for ICudaEngine and IExecutionContext of an engine x -> 2 x: it
reads and writes the addresses it was given and nothing else, so a missing copy or a stale address
shows. Neither knows kernels, time or errors.
"""

from __future__ import annotations

import ctypes
import types

import numpy as np


class HostCuda:
    """polygraphy.cuda.wrapper() over host memory."""

    def __init__(self):
        self.calls = []
        self.capturing = None
        self.graphs = {}
        self.memory = {}
        self.clock = 0.0
        self.handle = types.SimpleNamespace(
            **{name: getattr(self, f"_{name}") for name in self.HANDLED}
        )

    HANDLED = (
        "cudaGetDeviceCount",
        "cudaRuntimeGetVersion",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiateWithFlags",
        "cudaGraphDestroy",
        "cudaGraphLaunch",
        "cudaGraphExecDestroy",
        "cudaEventCreate",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "cudaEventElapsedTime",
        "cudaEventDestroy",
    )

    def issue(self, work):
        """Work on the stream: now, or in the graph that is being captured."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    # What Polygraphy's Stream and DeviceArray call.
    def create_stream(self):
        return 1

    def stream_synchronize(self, ptr):
        assert self.capturing is None, "CUDA refuses a synchronization during a capture"

    def destroy_stream(self, ptr):
        pass

    def malloc(self, nbytes):
        assert self.capturing is None, "CUDA refuses an allocation during a capture"
        buffer = ctypes.create_string_buffer(max(nbytes, 1))
        self.memory[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, ptr):
        self.memory.pop(ptr, None)

    def memcpy(self, dst, src, nbytes, kind, stream_ptr=None):
        self.issue(lambda: ctypes.memmove(dst, src, nbytes))

    # libcudart's own functions.
    def _cudaGetDeviceCount(self, count):
        count._obj.value = 1
        return 0

    def _cudaRuntimeGetVersion(self, version):
        version._obj.value = 12090
        return 0

    def _cudaStreamBeginCapture(self, stream, mode):
        self.calls.append("capture")
        self.capturing = []
        return 0

    def _cudaStreamEndCapture(self, stream, graph):
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value], self.capturing = self.capturing, None
        return 0

    @property
    def _cudaGraphInstantiateWithFlags(self):
        def instantiate(executable, graph, flags):
            executable._obj.value = graph.value
            return 0

        return instantiate

    def _cudaGraphDestroy(self, graph):
        return 0

    def _cudaGraphLaunch(self, executable, stream):
        self.calls.append("launch")
        for work in self.graphs[executable.value]:
            work()
        return 0

    def _cudaGraphExecDestroy(self, executable):
        return 0

    def _cudaEventCreate(self, event):
        event._obj.value = 1
        return 0

    def _cudaEventRecord(self, event, stream):
        self.clock += 0.5
        return 0

    def _cudaEventSynchronize(self, event):
        return 0

    def _cudaEventElapsedTime(self, elapsed, begin, end):
        elapsed._obj.value = 0.5
        return 0

    def _cudaEventDestroy(self, event):
        return 0


class FakeTensorRT(types.ModuleType):
    """The module ``tensorrt`` with a runtime whose every engine doubles x [batch, 8] float32."""

    __version__ = "10.14.1"

    def __init__(self, cuda, loads=True):
        super().__init__("tensorrt")
        self.cuda, self.loads = cuda, loads
        self.TensorIOMode = types.SimpleNamespace(INPUT="in", OUTPUT="out")
        self.loaded = []

    class Logger:
        WARNING = 1

        def __init__(self, severity):
            pass

    def Runtime(self, logger):
        deserialize = lambda data: FakeEngine(self.cuda) if self.loads else None  # noqa: E731
        self.runtime = types.SimpleNamespace(
            deserialize_cuda_engine=deserialize, engine_host_code_allowed=False
        )
        return self.runtime

    def nptype(self, dtype):
        return dtype

    def get_plugin_registry(self):
        def load_library(path):
            known = bool(self.loaded)  # a second creator of the same name is refused
            self.loaded.append(path)
            return object() if self.loads and not known else None

        return types.SimpleNamespace(load_library=load_library)


class FakeRtx(FakeTensorRT):
    """The module ``tensorrt_rtx``: the same, and a runtime cache that takes back what it gave out
    and refuses anything else, as IRuntimeCache does across cards and versions."""

    __version__ = "1.7.1"

    def __init__(self, cuda):
        super().__init__(cuda)
        self.__name__ = "tensorrt_rtx"
        self.caches = []

    def compiled(self):
        return b"compiled for this card"

    def Runtime(self, logger):
        engine = FakeEngine(self.cuda)
        engine.create_runtime_config = lambda: FakeRuntimeConfig(self)
        return types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine)


class FakeRuntimeConfig:
    def __init__(self, rtx):
        self.rtx, self.cache = rtx, None

    def create_runtime_cache(self):
        self.rtx.caches.append(FakeRuntimeCache(self.rtx))
        return self.rtx.caches[-1]

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class FakeRuntimeCache:
    def __init__(self, rtx):
        self.rtx, self.loaded = rtx, None

    def deserialize(self, blob):
        if blob != self.rtx.compiled():
            return False
        self.loaded = blob
        return True

    def serialize(self):
        return memoryview(self.rtx.compiled())


class FakeEngine:
    num_io_tensors = 2

    def __init__(self, cuda):
        self.cuda = cuda

    def get_tensor_name(self, i):
        return ("x", "y")[i]

    def get_tensor_mode(self, name):
        return {"x": "in", "y": "out"}[name]

    def get_tensor_dtype(self, name):
        return np.float32

    def get_tensor_shape(self, name):
        return (-1, 8)

    def create_execution_context(self, runtime_config=None):
        context = FakeContext(self.cuda)
        context.config = runtime_config
        return context


class FakeContext:
    def __init__(self, cuda):
        self.cuda, self.addresses, self.shape, self.enqueued = cuda, {}, None, 0
        self.changed = False  # a binding, which TensorRT makes good in the next run
        self.waits = False  # has a layer that waits for the host, which a capture does not allow

    def set_input_shape(self, name, shape):
        self.shape, self.changed = tuple(shape), True
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name], self.changed = address, True
        return True

    def execute_async_v3(self, stream):
        if self.cuda.capturing is not None:
            assert not self.changed, "a run behind a change of bindings cannot be captured"
            if self.waits:
                return False
        self.changed = False
        x, y, count = self.addresses["x"], self.addresses["y"], int(np.prod(self.shape))

        def work():
            source = np.ctypeslib.as_array((ctypes.c_float * count).from_address(x))
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(y))[:] = 2 * source

        self.enqueued += 1
        self.cuda.issue(work)
        return True
