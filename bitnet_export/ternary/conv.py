"""Ternary convolutions: BitConv1d and BitConv2d, which are trained, and TernaryConv, frozen.

A convolution whose kernel is 1, or as large as its stride, reads every input pixel for one output
pixel at most: it is a matrix product on the channels-last view, with no im2col, and runs as
TernaryMatMul. Any other kernel has ternary weights but a floating-point convolution, and freezes
to an ordinary nn.Conv. Groups, and convolutions that stay dense, are sites.py's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.errors import UsageError
from bitnet_export.op import TernaryAttributes
from bitnet_export.ternary import torch_op
from bitnet_export.ternary.config import TernaryConfig
from bitnet_export.ternary.layers import BitLayer, TernaryLayer
from bitnet_export.ternary.quantizers import QuantizerSpec, dequantize, spec_for
from bitnet_export.ternary.straight_through import ternary_linear_ste, ternary_weight_ste


def why_float(conv: nn.Conv1d | nn.Conv2d) -> str:
    """What keeps a convolution from being a matrix product: "kernel 3x3"; "" if nothing does."""
    axes = list(zip(conv.kernel_size, conv.stride, strict=True))
    kernel = "x".join(map(str, conv.kernel_size))
    if any(k not in (1, s) for k, s in axes) or (
        any(k > 1 and d > 1 for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    ):
        return f"kernel {kernel}"
    if not _is_unpadded(conv):
        return f"kernel {kernel} with padding"
    return ""


def _is_unpadded(conv: nn.Conv1d | nn.Conv2d) -> bool:
    if isinstance(conv.padding, str):
        return conv.padding == "valid" or all(k == 1 for k in conv.kernel_size)
    return not any(conv.padding)


def patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """x [B, C, *size] -> [B, *out, C * prod(kernel)]: what each output pixel reads, in the order
    of the weight's [C, *kernel]. Along each axis the kernel is 1 or equals the stride."""
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        size = x.shape[axis]
        if k == 1 and s > 1:
            x = x[(slice(None),) * axis + (slice(None, None, s),)]
        elif not isinstance(size, int) or size % k:  # a convolution drops an incomplete patch
            x = x.narrow(axis, 0, size // k * k)
    if all(k == 1 for k in kernel):
        return x.movedim(1, -1)
    n = len(kernel)
    for axis in reversed(range(n)):
        x = x.unflatten(axis + 2, (-1, kernel[axis]))
    outside = [2 + 2 * i for i in range(n)]
    inside = [3 + 2 * i for i in range(n)]
    return x.permute(0, *outside, 1, *inside).flatten(n + 1)


def conv_spec(conv: nn.Conv1d | nn.Conv2d, config: TernaryConfig) -> tuple[QuantizerSpec, str]:
    """quantizers.spec_for for a convolution: one that runs in floating point has float activations,
    and channel scales in place of group scales, which its file form has none for."""
    weight, reason = _BitConv.as_matrix(conv.weight.detach()), why_float(conv)
    if not reason:
        return spec_for(weight, config)
    if config.granularity == "group":
        config = replace(config, granularity="channel", group_size=0)
    spec, how = spec_for(weight, replace(config, activation_bits=0))
    return spec, f"ternary weights ({how}), runs as floating point Conv: {reason}"


def dense_conv(like: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """An nn.Conv1d or nn.Conv2d of ``like``'s geometry on the given Parameters."""
    kind = nn.Conv1d if weight.dim() == 3 else nn.Conv2d
    with torch.device("meta"):
        dense = kind(**_geometry(like), bias=bias is not None)
    dense.weight = weight
    dense.bias = bias
    return dense.train(like.training)


def _geometry(conv: Any) -> dict[str, Any]:
    """nn.Conv's arguments but for the bias."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    return {name: getattr(conv, name) for name in (*names, "groups", "padding_mode")}


class _BitConv(BitLayer):
    """What BitConv1d and BitConv2d share; mixed into nn.Conv1d and nn.Conv2d."""

    def __init__(self, *args: Any, config: TernaryConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        conv: Any = self
        if conv.groups != 1:
            raise UsageError(
                f"a ternary convolution has no groups, got groups={conv.groups}",
                where=type(self).__name__,
                fix="leave it an nn.Conv",
            )
        self._adopt(conv_spec(conv, config or TernaryConfig())[0])

    @classmethod
    def from_conv(cls, conv: Any, spec: QuantizerSpec | TernaryConfig | None = None) -> Any:
        """conv: an nn.Conv1d or nn.Conv2d without groups -> the same on the same Parameter
        objects. spec: how; a TernaryConfig is resolved for this weight."""
        new: Any = cls.__new__(cls)
        with torch.device("meta"):
            super(_BitConv, new).__init__(**_geometry(conv), bias=conv.bias is not None)
        new.weight, new.bias = conv.weight, conv.bias
        if not isinstance(spec, QuantizerSpec):
            spec = conv_spec(conv, spec or TernaryConfig())[0]
        new._adopt(spec)
        return new.train(conv.training)

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """weight [N, C, *kernel] -> [N, C * prod(kernel)]."""
        return weight.flatten(1)

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, *size], or without B -> [B, N, *out]."""
        conv: Any = self
        if why_float(conv):
            weight = ternary_weight_ste(self.matrix, self.alpha, self.spec).view_as(self.weight)
            y: Tensor = conv._conv_forward(input, weight, conv.bias)
            return y
        return _channels_first(
            input,
            conv.kernel_size,
            conv.stride,
            lambda x: ternary_linear_ste(x, self.matrix, self.alpha, conv.bias, self.spec),
        )

    def freeze(self) -> nn.Module:
        """TernaryConv where it is a matrix product; else a dense convolution whose weights are
        {-s, 0, +s}. Outputs do not change by a bit (float32)."""
        conv: Any = self
        if not why_float(conv):
            return TernaryConv.from_bitconv(self)
        weight = dequantize(*self.ternarize()).to(self.weight.dtype).view_as(self.weight)
        return dense_conv(self, nn.Parameter(weight), conv.bias)

    def to_linear(self) -> nn.Module:
        """The nn.Conv it was, with the float weight (the same Parameter objects)."""
        conv: Any = self
        return dense_conv(self, conv.weight, conv.bias)


class BitConv1d(_BitConv, nn.Conv1d):
    """nn.Conv1d whose forward uses the ternary form of its float weight (not BitConv1D, which
    stands for Hugging Face's Conv1D, a linear layer)."""


class BitConv2d(_BitConv, nn.Conv2d):
    """nn.Conv2d whose forward uses the ternary form of its float weight; the training form.

    State dict keys are nn.Conv2d's. Activations become int8, one scale a pixel (a patch, where the
    kernel equals the stride), if it can run as TernaryMatMul, and stay float otherwise.
    """


class TernaryConv(TernaryLayer):
    """A frozen ternary convolution that is a matrix product. Made by ``from_bitconv``."""

    def __init__(
        self,
        geometry: dict[str, Any],
        attributes: TernaryAttributes,
        packed_weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(attributes, packed_weight, scale, bias)
        for name, value in geometry.items():
            setattr(self, name, value)
        self.kernel_size: tuple[int, ...] = geometry["kernel_size"]
        self.stride: tuple[int, ...] = geometry["stride"]
        self.in_channels: int = geometry["in_channels"]

    @classmethod
    def from_bitconv(cls, layer: Any) -> TernaryConv:
        """Freeze a BitConv1d or BitConv2d; its weight is read once and no longer referred to."""
        trits, scale = layer.ternarize()
        n, k = trits.shape
        at = TernaryAttributes(k, n, layer.spec.group_size, layer.spec.activation_bits)
        packed = torch_op.pack_trits(trits)
        new = cls(_geometry(layer), at, packed, scale.clone(), layer.bias)
        new.dense_dtype = layer.weight.dtype
        return new.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight [N, C, *kernel], computed on each access."""
        return self.dense_matrix().reshape(-1, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        """input [B, C, *size], or without B -> [B, N, *out] in the input's dtype."""
        return _channels_first(input, self.kernel_size, self.stride, self.product)

    def to_linear(self) -> nn.Module:
        """An nn.Conv with the dequantized weight; the trits are not trainable."""
        return dense_conv(self, nn.Parameter(self.weight), self.dense_bias())


def _channels_first(
    input: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    product: Callable[[Tensor], Tensor],
) -> Tensor:
    """input [B, C, *size] or [C, *size] -> product of its patches, channels where they were."""
    alone = input.dim() < len(kernel) + 2
    y = product(patches(input[None] if alone else input, kernel, stride)).movedim(-1, 1)
    return y[0] if alone else y
