"""Target trt-rtx: wrong options and models are refused, the real builder's refusals become ours."""

from __future__ import annotations

import pytest

from bitnet_export import onnx_io
from bitnet_export.errors import MissingRequirement, StageError, UsageError
from bitnet_export.options import ExportOptions
from bitnet_export.pipeline import run_export
from bitnet_export.targets import target_for, trt_rtx
from bitnet_export.targets.trt_build import Request, build_engine
from tests.passes.graphs import ternary_case
from tests.targets.trt_support import Recorded, digits, job_for, lowered_for_rtx, require_rtx


@pytest.fixture(scope="module", autouse=True)
def rtx():
    require_rtx()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"compute_capabilities": ("9.0",)}, "choose from 7.5, 8.0, 8.6"),
        ({"compute_capabilities": ("75",)}, "--compute-capability 75"),
        ({"triton": "repository"}, "does not load engines of TensorRT-RTX"),
        ({"embed_plugin": True}, "--embed-plugin: --target trt-rtx has no use for it"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_any_work(changed, said):
    with pytest.raises(UsageError) as error:
        target_for("trt-rtx").check_options(ExportOptions(model="m", **changed))
    assert said in str(error.value)


def test_a_wrong_profile_is_refused_before_any_work(tmp_path):
    from bitnet_export.load import save

    path = save(digits()[0], tmp_path / "digits.pt", *digits()[1:])
    options = ExportOptions(
        model=path,
        target="trt-rtx",
        output=tmp_path / "out",
        min_shapes=("input:4x64",),
        max_shapes=("input:2x64",),
    )
    stages = []
    progress = Recorded()
    progress.stage = lambda name, detail="": stages.append(name)
    with pytest.raises(UsageError, match="axis batch is at least 4 and at most 2"):
        run_export(options, progress)
    assert stages == ["load"]
    assert not (tmp_path / "out").exists()


class TestRefusals:
    """What the real builder refuses becomes our error, and no process dies of it."""

    def request(self, folder, model, capability=(8, 6), k=128):
        onnx_io.write_model(model, folder / "model.onnx")
        profile = {"x": {"min": [1, k], "opt": [1, k], "max": [8, k]}}
        path = folder / "model.onnx"
        return Request("tensorrt_rtx", path, folder / "e.engine", profile, (capability,))

    def test_int4_for_turing(self, tmp_path):
        model = lowered_for_rtx(ternary_case(128, 64))
        with pytest.raises(StageError, match="int4") as error:
            build_engine(self.request(tmp_path, model, (7, 5)))
        assert "8.6 or newer for int4" in error.value.fix
        assert not (tmp_path / "e.engine").exists()

    def test_truncated_model(self, tmp_path):
        request = self.request(tmp_path, lowered_for_rtx(ternary_case(128, 64)))
        data = request.onnx.read_bytes()
        request.onnx.write_bytes(data[: len(data) // 2])
        with pytest.raises(StageError, match=r"model\.onnx: TensorRT-RTX built no engine") as error:
            build_engine(request)
        assert "parse" in str(error.value)

    def test_a_profile_that_is_not_in_order(self, tmp_path):
        request = self.request(tmp_path, lowered_for_rtx(ternary_case(128, 64)))
        request.profile["x"]["opt"] = [9, 128]
        with pytest.raises(StageError, match="MIN<=OPT<=MAX") as error:
            build_engine(request)
        assert "--max-shape" in error.value.fix

    def test_a_profile_of_another_shape(self, tmp_path):
        request = self.request(tmp_path, lowered_for_rtx(ternary_case(128, 64)), k=256)
        with pytest.raises(StageError, match="built no engine"):
            build_engine(request)

    def test_an_operator_it_does_not_know(self, tmp_path):
        model = lowered_for_rtx(ternary_case(128, 64))
        model.graph.node[0].op_type = "NoSuchOperator"
        with pytest.raises(StageError, match="NoSuchOperator"):
            build_engine(self.request(tmp_path, model))

    def test_a_builder_that_ends_its_process(self, tmp_path, monkeypatch):
        """TensorRT-RTX calls terminate() where a plugin is in a network; a signal stands for it."""
        from bitnet_export.targets import trt_build

        killer = (
            "import os, sys; print('[E] its last words', file=sys.stderr); os.kill(os.getpid(), 6)"
        )
        run = trt_build._run

        def run_killer(command, log, progress):
            return run([command[0], "-c", killer], log, progress)

        monkeypatch.setattr(trt_build, "_run", run_killer)
        with pytest.raises(StageError, match="ended its process with SIGABRT") as error:
            build_engine(self.request(tmp_path, lowered_for_rtx(ternary_case(128, 64))))
        assert "its last words" in str(error.value)


def test_missing_wheel_keeps_the_files(tmp_path, monkeypatch):
    from bitnet_export.targets import trt_build

    monkeypatch.setattr(trt_build, "find_spec", lambda name: None)
    job = job_for(tmp_path, lowered_for_rtx(ternary_case(128, 64)))
    with pytest.raises(MissingRequirement, match="TensorRT-RTX is not installed"):
        trt_rtx.TrtRtxTarget().build(job)
    assert (tmp_path / "build_engine.sh").is_file()
    assert "plans" in job.environment
