"""Running what an export wrote: ``load_session(directory)`` and the ONNX Runtime session behind it.

The manifest is checked first. The session takes feeds and gives outputs as ONNX Runtime's own
``run(output_names, feeds)`` does. A provider that is missing is an error, not a silent fallback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export.compress import loadable
from bitnet_export.errors import (
    BitnetExportError,
    MissingRequirement,
    StageError,
    UsageError,
    first_line,
)
from bitnet_export.manifest import MODEL, Manifest, check_manifest

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime as ort

CPU = "CPUExecutionProvider"
# Fusions whose result is slower than what it replaces (ONNX Runtime 1.32, docs/decisions.md).
SLOW_ON_CPU = ["SkipLayerNormFusion"]
STOP_SPINNING = "session.force_spinning_stop"
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# Set to 0 to run TernaryMatMul through its function body even where the native library is there.
NATIVE_VARIABLE = "BITNET_EXPORT_NATIVE"


class Session:
    """A loaded model: ``run(output_names, feeds)`` with named arrays, as ONNX Runtime's session.

    manifest: what the directory says about itself. native: the native library in use, or None.
    """

    def __init__(self, session: Any, manifest: Manifest, native: Path | None):
        self._session = session
        self.manifest = manifest
        self.native = native

    def run(
        self, output_names: Sequence[str] | None, feeds: Mapping[str, np.ndarray]
    ) -> list[np.ndarray]:
        """feeds: input name -> array -> the named outputs, all of them for None."""
        return self._session.run(output_names, dict(feeds))

    def get_inputs(self) -> list[Any]:
        """Input descriptions with name, shape and type."""
        return self._session.get_inputs()

    def get_outputs(self) -> list[Any]:
        """Output descriptions with name, shape and type."""
        return self._session.get_outputs()

    def get_providers(self) -> list[str]:
        """The execution providers in use."""
        return self._session.get_providers()


def load_session(
    directory: str | os.PathLike[str], threads: int | None = None, provider: str | None = None
) -> Session:
    """Load an output directory of any target that runs here.

    threads: intra-op threads, None for ONNX Runtime's own choice. provider: of a trt directory,
    "TensorrtExecutionProvider" runs the ONNX file in ONNX Runtime; None runs the engine. Raises
    InputError where the directory is damaged, MissingRequirement where this machine lacks what it
    needs.
    """
    path = Path(directory)
    manifest = check_manifest(path)
    if manifest.target in ("trt", "trt-rtx"):
        return _tensorrt_session(path, manifest, threads, provider)
    if provider not in (None, CPU):
        raise UsageError(f"{manifest.target} runs on {CPU}, not {provider}", where=str(path))
    native = native_library() if manifest.target == "onnx" else None
    with loadable(path / MODEL) as model:
        session = open_session(model, threads=threads, native=native)
    return Session(session, manifest, native)


def _tensorrt_session(
    path: Path, manifest: Manifest, threads: int | None, provider: str | None
) -> Session:
    from bitnet_export.targets import trt_session

    if provider is None:
        return Session(trt_session.open_engine(path, manifest), manifest, None)
    if provider != trt_session.TRT_PROVIDER or manifest.target != "trt":
        raise UsageError(
            f"{manifest.target} does not run in {provider}",
            where=str(path),
            fix=f"leave provider out, or use {trt_session.TRT_PROVIDER} with --target trt",
        )
    opened = trt_session.open_tensorrt_provider(path, manifest, threads)
    return Session(opened, manifest, None)


def open_session(
    path: Path | str | bytes,
    *,
    threads: int | None = None,
    provider: str = CPU,
    native: Path | None = None,
    fuse: bool = True,
    frugal: bool = False,
    takes_turns: bool = False,
    data_folder: Path | None = None,
) -> ort.InferenceSession:
    """An ONNX Runtime session with all graph optimizations and one inter-op thread.

    path: the ONNX file, or its content.
    threads: intra-op threads, None: ONNX Runtime's default. native: a library of custom ops to
    register. fuse: False keeps DequantizeLinear apart from its MatMul, for ONNX Runtime's fused
    float16 kernel sums in float16 (measured: 3 % off on MiniLM's layers, 0.1 % without it).
    frugal: for a few runs of a large model: what the graph computes from constants, as unpacked
    ternary weights, is computed anew in each run and nothing is repacked, so that hardly more than
    the file is ever in memory. takes_turns: another session runs in between: threads stop spinning
    when a run ends, or they would keep the other's threads from the cores. data_folder: where
    external tensors of content given as bytes lie.
    Raises MissingRequirement where the provider is absent (ONNX Runtime itself falls
    back silently), StageError where the model does not load, UsageError for threads below 1.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}", where="load_session")
    ort = _runtime_with(provider)
    where = "the decompressed model" if isinstance(path, bytes) else str(path)
    options = _session_options(
        threads, fuse=fuse, frugal=frugal, takes_turns=takes_turns, data_folder=data_folder
    )
    disabled = SLOW_ON_CPU if provider == CPU else []
    if frugal:
        disabled = [*disabled, "ConstantFolding"]
    try:
        if native is not None:
            options.register_custom_ops_library(os.fspath(native))
        session = ort.InferenceSession(
            path if isinstance(path, bytes) else os.fspath(path),
            options,
            providers=[provider],
            disabled_optimizers=disabled or None,
        )
    except Exception as error:
        raise StageError(
            f"ONNX Runtime {ort.__version__} does not load the model: {first_line(error)}",
            where=where,
            fix="check the file with bitnet-export inspect, the versions with bitnet-export doctor",
        ) from error
    if session.get_providers()[0] != provider:
        raise MissingRequirement(
            f"asked for {provider}, ONNX Runtime chose {session.get_providers()[0]}",
            where=where,
            fix="check the driver and the versions with bitnet-export doctor",
        )
    return session


