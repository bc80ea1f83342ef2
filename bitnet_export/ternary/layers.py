"""BitLinear, the layer that is trained, and TernaryLinear, the frozen packed one.

Both compute y through torch_op.ternary_linear, so converting changes no bit of the output. How
weights become trits is in quantizers.py; which layers are replaced is decided in sites.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.op import TernaryAttributes
from bitnet_export.ternary import torch_op
from bitnet_export.ternary.config import TernaryConfig
from bitnet_export.ternary.quantizers import (
    QuantizerSpec,
    dequantize,
    initial_alpha,
    spec_for,
    straight_through,
    ternarize,
)


class _TernaryLinearSTE(torch.autograd.Function):
    """y = ternary_linear(x, Q(weight)), with straight-through gradients.

    The rounding of activations and weights is treated as the identity: dL/dx uses the ternary
    weights, dL/dweight the int8 activations, then quantizers.straight_through. Under autocast the
    three matmuls run in its dtype; the int8 values and the trits are exact in bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        alpha: Tensor | None,
        bias: Tensor | None,
        spec: QuantizerSpec,
    ) -> Tensor:
        dtype = _compute_dtype(x)
        trits, scale = ternarize(weight, spec, alpha)
        with torch.autocast(x.device.type, enabled=False):
            left, a = torch_op.quantize_input(x, spec.activation_bits)
            low, row_scale, group_size = trits, scale, spec.group_size
            if group_size and dtype != torch.float32:
                # One matmul in place of one per group; exactness is lost to dtype anyway.
                low, row_scale, group_size = dequantize(trits, scale), scale.new_ones(1), 0
            left, low = left.to(dtype), low.to(dtype)
            y = torch_op.project(left, a, low, row_scale, bias, group_size)
        if any(ctx.needs_input_grad):
            ctx.spec, ctx.x_shape, ctx.x_dtype = spec, x.shape, x.dtype
            ctx.save_for_backward(left, a, weight, alpha, trits, scale)
        out_dtype = x.dtype if dtype == torch.float32 else dtype
        return y.reshape(*x.shape[:-1], trits.shape[0]).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, a, weight, alpha, trits, scale = ctx.saved_tensors
        needs_x, needs_weight, needs_alpha, needs_bias, _ = ctx.needs_input_grad
        dtype, spec = left.dtype, ctx.spec
        grad_x = grad_weight = grad_alpha = grad_bias = None
        with torch.autocast(left.device.type, enabled=False):
            grad = grads[0].reshape(-1, trits.shape[0]).to(dtype)
            if needs_x:
                ternary = dequantize(trits, scale).to(dtype)
                grad_x = (grad @ ternary).reshape(ctx.x_shape).to(ctx.x_dtype)
            if needs_weight or needs_alpha:
                inputs = left if a is None else (left * a).to(dtype)
                through = (grad.t() @ inputs).float()
                grad_weight, grad_alpha = straight_through(through, weight, trits, spec, alpha)
                grad_weight = grad_weight.to(weight.dtype)
            if needs_bias:
                grad_bias = grad.float().sum(0)
        return grad_x, grad_weight, grad_alpha, grad_bias, None


