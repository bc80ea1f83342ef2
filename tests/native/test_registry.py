"""The shipped plugin in NVIDIA's own plugin registry, on a machine without a GPU.

The registry is that of the tensorrt-rtx wheel: the same code as TensorRT's. It refuses plugins in
a network, so what is shown here ends with the creation of the plugin object. Its logger has the
layout of TensorRT 11, which makes the messages below a test of plugins/tensorrt/logging.cpp
against a real library.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .conftest import Unavailable

_KEPT: list[Any] = []  # TensorRT holds the logger without owning it
GOOD = {"K": 256, "N": 64, "group_size": 0, "activation_bits": 8}


@pytest.fixture(scope="module")
def trt(unavailable: Unavailable) -> Any:
    try:
        import tensorrt_rtx
    except ImportError:
        unavailable("there is no tensorrt_rtx: pip install tensorrt-rtx-cu12 (see constraints.txt)")
    return tensorrt_rtx


@pytest.fixture(scope="module")
def messages(trt: Any) -> list[tuple[Any, str]]:
    """What the library's one logger gets; it is global and has to stay alive."""
    received: list[tuple[Any, str]] = []

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            received.append((severity, message))

    _KEPT.append(Logger())
    _KEPT.append(trt.Builder(_KEPT[0]))  # the first builder's logger becomes the library's
    return received


@pytest.fixture(scope="module")
def creator(trt: Any, messages: Any, plugin_library: Path) -> Any:
    registry = trt.get_plugin_registry()
    assert registry.get_creator("TernaryMatMul", "1", "") is None
    assert registry.load_library(str(plugin_library)) is not None
    return registry.get_creator("TernaryMatMul", "1", "")


def _create(trt: Any, creator: Any, fields: dict[str, Any], phase: str = "BUILD") -> Any:
    """createPlugin with fields as the ONNX parser makes them of node attributes."""
    types = {np.dtype(np.int32): "INT32", np.dtype(np.int64): "INT64", np.dtype("f4"): "FLOAT32"}
    made = []
    for name, value in fields.items():
        array = np.atleast_1d(value if isinstance(value, np.ndarray) else np.int32(value))
        kind = getattr(trt.PluginFieldType, types[array.dtype])
        made.append(trt.PluginField(name, array, kind))
    return creator.create_plugin(
        "layer_7", trt.PluginFieldCollection(made), getattr(trt.TensorRTPhase, phase)
    )


def test_creator_is_listed(trt: Any, creator: Any) -> None:
    listed = [(c.name, c.plugin_version) for c in trt.get_plugin_registry().all_creators]
    assert listed.count(("TernaryMatMul", "1")) == 1
    assert creator.plugin_namespace == ""
    names = [field.name for field in creator.field_names]
    assert names == ["K", "N", "group_size", "activation_bits"]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"group_size": 64},
        {"activation_bits": 0},
        {"K": 300, "N": 1},
        {"K": np.array([256], np.int64), "N": np.array([64], np.int64)},
    ],
    ids=str,
)
def test_good_fields_make_a_plugin(trt: Any, creator: Any, changed: dict[str, Any]) -> None:
    plugin = _create(trt, creator, GOOD | changed)
    assert plugin is not None
    for capability in ("CORE", "BUILD", "RUNTIME"):
        kind = getattr(trt.PluginCapabilityType, capability)
        assert plugin.get_capability_interface(kind) is not None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"K": 0}, "K=0"),
        ({"N": -1}, "N=-1"),
        ({"group_size": 48}, "group_size=48"),
        ({"activation_bits": 4}, "activation_bits=4"),
        ({"bits": 2}, "unknown field bits"),
        ({"K": np.array([256.0], np.float32)}, "field K must be an INT32 or INT64"),
        ({"K": np.array([256, 256], np.int32)}, "field K must hold one value, got 2"),
        ({"K": None}, "field K is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_fields_are_refused_with_a_reason(
    trt: Any, creator: Any, messages: Any, changed: dict[str, Any], said: str
) -> None:
    fields = {name: value for name, value in (GOOD | changed).items() if value is not None}
    messages.clear()
    assert _create(trt, creator, fields) is None
    severity, message = messages[-1]
    assert severity == trt.ILogger.Severity.ERROR
    assert message.startswith("TernaryMatMul 'layer_7': ")
    assert said in message


def test_runtime_phase_wants_the_serialized_fields(trt: Any, creator: Any, messages: Any) -> None:
    serialized = GOOD | {"timed_m": 16, "serialization_version": 2}
    assert _create(trt, creator, serialized, "RUNTIME") is not None
    assert _create(trt, creator, GOOD, "RUNTIME") is None
    assert "timed_m is missing" in messages[-1][1]
    assert _create(trt, creator, serialized | {"serialization_version": 3}, "RUNTIME") is None
    assert "build the engine again" in messages[-1][1]


def test_the_device_is_known_or_its_absence_explained(
    trt: Any, creator: Any, messages: Any
) -> None:
    plugin = _create(trt, creator, GOOD)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    assert build.metadata_string == "K=256 N=64 group_size=0 activation_bits=8"
    messages.clear()
    key = build.timing_cache_id
    if key is not None:  # a machine with a card
        assert "sm=" in key
        return
    message = messages[-1][1]
    assert message.startswith("TernaryMatMul 'layer_7': the CUDA device cannot be queried: ")
    assert (
        "there is no NVIDIA driver, or it is older than" in message or "no CUDA device" in message
    )


# A process of its own, since registration is for good. What a program like ONNX Runtime does:
# TensorRT is there (not in the global scope), the library is opened and nothing is called.
OPENED = """
import ctypes, sys, tensorrt_rtx as trt
builder = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR))
registry = trt.get_plugin_registry()
if "registered" in sys.argv:
    registry.load_library(sys.argv[1].replace("register", "plugin"))
for _ in range(2):
    ctypes.CDLL(sys.argv[1])
print([c.name for c in registry.all_creators].count("TernaryMatMul"))
"""


@pytest.mark.parametrize("before", ["nothing", "registered"])
def test_opening_the_register_library_registers_the_plugin(
    trt: Any, plugin_library: Path, register_library: Path, before: str
) -> None:
    assert plugin_library.parent == register_library.parent
    command = [sys.executable, "-c", OPENED, str(register_library), before]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "1\n"
    assert ("TensorRT did not load" in done.stderr) == (before == "registered")


def test_register_library_without_tensorrt_says_so(register_library: Path) -> None:
    script = f"import ctypes; ctypes.CDLL({str(register_library)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "no TensorRT is loaded in this process yet" in done.stderr