def _runtime_with(provider: str) -> Any:
    """The onnxruntime module. Raises MissingRequirement without it, or where it has no such
    provider."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingRequirement(
            "ONNX Runtime is not installed", fix="pip install 'bitnet-export[ort]'"
        ) from error
    if provider not in ort.get_available_providers():
        raise MissingRequirement(
            f"ONNX Runtime has no {provider} here, only {', '.join(ort.get_available_providers())}",
            fix="pip install 'bitnet-export[ort-gpu]' on a machine with that device",
        )
    return ort


def _session_options(
    threads: int | None, *, fuse: bool, frugal: bool, takes_turns: bool, data_folder: Path | None
) -> ort.SessionOptions:
    """What open_session's parameters are to ONNX Runtime."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised, and need not be printed as well
    if data_folder is not None:
        options.add_session_config_entry(_DATA_FOLDER, os.fspath(data_folder))
    if frugal:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    if takes_turns:
        options.add_session_config_entry(STOP_SPINNING, "1")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def native_library() -> Path | None:
    """The native TernaryMatMul for ONNX Runtime, where it is installed and not switched off."""
    if os.environ.get(NATIVE_VARIABLE, "1") == "0":
        return None
    from bitnet_export.native import find_library

    try:
        return find_library("ort_cpu").path
    except BitnetExportError:
        return None


def cpu_advice(target: str) -> str:
    """What would make a directory of ``target`` faster on this CPU; "" where nothing would."""
    if os.environ.get(NATIVE_VARIABLE, "1") == "0":
        return ""
    from bitnet_export.native import remedy, search_library

    search = search_library("ort_cpu")
    if target == "onnx" and search.chosen is None:
        return (
            "TernaryMatMul ran through its function body, at the speed of full precision; the "
            f"native CPU library is several times faster: {remedy(search)}"
        )
    if target == "ort" and search.chosen is not None:
        return (
            "the native CPU library is here: --target onnx is usually the faster one with it "
            "(docs/native-cpu.md)"
        )
    return ""
