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


SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
TOWERS = dict(
    text_config={**SIZES, "vocab_size": 40, "max_position_embeddings": 12},
    vision_config={**SIZES, "image_size": 16, "patch_size": 8},
)
# Configuration, its fields, class -> shapes of the example inputs, in order.
OTHER_INPUTS = {
    "two towers": (
        "CLIPConfig",
        {**TOWERS, "projection_dim": 8},
        "CLIPModel",
        {"input_ids": (2, 12), "attention_mask": (2, 12), "pixel_values": (2, 3, 16, 16)},
    ),
    "speech to text": (
        "WhisperConfig",
        dict(
            vocab_size=40,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=8,
            max_source_positions=10,
            pad_token_id=0,
            decoder_start_token_id=1,
        ),
        "WhisperForConditionalGeneration",
        {"input_features": (2, 8, 20), "decoder_input_ids": (2, 16)},
    ),
    "spectrogram": (
        "ASTConfig",
        dict(SIZES, max_length=24, num_mel_bins=20),
        "ASTForAudioClassification",
        {"input_values": (2, 24, 20)},
    ),
    "frames": (
        "Wav2Vec2BertConfig",
        dict(SIZES, vocab_size=32, feature_projection_input_dim=12),
        "Wav2Vec2BertForCTC",
        {"input_features": (2, 16, 12)},
    ),
}


@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_images_speech_and_two_towers_have_example_inputs(tmp_path, name):
    import transformers

    config, fields, kind, shapes = OTHER_INPUTS[name]
    made = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    made.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {n: tuple(t.shape) for n, t in model.example_inputs.items()} == shapes
    outputs = model.module(**model.example_inputs)
    assert len(model.output_names) == (len(outputs) if isinstance(outputs, tuple) else 1)


def test_an_image_goes_in_and_text_comes_out(tmp_path):
    import transformers

    parts = (
        transformers.ViTConfig(**SIZES, image_size=16, patch_size=8),
        transformers.TrOCRConfig(
            vocab_size=40,
            d_model=16,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_position_embeddings=24,
        ),
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    transformers.VisionEncoderDecoderModel(config).save_pretrained(tmp_path)
    inputs = load(tmp_path).example_inputs
    assert inputs["pixel_values"].shape == (2, 3, 16, 16)
    assert int(inputs["decoder_input_ids"].max()) < 40


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Lxmert", {}, r"LxmertModel does not run on input_ids, attention_mask"),
        ("PatchTST", dict(d_model=16, ffn_dim=32), r"PatchTSTModel takes past_values"),
    ],
)
def test_a_model_that_needs_other_inputs_is_refused_with_a_way_out(tmp_path, kind, fields, message):
    import transformers

    config = getattr(transformers, f"{kind}Config")(**fields, num_attention_heads=2)
    if kind == "Lxmert":
        config.hidden_size, config.l_layers, config.r_layers, config.x_layers = 16, 1, 1, 1
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message) as refusal:
        load(tmp_path)
    assert "bitnet_export.save" in str(refusal.value)


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
