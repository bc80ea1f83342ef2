"""The machine's description: right where it can be checked, quiet where things are missing."""

import os
import platform

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


def test_gpus_are_read(monkeypatch):
    env.gpus.cache_clear()
    line = "Tesla T4, 7.5, 15360 MiB, 550.54"
    monkeypatch.setattr(env, "_output", lambda *command: f"{line}\n{line}\n")
    assert [gpu["compute_capability"] for gpu in env.gpus()] == ["7.5", "7.5"]
    env.gpus.cache_clear()
    monkeypatch.setattr(env, "_output", lambda *command: "")
    assert env.gpus() == ()
    env.gpus.cache_clear()


def test_hanging_and_failing_probes_are_empty():
    assert env._output("false") == ""
    assert env._output("no-such-tool") == ""
