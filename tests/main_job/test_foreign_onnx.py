"""The main job on ONNX files this package did not make: dense, ternary, and a mixture."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitnet_export import op, packing
from bitnet_export.errors import InputError
from bitnet_export.options import ExportOptions
from bitnet_export.pipeline import run_export
from bitnet_export.targets import load_session
from tests.main_job import models
from tests.main_job.checks import check_again, check_report, check_session, only_stock_operators

pytestmark = pytest.mark.slow
KINDS = {"dense": (), "ternary": (0, 1, 2), "mixed": (1,)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign")
    return {k: models.foreign_mlp(folder / f"{k}.onnx", v) for k, v in KINDS.items()}


@pytest.fixture(params=["ort", "onnx"])
def target(request):
    return request.param


def rows_of(report):
    return {row.name: (row.status, row.reason) for row in report.layers}


EXACT = ("ternary", "already ternary (channel scale), kept exactly")
MADE = ("ternary", "twn, channel scale")
HEAD = ("kept", "output head: no other layer reads an input of its width")


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("dense", {"dense_0": MADE, "dense_1": MADE, "dense_2": HEAD}),
        ("ternary", {"dense_0": EXACT, "dense_1": EXACT, "dense_2": EXACT}),
        ("mixed", {"dense_0": MADE, "dense_1": EXACT, "dense_2": HEAD}),
    ],
)
def test_main_job(export, files, tmp_path, kind, rows, target):
    report, directory = export(files[kind], target)
    check_report(report, directory)
    assert rows_of(report) == rows
    assert only_stock_operators(directory) == (target == "ort")
    assert any("without training" in w for w in report.warnings) == (kind != "ternary")
    check_session(directory, tmp_path, {"batch": 5})


def test_trits_and_scales_are_kept_to_the_bit(export, files):
    _, directory = export(files["ternary"], "onnx")
    model = onnx.load(directory / "model.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    want = models.foreign_weights((0, 1, 2))
    found = [n for n in model.graph.node if n.op_type == op.OP_TYPE]
    for i, node in enumerate(found):
        packed, scale, bias = (constants[name] for name in node.input[1:])
        trits = packing.unpack(packed, want[f"w{i}"].shape[0])
        assert np.array_equal((trits * scale[:, None]).T, want[f"w{i}"])
        assert np.array_equal(bias, want[f"b{i}"])


def test_a_ternary_model_answers_as_before(export, files):
    report, directory = export(files["ternary"], "ort")
    assert report.quality.value > 0.9  # top-1 of random logits
    x = np.random.default_rng(5).standard_normal((7, 64)).astype(np.float32)
    weights = models.foreign_weights((0, 1, 2))
    h = x
    for i in range(3):
        h = (h if i == 0 else np.maximum(h, 0)) @ weights[f"w{i}"] + weights[f"b{i}"]
    want = np.exp(h - h.max(-1, keepdims=True))
    want /= want.sum(-1, keepdims=True)
    (got,) = load_session(directory, threads=1).run(None, {"x": x})
    np.testing.assert_allclose(got, want, atol=0.05)  # int8 activations, three layers, softmax


def test_again(export, files):
    _, directory = export(files["mixed"], "ort")
    check_again(directory)


def test_passes_can_be_left_out(export, files):
    report, directory = export(
        files["mixed"], "ort", skip_passes=("ternarize-dense", "merge-siblings"), bench=False
    )
    check_report(report, directory, speed=False)
    assert rows_of(report)["dense_1"] == EXACT
    assert rows_of(report)["dense_0"] == ("kept", "weights are not ternary")
    notes = {p.name: p.notes for p in report.passes}
    assert notes["ternarize-dense"] == notes["merge-siblings"] == ["left out with --skip-pass"]


def test_nan_weights_leave_nothing_behind(files, tmp_path):
    model = onnx.load(files["dense"])
    (tensor,) = [t for t in model.graph.initializer if t.name == "w1"]
    values = numpy_helper.to_array(tensor).copy()
    values[2, 3] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, "w1"))
    onnx.save_model(model, tmp_path / "nan.onnx")
    out = tmp_path / "made" / "out"
    with pytest.raises(InputError, match="w1 holds NaN values"):
        run_export(ExportOptions(model=tmp_path / "nan.onnx", output=out, threads=1))
    assert [p.name for p in tmp_path.iterdir()] == ["nan.onnx"]


def test_nothing_to_make_ternary_is_said(files, tmp_path):
    with pytest.raises(InputError, match="no layer became ternary"):
        run_export(
            ExportOptions(
                model=files["dense"],
                output=tmp_path / "out",
                skip_passes=("ternarize-dense",),
                threads=1,
            )
        )
    assert not list(tmp_path.iterdir())
