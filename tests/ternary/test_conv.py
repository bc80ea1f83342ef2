"""BitConv2d and TernaryConv: the convolution they stand for, the oracle, and their gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitnet_export.errors import UsageError
from bitnet_export.op import reference_ternary_matmul
from bitnet_export.ternary import TernaryConfig
from bitnet_export.ternary.conv import BitConv1d, BitConv2d, TernaryConv, patches, why_float
from bitnet_export.ternary.quantizers import dequantize

FLOAT = TernaryConfig(activation_bits=0)
CONFIGS = {
    "twn": TernaryConfig(),
    "group": TernaryConfig(granularity="group", group_size=32),
    "lsq": TernaryConfig(quantizer="lsq"),
    "float": FLOAT,
}
# arguments of nn.Conv2d after the channels, image size (H, W), output size
PRODUCTS = {
    "1x1": ((1,), {}, (5, 7), (5, 7)),
    "1x1 stride 2": ((1, 2), {}, (5, 8), (3, 4)),
    "1x1 same": ((1,), {"padding": "same"}, (2, 3), (2, 3)),
    "patches": ((2, 2), {}, (6, 4), (3, 2)),
    "patches with a rest": ((3, 3), {}, (7, 11), (2, 3)),
    "mixed": (((1, 2), (3, 2)), {"padding": "valid"}, (7, 5), (3, 2)),
    "one pixel": ((1,), {"bias": False}, (1, 1), (1, 1)),
}
FLOATS = {
    "kernel 3x3": ((3,), {"padding": 1}),
    "kernel 2x2": ((2, 1), {}),
    "kernel 2x1": (((2, 1), 2), {"dilation": 2}),
    "kernel 1x1 with padding": ((1,), {"padding": (0, 1)}),
    "kernel 3x5": (((3, 5),), {"padding": "same", "padding_mode": "reflect"}),
}


def _conv(name, channels=32, out=5):
    args, kwargs, *_ = PRODUCTS[name]
    return nn.Conv2d(channels, out, *args, **kwargs)


@pytest.mark.parametrize("name", PRODUCTS)
def test_patches_times_the_matrix_are_the_convolution(name):
    conv = _conv(name)
    x = torch.randn(2, 32, *PRODUCTS[name][2])
    rows = patches(x, conv.kernel_size, conv.stride)
    y = F.linear(rows, conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    assert y.shape[2:] == PRODUCTS[name][3]
    torch.testing.assert_close(y, conv(x), rtol=1e-4, atol=1e-5)  # sums in another order


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_trained_frozen_and_oracle_agree_in_the_integers(name, config):
    layer = BitConv2d.from_conv(_conv(name), config)
    frozen = layer.freeze()
    assert isinstance(frozen, TernaryConv)
    x = torch.randn(3, 32, *PRODUCTS[name][2]) * 3
    y = layer(x)
    assert torch.equal(y, frozen(x))
    assert y.shape == layer.to_linear()(x).shape
    at = frozen.attributes
    expected = reference_ternary_matmul(
        patches(x, frozen.kernel_size, frozen.stride).numpy(),
        frozen.packed_weight.numpy(),
        frozen.scale.numpy(),
        None if frozen.bias is None else frozen.bias.numpy(),
        attributes=at,
    )
    got = y.detach().movedim(1, -1).numpy()
    if at.activation_bits and not at.group_size:
        np.testing.assert_array_equal(got, expected)
    else:
        # float sums, or groups added in another order: a few ulp of the largest partial sum
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_with_float_activations_it_is_the_convolution_with_ternary_weights(name):
    layer = BitConv2d.from_conv(_conv(name), FLOAT)
    frozen = layer.freeze()
    x = torch.randn(2, 32, *PRODUCTS[name][2])
    dense = frozen.to_linear()
    assert torch.equal(dense.weight.flatten(1), dequantize(*layer.ternarize()))
    assert torch.equal(frozen.weight, dense.weight)
    torch.testing.assert_close(frozen(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FLOATS)
def test_other_kernels_are_convolutions_with_ternary_weights(name):
    args, kwargs = FLOATS[name]
    conv = nn.Conv2d(16, 6, *args, **kwargs)
    assert why_float(conv) == name
    layer = BitConv2d.from_conv(conv)
    assert layer.spec.activation_bits == 0
    x = torch.randn(2, 16, 7, 9)
    frozen = layer.freeze()
    assert type(frozen) is nn.Conv2d
    assert torch.equal(layer(x), frozen(x))
    for channel in frozen.weight.detach().abs():
        assert len(channel[channel > 0].unique()) == 1
    assert frozen.weight.shape == conv.weight.shape
    assert not torch.equal(frozen.weight, conv.weight)


@pytest.mark.parametrize("kernel", [1, 4])
def test_conv1d(kernel):
    conv = nn.Conv1d(24, 7, kernel, kernel)
    layer = BitConv1d.from_conv(conv)
    frozen = layer.freeze()
    x = torch.randn(2, 24, 13)
    assert torch.equal(layer(x), frozen(x))
    assert frozen(x).shape == conv(x).shape
    assert type(frozen.to_linear()) is nn.Conv1d
    assert layer.to_linear().weight is conv.weight


def test_an_image_without_a_batch():
    layer = BitConv2d.from_conv(_conv("patches"))
    x = torch.randn(32, 6, 4)
    assert torch.equal(layer(x), layer(x[None])[0])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_of_a_product_equal_those_of_the_dense_convolution(config):
    """Float activations: autograd through a convolution with the ternary weights is the rule."""
    layer = BitConv2d.from_conv(_conv("patches"), config)
    layer.spec = layer.spec.__class__(**{**vars(layer.spec), "activation_bits": 0})
    _check_gradients(layer, torch.randn(2, 32, 6, 4))


@pytest.mark.parametrize("config", [CONFIGS["twn"], CONFIGS["lsq"]], ids=["twn", "lsq"])
def test_gradients_of_a_float_convolution(config):
    layer = BitConv2d.from_conv(nn.Conv2d(16, 6, 3, padding=1), config)
    _check_gradients(layer, torch.randn(2, 16, 5, 5))


def _check_gradients(layer, x):
    x.requires_grad_()
    y = layer(x)
    g = torch.randn_like(y)
    y.backward(g)
    w = dequantize(*layer.ternarize()).view_as(layer.weight).requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    b = layer.bias.detach().clone().requires_grad_()
    F.conv2d(x2, w, b, layer.stride, layer.padding).backward(g)
    expected = w.grad
    if layer.spec.quantizer == "lsq":
        alpha = layer.alpha[:, None, None, None]
        expected = expected * (layer.weight.abs() <= alpha)
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, expected, **close)
    torch.testing.assert_close(x.grad, x2.grad, **close)
    torch.testing.assert_close(layer.bias.grad, b.grad, **close)


def test_training_moves_the_loss_down_and_trits_change():
    target = nn.Conv2d(16, 16, 3, padding=1)
    layer = BitConv2d.from_conv(nn.Conv2d(16, 16, 3, padding=1))
    before = layer.ternarize()[0]
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x = torch.randn(8, 16, 6, 6)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), target(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not torch.equal(before, layer.ternarize()[0])


def test_state_dict_keys_are_those_of_the_convolution_and_load_both_ways():
    conv = _conv("patches")
    layer = BitConv2d.from_conv(conv)
    assert list(layer.state_dict()) == list(conv.state_dict())
    assert layer.weight is conv.weight
    other = BitConv2d(32, 5, 2, 2, config=TernaryConfig(quantizer="lsq"))
    other.load_state_dict(conv.state_dict())
    assert torch.equal(other.weight, conv.weight)
    torch.testing.assert_close(other.alpha.detach(), 2 * conv.weight.detach().abs().mean((1, 2, 3)))


def test_freezing_keeps_scale_and_bias_float32_and_the_geometry():
    frozen = BitConv2d.from_conv(_conv("mixed")).freeze()
    scale = frozen.scale.clone()
    assert torch.equal(frozen.half().scale, scale)
    dense = frozen.float().to_linear()
    assert (dense.kernel_size, dense.stride, dense.padding) == ((1, 2), (3, 2), "valid")


def test_groups_are_refused():
    with pytest.raises(UsageError, match="no groups"):
        BitConv2d(16, 16, 3, groups=16)


def test_bfloat16_autocast_stays_close():
    for layer in (BitConv2d.from_conv(_conv("1x1")), BitConv2d(32, 8, 3)):
        x = torch.randn(2, 32, 6, 6)
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        # bfloat16 keeps 8 bits: each of a few roundings is within 2^-8 of the largest value
        limit = 0.03 * exact.abs().max().item()
        torch.testing.assert_close(y.float(), exact, rtol=0, atol=limit)
