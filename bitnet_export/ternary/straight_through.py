"""The ternary layers' arithmetic in training: forward as deployed, gradients straight through.

Rounding is treated as the identity on the way back. What the quantizers themselves let through is
quantizers.straight_through's; the modules that call this are in layers.py and conv.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitnet_export.ternary import torch_op
from bitnet_export.ternary.quantizers import (
    QuantizerSpec,
    dequantize,
    straight_through,
    ternarize,
)


def ternary_linear_ste(
    x: Tensor, weight: Tensor, alpha: Tensor | None, bias: Tensor | None, spec: QuantizerSpec
) -> Tensor:
    """x [..., K], float weight [N, K] -> y [..., N] as torch_op.ternary_linear gives it."""
    y: Tensor = _TernaryLinear.apply(x, weight, alpha, bias, spec)
    return y


def ternary_weight_ste(weight: Tensor, alpha: Tensor | None, spec: QuantizerSpec) -> Tensor:
    """float weight [N, K] -> trits * scale [N, K] in weight's dtype, for layers whose product is
    computed in floating point."""
    ternary: Tensor = _TernaryWeight.apply(weight, alpha, spec)
    return ternary


class _TernaryLinear(torch.autograd.Function):
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


class _TernaryWeight(torch.autograd.Function):
    """trits * scale, with the quantizer's straight-through gradients."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor | None, spec: QuantizerSpec) -> Tensor:
        trits, scale = ternarize(weight, spec, alpha)
        ctx.spec = spec
        ctx.save_for_backward(weight, alpha, trits)
        return dequantize(trits, scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, alpha, trits = ctx.saved_tensors
        through = grads[0].float()
        grad_weight, grad_alpha = straight_through(through, weight, trits, ctx.spec, alpha)
        return grad_weight.to(weight.dtype), grad_alpha, None
