"""doctor: every missing thing comes with a command; a bare machine is described, not crashed on."""

import json

import pytest

from bitnet_export import env
from bitnet_export.cli import doctor_checks
from tests.cli.conftest import run


def test_text():
    done = run("doctor")
    assert done.returncode == 0, done.stderr
    for heading in ("Packages", "ONNX Runtime", "Processor", "GPU", "TensorRT", "Compilers"):
        assert f"\n{heading}" in f"\n{done.stdout}"


def test_json():
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert found["environment"]["cores"] >= 1
    names = {check["name"] for check in found["checks"]}
    assert {"torch", "onnxruntime", "instruction sets", "cmake", "NVIDIA GPU"} - names <= {
        "NVIDIA GPU"
    }
    for check in found["checks"]:
        assert check["status"] in ("ok", "limited", "absent", "missing")


def test_bare_machine(monkeypatch):
    monkeypatch.setattr(env, "version", lambda package: None)
    monkeypatch.setattr(env, "gpus", lambda: ())
    monkeypatch.setattr(env, "nvcc_version", lambda: None)
    monkeypatch.setattr(env, "tool_version", lambda tool, *a: None)
    monkeypatch.setattr(env, "cpu_flags", lambda: None)
    monkeypatch.setattr(env, "memory_bytes", lambda: None)
    monkeypatch.setattr(env, "ort_providers", lambda: [])
    checks = {check.name: check for check in doctor_checks.run_checks()}
    assert checks["torch"].status == "missing"
    assert checks["torch"].fix == "pip install 'torch>=2.9'"
    assert checks["onnxruntime"].fix == "pip install 'bitnet-export[ort]'"
    for name in ("C++ compiler", "cmake", "tensorrt", "CUDA compiler (nvcc)"):
        assert checks[name].status == "absent"
        assert checks[name].fix


def test_old_versions(monkeypatch):
    old = {"onnxruntime": "1.24.0", "torch": "2.4.1+cu121", "tensorrt": "8.6"}
    monkeypatch.setattr(env, "version", old.get)
    checks = {check.name: check for check in doctor_checks.run_checks()}
    assert checks["onnxruntime"].status == "limited"
    assert "2-bit" in checks["onnxruntime"].detail
    assert checks["torch"].detail == "2.4.1+cu121, needs 2.9"
    assert checks["tensorrt"].status == "limited"


def test_gpu(monkeypatch):
    gpu = {"name": "T4", "compute_capability": "7.5", "memory": "15 GB", "driver": "550"}
    monkeypatch.setattr(
        env, "gpus", lambda: (gpu, {**gpu, "name": "P4", "compute_capability": "6.1"})
    )
    monkeypatch.setattr(env, "ort_providers", lambda: ["CPUExecutionProvider"])
    checks = {check.name: check for check in doctor_checks.run_checks()}
    assert checks["T4"].status == "ok"
    assert checks["P4"].status == "limited"
    assert "ort-gpu" in checks["CUDA provider"].fix


class TestPlugin:
    """Which plugin library would be loaded, from where, and why; none is loaded for that."""

    VARIABLE = "BITNET_EXPORT_TENSORRT_PLUGIN"

    def check(self, monkeypatch, path, version):
        if version is not None:
            info = f"@(#)bitnet-export library=tensorrt_plugin version={version} cuda=13.0;"
            path.write_bytes(b"\x7fELF" + info.encode())
        monkeypatch.setenv(self.VARIABLE, str(path))
        return next(c for c in doctor_checks.run_checks() if c.name == "tensorrt_plugin")

    def test_the_one_that_would_be_loaded_is_named(self, monkeypatch, tmp_path):
        path = tmp_path / "p.so"
        found = self.check(monkeypatch, path, env.version("bitnet-export"))
        assert found.status == "ok"
        assert found.detail.startswith(f"{path} (variable {self.VARIABLE}: version ")

    def test_one_of_another_version_is_said_not_to_be_used(self, monkeypatch, tmp_path):
        found = self.check(monkeypatch, tmp_path / "p.so", "0.0.1")
        assert found.status == "limited"
        assert "version 0.0.1 is not used by this one" in found.detail
        assert "matching wheel" in found.fix

    def test_a_wrong_path_is_said(self, monkeypatch, tmp_path):
        found = self.check(monkeypatch, tmp_path / "none.so", None)
        assert found.status == "absent"
        assert f"no file {tmp_path / 'none.so'}" in found.detail
        assert found.fix == f"correct or unset {self.VARIABLE}"


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (("avx512_vnni", "avx2"), "ok"),
        (("avx2",), "limited"),
        (("asimddp", "asimd"), "ok"),
        ((), "limited"),
    ],
)
def test_instruction_sets(monkeypatch, flags, status):
    monkeypatch.setattr(env, "cpu_flags", lambda: flags)
    checks = {check.name: check for check in doctor_checks.run_checks()}
    assert checks["instruction sets"].status == status


@pytest.mark.parametrize(
    ("found", "minimum", "good"),
    [
        ("2.13.0+cpu", "2.9", True),
        ("1.9", "1.28", False),
        ("0.6.1", "0.6.1", True),
        ("2", "2.0.1", False),
    ],
)
def test_versions_compare_as_numbers(found, minimum, good):
    assert doctor_checks.at_least(found, minimum) is good
