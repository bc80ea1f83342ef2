"""Hugging Face models with random weights: prepared by the default patterns, converted exactly."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from bitnet_export.ternary import BitLinear, convert, prepare, to_linear  # noqa: E402

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
CAUSAL = {**TINY, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _no_compiler():
    """transformers' BitNet layers torch.compile their rounding: slow, and not what is tested."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _model(kind):
    t = transformers
    build = {
        "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TINY)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL)),
        "tied llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL, tie_word_embeddings=True)),
        "bitnet": lambda: t.BitNetForCausalLM(t.BitNetConfig(**CAUSAL)),
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(
                **{k: v for k, v in TINY.items() if k != "vocab_size"}, image_size=32, patch_size=8
            )
        ),
    }
    return build[kind]().eval()


def _inputs(kind):
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    return {"input_ids": torch.randint(0, 99, (2, 7)), "attention_mask": torch.ones(2, 7).long()}


# ternary layers: per block q k v o and the feed-forward (+ BERT's pooler)
EXPECTED = {"bert": 13, "llama": 14, "tied llama": 14, "bitnet": 14, "gpt2": 8, "vit": 12}


@pytest.mark.parametrize("kind", EXPECTED)
def test_default_patterns_convert_the_blocks_and_keep_the_head(kind):
    model, inputs = _model(kind), _inputs(kind)
    keys = set(model.state_dict())
    with torch.no_grad():
        dense = model(**inputs).logits
        rows = prepare(model)
        assert set(model.state_dict()) == keys
        assert sum(row.status == "ternary" for row in rows) == EXPECTED[kind]
        head = [r for r in rows if r.name.split(".")[-1] in ("classifier", "lm_head")]
        assert [r.status for r in head] == ["kept"]
        ternary = model(**inputs).logits
        convert(model)
        assert torch.equal(ternary, model(**inputs).logits)
    assert not torch.allclose(dense, ternary)
    to_linear(model)
    assert set(model.state_dict()) == keys


def test_gpt2_round_trip_keeps_conv1d_weights():
    model, inputs = _model("gpt2"), _inputs("gpt2")
    with torch.no_grad():
        before = model(**inputs).logits
        prepare(model)
        to_linear(model)
        assert type(model.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
        assert torch.equal(before, model(**inputs).logits)


def _trits(n, k):
    return torch.randint(-1, 2, (n, k)).float()


@pytest.mark.parametrize("norm", [False, True])
def test_offline_autobitlinear_keeps_trits_and_scale(norm):
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(64, 12, bias=True, use_rms_norm=norm)
    trits = _trits(12, 64)
    layer.weight.data.copy_(trits)
    layer.weight_scale.fill_(0.731)
    model = torch.nn.Sequential(layer)
    x = torch.randn(5, 64)
    rows = prepare(model)
    assert rows[0].reason.startswith("already ternary")
    assert isinstance(model[0], BitLinear)
    got, scale = model[0].ternarize()
    assert torch.equal(got, trits)
    assert torch.equal(scale, layer.weight_scale)
    with torch.no_grad():
        # transformers scales the bias too; ours is the op's: compare without it
        model[0].bias.zero_()
        layer.bias.data.zero_()
        torch.testing.assert_close(model(x), layer(x), rtol=1e-4, atol=1e-4)
        y = model(x)
        convert(model)
        assert torch.equal(y, model(x))


def test_packed_hf_bitlinear_is_unpacked_and_divided_by_its_scale():
    from transformers.integrations.bitnet import BitLinear as HfBitLinear
    from transformers.integrations.bitnet import pack_weights

    layer = HfBitLinear(64, 12, bias=False, dtype=torch.float32)
    trits = _trits(12, 64)
    layer.weight = torch.nn.Buffer(pack_weights(trits.clone()))
    layer.weight_scale.fill_(4.0)
    model = torch.nn.Sequential(layer)
    prepare(model)
    got, scale = model[0].ternarize()
    assert torch.equal(got, trits)
    assert scale.tolist() == [0.25]


def test_online_autobitlinear_keeps_its_own_quantizer():
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(64, 12, bias=False, online_quant=True)
    model = torch.nn.Sequential(layer)
    prepare(model)
    trits, scale = model[0].ternarize()
    mean = layer.weight.abs().mean()
    assert torch.equal(trits, (layer.weight / mean).round().clamp(-1, 1))
    assert scale.item() == pytest.approx(mean.item())
