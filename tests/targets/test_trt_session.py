"""Engine sessions over the stand-ins of trt_fakes.py, which say what they stand for."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bitnet_export import env, manifest
from bitnet_export.errors import InputError, MissingRequirement, StageError, UsageError
from bitnet_export.targets import load_session, trt_cuda, trt_session
from bitnet_export.targets.trt_session import EngineSession, provider_options
from bitnet_export.verify import engine_speed
from bitnet_export.verify.feeds import Case
from tests.targets.trt_fakes import FakeTensorRT, HostCuda
from tests.targets.trt_support import trt_record

STATIC = {"x": {"min": [4, 8], "opt": [4, 8], "max": [4, 8]}}
DYNAMIC = {"x": {"min": [1, 8], "opt": [4, 8], "max": [16, 8]}}


@pytest.fixture
def cuda(monkeypatch):
    from polygraphy.cuda import cuda as module

    fake = HostCuda()
    monkeypatch.setattr(module, "wrapper", lambda: fake)
    monkeypatch.setattr(trt_cuda, "library", lambda: fake.handle)
    return fake


@pytest.fixture
def tensorrt(cuda, monkeypatch):
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(trt_session, "_LOADED_PLUGINS", set())
    return fake


@pytest.fixture
def engine_file(tmp_path):
    path = tmp_path / manifest.ENGINE
    path.write_bytes(b"engine")
    return path


def x_of(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, 8)).astype(np.float32)


@pytest.mark.usefixtures("tensorrt")
class TestEngineSession:
    def test_dynamic_shapes_grow_and_shrink(self, engine_file, cuda):
        session = EngineSession(engine_file, "tensorrt", DYNAMIC)
        for rows in (4, 1, 16, 3):
            x = x_of(rows, seed=rows)
            (y,) = session.run(None, {"x": x})
            assert np.array_equal(y, 2 * x)
        assert "capture" not in cuda.calls  # a graph is of one shape

    def test_a_static_engine_is_captured_once_and_sees_new_inputs(self, engine_file, cuda):
        session = EngineSession(engine_file, "tensorrt", STATIC)
        for seed in range(4):
            x = x_of(4, seed)
            assert np.array_equal(session.run(["y"], {"x": x})[0], 2 * x)
        # The first run is no graph: kernels are loaded there, which a capture does not allow.
        assert cuda.calls == ["capture", "launch", "launch", "launch"]
        assert session._context.enqueued == 2

    def test_descriptions_are_those_of_onnx_runtime(self, engine_file):
        session = EngineSession(engine_file, "tensorrt", DYNAMIC)
        (x,), (y,) = session.get_inputs(), session.get_outputs()
        assert (x.name, x.shape, x.type) == ("x", [-1, 8], "tensor(float)")
        assert y.name == "y"
        assert session.get_providers() == ["tensorrt"]

    @pytest.mark.parametrize(
        ("feeds", "said"),
        [
            ({}, "no value for input x"),
            ({"x": np.zeros((17, 8))}, r"takes \[1, 8\] to \[16, 8\]"),
            ({"x": np.zeros(8)}, r"shape \[8\]"),
        ],
        ids=["missing", "too large", "wrong rank"],
    )
    def test_feeds_that_do_not_fit(self, engine_file, feeds, said):
        with pytest.raises(InputError, match=said):
            EngineSession(engine_file, "tensorrt", DYNAMIC).run(None, feeds)

    def test_events_time_what_is_launched(self, engine_file):
        timer = EngineSession(engine_file, "tensorrt", STATIC).time({"x": x_of(4)}, samples=10)
        assert timer() == 0.5  # what the fake's events are apart

    def test_an_engine_that_does_not_load(self, engine_file, tensorrt):
        tensorrt.loads = False
        with pytest.raises(StageError, match="does not load the engine"):
            EngineSession(engine_file, "tensorrt", STATIC)


@pytest.fixture
def t4_directory(tmp_path, monkeypatch, engine_file):
    """An export with an engine, on "its" T4: nvidia-smi's answer is replaced."""
    monkeypatch.setattr(
        env, "gpus", lambda: ({"name": "Tesla T4", "compute_capability": "7.5", "driver": "1"},)
    )
    record = trt_record()
    plugin = tmp_path / "p.so"
    plugin.write_bytes(b"plugin")
    record.environment["plugin"] = {"file": "p.so", "sha256": manifest.sha256_of(plugin)}
    record.files = manifest.record_files(tmp_path, [manifest.ENGINE, "p.so"])
    manifest.write_manifest(record, tmp_path)
    return tmp_path


