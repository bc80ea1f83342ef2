"""Target trt where TensorRT or the GPU is missing, and the checks around an engine.

TensorRT itself is not installed in CI and needs a GPU to build: what replaces it here are
recorded facts (what a build on a T4 would report), never a stand-in for the builder's work. The
builder's code path, shared with trt-rtx, runs for real in test_trt_rtx.py.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from bitnet_export import manifest
from bitnet_export.errors import InputError, MissingRequirement, StageError, UsageError
from bitnet_export.options import ExportOptions
from bitnet_export.passes import RetargetTensorRT, run_passes
from bitnet_export.targets import load_session, target_for, trt, trt_build, trt_engine
from bitnet_export.targets.base import Target
from bitnet_export.targets.trt_build import Built
from bitnet_export.targets.trt_environment import Machine, check_environment, choose_engine
from bitnet_export.targets.trt_worker import count_plugin_layers
from tests.passes.graphs import ternary_case, ternary_model
from tests.targets.trt_support import job_for, trt_record

T4 = Machine("10.14.1", "12.4", "Tesla T4", "7.5")


@pytest.fixture
def model():
    return run_passes(ternary_model(ternary_case(128, 64)), [RetargetTensorRT()])[0]


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """A file with a plugin's build information: what is copied and recorded, never loaded."""
    path = tmp_path / "plugin" / "libbitnet_tensorrt_plugin.so"
    path.parent.mkdir()
    version = trt.env.version("bitnet-export")
    info = f"@(#)bitnet-export library=tensorrt_plugin version={version} cuda=13.0;"
    path.write_bytes(b"\x7fELF" + info.encode())
    monkeypatch.setenv("BITNET_EXPORT_TENSORRT_PLUGIN", str(path))
    return path


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setattr(trt_build, "find_spec", lambda name: None)
    monkeypatch.setattr(trt_build.env, "gpus", lambda: ())


@pytest.mark.usefixtures("no_tensorrt")
class TestWithoutTensorRT:
    def test_the_files_are_kept_and_the_gap_is_named(self, tmp_path, model, plugin):
        job = job_for(tmp_path / "out", model, target="trt")
        with pytest.raises(MissingRequirement, match="TensorRT is not installed") as error:
            trt.TrtTarget().build(job)
        assert error.value.exit_code == 3
        assert "there is no NVIDIA GPU" in str(error.value)
        assert "run build_engine.sh" in error.value.fix
        assert (job.directory / plugin.name).read_bytes() == plugin.read_bytes()
        recorded = job.environment["plugin"]
        assert recorded["sha256"] == manifest.sha256_of(plugin)
        assert recorded["file"] == plugin.name

    @pytest.mark.usefixtures("plugin")
    def test_no_engine_makes_it_a_success(self, tmp_path, model):
        job = job_for(tmp_path / "out", model, target="trt", engine=False)
        trt.TrtTarget().build(job)
        assert (job.directory / "build_engine.sh").is_file()
        assert "engines" not in job.environment

    def test_without_a_plugin_the_model_and_script_are_there(self, tmp_path, model, monkeypatch):
        monkeypatch.setenv("BITNET_EXPORT_TENSORRT_PLUGIN", str(tmp_path / "none.so"))
        job = job_for(tmp_path / "out", model, target="trt")
        with pytest.raises(MissingRequirement, match="tensorrt_plugin"):
            trt.TrtTarget().build(job)
        assert "plugin" not in job.environment
        assert "--dynamicPlugins" not in (job.directory / "build_engine.sh").read_text()

    @pytest.mark.usefixtures("plugin")
    def test_the_script_names_everything_trtexec_needs(self, tmp_path, model):
        job = job_for(tmp_path / "out", model, target="trt", engine=False, embed_plugin=True)
        trt.TrtTarget().build(job)
        (tmp_path / "bin").mkdir()
        # Stands for NVIDIA's trtexec, which is not on PyPI: shows what it would be called with.
        (tmp_path / "bin" / "trtexec").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / "bin" / "trtexec").chmod(0o755)
        done = subprocess.run(
            [job.directory / "build_engine.sh", "trtexec", "--verbose"],
            capture_output=True,
            text=True,
            env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
            timeout=20,
            check=True,
        )
        assert done.stdout.split() == [
            "--onnx=model.onnx",
            "--saveEngine=model.engine",
            "--stronglyTyped",
            "--dynamicPlugins=./libbitnet_tensorrt_plugin.so",
            "--setPluginsToSerialize=./libbitnet_tensorrt_plugin.so",
            "--minShapes=x:1x128",
            "--optShapes=x:1x128",
            "--maxShapes=x:8x128",
            "--profilingVerbosity=detailed",
            "--verbose",
        ]

    @pytest.mark.usefixtures("plugin")
    def test_the_scripts_python_form_says_what_is_missing(self, tmp_path, model, capsys):
        job = job_for(tmp_path / "out", model, target="trt", engine=False)
        trt.TrtTarget().build(job)
        record = manifest.Manifest(name="m", target="trt", environment=job.environment)
        manifest.write_manifest(record, job.directory)
        assert trt_engine.main([str(job.directory)]) == 3
        assert "TensorRT is not installed" in capsys.readouterr().err


