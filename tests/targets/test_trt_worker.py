"""The worker's path for TensorRT, with NVIDIA's real builder: TensorRT-RTX takes TensorRT's place.

The two have one Python API for what is used here: logger, plugin registry, parser, profile,
timing cache, plugins to serialize, progress monitor. What stays untested is what TensorRT-RTX
has not: plugin layers in a network, and the inspector, which needs a GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_export import env, onnx_io
from bitnet_export.errors import MissingRequirement
from bitnet_export.native import find_library
from bitnet_export.passes.lower_rtx import dense_weights
from tests.passes.graphs import ternary_case
from tests.targets.trt_support import lowered_for_rtx, require_rtx, unavailable

K, N = 256, 128
# What the worker asks of the module tensorrt, asked of tensorrt_rtx instead. The version decides
# what Polygraphy believes to be there.
AS_TENSORRT = """
import json, sys
import tensorrt_rtx
tensorrt_rtx.__version__ = "10.14.1"
sys.modules["tensorrt"] = tensorrt_rtx
from bitnet_export.targets import trt_worker
trt_worker.inspect_engine = lambda data, trt: {}  # needs a GPU
sys.exit(trt_worker.main(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def plugin():
    require_rtx()
    try:
        return find_library("tensorrt_plugin").path
    except MissingRequirement as error:
        return unavailable(error.what)


@pytest.fixture
def build(tmp_path, plugin):
    """Build one linear as --target trt would -> (events, log, engine's bytes)."""
    model = dense_weights(lowered_for_rtx(ternary_case(K, N)))[0]
    path = onnx_io.write_model(model, tmp_path / "model.onnx")
    engine = tmp_path / "model.engine"
    request = {
        "runtime": "tensorrt",
        "onnx": str(path),
        "engine": str(engine),
        "profile": {"x": {"min": [1, K], "opt": [1, K], "max": [8, K]}},
        "plugin": str(plugin),
        "timing_cache": str(tmp_path / "timing.cache"),
    }

    def run(**changes):
        written = tmp_path / "request.json"
        written.write_text(json.dumps(request | changes))
        done = subprocess.run(
            [sys.executable, "-c", AS_TENSORRT, str(written)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        events = [json.loads(line) for line in done.stdout.splitlines()]
        assert done.returncode == (0 if events[-1]["event"] == "result" else 1), done.stderr
        return events, done.stderr, engine.stat().st_size if engine.is_file() else 0

    return run


def test_an_engine_is_built_with_the_plugin_loaded(build):
    events, _, size = build()
    assert events[-1] == {"event": "result", "version": "10.14.1", "parsed_plugin_layers": 0}
    assert size > 2 * K * N  # float16 weights
    steps = [e for e in events if e["event"] == "progress" and e["total"]]
    assert steps
    assert all(0 <= e["done"] <= e["total"] for e in steps)


def test_the_timing_cache_is_written_and_read_again(build, tmp_path):
    cache = tmp_path / "timing.cache"
    _, log, _ = build()
    assert cache.stat().st_size > 0
    assert "deserialize timing cache" not in log  # there was none
    _, log, _ = build()
    # It was handed to the builder, which without a GPU cannot say whether it fits and says so.
    assert "deserialize timing cache" in log or env.gpus()


def test_a_damaged_timing_cache_is_made_anew(build, tmp_path):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"no timing cache")
    events, _, size = build()
    assert events[-1]["event"] == "result"
    assert size > 0
    assert b"no timing cache" not in cache.read_bytes()


def test_embedding_puts_the_plugin_into_the_engine(build, plugin):
    _, _, without = build()
    _, _, with_plugin = build(embed_plugin=True)
    added = with_plugin - without
    # Whole or compressed: but the library, and not its name only.
    assert 0.2 * Path(plugin).stat().st_size < added < 1.1 * Path(plugin).stat().st_size


def test_a_library_that_is_no_plugin_is_named(build, tmp_path):
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(b"\x7fELF")
    events, _, size = build(plugin=str(wrong))
    assert events[-1]["event"] == "error"
    assert "wrong.so" in events[-1]["what"]
    assert size == 0