class TestLoadSession:
    def test_the_plugin_is_loaded_by_absolute_path_first(self, t4_directory, tensorrt):
        session = load_session(t4_directory)
        x = x_of(2)
        assert np.array_equal(session.run(None, {"x": x})[0], 2 * x)
        assert tensorrt.loaded == [str(t4_directory / "p.so")]
        load_session(t4_directory)
        assert len(tensorrt.loaded) == 1  # a second time would register it twice

    def test_a_plugin_that_is_refused(self, t4_directory, tensorrt):
        tensorrt.loads = False
        with pytest.raises(StageError, match=r"p\.so: TensorRT's plugin registry did not load it"):
            load_session(t4_directory)

    @pytest.mark.usefixtures("tensorrt")
    def test_a_changed_engine_is_never_loaded(self, t4_directory):
        (t4_directory / manifest.ENGINE).write_bytes(b"change")
        with pytest.raises(InputError, match=r"model\.engine"):
            load_session(t4_directory)

    def test_another_version_is_never_loaded(self, t4_directory, tensorrt):
        tensorrt.__version__ = "10.9.0"
        with pytest.raises(MissingRequirement, match=r"TensorRT 10\.14\.1, here 10\.9\.0"):
            load_session(t4_directory)
        assert tensorrt.loaded == []


def test_bench_interleaves_engine_and_baseline(t4_directory, tensorrt, monkeypatch, engine_file):
    monkeypatch.setattr(engine_speed, "build_engine", lambda request, progress: _pretend(request))
    (t4_directory / "intermediate").mkdir()
    case = Case("batch=4", {"x": x_of(4)})
    record = manifest.read_manifest(t4_directory)
    (row,) = engine_speed.measure_engine_speed(
        t4_directory, record, t4_directory / "baseline.onnx", [case], samples=7
    )
    assert len(row.samples_ms) == len(row.baseline_samples_ms) == 7
    assert (row.ms, row.ratio, row.provider) == (0.5, 1.0, "tensorrt")
    assert row.baseline == "fp32 engine"


def _pretend(request):
    """Stands for a build on the GPU: the baseline has the profile of the engine it is beside."""
    assert request.profile == trt_record().environment["profile"]
    request.engine.write_bytes(b"baseline")


class TestProvider:
    """ONNX Runtime's TensorRT provider; the installed ONNX Runtime has none without a GPU."""

    def test_options_carry_plugin_and_profile(self, tmp_path):
        record = trt_record()
        record.environment["plugin"] = {"file": "p.so", "register": "r.so"}
        options = provider_options(tmp_path, record)
        # It opens the library and calls nothing in it: the plugin alone would not be registered.
        assert options["trt_extra_plugin_lib_paths"] == str(tmp_path / "r.so")
        assert options["trt_profile_max_shapes"] == "x:8x8"

    def test_without_the_registering_library(self, tmp_path):
        record = trt_record()
        record.environment["plugin"] = {"file": "p.so"}
        with pytest.raises(MissingRequirement, match="libbitnet_tensorrt_register"):
            provider_options(tmp_path, record)

    def test_missing_provider(self, tmp_path):
        import onnxruntime

        if trt_session.TRT_PROVIDER in onnxruntime.get_available_providers():
            pytest.skip("this ONNX Runtime has the provider")
        manifest.write_manifest(trt_record(), tmp_path)
        with pytest.raises(MissingRequirement, match="has no TensorrtExecutionProvider here"):
            load_session(tmp_path, provider=trt_session.TRT_PROVIDER)

    @pytest.mark.usefixtures("cuda")
    def test_nodes_left_to_the_cpu_are_an_error(self, tmp_path, monkeypatch):
        """The real ONNX Runtime, made to believe that it has the provider: it then falls back to
        the CPU with a warning, which is what a plugin that fails to load does as well."""
        import onnxruntime

        from bitnet_export import onnx_io
        from tests.passes.graphs import ternary_case, ternary_model

        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: [trt_session.TRT_PROVIDER]
        )
        onnx_io.write_model(ternary_model(ternary_case(64, 8)), tmp_path / manifest.MODEL)
        manifest.write_manifest(trt_record(), tmp_path)
        with pytest.raises(StageError, match=r"the whole model|ONNX Runtime chose"):
            load_session(tmp_path, provider=trt_session.TRT_PROVIDER)

    def test_other_providers_are_refused(self, tmp_path):
        manifest.write_manifest(trt_record(), tmp_path)
        with pytest.raises(UsageError, match="does not run in CUDAExecutionProvider"):
            load_session(tmp_path, provider="CUDAExecutionProvider")


def test_the_real_cuda_runtime_explains_why_there_is_no_gpu():
    try:
        trt_cuda.library()
    except MissingRequirement as error:
        pytest.skip(f"no libcudart here: {error.what[:60]}")
    assert trt_cuda.runtime_version()[0].isdigit()
    if env.gpus():
        trt_cuda.require_gpu()
        return
    with pytest.raises(MissingRequirement, match="cudaError") as error:
        trt_cuda.require_gpu()
    assert "machine with a GPU" in error.value.fix