def _compute_dtype(x: Tensor) -> torch.dtype:
    """What the matmuls run in: float32, or autocast's dtype."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32


class BitLinear(nn.Linear):
    """nn.Linear whose forward uses the ternary form of its float weight; the training form.

    State dict keys stay ``weight`` and ``bias``; the learned-scale quantizers add ``alpha``,
    which is computed when a plain nn.Linear's state dict is loaded. Forward in train and eval
    mode is the same and equals ``TernaryLinear.from_bitlinear(self)`` bit for bit (float32; under
    autocast the matmul runs in autocast's dtype).
    """

    alpha: nn.Parameter | None
    transposed = False  # whether weight is stored [K, N]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: TernaryConfig | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rms_norm: nn.Module | None = None
        self._adopt(spec_for(self.matrix, config or TernaryConfig())[0])

    def _adopt(self, spec: QuantizerSpec) -> None:
        self.spec = spec
        alpha = initial_alpha(self.matrix, spec)
        self.register_parameter("alpha", None if alpha is None else nn.Parameter(alpha))

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        spec: QuantizerSpec | TernaryConfig | None = None,
    ) -> BitLinear:
        """linear: anything with weight [N, K] ([K, N] for BitConv1D) and bias -> a BitLinear on
        the same Parameter objects. spec: how; a TernaryConfig is resolved for this weight."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        weight = linear.weight
        new.register_parameter("weight", weight)
        new.register_parameter("bias", getattr(linear, "bias", None))
        new.out_features, new.in_features = new.matrix.shape
        new.rms_norm = getattr(linear, "rms_norm", None)
        if not isinstance(spec, QuantizerSpec):
            spec = spec_for(new.matrix, spec or TernaryConfig())[0]
        new._adopt(spec)
        return new.train(linear.training)

    @property
    def matrix(self) -> Tensor:
        """The float weight as [N, K], however it is stored."""
        return self.weight.t() if self.transposed else self.weight

    def ternarize(self) -> tuple[Tensor, Tensor]:
        """(trits [N, K] float32, scale float32) as the forward uses them."""
        return ternarize(self.matrix, self.spec, self.alpha)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return _TernaryLinearSTE.apply(input, self.matrix, self.alpha, self.bias, self.spec)

    def to_linear(self) -> nn.Module:
        """The nn.Linear it was, with the float weight (the same Parameter objects)."""
        return _restore(self, self.weight, self.bias)

    def extra_repr(self) -> str:
        s = self.spec
        return f"{super().extra_repr()}, {s.quantizer}, {s.granularity}, A{s.activation_bits}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Loading a plain nn.Linear's entries sets alpha to its start value for that weight."""
        key = prefix + "alpha"
        if self.alpha is not None and key not in state_dict and prefix + "weight" in state_dict:
            weight = state_dict[prefix + "weight"]
            start = initial_alpha(weight.t() if self.transposed else weight, self.spec)
            state_dict[key] = start
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BitConv1D(BitLinear):
    """BitLinear in the place of Hugging Face's Conv1D (GPT-2): weight stays stored [K, N]."""

    transposed = True

    @property
    def nx(self) -> int:
        """Conv1D's name for in_features."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Conv1D's name for out_features."""
        return self.out_features


class TernaryLinear(nn.Module):
    """A frozen ternary layer: packed_weight uint8 [N, K'/4], scale and bias float32.

    Made by ``from_bitlinear``. Not trainable: no gradient flows through it.
    """

    packed_weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        attributes: TernaryAttributes,
        packed_weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.register_buffer("packed_weight", packed_weight)
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.rms_norm: nn.Module | None = None
        self.transposed = False
        self.dense_dtype = torch.float32

    @classmethod
    def from_bitlinear(cls, layer: BitLinear) -> TernaryLinear:
        """Freeze a BitLinear; its weight is read once and no longer referred to."""
        trits, scale = layer.ternarize()
        n, k = trits.shape
        at = TernaryAttributes(k, n, layer.spec.group_size, layer.spec.activation_bits)
        new = cls(at, torch_op.pack_trits(trits), scale.clone(), layer.bias)
        new.rms_norm = layer.rms_norm
        new.transposed = layer.transposed
        new.dense_dtype = layer.weight.dtype
        return new.train(layer.training)

    @property
    def in_features(self) -> int:
        """K."""
        return self.attributes.K

    @property
    def out_features(self) -> int:
        """N."""
        return self.attributes.N

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, [N, K] ([K, N] in a Conv1D's place), computed on each access.

        For code that asks a layer for its weight's dtype or device, and for reading.
        """
        trits = torch_op.unpack_trits(self.packed_weight, self.in_features)
        weight = dequantize(trits, self.scale).to(self.dense_dtype)
        return weight.t() if self.transposed else weight

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N] in the input's dtype."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        at = self.attributes
        return torch_op.ternary_matmul(
            input,
            self.packed_weight,
            self.scale,
            self.bias,
            at.K,
            at.N,
            at.group_size,
            at.activation_bits,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> TernaryLinear:
        """model.half() and the like move the layer but leave scale and bias float32: that is the
        op's contract, and rounded scales would change every output."""
        kept = {name: getattr(self, name) for name in ("scale", "bias")}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            if original is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, original.to(getattr(self, name).device))
        return self

    def to_linear(self) -> nn.Module:
        """An nn.Linear (or Conv1D) with the dequantized weight; the trits are not trainable."""
        bias = None if self.bias is None else nn.Parameter(self.bias.to(self.dense_dtype))
        return _restore(self, nn.Parameter(self.weight.contiguous()), bias)

    def extra_repr(self) -> str:
        at = self.attributes
        return (
            f"in_features={at.K}, out_features={at.N}, bias={self.bias is not None},"
            f" group_size={at.group_size}, activation_bits={at.activation_bits}"
        )


def _restore(layer: BitLinear | TernaryLinear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer of the kind ``layer`` replaced, on the given parameters."""
    dense: Any
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(layer.out_features, layer.in_features)
    else:
        with torch.device("meta"):
            dense = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    dense.weight = weight
    dense.bias = bias
    if layer.rms_norm is not None:
        dense = nn.Sequential(layer.rms_norm, dense)
    return dense.train(layer.training)
