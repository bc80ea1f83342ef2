"""BitLinear and TernaryLinear: one output, the oracle's; gradients written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitnet_export import packing
from bitnet_export.errors import InputError
from bitnet_export.op import reference_ternary_matmul
from bitnet_export.ternary import BitLinear, TernaryConfig, TernaryLinear, torch_op
from bitnet_export.ternary.layers import BitConv1D
from bitnet_export.ternary.quantizers import dequantize
from bitnet_export.ternary.torch_op import ternary_matmul, unpack_trits

CONFIGS = {
    "twn": TernaryConfig(),
    "tensor": TernaryConfig(granularity="tensor"),
    "group": TernaryConfig(granularity="group", group_size=32),
    "absmean": TernaryConfig(quantizer="absmean", granularity="tensor"),
    "threshold": TernaryConfig(quantizer="threshold", threshold=0.02),
    "lsq": TernaryConfig(quantizer="lsq"),
    "float": TernaryConfig(activation_bits=0),
    "float group": TernaryConfig(activation_bits=0, granularity="group", group_size=64),
}
# (M, K, N): single row and column, K off the packing multiple
SHAPES = [(1, 64, 1), (3, 70, 17), (17, 192, 33), (2, 1, 3)]


def _layer(k, n, config, bias=True):
    return BitLinear.from_linear(nn.Linear(k, n, bias=bias), config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_trained_converted_and_oracle_agree(config, m, k, n, bias):
    layer = _layer(k, n, config, bias)
    frozen = TernaryLinear.from_bitlinear(layer)
    x = torch.randn(m, 2, k) * 3
    y = layer(x)
    assert torch.equal(y, frozen(x))
    with torch.no_grad():
        assert torch.equal(y, layer.eval()(x))
    at = frozen.attributes
    b = None if frozen.bias is None else frozen.bias.numpy()
    expected = reference_ternary_matmul(
        x.numpy(), frozen.packed_weight.numpy(), frozen.scale.numpy(), b, attributes=at
    )
    if at.activation_bits and not at.group_size:
        np.testing.assert_array_equal(y.detach().numpy(), expected)
    else:
        # float sums, or groups added in another order: a few ulp of the largest partial sum
        np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32_and_cast_last(dtype):
    frozen = TernaryLinear.from_bitlinear(_layer(96, 5, TernaryConfig()))
    x = torch.randn(3, 96, dtype=dtype)
    y = frozen(x)
    assert y.dtype == dtype
    assert torch.equal(y, frozen(x.float()).to(dtype))


def test_half_keeps_scale_and_bias_float32():
    frozen = TernaryLinear.from_bitlinear(_layer(64, 5, TernaryConfig()))
    scale, bias = frozen.scale.clone(), frozen.bias.clone()
    frozen.half()
    assert torch.equal(frozen.scale, scale)
    assert torch.equal(frozen.bias, bias)


def test_nan_in_a_row_shows_in_that_row_only():
    layer = TernaryLinear.from_bitlinear(_layer(64, 5, TernaryConfig()))
    x = torch.randn(3, 64)
    x[1, 7] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_autocast_does_not_touch_the_frozen_layer():
    frozen = TernaryLinear.from_bitlinear(_layer(128, 9, TernaryConfig()))
    x = torch.randn(4, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen.float()(x))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_bfloat16_training_stays_close(config):
    layer, x = _layer(192, 33, config), torch.randn(8, 192)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: each of a few roundings is within 2^-8 of the largest value
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_equal_the_written_out_rule(config):
    layer = _layer(64, 6, config)
    x = torch.randn(5, 64, requires_grad=True)
    g = torch.randn(5, 6)
    layer(x).backward(g)
    trits, scale = layer.ternarize()
    xd = x.detach()
    if config.activation_bits:
        a = xd.abs().amax(1, keepdim=True).clamp_min(1e-5) / 127
        xd = torch.round(xd / a).clamp(-128, 127) * a
    through = torch.einsum("mn,mk->nk", g, xd)
    expected = through
    if config.quantizer == "lsq":
        expected = through * (layer.weight.abs() <= layer.alpha[:, None])
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, g @ dequantize(trits, scale), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, g.sum(0), rtol=1e-6, atol=1e-6)
    if config.quantizer == "threshold":
        torch.testing.assert_close(layer.alpha.grad, (through * trits).sum()[None])
    if config.quantizer in ("twn", "absmean"):
        assert layer.alpha is None


def test_state_dict_keys_are_those_of_linear_and_load_both_ways():
    linear = nn.Linear(32, 4)
    layer = BitLinear.from_linear(linear)
    assert list(layer.state_dict()) == list(linear.state_dict())
    assert layer.weight is linear.weight
    other = BitLinear(32, 4)
    other.load_state_dict(linear.state_dict())
    nn.Linear(32, 4).load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, linear.weight)


def test_loading_a_dense_state_dict_starts_alpha_from_its_weight():
    layer = BitLinear(32, 4, config=TernaryConfig(quantizer="lsq"))
    linear = nn.Linear(32, 4)
    layer.load_state_dict(linear.state_dict())
    torch.testing.assert_close(layer.alpha.detach(), 2 * linear.weight.detach().abs().mean(1))
    again = BitLinear(32, 4, config=TernaryConfig(quantizer="lsq"))
    with torch.no_grad():
        layer.alpha.fill_(0.3)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.alpha, layer.alpha)


def test_back_to_linear_has_the_same_parameter_then_the_dequantized_one():
    linear = nn.Linear(48, 7)
    layer = BitLinear.from_linear(linear)
    assert layer.to_linear().weight is linear.weight
    frozen = TernaryLinear.from_bitlinear(layer)
    dense = frozen.to_linear()
    assert torch.equal(dense.weight, dequantize(*layer.ternarize()))
    again = TernaryLinear.from_bitlinear(BitLinear.from_linear(dense))
    assert torch.equal(again.packed_weight, frozen.packed_weight)
    assert torch.equal(again.scale, frozen.scale)


def test_conv1d_keeps_its_transposed_weight():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(12, 32)
    layer = BitConv1D.from_linear(conv1d)
    assert layer.weight is conv1d.weight
    assert (layer.in_features, layer.out_features) == (32, 12)
    x = torch.randn(2, 3, 32, requires_grad=True)
    frozen = TernaryLinear.from_bitlinear(layer)
    y = layer(x)
    assert torch.equal(y, frozen(x.detach()))
    trits, scale = layer.ternarize()
    close = F.linear(x, dequantize(trits, scale), layer.bias)
    assert (y - close).abs().max() < 0.05 * close.abs().max()
    y.sum().backward()
    assert layer.weight.grad.shape == (32, 12)
    assert type(layer.to_linear()).__name__ == "Conv1D"
    assert frozen.to_linear().weight.shape == (32, 12)


def test_export_is_one_node_with_dynamic_dimensions():
    model = nn.Sequential(TernaryLinear.from_bitlinear(_layer(64, 6, TernaryConfig())))
    auto = torch.export.Dim.AUTO
    program = torch.export.export(
        model, (torch.randn(2, 5, 64),), dynamic_shapes=({0: auto, 1: auto},)
    )
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert [str(n.target) for n in nodes] == ["bitnet.ternary_matmul.default"]
    x = torch.randn(3, 9, 64)
    assert torch.equal(program.module()(x), model(x))


def test_custom_op_passes_torch_opcheck():
    frozen = TernaryLinear.from_bitlinear(_layer(70, 6, TernaryConfig()))
    args = (torch.randn(3, 70), frozen.packed_weight, frozen.scale, frozen.bias, 70, 6, 0, 8)
    torch.library.opcheck(ternary_matmul, args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 63)}, "x must be"),
        ({"scale": torch.ones(5)}, "scale must be"),
        ({"bias": torch.ones(5)}, "bias must be"),
        ({"packed_weight": torch.zeros(6, 8, dtype=torch.uint8)}, "packed_weight must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    frozen = TernaryLinear.from_bitlinear(_layer(64, 6, TernaryConfig()))
    args = {
        "x": torch.zeros(2, 64),
        "packed_weight": frozen.packed_weight,
        "scale": frozen.scale,
        "bias": frozen.bias,
        **change,
    }
    with pytest.raises(InputError, match=message):
        ternary_matmul(*args.values(), 64, 6, 0, 8)


def test_unpacking_is_packings_inverse_and_shows_corruption():
    trits = np.random.default_rng(0).integers(-1, 2, (5, 77)).astype(np.int8)
    packed = torch.from_numpy(packing.pack(trits))
    np.testing.assert_array_equal(unpack_trits(packed, 77).numpy(), trits)
    packed[0, 0] = 0
    assert unpack_trits(packed, 77)[0, :4].isnan().all()


def test_a_model_that_reads_a_weights_dtype_while_it_is_traced_leaves_real_tensors_behind():
    """T5's feed-forward does; what a trace made must not stay in a cache."""

    class ReadsDtype(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wo = TernaryLinear.from_bitlinear(_layer(8, 4, TernaryConfig()))

        def forward(self, x):
            return self.wo(x.to(self.wo.weight.dtype))

    module, x = ReadsDtype(), torch.randn(2, 8)
    torch_op._trits_of_byte.cache_clear()
    torch.export.export(module, (x,))
    assert module(x).numpy().shape == (2, 4)
