"""Running TensorRT outputs: engines through TensorRT's Python API, ONNX through its provider.

Both speak as an ONNX Runtime session does, so that ``load_session`` and everything built on it
treat them alike. An engine of one shape runs as a captured CUDA graph from its third run on.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export.errors import InputError, MissingRequirement, StageError, first_line
from bitnet_export.manifest import MODEL, Manifest, sha256_of
from bitnet_export.targets import trt_cuda, trt_profile
from bitnet_export.targets.trt_build import TENSORRT
from bitnet_export.targets.trt_environment import (
    check_environment,
    choose_engine,
    this_machine,
)

if TYPE_CHECKING:
    import numpy as np

TRT_PROVIDER = "TensorrtExecutionProvider"
_TYPE_NAMES = {"float32": "float", "float64": "double"}
# TensorRT keeps one logger and the plugin libraries of a process; they are loaded once. Known by
# their sha256: two exports have two copies of one library, and a second would be refused.
_LOGGERS: dict[str, Any] = {}
_LOADED_PLUGINS: set[str] = set()


@dataclass(frozen=True)
class TensorInfo:
    """An input or output, described as ONNX Runtime does: -1 is a dynamic axis."""

    name: str
    shape: list[int]
    type: str


def open_engine(directory: Path, record: Manifest) -> EngineSession:
    """The engine of an output directory that fits this machine, loaded.

    Raises MissingRequirement where there is none, no GPU, or something differs from what it was
    built for, StageError where TensorRT refuses it.
    """
    engines = record.environment.get("engines")
    if not engines:
        raise MissingRequirement(
            "holds no engine yet",
            where=str(directory),
            fix="run build_engine.sh in it on the machine that will run the engine",
        )
    runtime = next(iter(engines.values()))["runtime"]
    trt_cuda.require_gpu()
    machine = this_machine(runtime)
    file = choose_engine(engines, machine, directory)
    check_environment(record, file, machine, directory)
    plugin = record.environment.get("plugin")
    embedded = bool(engines[file].get("embedded_plugin"))
    if runtime == TENSORRT and plugin and not embedded:
        load_plugin(importlib.import_module(runtime), directory / plugin["file"])
    profile = record.environment["profile"]
    return EngineSession(directory / file, runtime, profile, host_code=embedded)


def load_plugin(trt: Any, path: Path) -> None:
    """Make the plugin library known to TensorRT, by absolute path. Raises StageError."""
    path = path.absolute()
    digest = sha256_of(path)
    if digest in _LOADED_PLUGINS:
        return
    _logger(trt)
    if trt.get_plugin_registry().load_library(str(path)) is None:
        what = "TensorRT's plugin registry did not load it"
        if not _LOADED_PLUGINS:
            raise StageError(what, where=str(path))
        raise StageError(
            f"{what}: another build of it is loaded in this process, which can hold one",
            where=str(path),
            fix="load this export in a process of its own, or export both with one bitnet-export",
        )
    _LOADED_PLUGINS.add(digest)


def _logger(trt: Any) -> Any:
    """TensorRT's logger, warnings and worse on stderr; it has to outlive everything."""
    return _LOGGERS.setdefault(trt.__name__, trt.Logger(trt.Logger.WARNING))


