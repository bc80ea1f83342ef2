"""Calibration, sensitivity and --keep-budget through a whole export, as a user would run it."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bitnet_export as be
from bitnet_export import post_training
from bitnet_export.errors import UsageError
from bitnet_export.options import ExportOptions, FinetuneOptions
from bitnet_export.ternary.recipes import RECIPES

WIDTH, BUDGET = 64, 0.06


class Loud(nn.Module):
    """Residual blocks; block 1 is the one that matters."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x):
        for gain, block in zip((0.3, 20.0, 0.3, 0.3), self.blocks, strict=True):
            x = x + gain * block(torch.tanh(x))
        return self.head(x)


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """export(**options) -> (report.json as it is, the directory), on 400 samples whose entries go
    together, as activations do; the same model every time."""
    home = tmp_path_factory.mktemp("loud")
    torch.manual_seed(0)
    x = torch.randn(400, 12) @ torch.randn(12, WIDTH) + 0.1 * torch.randn(400, WIDTH)
    model = be.save(Loud(), home / "loud.pt", {"x": x[:2]}, {"x": {0: "batch"}})
    np.savez(home / "data.npz", x=x.numpy())

    def run(**options):
        out = home / f"out-{len(list(home.iterdir()))}"
        be.run_export(
            ExportOptions(model=model, data=home / "data.npz", bench=False, output=out, **options)
        )
        return json.loads((out / "report.json").read_text()), out

    return run


@pytest.fixture(scope="module")
def plain(export):
    return export(sensitivity=True, calibration="none")


def linear_bytes(report):
    return report["size"]["by_part"]["linear"]["bytes"]


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_the_budget_keeps_the_sensitive_layer_at_int8(export, plain, target):
    report, out = export(target=target, calibration="none", keep_budget=BUDGET)
    assert report["verdict"] == "pass"
    status = {row["name"]: row["status"] for row in report["layers"]}
    assert [name for name, kind in status.items() if kind == "int8"] == ["blocks.1"]
    (choice,) = [d for d in report["decisions"] if d["name"] == "keep_budget"]
    assert "blocks.1" in choice["reason"]
    assert report["quality"]["value"] >= plain[0]["quality"]["value"]
    model = onnx.load(out / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}["blocks.1.weight_int8"]
    assert tuple(stored.dims) == (WIDTH, WIDTH)
    assert stored.data_type == onnx.TensorProto.INT8
    if target == "ort":
        grown = linear_bytes(report) - linear_bytes(plain[0])
        assert 0 < grown <= BUDGET * 4 * 4 * WIDTH * WIDTH


def test_sensitivity_is_in_the_report_and_drawn(plain):
    report, out = plain
    rows = {row["name"]: row for row in report["layers"]}
    errors = {name: row["sensitivity"] for name, row in rows.items() if row["sensitivity"]}
    assert max(errors, key=errors.get) == "blocks.1"
    assert rows["blocks.0"]["saved_bytes"] > 3 * WIDTH * WIDTH
    assert rows["head"]["sensitivity"] is None
    assert all(row["output_error"] is None for row in report["layers"])
    page = (out / "report.html").read_text()
    assert "Error and bytes saved by each layer alone, 4 layers" in page


def test_data_means_calibration_and_it_brings_the_output_closer(export, plain):
    report, _ = export()
    assert report["verdict"] == "pass"
    (choice,) = [d for d in report["decisions"] if d["name"] == "calibration"]
    assert choice["choice"] == "trits"
    assert report["quality"]["value"] > plain[0]["quality"]["value"]
    errors = [row for row in report["layers"] if row["output_error"] is not None]
    assert len(errors) == 4
    assert all(row["output_error"] <= row["plain_error"] for row in errors)


@pytest.mark.parametrize(
    ("options", "recipe", "expected"),
    [
        ({}, "encoder", False),
        ({"data": Path("data.npz")}, "encoder", True),
        ({"data": Path("data.npz")}, "embedding", False),
        ({"data": Path("data.npz"), "calibration": "scale"}, "embedding", True),
        ({"data": Path("data.npz"), "calibration": "none", "finetune_steps": 3}, "encoder", True),
        ({"data": Path("data.npz"), "finetune_steps": 3}, "encoder", False),
        ({"calibration": "scale"}, "encoder", True),
        ({"keep_budget": 0.02}, "encoder", True),
    ],
)
def test_when_there_is_something_to_do_or_to_say(options, recipe, expected):
    asked = ExportOptions(model=Path("m.pt"), **options)
    assert post_training.wanted(asked, RECIPES[recipe]) is expected


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"sensitivity": True}, "--sensitivity"),
        ({"keep_budget": 0.1}, "--keep-budget"),
        ({"calibration": "scale"}, "--calibration"),
        ({"finetune_steps": 3}, "--finetune-steps"),
    ],
)
def test_onnx_files_are_refused_with_the_reason(options, flag):
    with pytest.raises(UsageError, match=flag):
        post_training.refuse_onnx(ExportOptions(model=Path("m.onnx"), **options))
    post_training.refuse_onnx(ExportOptions(model=Path("m.onnx"), calibration="none"))


def test_a_budget_for_every_layer_is_refused(export):
    with pytest.raises(UsageError, match=r"--keep-budget: all 4 layers .*\n.* less than that"):
        export(calibration="none", keep_budget=0.9)


class OneByOne(nn.Module):
    """Takes one sample at a time."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x):
        return self.head(torch.relu(self.inner(x)).reshape(1, WIDTH))


class Recurrent(nn.Module):
    """A loop over the time axis, which a trace unrolls."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x):
        state = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            state = torch.tanh(self.step(x[:, t]) + state)
        return self.head(state)


def test_an_axis_that_comes_out_fixed_is_said_and_not_varied(tmp_path):
    torch.save(Recurrent().state_dict(), tmp_path / "m.pt")
    options = ExportOptions(
        model=tmp_path / "m.pt",
        factory="tests.main_job.test_post_training:Recurrent",
        input_specs=("x:batch,time,32",),
        target="onnx",
        output=tmp_path / "out",
        bench=False,
    )
    report = be.run_export(options)
    assert report.passed
    assert any("takes time = 16 only" in warning for warning in report.warnings)
    assert {row.shape for row in report.parity} == {"batch=1", "batch=3"}


def test_a_model_of_a_fixed_batch_gets_no_other(tmp_path):
    model = be.save(OneByOne(), tmp_path / "one.pt", {"x": torch.randn(1, WIDTH)})
    np.savez(tmp_path / "data.npz", x=torch.randn(20, WIDTH).numpy())
    common = {"model": model, "data": tmp_path / "data.npz", "bench": False}
    be.run_export(ExportOptions(**common, sensitivity=True, output=tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    decision = next(d for d in report["decisions"] if d["name"] == "calibration")
    assert decision["choice"] == "none"
    assert "batch is fixed at 1" in decision["reason"]
    assert report["quality"]["samples"] == 20
    training = {"model": model, "data": tmp_path / "data.npz", "steps": 1}
    with pytest.raises(UsageError, match=r"batch is fixed at 1; .* 32 samples.*\n.*--batch-size 1"):
        be.run_finetune(FinetuneOptions(**training, output=tmp_path / "t.pt"))
    be.run_finetune(FinetuneOptions(**training, batch_size=1, output=tmp_path / "t.pt"))
