"""Hugging Face's BitNet layers -> plain layers that mean the same, before anything runs them.

transformers has two, whatever the architecture: ``BitLinear`` (packed uint8, divided by
weight_scale) and ``AutoBitLinear`` (multiplied by weight_scale; or, online, latent weights
quantized at each call). Both compile their arithmetic with torch.compile, quantize activations as
they go and refuse ``.float()``. Here their trits and scale move, unchanged, into BitNetLinear,
which keeps the optional norm and leaves int8 activations to the ternary layer made from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_export.errors import InputError

HF_KINDS = ("AutoBitLinear", "BitLinear")
CODES_PER_BYTE = 4
# transformers' floor of mean |w|.
SCALE_FLOOR = 1e-5


class BitNetLinear(nn.Linear):
    """x [..., K] -> [..., N] with the weights of a BitNet layer, in floating point.

    online_quant: ``weight`` [N, K] holds latent values, made ternary by absmean at each call as in
    training; else it holds {-s, 0, +s}. rms_norm: applied to x first, or None.
    """

    online_quant: bool
    rms_norm: nn.Module | None

    def forward(self, input: Tensor) -> Tensor:
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        weight = absmean_ternary(self.weight) if self.online_quant else self.weight
        return functional.linear(input, weight, self.bias)


def absmean_ternary(weight: Tensor) -> Tensor:
    """weight [N, K] -> {-s, 0, +s}, s = mean |w|; straight-through (BitNet b1.58,
    arXiv:2402.17764; the operations are those of transformers' WeightQuant, in order)."""
    scale = 1.0 / weight.abs().mean().clamp(min=SCALE_FLOOR)
    ternary = (weight * scale).round().clamp(-1, 1) / scale
    return ternary.detach() + (weight - weight.detach()) if weight.requires_grad else ternary


def is_hf_bitnet(module: nn.Module) -> bool:
    """Whether module is one of transformers' BitNet layers."""
    kind = type(module)
    return kind.__module__.startswith("transformers.") and kind.__name__ in HF_KINDS


def fold_bitnet_layers(model: nn.Module) -> list[str]:
    """Replace every BitNet layer of transformers, in place; -> their paths."""
    found = [(path, m) for path, m in model.named_modules() if is_hf_bitnet(m)]
    for path, module in found:
        model.set_submodule(path, from_hf_layer(module, path))
    return [path for path, _ in found]


def from_hf_layer(module: Any, path: str = "") -> BitNetLinear:
    """One of transformers' BitNet layers -> what it means, in float32. path: for the InputError
    where the packed weights hold a code that is no trit."""
    online = bool(getattr(module, "online_quant", False))
    bias = None if module.bias is None else module.bias.detach().float()
    if type(module).__name__ == "BitLinear":
        weight = _checked(unpack_rows(module.weight), path) / module.weight_scale.float()
    elif online:
        weight = module.weight.detach().float()
    else:
        scale = module.weight_scale.float()
        weight = _checked(module.weight.detach().float(), path) * scale
        bias = None if bias is None else bias * scale  # it scales the whole of x W^T + b
    with torch.device("meta"):
        new = BitNetLinear(weight.shape[1], weight.shape[0], bias is not None)
    new.weight = nn.Parameter(weight)
    if bias is not None:
        new.bias = nn.Parameter(bias)
    new.online_quant = online
    new.rms_norm = module.rms_norm
    return new.train(module.training)


def _checked(trits: Tensor, path: str) -> Tensor:
    if bool((trits.abs() > 1).any()):
        raise InputError(
            "its packed weights hold code 3, which stands for no trit: a damaged checkpoint",
            where=path or "BitNet layer",
            fix="download or write the checkpoint again",
        )
    return trits


def unpack_rows(packed: Tensor) -> Tensor:
    """packed uint8 [R, K] -> trits [4R, K] float32. Byte row r holds rows r, R+r, 2R+r and 3R+r
    from its low bits up, code = w + 1."""
    quarters = [(packed >> 2 * i) & 3 for i in range(CODES_PER_BYTE)]
    return torch.cat(quarters).float() - 1


def pack_rows(trits: Tensor) -> Tensor:
    """trits [N, K] in {-1, 0, 1}, N a multiple of 4 -> uint8 [N/4, K]; inverse of unpack_rows."""
    codes = (trits + 1).to(torch.uint8)
    quarters = codes.chunk(CODES_PER_BYTE)
    packed = torch.zeros_like(quarters[0])
    for i, quarter in enumerate(quarters):
        packed |= quarter << 2 * i
    return packed