class EngineSession:
    """A loaded engine: ``run(output_names, feeds)`` as an ONNX Runtime session.

    profile: shapes it takes. host_code: whether it carries a plugin library, which TensorRT is to
    load. Not for several threads at once: there is one execution context.
    """

    def __init__(
        self, path: Path, runtime: str, profile: trt_profile.Profile, *, host_code: bool = False
    ) -> None:
        from polygraphy.cuda import Stream

        self._trt = importlib.import_module(runtime)
        self.path, self.profile = path, profile
        self._runtime = self._trt.Runtime(_logger(self._trt))
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise StageError(
                f"{runtime} {self._trt.__version__} does not load the engine (its log says why)",
                where=str(path),
                fix="run build_engine.sh in the directory on this machine",
            )
        self._cache: tuple[Any, Path] | None = None
        self._context = self._make_context()
        self._stream = Stream()
        self._buffers: dict[str, Any] = {}
        self._graph: trt_cuda.Graph | None = None
        self._static = trt_profile.is_static(profile)
        self._has_run = False
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        mode = self._trt.TensorIOMode.INPUT
        self.inputs = [n for n in names if self._engine.get_tensor_mode(n) == mode]
        self.outputs = [n for n in names if n not in self.inputs]

    def _make_context(self) -> Any:
        """An execution context. TensorRT-RTX compiles for the card when it first runs; what it
        compiled is kept beside the engine, so that the next process starts at once."""
        if self._trt.__name__ == TENSORRT:
            return self._engine.create_execution_context()
        config = self._engine.create_runtime_config()
        cache, file = config.create_runtime_cache(), self.path.with_suffix(".runtime-cache")
        # False: of another card, driver or TensorRT-RTX, or damaged. It is then made anew.
        if not (file.is_file() and cache.deserialize(file.read_bytes())):
            self._cache = (cache, file)
        config.set_runtime_cache(cache)
        return self._engine.create_execution_context(config)

    def _keep_cache(self) -> None:
        """Write the runtime cache once, whole or not at all; a directory that cannot be written
        only costs time."""
        if self._cache is not None:
            cache, file = self._cache
            self._cache = None
            partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
            with contextlib.suppress(OSError):
                partial.write_bytes(bytes(cache.serialize()))
                partial.replace(file)

    def get_inputs(self) -> list[TensorInfo]:
        """Input descriptions with name, shape and type."""
        return [self._describe(name) for name in self.inputs]

    def get_outputs(self) -> list[TensorInfo]:
        """Output descriptions with name, shape and type."""
        return [self._describe(name) for name in self.outputs]

    def get_providers(self) -> list[str]:
        """What runs it: TensorRT or TensorRT-RTX."""
        return [self._trt.__name__]

    def _describe(self, name: str) -> TensorInfo:
        dtype = self._dtype(name).name
        kind = f"tensor({_TYPE_NAMES.get(dtype, dtype)})"
        return TensorInfo(name, list(self._engine.get_tensor_shape(name)), kind)

    def _dtype(self, name: str) -> np.dtype[Any]:
        import numpy as np

        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """feeds: input name -> array -> the named outputs, all of them for None.

        Raises InputError for feeds that do not fit, StageError where CUDA or TensorRT fails.
        """
        import numpy as np

        self.bind(feeds)
        self.launch()
        results = {}
        for name in output_names or self.outputs:
            host = np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name))
            results[name] = self._buffers[name].copy_to(host, self._stream)
        self._stream.synchronize()
        self._keep_cache()
        return list(results.values())

    def bind(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Copy the inputs to the GPU and make room for the outputs of their shapes."""
        import numpy as np

        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise InputError(f"no value for input {', '.join(missing)}", where=str(self.path))
        arrays = {n: np.ascontiguousarray(feeds[n], self._dtype(n)) for n in self.inputs}
        trt_profile.check_shapes(self.profile, {n: a.shape for n, a in arrays.items()})
        for name, array in arrays.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InputError(f"input {name}: shape {list(array.shape)} is refused by TensorRT")
            self._buffer(name, array.shape).copy_from(array, self._stream)
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            if min(shape, default=1) < 0:
                raise StageError(f"output {name} has a shape that depends on data: {shape}")
            self._buffer(name, shape)

    def _buffer(self, name: str, shape: tuple[int, ...]) -> Any:
        """GPU memory for a tensor, kept and only ever grown; TensorRT is told where."""
        from polygraphy.cuda import DeviceArray
        from polygraphy.datatype import DataType

        buffer = self._buffers.get(name)
        if buffer is None:
            dtype = DataType.from_dtype(self._dtype(name))
            buffer = self._buffers[name] = DeviceArray(shape=shape, dtype=dtype)
        buffer.resize(shape)
        self._context.set_tensor_address(name, buffer.ptr)
        return buffer

    def launch(self) -> None:
        """Issue one inference on what is bound. Static shapes: a graph from the third time on. It
        is captured behind the second, since a capture allows neither the kernels to be loaded, as
        the first run does, nor a changed binding to be made good, as the run behind it does."""
        if self._graph is not None:
            self._graph.launch()
            return
        self._enqueue()
        if self._static and self._has_run:
            self._capture()
        self._has_run = True

    def _capture(self) -> None:
        """Record the work for later runs, where it can be: some layers wait for the host."""
        self._static = False  # whatever comes of it, not tried again
        if self._capturable():
            with contextlib.suppress(StageError):
                self._graph = trt_cuda.Graph(self._stream, self._enqueue)

    def _capturable(self) -> bool:
        """TensorRT-RTX says whether a graph can be captured; of TensorRT it shows in trying."""
        ask = getattr(self._context, "is_stream_capturable", None)
        return bool(ask(self._stream.ptr)) if ask else True

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.ptr):
            raise StageError("TensorRT could not run the engine", where=str(self.path))

    def time(self, feeds: Mapping[str, np.ndarray], samples: int) -> Callable[[], float]:
        """A call that gives the GPU milliseconds of one inference on ``feeds``, copies excluded;
        warmed up with a tenth of ``samples``, at least three runs."""
        self.bind(feeds)
        for _ in range(max(3, samples // 10)):
            self.launch()
        self._stream.synchronize()
        timer = trt_cuda.Timer(self._stream)
        return lambda: timer.time(self.launch)


def open_tensorrt_provider(directory: Path, record: Manifest, threads: int | None = None) -> Any:
    """The plugin ONNX in ONNX Runtime's TensorRT provider, which builds its engine itself.

    Raises MissingRequirement where the provider is not there, StageError where it left a node to
    another provider: a plugin that fails to load is only a warning there.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingRequirement(
            "ONNX Runtime is not installed", fix="pip install 'bitnet-export[ort-gpu]'"
        ) from error
    if TRT_PROVIDER not in ort.get_available_providers():
        raise MissingRequirement(
            f"ONNX Runtime {ort.__version__} has no {TRT_PROVIDER} here, only "
            f"{', '.join(ort.get_available_providers())}",
            fix="pip install 'bitnet-export[ort-gpu]' and TensorRT 10 on a machine with a GPU",
        )
    trt_cuda.require_gpu()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    provider = (TRT_PROVIDER, provider_options(directory, record))
    try:
        session = ort.InferenceSession(str(directory / MODEL), options, providers=[provider])
    except Exception as error:
        raise StageError(
            f"ONNX Runtime's TensorRT provider does not take the whole model: {first_line(error)}",
            where=str(directory / MODEL),
            fix="check that TensorRT 10 and the plugin load: bitnet-export doctor",
        ) from error
    if session.get_providers()[0] != TRT_PROVIDER:
        raise StageError(
            f"asked for {TRT_PROVIDER}, ONNX Runtime chose {session.get_providers()[0]}",
            where=str(directory / MODEL),
        )
    return session


def provider_options(directory: Path, record: Manifest) -> dict[str, str]:
    """Options of ONNX Runtime's TensorRT provider: plugin, profile, cached engines.

    It only opens the library it is given, hence the one that registers the plugin beside it.
    """
    environment = record.environment
    options = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(directory.absolute()),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(directory.absolute()),
    }
    if "plugin" in environment:
        register = environment["plugin"].get("register")
        if register is None:
            raise MissingRequirement(
                "the export has no libbitnet_tensorrt_register.so, through which ONNX Runtime "
                "gets to know the plugin",
                where=str(directory),
                fix="install a wheel that has it, or python tools/build_native.py; export again",
            )
        options["trt_extra_plugin_lib_paths"] = str((directory / register).absolute())
    profile = environment.get("profile", {})
    if profile and not trt_profile.is_static(profile):
        for kind in trt_profile.KINDS:
            options[f"trt_profile_{kind}_shapes"] = ",".join(
                f"{name}:{'x'.join(map(str, shapes[kind]))}" for name, shapes in profile.items()
            )
    return options
