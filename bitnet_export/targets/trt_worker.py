"""The process that builds one engine: ``python -m bitnet_export.targets.trt_worker REQUEST``.

A process of its own, because NVIDIA's libraries end the one they run in on some inputs, and
because Polygraphy decides between TensorRT and TensorRT-RTX once, when it is imported. It prints
one JSON event a line on stdout (progress, result, error); the library's own messages go to
stderr. trt_build.py starts it and reads both.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> int:
    """Build what the request asks for; 0, or 1 after an error event."""
    request = json.loads(Path(request_path).read_text())
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints is no event

    def emit(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        emit(event="result", **build(request, emit))
    except Exception as error:
        emit(event="error", what=str(error).strip() or type(error).__name__)
        return 1
    return 0


def build(request: dict[str, Any], emit: Any) -> dict[str, Any]:
    """request: what trt_build.Request holds -> the facts of the engine written."""
    if request["runtime"] == "tensorrt_rtx":
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
        import tensorrt_rtx as trt
    else:
        import tensorrt as trt
    from polygraphy.backend.trt import (
        engine_bytes_from_network,
        get_trt_logger,
        network_from_onnx_path,
    )
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.WARNING
    get_trt_logger()  # the first logger becomes the library's; the plugin logs through it as well
    plugin = request.get("plugin")
    if plugin and trt.get_plugin_registry().load_library(plugin) is None:
        raise RuntimeError(f"the plugin registry did not load {plugin}")
    emit(event="progress", done=0, total=0, detail="parsing the model")
    network = network_from_onnx_path(request["onnx"], strongly_typed=True)
    facts: dict[str, Any] = {
        "version": trt.__version__,
        "parsed_plugin_layers": _plugin_layers(network[1], trt),
    }
    data = engine_bytes_from_network(
        network,
        config=make_config(request, trt, make_monitor(trt, emit)),
        save_timing_cache=request.get("timing_cache"),
    )
    Path(request["engine"]).write_bytes(bytes(data))
    if request["runtime"] == "tensorrt":
        facts |= inspect_engine(data, trt)
    return facts


def make_config(request: dict[str, Any], trt: Any, monitor: Any) -> Any:
    """The Polygraphy config loader: profile, target, caches. Precision lives in the graph."""
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, shapes in request["profile"].items():
        profile.add(name, *(tuple(shapes[kind]) for kind in ("min", "opt", "max")))
    common: dict[str, Any] = {
        "profiles": [profile],
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if request["runtime"] == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        capabilities = [tuple(c) for c in request["compute_capabilities"]] or None
        return CreateConfigRTX(compute_capabilities=capabilities, **common)
    cache = request.get("timing_cache")
    known = cache if cache and Path(cache).is_file() else None
    create = CreateConfig(load_timing_cache=known, **common)
    if not request.get("embed_plugin"):
        return create

    def with_plugin(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        config.plugins_to_serialize = [request["plugin"]]
        return config

    return with_plugin


def make_monitor(trt: Any, emit: Any) -> Any:
    """An IProgressMonitor that emits the outermost phase's steps."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int]] = {}

        def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, num_steps)
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.phases[phase_name][1])

        def _tell(self, name: str, done: int) -> None:
            parent, steps = self.phases[name]
            if parent is None:
                emit(event="progress", done=min(done, steps), total=steps, detail=name)

    return Monitor()


def _plugin_layers(network: Any, trt: Any) -> int:
    """Layers of the parsed network that are plugins."""
    kinds = {
        getattr(trt.LayerType, name)
        for name in ("PLUGIN", "PLUGIN_V2", "PLUGIN_V3")
        if hasattr(trt.LayerType, name)
    }
    return sum(network.get_layer(i).type in kinds for i in range(network.num_layers))


def inspect_engine(data: Any, trt: Any) -> dict[str, Any]:
    """Load the engine on this GPU and count its layers, and those that are plugins."""
    from polygraphy.backend.trt import engine_from_bytes

    inspector = engine_from_bytes(data).create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers = json.loads(text)["Layers"]
    return {"plugin_layers": count_plugin_layers(layers), "layers": len(layers)}


def count_plugin_layers(layers: list[Any]) -> int:
    """The inspector's layers, at detailed verbosity objects with LayerType -> the plugins."""
    kinds = (str(layer.get("LayerType", "")) for layer in layers if isinstance(layer, dict))
    return sum("plugin" in kind.lower() for kind in kinds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
