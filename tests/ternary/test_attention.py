"""SplitMultiheadAttention against torch's own module, in all the ways it can be called."""

import copy

import pytest
import torch
from torch import nn

from bitnet_export.ternary import TernaryConfig, convert, prepare, to_linear
from bitnet_export.ternary.attention import SplitMultiheadAttention

VARIANTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim vdim": {"kdim": 24, "vdim": 40},
}
E, HEADS, B, L, S = 32, 4, 3, 5, 7


def _close(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if e is not None:
            # same arithmetic, other summation order in the kernels
            torch.testing.assert_close(a, e, rtol=1e-5, atol=2e-6)


def _cross_inputs(options, batch=B):
    shapes = [(L, E), (S, options.get("kdim", E)), (S, options.get("vdim", E))]
    if batch is None:
        return [torch.randn(*shape) for shape in shapes]
    first = options.get("batch_first", False)
    return [torch.randn(*((batch, n) if first else (n, batch)), e) for n, e in shapes]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "3-d"])
def test_cross_attention_equals_the_original(options, need_weights, masks):
    source = nn.MultiheadAttention(E, HEADS, **options).eval()
    nn.init.normal_(source.out_proj.weight, std=0.2)
    split = SplitMultiheadAttention.from_attention(source)
    inputs = _cross_inputs(options)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 4:] = True
    blocked = torch.rand(L, S) > 0.7
    blocked[:, 0] = False
    kwargs = {
        "none": {},
        "bool": {"attn_mask": blocked, "key_padding_mask": padding},
        "float": {"attn_mask": torch.randn(L, S)},
        "3-d": {"attn_mask": torch.randn(B * HEADS, L, S)},
    }[masks]
    for average in (True, False):
        kwargs |= {"need_weights": need_weights, "average_attn_weights": average}
        _close(split(*inputs, **kwargs), source(*inputs, **kwargs))


@pytest.mark.parametrize("need_weights", [True, False])
def test_unbatched_and_self_attention(need_weights):
    source = nn.MultiheadAttention(E, HEADS, batch_first=True).eval()
    split = SplitMultiheadAttention.from_attention(source)
    inputs = _cross_inputs({}, batch=None)
    padding = torch.zeros(S, dtype=torch.bool)
    padding[5:] = True
    kwargs = {"need_weights": need_weights, "key_padding_mask": padding}
    _close(split(*inputs, **kwargs), source(*inputs, **kwargs))
    x = torch.randn(B, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    kwargs = {"need_weights": need_weights, "attn_mask": causal, "is_causal": True}
    _close(split(x, x, x, **kwargs), source(x, x, x, **kwargs))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_state_dict_is_the_originals_and_loads_both_ways(options):
    source = nn.MultiheadAttention(E, HEADS, **options)
    split = SplitMultiheadAttention.from_attention(source)
    saved = split.state_dict()
    assert set(saved) == set(source.state_dict())
    assert all(torch.equal(saved[k], v) for k, v in source.state_dict().items())
    other = nn.MultiheadAttention(E, HEADS, **options)
    split.load_state_dict(other.state_dict())
    back = split.to_attention()
    assert type(back) is nn.MultiheadAttention
    assert all(torch.equal(back.state_dict()[k], v) for k, v in other.state_dict().items())


def _encoder(**options):
    layer = nn.TransformerEncoderLayer(E, HEADS, 64, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).eval()


def test_ternary_encoder_never_takes_the_fused_path():
    """In inference mode torch would run the whole layer on the float weights."""
    encoder = _encoder()
    x, padding = torch.randn(B, L, E), torch.zeros(B, L, dtype=torch.bool)
    padding[0, 3:] = True
    prepare(encoder)
    slow = encoder(x, src_key_padding_mask=padding).detach()
    with torch.inference_mode():
        fast = encoder(x, src_key_padding_mask=padding)
    assert torch.equal(slow, fast)
    convert(encoder)
    with torch.inference_mode():
        assert torch.equal(slow, encoder(x, src_key_padding_mask=padding))


def test_fused_path_is_avoided_when_only_the_feed_forward_is_ternary():
    encoder = _encoder()
    dense = copy.deepcopy(encoder)
    rows = prepare(encoder, TernaryConfig(exclude=("*self_attn*",)))
    assert {r.name for r in rows if r.status == "ternary"} == {
        f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
    }
    assert type(encoder.layers[0].self_attn) is nn.MultiheadAttention
    x = torch.randn(B, L, E)
    with torch.inference_mode():
        fast, float_weights = encoder(x), dense(x)
    # The float attention has a fast path of its own: its rounding may flip an int8 step or two.
    torch.testing.assert_close(fast, encoder(x).detach(), rtol=0, atol=0.03)
    assert (fast - float_weights).abs().max() > 0.1


def test_reverting_gives_the_encoder_its_fast_path_back():
    encoder = _encoder()
    before = copy.deepcopy(encoder)
    prepare(encoder)
    to_linear(encoder)
    assert encoder.use_nested_tensor == before.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == before.layers[0].activation_relu_or_gelu
    assert list(encoder.state_dict()) == list(before.state_dict())
    x = torch.randn(B, L, E)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), before(x))


def test_decoder_with_cross_attention_converts_exactly():
    layer = nn.TransformerDecoderLayer(E, HEADS, 64, batch_first=True, norm_first=True)
    decoder = nn.TransformerDecoder(layer, 1).eval()
    rows = prepare(decoder)
    assert sum(r.status == "ternary" for r in rows) == 10
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    y = decoder(x, memory)
    convert(decoder)
    assert torch.equal(y, decoder(x, memory))
