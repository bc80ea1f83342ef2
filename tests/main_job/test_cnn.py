"""The main job on convolutions: which run as TernaryMatMul, which as Conv, and what is written."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from bitnet_export import op
from bitnet_export.finetune_run import run_finetune
from bitnet_export.load import save
from bitnet_export.options import FinetuneOptions
from bitnet_export.passes.pack_convolutions import channel_trits
from tests.main_job.checks import check_report, check_session, only_stock_operators, operators

METRIC = "tests.main_job.models:accuracy"
# The digits CNN's convolutions: 1 -> 32, 32 -> 64, 64 -> 64, 64 -> 64, 64 -> 128 channels.
KERNELS = {0: "3x3", 3: "3x3", 6: "1x1", 9: "3x3", 12: "1x1"}
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_each_convolution_says_how_it_runs(export, digit_files, target, tmp_path):
    report, directory = export(
        digit_files["cnn"], target, metric=METRIC, metric_data=digit_files["data"], bench=False
    )
    check_report(report, directory, speed=False)
    assert report.quality.baseline > 0.85
    rows = {row.name: row for row in report.layers}
    assert rows["features.0"].reason == "reads 1 channel, below min_k=16: few weights to save"
    for i in (3, 9):
        row = rows[f"features.{i}"]
        assert row.status == "ternary"
        assert row.reason.startswith("ternary weights")
        assert row.reason.endswith("runs as floating point Conv: kernel 3x3")
        assert 0.2 < row.sparsity < 0.7
    for i in (6, 12):
        assert rows[f"features.{i}"].reason == "twn, channel scale"
        assert rows[f"features.{i}"].inputs == 64
    found = operators(directory)
    assert found["", "Conv"] == 3
    assert found["", "BatchNormalization"] == 0
    if target == "ort":
        assert found["com.microsoft", "MatMulIntegerToFloat"] == 2
        assert only_stock_operators(directory)
    else:
        assert found[op.DOMAIN, op.OP_TYPE] == 2
    # 2 bits a weight, and the first convolution and the head in float32.
    assert report.size.by_part["linear"].bits_per_weight < 4
    check_session(directory, tmp_path, {"batch": 3})


def test_fine_tuning_trains_them_and_export_keeps_the_trits(export, digit_files, tmp_path):
    tuned = run_finetune(
        FinetuneOptions(
            model=digit_files["cnn"],
            data=digit_files["train"],
            output=tmp_path / "tuned.pt",
            steps=100,
            threads=1,
        )
    )
    report, directory = export(tuned, metric=METRIC, metric_data=digit_files["data"], bench=False)
    check_report(report, directory, speed=False)
    ternary = [row for row in report.layers if row.status == "ternary"]
    assert len(ternary) == 4
    assert all("already ternary" in row.reason for row in ternary)
    assert report.quality.value > report.quality.baseline - 0.03


@pytest.mark.parametrize("target", ["trt", "trt-rtx"])
def test_tensorrt_gets_dense_kernels_it_can_read(export, digit_files, target):
    _, directory = export(digit_files["cnn"], target, bench=False, engine=False)
    model = onnx.load(directory / "model.onnx")
    found = {node.op_type for node in model.graph.node}
    assert "BitShift" not in found
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    convs = [n for n in model.graph.node if n.op_type == "Conv"]
    ternary = [channel_trits(constants[n.input[1]]) is not None for n in convs]
    assert ternary == [False, True, True]


def test_float16_kernels_are_packed_too(export, digit_files):
    report, directory = export(digit_files["cnn"], "onnx", dtype="fp16", bench=False)
    check_report(report, directory, speed=False)
    assert operators(directory)["", "BitShift"] == 2
    assert np.isfinite(report.quality.value)


def test_a_model_with_no_matrix_product_at_all(export, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3)).eval()
    image = {"image": torch.randn(2, 16, 8, 8)}

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, image):
            return self.body(image)

    path = save(Net().eval(), tmp_path / "net.pt", image, {"image": {0: "batch"}})
    report, directory = export(path, bench=False, per_layer=True)
    assert report.verdict == "pass"
    assert operators(directory)["", "BitShift"] == 2
    assert report.size.by_part["linear"].bits_per_weight < 3
    assert {d.name: d.choice for d in report.decisions}["ort_kernel"] == "none"
