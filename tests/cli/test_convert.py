"""Foreign ternary checkpoints in and out, as processes: from GGUF, to packed Hugging Face."""

import json

import numpy as np
import pytest

from tests.cli.conftest import run
from tests.cli.test_bad_inputs import check

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    from tests.load.gguf_files import write_llama

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_llama(path, scales="row", layers=1)
    return path


def test_a_gguf_file_is_a_model_like_any_other(gguf_file, tmp_path):
    done = run(gguf_file, "--target", "ort", "--no-bench", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "llama GGUF with 7 TQ2_0" in done.stderr
    assert "PASS" in done.stdout
    assert "Fine-tuning recovers" not in done.stderr  # it is ternary as it is
    report = json.loads((tmp_path / "out/report.json").read_text())
    exact = [row for row in report["layers"] if "already ternary" in row["reason"]]
    assert len(exact) == 7
    assert report["model"]["kind"] == "gguf"


def test_damaged_gguf_files(gguf_file, tmp_path):
    data = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: len(data) // 2])
    check(run(tmp_path / "cut.gguf", cwd=tmp_path), 2, "cut.gguf", "truncated or damaged")
    assert [p.name for p in tmp_path.iterdir()] == ["cut.gguf"]


def test_fine_tuned_goes_back_to_hugging_face_and_to_training(tmp_path):
    import torch
    from safetensors.torch import load_file

    from bitnet_export import ConvertOptions, run_convert
    from bitnet_export.errors import UsageError
    from bitnet_export.load import load
    from bitnet_export.ternary import prepare
    from tests.load.bitnet_files import TINY

    source = tmp_path / "llama"
    config = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 1})
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    ids = np.random.default_rng(0).integers(0, 99, (24, 8))
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    common = ("--granularity", "tensor", "--steps", 2, "--batch-size", 8)
    done = run("finetune", source, "--data", "d.npz", "-o", "t.pt", *common, "-q", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run("convert", "t.pt", "--to", "hf-bitnet", "-o", "packed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written to packed\n"
    assert "7 ternary layers packed" in done.stderr
    with torch.compiler.set_stance("force_eager"):
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layers = load(tmp_path / "t.pt").module
    prepare(layers)
    trits, scale = layers.get_submodule("model.model.layers.0.mlp.up_proj").ternarize()
    up = model.model.layers[0].mlp.up_proj
    assert torch.equal(up.weight, trits)
    assert torch.equal(up.weight_scale, scale)
    weights = run_convert(ConvertOptions(tmp_path / "t.pt", output=tmp_path / "w.safetensors"))
    again = transformers.LlamaForCausalLM(config)
    again.load_state_dict(load_file(weights))  # the names of the Hugging Face model
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, trits * scale)
    packed = ConvertOptions(tmp_path / "t.pt", to="hf-bitnet", output=tmp_path / "packed")
    with pytest.raises(UsageError, match="not empty"):
        run_convert(packed)


def test_what_cannot_be_converted(mlp_file, tmp_path):
    done = run("convert", mlp_file, "--to", "hf-bitnet", cwd=tmp_path)
    check(done, 2, "none of its layers is ternary", "-> make it ternary first")
    (tmp_path / "w.pt").touch()
    done = run("convert", mlp_file, "--to", "state-dict", "-o", "w.pt", cwd=tmp_path)
    check(done, 2, "the file exists", "--force")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pt"]
