"""Hugging Face directories: class from the config, named tensors in and out, local files only."""

import json
import shutil

import pytest
import torch

from bitnet_export.errors import InputError
from bitnet_export.load import load
from tests.load.models import BATCH_SEQUENCE, save_huggingface, tiny_model


@pytest.mark.parametrize(
    ("kind", "head", "inputs", "outputs"),
    [
        ("bert", "ForSequenceClassification", 3, ["logits"]),
        ("bert", "ForQuestionAnswering", 3, ["start_logits", "end_logits"]),
        ("llama", "ForCausalLM", 2, ["logits"]),
        ("gpt2", "LMHeadModel", 2, ["logits"]),
        ("vit", "ForImageClassification", 1, ["logits"]),
    ],
)
def test_heads_and_outputs(tmp_path, kind, head, inputs, outputs):
    original = save_huggingface(tmp_path / "m", kind, head)
    loaded = load(tmp_path / "m")
    assert loaded.kind == "huggingface"
    assert loaded.name == "m"
    assert loaded.output_names == outputs
    assert len(loaded.example_inputs) == inputs
    assert type(loaded.module.model) is type(original)
    with torch.no_grad():
        ours = loaded.module(*loaded.example_inputs.values())
        theirs = original(**loaded.example_inputs)
    first = ours if isinstance(ours, torch.Tensor) else ours[0]
    torch.testing.assert_close(first, theirs[outputs[0]], rtol=0, atol=1e-6)


def test_encoder(bert_directory):
    loaded = load(bert_directory)
    assert loaded.output_names == ["last_hidden_state", "pooler_output"]
    assert loaded.dynamic_axes["input_ids"] == BATCH_SEQUENCE
    assert loaded.axis_limits == {"sequence": 24}
    assert loaded.example_inputs["input_ids"].max() < 40
    assert loaded.hf_config.model_type == "bert"


def test_pooler_without_weights_is_left_out(bert_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert_directory, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if not k.startswith("pooler")}
    save_file(weights, file, metadata={"format": "pt"})
    loaded = load(tmp_path / "m")
    assert loaded.output_names == ["last_hidden_state"]
    assert "pooler_output" in loaded.notes[0]


def test_missing_weights_are_an_error(bert_directory, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(bert_directory, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "query" not in k}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"2 weights are missing.*query"):
        load(tmp_path / "m")


def test_data_without_segments(bert_directory, tmp_path):
    import numpy as np

    ids = np.ones((3, 6), np.int64)
    np.savez(tmp_path / "d.npz", input_ids=ids, attention_mask=ids)
    loaded = load(bert_directory, data=tmp_path / "d.npz")
    assert list(loaded.example_inputs) == ["input_ids", "attention_mask"]


def test_an_image_size_that_the_config_does_not_name_is_assumed(tmp_path):
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    loaded = load(tmp_path, input_specs=["pixel_values:batchx3x32x32"])
    assert "224 x 224 pixels are assumed" in loaded.notes[0]
    assert loaded.example_inputs["pixel_values"].shape == (2, 3, 32, 32)
    assert loaded.output_names == ["logits"]


def test_a_model_that_needs_other_inputs_is_refused_with_a_way_out(tmp_path):
    import transformers

    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 40},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"CLIPModel does not run on input_ids, attention_mask"):
        load(tmp_path)


def test_unknown_architecture_falls_back(bert_directory, tmp_path):
    shutil.copytree(bert_directory, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert type(load(tmp_path / "m").module.model).__name__ == "BertModel"


@pytest.mark.parametrize(
    ("config", "message"),
    [("not json", "config.json"), ("{}", "config.json"), ('{"model_type": "nope"}', "config.json")],
)
def test_unreadable_config(tmp_path, config, message):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_no_weights(tmp_path):
    tiny_model("bert").config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model\.safetensors"):
        load(tmp_path)


def test_truncated_weights(bert_directory, tmp_path):
    shutil.copytree(bert_directory, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(InputError, match=r"cannot be loaded"):
        load(tmp_path / "m")


def test_nan_weights(tmp_path):
    model = tiny_model("bert")
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"encoder\.layer\.0\.output\.dense\.weight holds 1 NaN"):
        load(tmp_path)


def test_overridden_shape(bert_directory):
    loaded = load(bert_directory, input_specs=["input_ids:1x8:int64"])
    assert {tuple(t.shape) for t in loaded.example_inputs.values()} == {(1, 8)}
    assert loaded.dynamic_axes == {}
