"""Timing: interleaved, complete, within its budget, and telling slow from fast."""

import time

import numpy as np
import pytest

from bitnet_export.errors import InputError, MissingRequirement
from bitnet_export.verify import speed
from bitnet_export.verify.feeds import Case, make_cases
from bitnet_export.verify.memory import measure_memory
from tests.verify import models


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr(speed, "WARM_UP_SECONDS", 0.02)
    monkeypatch.setattr(speed, "SETTLE_SECONDS", 0.0)


def test_two_models_on_two_shapes(tmp_path):
    paths = [models.write(tmp_path / f"{f}.onnx", f) for f in ("float", "nbits")]
    example = models.example()
    cases = make_cases([{"batch": 1}, {"batch": 5}], example, models.AXES)
    seen = []
    rows = speed.measure_speed(*paths, cases, threads=1, samples=20, on_case=seen.append)
    assert [row.shape for row in rows] == seen == ["batch=1", "batch=5"]
    for row in rows:
        assert len(row.samples_ms) == len(row.baseline_samples_ms) == 20
        assert row.ms == pytest.approx(np.median(row.samples_ms), abs=1e-5)
        assert row.ratio == row.baseline_ms / row.ms
        assert min(row.samples_ms) <= row.ms <= row.p90_ms <= row.p99_ms <= max(row.samples_ms)
        assert row.baseline == "fp32 ONNX"
        assert row.provider == "CPUExecutionProvider"
        assert row.threads == 1
        assert row.memory_bytes is None


def test_slow_is_told_from_fast_and_order_is_shuffled():
    calls = []

    def run(name, seconds):
        calls.append(name)
        time.sleep(seconds)

    runs = [lambda: run("slow", 0.004), lambda: run("fast", 0.001)]
    slow, fast = speed.time_interleaved(runs, samples=20, budget_s=5, seed=1)
    assert len(slow) == len(fast) == 20
    assert np.median(slow) > 1.5 * np.median(fast)
    rounds = [tuple(calls[i : i + 2]) for i in range(len(calls) - 40, len(calls), 2)]
    assert {*rounds} == {("slow", "fast"), ("fast", "slow")}


def test_budget_ends_early_but_not_below_the_minimum():
    started = time.perf_counter()
    taken = speed.time_interleaved([lambda: time.sleep(0.01)], samples=10_000, budget_s=0.2)
    assert speed.MIN_SAMPLES <= len(taken[0]) < 100
    assert time.perf_counter() - started < 30  # 10,000 samples would take 100 s
    taken = speed.time_interleaved([lambda: time.sleep(0.01)], samples=50, budget_s=0.0)
    assert len(taken[0]) == speed.MIN_SAMPLES


def test_refuses_nothing_and_absent_provider(tmp_path):
    path = models.write(tmp_path / "m.onnx", "float")
    with pytest.raises(InputError, match="nothing to time"):
        speed.measure_speed(path, path, [])
    case = Case("batch=2", models.example())
    with pytest.raises(MissingRequirement):
        speed.measure_speed(path, path, [case], provider="CUDAExecutionProvider")


def test_a_baseline_with_other_inputs_is_refused(tmp_path):
    path = models.write(tmp_path / "float.onnx", "float")
    with pytest.raises(InputError, match="which the other model has no input for"):
        speed.measure_speed(path, path, [Case("batch=1", {"other": np.zeros(1)})], threads=1)


def test_memory_of_a_fresh_process(tmp_path):
    path = models.write(tmp_path / "m.onnx", "float")
    used = measure_memory(path, models.example(), 1)
    assert used is None or 0 < used < 500_000_000
    (tmp_path / "torn.onnx").write_bytes(b"torn")
    assert measure_memory(tmp_path / "torn.onnx", models.example(), 1) is None
