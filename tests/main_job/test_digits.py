"""The main job on classifiers of scikit-learn's digits, judged by accuracy through --metric."""

import numpy as np
import pytest

from bitnet_export import op
from bitnet_export.finetune_run import run_finetune
from bitnet_export.options import FinetuneOptions
from bitnet_export.targets import load_session
from tests.main_job import models
from tests.main_job.checks import (
    check_again,
    check_report,
    check_session,
    only_stock_operators,
    operators,
)

METRIC = "tests.main_job.models:accuracy"
pytestmark = pytest.mark.slow


@pytest.fixture(params=["mlp", "vit"])
def model(request, digit_files):
    return digit_files[request.param]


@pytest.fixture(params=["ort", "onnx"])
def target(request):
    return request.param


def test_directory_and_report(export, model, target, digit_files):
    report, directory = export(model, target, metric=METRIC, metric_data=digit_files["data"])
    check_report(report, directory)
    assert report.quality.metric == METRIC
    assert report.quality.samples == 397
    assert report.quality.baseline > 0.85
    assert report.quality.value > 0.7  # without training; test_fine_tuning gets it back
    assert any("ternarized without training" in w for w in report.warnings)
    # 64 to 128 wide: the graph itself and the head weigh more than the ternary layers.
    assert report.size.ratio > 2
    assert report.size.by_part["linear"].bits_per_weight < 8
    kept = {row.name: row.reason for row in report.layers if row.status == "kept"}
    assert any("head" in reason for reason in kept.values())
    assert only_stock_operators(directory) == (target == "ort")


def test_session_is_the_model_that_was_judged(export, model, target, digit_files, tmp_path):
    report, directory = export(model, target, metric=METRIC, metric_data=digit_files["data"])
    check_session(directory, tmp_path, {"batch": 3})
    data = models.digits()
    session = load_session(directory, threads=1)
    (logits,) = session.run(None, {"image": data["test_x"]})
    right = float((logits.argmax(-1) == data["test_y"]).mean())
    # The report counts in batches of 32; a whole-file batch may flip a tie.
    assert right == pytest.approx(report.quality.value, abs=0.006)


def test_again(export, model, digit_files):
    _, directory = export(model, "ort", metric=METRIC, metric_data=digit_files["data"])
    check_again(directory)


def test_kernels(export, digit_files):
    auto, _ = export(digit_files["vit"], metric=METRIC, metric_data=digit_files["data"])
    (decision,) = [d for d in auto.decisions if d.name == "ort_kernel"]
    assert decision.choice == "int8"
    assert "16 rows" in decision.reason  # 16 patches of one image
    auto, _ = export(digit_files["mlp"], metric=METRIC, metric_data=digit_files["data"])
    (decision,) = [d for d in auto.decisions if d.name == "ort_kernel"]
    assert decision.choice == "2bit"
    assert "1 row(s)" in decision.reason


@pytest.mark.parametrize("kernel", ["2bit", "int8"])
def test_either_kernel_on_request(export, digit_files, kernel):
    report, directory = export(digit_files["vit"], ort_kernel=kernel, bench=False)
    check_report(report, directory, speed=False)
    wanted = {"2bit": "MatMulNBits", "int8": "MatMulIntegerToFloat"}[kernel]
    # q, k and v are one product, so 4 of the block's 6 layers; the patch layer has K=4.
    assert operators(directory)["com.microsoft", wanted] == 4


def test_group_scales_and_per_layer(export, digit_files):
    from bitnet_export.options import TernaryOptions

    report, directory = export(
        digit_files["vit"],
        ternary=TernaryOptions(granularity="group", group_size=32),
        ort_kernel="int8",
        per_layer=True,
        bench=False,
    )
    check_report(report, directory, speed=False)
    assert operators(directory)["com.microsoft", "MatMulNBits"] == 4
    errors = [r.relative_error for r in report.layers if r.status == "ternary"]
    assert all(e is not None and e < 0.1 for e in errors)


def test_fine_tuning(export, digit_files, tmp_path):
    tuned = run_finetune(
        FinetuneOptions(
            model=digit_files["mlp"],
            data=digit_files["train"],
            output=tmp_path / "tuned.pt",
            steps=150,
            threads=1,
        )
    )
    report, directory = export(tuned, "ort", metric=METRIC, metric_data=digit_files["data"])
    check_report(report, directory)
    assert report.finetune.steps == 150
    assert report.quality.value > report.quality.baseline - 0.03
    assert all("already ternary" in row.reason for row in report.layers if row.status == "ternary")
    assert not any("without training" in w for w in report.warnings)


def test_float16(export, digit_files):
    report, directory = export(digit_files["vit"], "onnx", dtype="fp16", bench=False)
    check_report(report, directory, speed=False)
    import onnx

    model = onnx.load(directory / "model.onnx")
    halves = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]
    assert halves
    assert operators(directory)[op.DOMAIN, op.OP_TYPE] == 4
    assert np.isfinite(report.quality.value)
