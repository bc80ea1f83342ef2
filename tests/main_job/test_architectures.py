"""The main job on models with sequences: torch's own encoder and tiny random Hugging Face ones."""

import numpy as np
import pytest
import torch

from bitnet_export import op
from bitnet_export.load import save
from tests.main_job import models
from tests.main_job.checks import (
    check_again,
    check_report,
    check_session,
    feeds_for,
    only_stock_operators,
    operators,
)

pytestmark = pytest.mark.slow

# Ternary layers by default: the blocks' projections; BERT's pooler is one more. kept: a layer
# that stays, and a word of the reason.
EXPECTED = {
    "encoder": (8, "encoder.layers.0.norm1", "no linear layer"),
    "bert": (7, "model.embeddings.word_embeddings", "embedding"),
    "llama": (7, "model.lm_head", "excluded"),
    "bitnet": (7, "model.lm_head", "excluded"),
    "mixtral": (10, "model.lm_head", "excluded"),  # two a expert, which single tokens leave idle
}
HUGGING_FACE = ("bert", "llama", "bitnet", "mixtral", "tied-llama")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    encoder = save(
        models.Encoder().eval(),
        folder / "encoder.pt",
        {"x": torch.randn(2, 6, 32)},
        {"x": {0: "batch", 1: "sequence"}},
    )
    made = {k: models.huggingface(k, folder / k) for k in HUGGING_FACE}
    return made | {"encoder": encoder}


@pytest.fixture(params=["ort", "onnx"])
def target(request):
    return request.param


@pytest.mark.parametrize("name", EXPECTED)
def test_main_job(export, files, tmp_path, name, target):
    report, directory = export(files[name], target)
    check_report(report, directory)
    ternary, kept, why = EXPECTED[name]
    rows = {row.name: row for row in report.layers}
    assert sum(row.status == "ternary" for row in report.layers) == ternary
    assert rows[kept].status == "kept"
    assert why in rows[kept].reason
    assert only_stock_operators(directory) == (target == "ort")
    shapes = {row.shape for row in report.parity}
    assert any("batch=1," in shape for shape in shapes)
    assert any("batch=3," in shape for shape in shapes)
    check_session(directory, tmp_path, {"batch": 3, "sequence": 5})


def test_weights_that_are_ternary_stay_so(export, files):
    report, directory = export(files["bitnet"], "onnx")
    ternary = [row for row in report.layers if row.status == "ternary"]
    assert len(ternary) == 7
    assert all("already ternary" in row.reason for row in ternary)
    assert not any("without training" in w for w in report.warnings)
    # Only the activations are rounded: what BitNet itself does, so the answers hardly move.
    assert report.quality.value > 0.97
    assert operators(directory)[op.DOMAIN, op.OP_TYPE] == 4  # q k v, o, gate up, down


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_again(export, files, name):
    _, directory = export(files[name], "ort")
    check_again(directory)


def test_dynamic_axes_take_any_size(export, files):
    from bitnet_export.targets import load_session

    _, directory = export(files["llama"], "ort")
    session = load_session(directory, threads=1)
    for batch, sequence in ((1, 1), (1, 9), (4, 3)):
        logits = session.run(None, feeds_for(directory, {"batch": batch, "sequence": sequence}))[0]
        assert logits.shape == (batch, sequence, 99)
        assert np.isfinite(logits).all()


@pytest.mark.parametrize("embeddings", ["int8", "int4"])
def test_quantized_embeddings_are_in_the_parity(export, files, embeddings):
    report, directory = export(files["tied-llama"], "ort", embeddings=embeddings, bench=False)
    check_report(report, directory, speed=False)
    (row,) = [p for p in report.passes if p.name == "quantize-embeddings"]
    assert row.rewritten + len(row.skipped) == 1
    # A table tied to the head is in the file once, whichever way it is kept.
    part = report.size.by_part["embeddings"]
    assert part.bytes + report.size.by_part["linear"].bytes < 600 * 32 * 4 * 1.6