@pytest.mark.usefixtures("no_tensorrt")
class TestPluginOfAnotherVersion:
    """It counts as none: never copied, and no reason to fail where no engine is asked for."""

    @pytest.fixture
    def job(self, tmp_path, model, plugin):
        def make(**options):
            plugin.write_bytes(b"@(#)bitnet-export library=tensorrt_plugin version=0.0.1;")
            return job_for(tmp_path / "out", model, target="trt", **options)

        return make

    def test_no_engine_is_a_success_that_says_so(self, job):
        made = job(engine=False)
        trt.TrtTarget().build(made)
        assert not list(made.directory.glob("*.so"))
        assert "plugin" not in made.environment
        (said,) = (d for d in made.lowered.decisions if d.name == "plugin")
        assert said.choice == "not beside the model"
        assert "of version 0.0.1, this bitnet-export is" in said.reason

    def test_an_engine_is_refused_as_without_a_plugin(self, job):
        with pytest.raises(MissingRequirement, match=r"of version 0\.0\.1") as error:
            trt.TrtTarget().build(job())
        assert error.value.exit_code == 3

    def test_build_engine_sh_says_what_to_do_later(self, job, monkeypatch):
        made = job(engine=False)
        trt.TrtTarget().build(made)
        record = manifest.Manifest(name="m", target="trt", environment=made.environment)
        manifest.write_manifest(record, made.directory)
        monkeypatch.setattr(trt_engine, "missing_for", lambda runtime: [])
        with pytest.raises(MissingRequirement, match="found no plugin library; export again"):
            trt_engine.finish(made.directory)


@pytest.mark.parametrize(
    ("name", "builds"), [("onnx", False), ("ort", False), ("trt", True), ("trt-rtx", True)]
)
def test_only_targets_that_build_something_have_a_build_stage(name, builds):
    target = target_for(name)
    assert target.builds is builds
    # A target that overrides the hook and does not say so would never be asked to build.
    assert (type(target).build is not Target.build) is builds


