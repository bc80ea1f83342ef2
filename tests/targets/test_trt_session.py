"""Engine sessions over the stand-ins of trt_fakes.py, which say what they stand for."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pytest
from polygraphy.backend.onnxrt import OnnxrtRunner

from bitnet_export import env, manifest
from bitnet_export.errors import InputError, MissingRequirement, StageError, UsageError
from bitnet_export.targets import load_session, trt_cuda, trt_session
from bitnet_export.targets.trt_session import EngineSession, provider_options
from bitnet_export.verify import engine_speed
from bitnet_export.verify.engine_parity import compare_engine
from bitnet_export.verify.feeds import Case
from tests.targets.trt_fakes import FakeRtx, FakeTensorRT, HostCuda
from tests.targets.trt_support import require_rtx, trt_record

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
        # The first run loads kernels, the second makes good what binding changed: neither can be
        # captured, so the graph is made behind the second.
        assert cuda.calls == ["capture", "launch", "launch"]
        assert session._context.enqueued == 3

    def test_an_engine_that_cannot_be_captured_runs_without(self, engine_file, cuda):
        session = EngineSession(engine_file, "tensorrt", STATIC)
        session._context.waits = True
        for seed in range(4):
            x = x_of(4, seed)
            assert np.array_equal(session.run(["y"], {"x": x})[0], 2 * x)
        assert cuda.calls == ["capture"]  # tried once

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
        assert tensorrt.runtime.engine_host_code_allowed is False

    def test_two_exports_share_the_plugin_of_a_process(self, t4_directory, tmp_path, tensorrt):
        load_session(t4_directory)
        (other := tmp_path / "other").mkdir()
        for file in t4_directory.iterdir():
            if file.is_file():
                shutil.copy2(file, other)
        load_session(other)  # the same library under another path
        record = manifest.check_manifest(other)
        (other / "p.so").write_bytes(b"another build")
        record.environment["plugin"]["sha256"] = manifest.sha256_of(other / "p.so")
        record.files |= manifest.record_files(other, ["p.so"])
        manifest.write_manifest(record, other)
        with pytest.raises(StageError, match="another build of it is loaded in this process"):
            load_session(other)

    def test_an_engine_with_the_plugin_inside_may_load_it(self, t4_directory, tensorrt):
        record = manifest.check_manifest(t4_directory)
        record.environment["engines"][manifest.ENGINE]["embedded_plugin"] = True
        manifest.write_manifest(record, t4_directory)
        load_session(t4_directory)
        assert tensorrt.loaded == []
        assert tensorrt.runtime.engine_host_code_allowed is True

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


class TestRuntimeCache:
    """TensorRT-RTX compiles for the card on the first run; FakeRtx keeps to the wheel's API."""

    @pytest.fixture
    def rtx(self, cuda, monkeypatch):
        fake = FakeRtx(cuda)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
        return fake

    def run_once(self, engine_file):
        session = EngineSession(engine_file, "tensorrt_rtx", DYNAMIC)
        assert np.array_equal(session.run(None, {"x": x_of(4)})[0], 2 * x_of(4))
        return session

    def test_what_was_compiled_is_kept_and_found_again(self, engine_file, rtx):
        cache = engine_file.with_suffix(".runtime-cache")
        self.run_once(engine_file)
        assert cache.read_bytes() == rtx.compiled()
        written = cache.stat().st_mtime_ns
        self.run_once(engine_file)
        assert rtx.caches[-1].loaded == rtx.compiled()
        assert cache.stat().st_mtime_ns == written
        assert not list(engine_file.parent.glob("*.partial"))

    def test_a_cache_of_another_card_is_replaced(self, engine_file, rtx):
        cache = engine_file.with_suffix(".runtime-cache")
        cache.write_bytes(b"compiled for another card")
        self.run_once(engine_file)
        assert rtx.caches[-1].loaded is None
        assert cache.read_bytes() == rtx.compiled()

    def test_a_directory_that_cannot_be_written_is_no_error(self, engine_file, rtx, monkeypatch):
        def refuse(self, data):
            raise PermissionError(13, "read-only", str(self))

        monkeypatch.setattr(type(engine_file), "write_bytes", refuse)
        self.run_once(engine_file)
        assert not engine_file.with_suffix(".runtime-cache").exists()

    @pytest.mark.usefixtures("rtx")
    def test_the_context_is_made_with_the_cache(self, engine_file):
        session = EngineSession(engine_file, "tensorrt_rtx", DYNAMIC)
        assert session._context.config.cache is not None


