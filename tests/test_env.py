"""The machine's description: right where it can be checked, quiet where things are missing."""

import os
import platform
import shutil
import subprocess

import pytest
import torch

from bitnet_export import env


def test_versions():
    assert env.version("torch") == torch.__version__
    assert env.version("no-such-package-at-all") is None
    assert env.package_versions()["torch"] == torch.__version__


def test_describe_fills_the_reports_environment():
    from bitnet_export.report.schema import Environment

    found = Environment(**env.describe())
    assert found.python == platform.python_version()
    assert found.cores == env.usable_cores() == len(os.sched_getaffinity(0))
    assert "CPUExecutionProvider" in found.providers
    assert found.cpu


def test_memory_is_plausible():
    assert env.memory_bytes() > 2**28


def test_cpu_flags_without_proc(monkeypatch):
    monkeypatch.setattr(env, "_cpuinfo", lambda: {})
    assert env.cpu_flags() is None
    assert env.cpu_model()
    monkeypatch.setattr(env, "_cpuinfo", lambda: {"flags": "fpu avx2 avx512_vnni"})
    assert env.cpu_flags() == ("avx512_vnni", "avx2")
    monkeypatch.setattr(env, "_cpuinfo", lambda: {"Features": "asimd asimddp"})
    assert env.cpu_flags() == ("asimddp", "asimd")


def test_missing_tools_are_none():
    assert env.tool_version("no-such-tool") is None
    assert env.shared_library("no_such_library_anywhere") is None


GPUS = """\
GeForce GTX 1660, 7.5, 6144 MiB, 550.54, 00000000:01:00.0
NVIDIA GeForce RTX 3090, 8.6, 24576 MiB, 550.54, 00000000:41:00.0
"""


@pytest.fixture
def nvidia_smi(monkeypatch):
    """Sets what nvidia-smi prints."""

    def prints(text: str) -> None:
        env.gpus.cache_clear()
        monkeypatch.setattr(env, "_output", lambda *command: text)

    yield prints
    env.gpus.cache_clear()


def test_gpus_are_read(nvidia_smi):
    nvidia_smi(GPUS)
    assert [gpu["compute_capability"] for gpu in env.gpus()] == ["7.5", "8.6"]
    assert set(env.gpus()[0]) == {"name", "compute_capability", "memory", "driver"}
    nvidia_smi("")
    assert env.gpus() == ()


def test_the_gpu_that_cuda_uses_comes_first(nvidia_smi, monkeypatch):
    for cuda, names in [
        (["0000:41:00.0", "0000:01:00.0"], ["RTX 3090", "GTX 1660"]),
        (["0000:01:00.0"], ["GTX 1660", "RTX 3090"]),
        (["0000:41:00.0"], ["RTX 3090", "GTX 1660"]),
        (["?"], ["GTX 1660", "RTX 3090"]),
    ]:
        monkeypatch.setattr(env, "cuda_bus_ids", lambda found=cuda: found)
        nvidia_smi(GPUS)
        assert [gpu["name"][-len(n) :] for gpu, n in zip(env.gpus(), names, strict=True)] == names


DRIVER = """
#include <stdio.h>
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int* count) { *count = 2; return 0; }
int cuDeviceGet(int* device, int i) { *device = 7 - i; return i > 1; }
int cuDeviceGetPCIBusId(char* text, int size, int device) {
  return snprintf(text, size, "0000:%02x:00.0", device) < 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_driver_is_asked(tmp_path):
    (tmp_path / "driver.c").write_text(DRIVER)
    for status in (0, 100):
        library = tmp_path / f"driver{status}.so"
        command = ["gcc", "-shared", "-fPIC", f"-DSTATUS={status}", "-o", library, "driver.c"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = ["0000:07:00.0", "0000:06:00.0"] if status == 0 else []
        assert env.cuda_bus_ids(str(library)) == found
    assert env.cuda_bus_ids("no-such-library.so") == []


def test_hanging_and_failing_probes_are_empty():
    assert env._output("false") == ""
    assert env._output("no-such-tool") == ""
