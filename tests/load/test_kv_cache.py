"""--kv-cache: a decoder's cache as named tensors, step by step against transformers itself."""

import copy
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet_export.errors import InputError, UsageError
from bitnet_export.export import export_module
from bitnet_export.load import load
from bitnet_export.load.kv_cache import OPSET, take_weights, with_kv_cache

transformers = pytest.importorskip("transformers")
ort = pytest.importorskip("onnxruntime")
LAYERS, HEADS, SIZE = 2, 2, 16
DECODER = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=HEADS,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("decoder")
    config = transformers.LlamaConfig(**DECODER)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def decoder(directory):
    return with_kv_cache(load(directory))


@pytest.fixture(scope="module")
def exported(decoder):
    return export_module(
        decoder.module,
        decoder.example_inputs,
        decoder.dynamic_axes,
        output_names=decoder.output_names,
        opset=OPSET,
    )


def empty_cache(batch):
    names = [f"past_key_values_{i}_{p}" for i in range(LAYERS) for p in ("key", "value")]
    return {name: np.zeros((batch, HEADS, 0, SIZE), np.float32) for name in names}


def test_inputs_and_outputs_are_named(decoder):
    assert list(decoder.example_inputs)[:3] == [
        "input_ids",
        "attention_mask",
        "past_key_values_0_key",
    ]
    assert decoder.output_names[:2] == ["logits", "present_0_key"]
    assert decoder.dynamic_axes["attention_mask"] == {0: "batch", 1: "past_sequence + sequence"}
    outputs = decoder.module(*decoder.example_inputs.values())
    by_name = decoder.module(**decoder.example_inputs)
    assert len(outputs) == len(decoder.output_names)
    assert torch.equal(outputs[0], by_name[0])


@pytest.mark.parametrize("batch", [1, 2])
def test_token_by_token_in_onnx_runtime_is_transformers_in_one_go(directory, exported, batch):
    mask = next(i for i in exported.graph.input if i.name == "attention_mask")
    assert mask.type.tensor_type.shape.dim[1].dim_param == "past_sequence + sequence"
    session = ort.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 96, (batch, 9))
    cache, steps = empty_cache(batch), []
    for begin, end in [(0, 4), (4, 5), (5, 6), (6, 9)]:  # a prompt, two tokens, three at once
        feeds = {"input_ids": ids[:, begin:end], "attention_mask": np.ones((batch, end), np.int64)}
        logits, *present = session.run(None, feeds | cache)
        cache = dict(zip(cache, present, strict=True))
        steps.append(logits)
    assert present[0].shape == (batch, HEADS, 9, SIZE)
    whole = transformers.LlamaForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        expected = whole(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(np.concatenate(steps, axis=1), expected, rtol=1e-3, atol=1e-4)


# Layers that look back 5 tokens beside, or in place of, such that see all.
WINDOWS = {
    "Mistral": dict(sliding_window=5),
    "Gemma3Text": dict(
        head_dim=SIZE, sliding_window=5, layer_types=["sliding_attention", "full_attention"]
    ),
}


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_is_kept_though_the_cache_forgets_nothing(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(**DECODER, **WINDOWS[family])
    kind = f"{family.removesuffix('Text')}ForCausalLM"
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(tmp_path)
    decoder = with_kv_cache(load(tmp_path))
    ids = torch.randint(3, 90, (1, 16))
    with torch.no_grad():
        whole = decoder.module.model(ids, use_cache=False).logits
        cache = {name: torch.tensor(value) for name, value in empty_cache(1).items()}
        for i in range(16):
            mask = torch.ones(1, i + 1, dtype=torch.int64)
            logits, *present = decoder.module(ids[:, i : i + 1], mask, **cache)
            torch.testing.assert_close(logits[:, 0], whole[:, i], rtol=1e-4, atol=1e-5)
            cache = dict(zip(cache, present, strict=True))
        cut = decoder.module.model(ids[:, 1:], use_cache=False).logits
    assert present[0].shape[2] == 16
    if family == "Mistral":  # of two layers, each with 5 in view, the last sees 9 tokens
        assert not torch.allclose(whole[:, 3], cut[:, 2], rtol=1e-3)
        torch.testing.assert_close(whole[:, 12], cut[:, 11], rtol=1e-3, atol=1e-4)


def test_a_cache_that_changes_the_answer_is_refused(directory, monkeypatch):
    loaded = load(directory)
    forward = loaded.module.model.forward

    def forgets(*args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length():
            kwargs["attention_mask"] = kwargs["attention_mask"][:, -3:]
            outputs = forward(*args, **{**kwargs, "use_cache": False})
            outputs.past_key_values = past_key_values
            return outputs
        return forward(*args, past_key_values=past_key_values, **kwargs)

    forgets.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(loaded.module.model, "forward", forgets)
    with pytest.raises(InputError, match="answers otherwise"):
        with_kv_cache(loaded)


def test_padding_on_the_left_changes_nothing(decoder):
    ids = torch.tensor([[5, 6, 7]])
    cache = {n: torch.from_numpy(v) for n, v in empty_cache(1).items()}
    plain = decoder.module(input_ids=ids, attention_mask=torch.ones(1, 3).long(), **cache)[0]
    padded = decoder.module(
        input_ids=torch.tensor([[0, 0, 5, 6, 7]]),
        attention_mask=torch.tensor([[0, 0, 1, 1, 1]]),
        **cache,
    )[0]
    assert torch.allclose(plain, padded[:, 2:], atol=1e-5)


def test_the_usual_past_has_positions(decoder):
    assert decoder.usual_sizes == {"sequence": 1, "past_sequence": 32}  # of 64 positions


def test_a_model_without_a_cache_is_refused(directory):
    plain = load(directory)
    plain.hf_config = None
    with pytest.raises(UsageError, match="ForCausalLM"):
        with_kv_cache(plain)


def test_trained_weights_go_back_into_the_decoder(directory):
    original, trained = load(directory), load(directory)
    trained.name, trained.source = "tuned", Path("tuned.pt")
    with torch.no_grad():
        for parameter in trained.module.parameters():
            parameter.add_(1)
    before = copy.deepcopy(original.module.state_dict())
    take_weights(original, trained)
    assert original.name == "tuned"
    for name, value in original.module.state_dict().items():
        assert torch.allclose(value, before[name] + 1)


def test_weights_of_another_decoder_are_refused(directory):
    original, trained = load(directory), load(directory)
    trained.module.model.lm_head.weight = torch.nn.Parameter(torch.zeros(3, 64))
    with pytest.raises(InputError, match="lm_head"):
        take_weights(original, trained)