def test_the_real_wheel_has_the_api_that_sessions_call():
    """What FakeTensorRT and FakeRtx stand for, by name and by the wheel's own signatures: whether
    it behaves as documented shows only on a GPU."""
    require_rtx()
    import tensorrt_rtx as trt

    signatures = [
        (trt.ICudaEngine.create_runtime_config, "-> "),
        (trt.ICudaEngine.create_execution_context, "runtime_config: "),
        (trt.ICudaEngine.get_tensor_name, "index: "),
        (trt.ICudaEngine.get_tensor_mode, "name: str"),
        (trt.ICudaEngine.get_tensor_dtype, "name: str"),
        (trt.ICudaEngine.get_tensor_shape, "name: str"),
        (trt.IRuntimeConfig.create_runtime_cache, "-> "),
        (trt.IRuntimeConfig.set_runtime_cache, "cache: "),
        (trt.IRuntimeCache.serialize, "IHostMemory"),
        (trt.IRuntimeCache.deserialize, "-> bool"),
        (trt.IExecutionContext.set_input_shape, "-> bool"),
        (trt.IExecutionContext.set_tensor_address, "-> bool"),
        (trt.IExecutionContext.get_tensor_shape, "name: str"),
        (trt.IExecutionContext.execute_async_v3, "-> bool"),
        (trt.IExecutionContext.is_stream_capturable, "-> bool"),
        (trt.Runtime.deserialize_cuda_engine, "-> "),
        (trt.IPluginRegistry.load_library, "plugin_path: str"),
    ]
    for function, part in signatures:
        assert part in str(function.__doc__), f"{function.__name__}: {function.__doc__}"
    assert trt.nptype(trt.DataType.HALF) is np.float16
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT
    assert isinstance(vars(trt.ICudaEngine)["num_io_tensors"], property)


class TestEngineParity:
    """The engine against its ONNX model; the stand-in engine doubles x."""

    def compare(self, directory, factor, cases=None):
        runner = OnnxrtRunner(lambda: Multiplies(factor), name="lowered")
        record = manifest.read_manifest(directory)
        record.parity_kinds = ["fp16"]
        cases = cases or [Case("batch=4", {"x": x_of(4)}), Case("batch=17", {"x": x_of(17)})]
        return compare_engine(directory, record, runner, cases, name="lowered")

    @pytest.mark.usefixtures("tensorrt")
    def test_equal_results_pass_and_cases_outside_the_profile_are_left_out(self, t4_directory):
        rows = self.compare(t4_directory, 2.0)
        assert [(row.pair, row.shape, row.passed) for row in rows] == [
            ("lowered -> engine", "batch=4", True)
        ]

    @pytest.mark.usefixtures("tensorrt")
    def test_without_a_case_in_the_profile_nothing_is_claimed(self, t4_directory):
        with pytest.raises(MissingRequirement, match="none of the shapes compared"):
            self.compare(t4_directory, 2.0, [Case("batch=17", {"x": x_of(17)})])

    @pytest.mark.usefixtures("tensorrt")
    def test_other_results_fail(self, t4_directory):
        (row,) = self.compare(t4_directory, 2.5)
        assert not row.passed
        assert row.max_abs > 0.1


class Multiplies:
    """Stands for an ONNX Runtime session of the model that the stand-in engine was made from."""

    def __init__(self, factor):
        self.factor = factor

    def get_inputs(self):
        return [trt_session.TensorInfo("x", [-1, 8], "tensor(float)")]

    def get_outputs(self):
        return [trt_session.TensorInfo("y", [-1, 8], "tensor(float)")]

    def run(self, names, feeds):
        return [np.float32(self.factor) * feeds["x"]]


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
