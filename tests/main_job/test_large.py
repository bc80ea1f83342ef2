"""Models past the 2 GB of protobuf, with the limit lowered: every file that a run writes keeps its
tensors in a file of their own, and all that comes out is what comes out of a small model."""

import gc
import os
import weakref

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from bitnet_export import onnx_io, onnx_tensors
from bitnet_export.export import export_module
from bitnet_export.load import load, save
from bitnet_export.opening import export_loaded
from bitnet_export.options import BenchOptions, ExportOptions, VerifyOptions
from bitnet_export.passes.opset import raise_opset
from bitnet_export.pipeline import run_bench, run_export, run_verify
from bitnet_export.targets import load_session
from bitnet_export.ternary import convert, prepare
from bitnet_export.verify import exact
from bitnet_export.verify.feeds import Case
from tests.main_job import models

pytestmark = pytest.mark.slow
LIMIT = 10_000
DECODER = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


class Toy(nn.Module):
    """ids [batch, sequence] -> logits, with all that language models have large: an embedding, two
    layers and a head, whose weight may be the embedding's."""

    def __init__(self, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64, bias=False)
        self.head = nn.Linear(64, 128, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        return {"logits": self.head(x + self.down(torch.relu(self.up(x))))}


def write_toy(path, *, tied=False):
    torch.manual_seed(0)
    ids = torch.arange(12).reshape(2, 6)
    return save(Toy(tied).eval(), path, {"ids": ids}, {"ids": {0: "batch", 1: "sequence"}})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "toy.pt")


@pytest.fixture(scope="module")
def tied_toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy") / "tied.pt", tied=True)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("decoder") / "tiny"
    config = transformers.LlamaConfig(**DECODER)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture
def foreign(tmp_path):
    return models.foreign_mlp(tmp_path / "foreign.onnx", ())


@pytest.fixture
def low_limit(monkeypatch):
    """2 GB come at 10 KB, and nothing may be made one message past them."""
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", LIMIT)


def exported(model, out, target, **options):
    settings = dict(threads=1, bench=False) | options
    return run_export(ExportOptions(model=model, target=target, output=out, **settings))


def outputs(directory):
    session = load_session(directory, threads=1)
    (value,) = session.get_inputs()
    shape = [3 if isinstance(d, str) else d for d in value.shape]
    rng = np.random.default_rng(0)
    whole = "int" in value.type
    x = rng.integers(0, 90, shape) if whole else rng.standard_normal(shape).astype(np.float32)
    return session.run(None, {value.name: x})


def check_passed(report, directory):
    assert report.verdict == "pass", report.gates
    assert report.parity
    assert all(row.passed for row in report.parity)
    assert sum(part.bytes for part in report.size.by_part.values()) == report.size.bytes
    files = [directory / f"model.onnx{end}" for end in ("", ".data", ".zst", ".data.zst")]
    assert sum(f.stat().st_size for f in files if f.is_file()) == report.size.bytes


VARIANTS = {
    "ort": dict(target="ort"),
    "onnx-tied": dict(target="onnx"),
    "onnx-fp16": dict(target="onnx", dtype="fp16", embeddings="keep"),
    "compressed": dict(target="ort", embeddings="keep", ort_kernel="2bit", compress=True),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_model_comes_out_like_a_small_one(toy, tied_toy, tmp_path, monkeypatch, variant):
    model = tied_toy if variant == "onnx-tied" else toy
    exported(model, tmp_path / "small", **VARIANTS[variant], verify=False)
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", LIMIT)
    report = exported(model, tmp_path / "large", **VARIANTS[variant])
    check_passed(report, tmp_path / "large")
    for name in ("baseline", "ternary"):
        assert (tmp_path / f"large/intermediate/{name}.onnx.data").stat().st_size > LIMIT
    for small, large in zip(outputs(tmp_path / "small"), outputs(tmp_path / "large"), strict=True):
        np.testing.assert_allclose(large, small, rtol=0, atol=2e-5 * max(1, np.abs(small).max()))


def test_a_large_directory_is_verified_and_timed_again(toy, tmp_path, low_limit):
    exported(toy, tmp_path / "out", "onnx", embeddings="keep")
    again = VerifyOptions(directory=tmp_path / "out", per_layer=True, reference=toy)
    report = run_verify(again)
    assert report.quality is not None
    assert report.verdict == "pass"
    assert all(row.cosine is not None for row in report.layers if row.status == "ternary")
    assert run_bench(BenchOptions(directory=tmp_path / "out", samples=5)).speed


def test_a_large_decoder_with_a_cache(decoder, tmp_path, low_limit):
    report = exported(decoder, tmp_path / "out", "onnx", kv_cache=True)
    check_passed(report, tmp_path / "out")
    assert (tmp_path / "out/intermediate/baseline.onnx.data").is_file()


@pytest.mark.parametrize("target", ["trt", "trt-rtx"])
def test_large_files_for_tensorrt(toy, tmp_path, low_limit, target):
    report = exported(toy, tmp_path / "out", target, engine=False)
    assert report.size.bytes > 0
    onnx.checker.check_model(os.fspath(tmp_path / "out/intermediate/ternary.onnx"))


@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_a_large_foreign_file(foreign, tmp_path, low_limit, target):
    model = onnx.load(foreign)
    path = tmp_path / "folder" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(
        model, path, save_as_external_data=True, location="weights.bin", size_threshold=100
    )
    report = exported(path, tmp_path / "out", target)
    check_passed(report, tmp_path / "out")
    assert {row.status for row in report.layers} == {"ternary", "kept"}
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "weights.bin"]
    exported(foreign, tmp_path / "small", target, verify=False)
    for small, large in zip(outputs(tmp_path / "small"), outputs(tmp_path / "out"), strict=True):
        np.testing.assert_allclose(large, small, atol=1e-5)