def test_timing_caches_are_kept_by_version_and_card(monkeypatch, tmp_path):
    monkeypatch.setenv(trt_build.CACHE_VARIABLE, str(tmp_path))
    path = trt_build.timing_cache("10.14.1", "NVIDIA GeForce GTX 1660 Ti")
    assert path == tmp_path / "timing-10.14.1-NVIDIA-GeForce-GTX-1660-Ti.cache"
    others = {trt_build.timing_cache("10.13.0", "T4"), trt_build.timing_cache("10.14.1", "T4")}
    assert len({path, *others}) == 3
    monkeypatch.delenv(trt_build.CACHE_VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trt_build.timing_cache("1", "T4").parent == tmp_path / ".cache" / "bitnet-export"


def test_engine_of_a_target_without_one_is_refused(tmp_path):
    manifest.write_manifest(manifest.Manifest(name="m", target="ort"), tmp_path)
    with pytest.raises(InputError, match="has no engine"):
        trt_engine.finish(tmp_path)


@pytest.mark.parametrize(("parsed", "engine"), [(0, 0), (1, 0), (1, 2)])
def test_every_node_has_to_be_a_plugin_layer(model, parsed, engine):
    built = Built("10.14.1", 1, parsed_plugin_layers=parsed, plugin_layers=engine)
    with pytest.raises(StageError, match="1 TernaryMatMul nodes"):
        trt_engine.check_plugin_layers(model, built)
    good = replace(built, parsed_plugin_layers=1, plugin_layers=1)
    trt_engine.check_plugin_layers(model, good)


def test_plugin_layers_are_counted_in_the_inspectors_output():
    """Stands for IEngineInspector's JSON at detailed verbosity; names alone are no evidence."""
    layers = [
        {"Name": "TernaryMatMul_1", "LayerType": "PluginV3"},
        {"Name": "TernaryMatMul_2", "LayerType": "gemm"},
        "TernaryMatMul_3",
    ]
    assert count_plugin_layers(layers) == 1


class TestEnvironment:
    """The manifest's facts against a machine; nothing is loaded, so none is needed."""

    def test_the_same_machine_passes(self, tmp_path):
        check_environment(trt_record(), manifest.ENGINE, T4, tmp_path)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"version": "10.13.0"}, "TensorRT 10.14.1, here 10.13.0"),
            ({"cuda": "13.0"}, "CUDA 12, here 13"),
            ({"gpu": "NVIDIA GeForce GTX 1660"}, "GPU Tesla T4, here NVIDIA GeForce GTX 1660"),
            ({"compute_capability": "8.6"}, "compute capability 7.5, here 8.6"),
        ],
        ids=lambda v: v if isinstance(v, str) else "",
    )
    def test_what_differs_is_named(self, tmp_path, changed, said):
        with pytest.raises(MissingRequirement, match="for another machine") as error:
            check_environment(trt_record(), manifest.ENGINE, replace(T4, **changed), tmp_path)
        assert said in str(error.value)
        assert "build_engine.sh" in error.value.fix
        others = str(error.value).count(", here ")
        assert others == 1  # and nothing else

    def test_no_tensorrt(self, tmp_path):
        with pytest.raises(MissingRequirement, match=r"TensorRT 10\.14\.1 is needed"):
            check_environment(trt_record(), manifest.ENGINE, replace(T4, version=None), tmp_path)

    def test_another_plugin(self, tmp_path):
        record = trt_record()
        record.environment["plugin"] = {"file": "p.so", "sha256": "0" * 64}
        (tmp_path / "p.so").write_bytes(b"other")
        with pytest.raises(MissingRequirement, match=r"plugin p\.so 000000000000, here "):
            check_environment(record, manifest.ENGINE, T4, tmp_path)
        record.environment["engines"][manifest.ENGINE]["embedded_plugin"] = True
        check_environment(record, manifest.ENGINE, T4, tmp_path)

    def test_rtx_engines_are_chosen_by_card(self, tmp_path):
        engines = {
            "model-sm75.engine": {"runtime": "tensorrt_rtx", "compute_capabilities": [[7, 5]]},
            "model-sm86.engine": {"runtime": "tensorrt_rtx", "compute_capabilities": [[8, 6]]},
        }
        ampere = Machine("1.7", "12.9", "RTX 3060", "8.6")
        assert choose_engine(engines, ampere, tmp_path) == "model-sm86.engine"
        hopper = Machine("1.7", "12.9", "H100", "9.0")
        with pytest.raises(MissingRequirement, match=r"7\.5, 8\.6, this GPU \(H100\) has 9\.0"):
            choose_engine(engines, hopper, tmp_path)
        portable = {"model.engine": {"runtime": "tensorrt_rtx", "compute_capabilities": []}}
        assert choose_engine(portable, hopper, tmp_path) == "model.engine"
        with pytest.raises(MissingRequirement, match=r"has 7\.5"):
            choose_engine(portable, T4, tmp_path)


def test_a_directory_without_an_engine_says_what_to_run(tmp_path):
    manifest.write_manifest(manifest.Manifest(name="m", target="trt"), tmp_path)
    with pytest.raises(MissingRequirement, match="holds no engine yet") as error:
        load_session(tmp_path)
    assert "build_engine.sh" in error.value.fix


@pytest.mark.parametrize("target", ["onnx", "ort"])
@pytest.mark.parametrize(
    ("option", "value"),
    [("embed_plugin", True), ("compute_capabilities", ("7.5",)), ("portable_engine", True)],
)
def test_engine_options_of_other_targets_are_refused(target, option, value):
    with pytest.raises(UsageError, match="has no use for it"):
        target_for(target).check_options(ExportOptions(model="m", **{option: value}))


@pytest.mark.parametrize("target", ["onnx", "trt", "trt-rtx"])
@pytest.mark.parametrize("changed", [{"ort_kernel": "int8"}, {"activation_scale": "tensor"}])
def test_options_of_stock_operators_are_refused_elsewhere(target, changed):
    with pytest.raises(UsageError, match="has no use for it"):
        target_for(target).check_options(ExportOptions(model="m", **changed))
    target_for("ort").check_options(ExportOptions(model="m", **changed))