def test_the_full_precision_file_of_a_large_run_is_taken_as_a_model(toy, tmp_path, low_limit):
    """Its weights are stored transposed, and stay where they are while the passes look at them."""
    exported(toy, tmp_path / "first", "ort", verify=False)
    baseline = tmp_path / "first/intermediate/baseline.onnx"
    assert all(
        onnx_tensors.is_outside(t)
        for t in onnx_io.read_model(baseline).graph.initializer
        if onnx_tensors.tensor_bytes(t) > 1024
    )
    model = onnx_io.read_model(baseline)
    constants = {t.name for t in model.graph.initializer}
    # Runtimes would fold a transpose, and hold the weight twice.
    assert not [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in constants]
    report = exported(baseline, tmp_path / "second", "ort")
    check_passed(report, tmp_path / "second")
    assert sum(row.status == "ternary" for row in report.layers) == 2


def test_weights_are_streamed_not_held(toy, tmp_path, low_limit):
    loaded = load(toy)
    data = tmp_path / "model.onnx.data"
    model = export_module(
        loaded.module,
        loaded.example_inputs,
        loaded.dynamic_axes,
        output_names=loaded.output_names,
        data=data,
    )
    assert len(model.SerializeToString()) < 200_000
    written = onnx_io.write_model(model, tmp_path / "model.onnx")
    before = data.stat()
    onnx_io.write_model(model, tmp_path / "model.onnx")
    assert data.stat().st_ino == before.st_ino  # left where it was
    copy = onnx_io.write_model(model, tmp_path / "copy" / "model.onnx")
    for one, other in zip(
        onnx_io.read_model(written).graph.initializer,
        onnx_io.read_model(copy).graph.initializer,
        strict=True,
    ):
        assert np.array_equal(onnx_tensors.values(one), onnx_tensors.values(other))
        assert one.name == other.name


def test_a_large_old_file_is_raised_to_a_new_opset(foreign, tmp_path, monkeypatch):
    """onnx's converter serializes what it is given: large tensors must not be in it."""
    model = onnx.load(foreign)
    for entry in model.opset_import:
        entry.version = 17 if entry.domain == "" else entry.version
    model.metadata_props.add(key="origin", value="elsewhere")
    before = {t.name: t.SerializeToString() for t in model.graph.initializer}
    seen = []
    convert = onnx.version_converter.convert_version

    def watched(given, version):
        seen.append(sum(t.ByteSize() for t in given.graph.initializer))
        return convert(given, version)

    monkeypatch.setattr(onnx.version_converter, "convert_version", watched)
    raised = raise_opset(model, 20)
    assert seen[0] < sum(map(len, before.values())) / 2
    assert [i.name for i in raised.graph.input] == [i.name for i in model.graph.input]
    assert {t.name: t.SerializeToString() for t in raised.graph.initializer} == before
    assert onnx_io.model_opset(raised) == 20
    assert raised.metadata_props[0].value == "elsewhere"


def test_no_weight_outlives_the_layer_it_became_ternary_in(decoder, tmp_path, low_limit):
    """onnxscript keeps what it exported last; the full-precision weights must not be part of it."""
    loaded = load(decoder)
    weights = {
        name: weakref.ref(weight)
        for name, weight in loaded.module.named_parameters()
        if name.endswith("proj.weight")
    }
    model = export_loaded(loaded, path=tmp_path / "model.onnx")
    prepare(loaded.module)
    convert(loaded.module)
    gc.collect()
    assert model.graph.node
    assert len(weights) == 7
    assert [name for name, weight in weights.items() if weight() is not None] == []


@pytest.mark.parametrize("limit", [1, 20_000])
def test_layers_are_checked_in_parts(toy, tmp_path, monkeypatch, limit):
    """Whatever a run has room for, each layer is compared, and the worst one named."""
    exported(toy, tmp_path / "out", "onnx", verify=False)
    feeds = {"ids": np.arange(12).reshape(2, 6)}
    arguments = (
        tmp_path / "out/intermediate/ternary.onnx",
        tmp_path / "out/model.onnx",
        [Case("a case", feeds)],
        ["function"],
    )
    (whole,) = exact.check_layers(*arguments)
    monkeypatch.setattr(exact, "GROUP_BYTES", limit)
    runs = []
    run = exact.run_session
    monkeypatch.setattr(exact, "run_session", lambda *a: runs.append(a[2]) or run(*a))
    (parts,) = exact.check_layers(*arguments)
    assert parts == whole
    assert len(runs) == 2
    assert sum(map(len, runs)) == 4
