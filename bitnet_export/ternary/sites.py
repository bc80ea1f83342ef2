"""Which modules of a model can be ternary, and for the others the reason why not.

Only looks; swap.py replaces. A site is a dense layer whose whole work is x @ W^T + b, or a
convolution without groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitnet_export.errors import InputError
from bitnet_export.load.hf_bitnet import BitNetLinear, from_hf_layer, is_hf_bitnet
from bitnet_export.load.model import is_finite
from bitnet_export.ternary.attention import SplitMultiheadAttention
from bitnet_export.ternary.config import LayerStatus, TernaryConfig
from bitnet_export.ternary.conv import BitConv1d, BitConv2d, conv_spec, why_float
from bitnet_export.ternary.layers import BitConv1D, BitLayer, BitLinear, TernaryLayer
from bitnet_export.ternary.quantizers import QuantizerSpec, spec_for

Site = tuple[type[BitLayer], Any]
"""The class to build and the module to build it from (weight, bias, rms_norm)."""


@dataclass(frozen=True)
class Decision:
    """What happens to the module at ``status.name``. site and spec: only if it is replaced."""

    status: LayerStatus
    site: Site | None = None
    spec: QuantizerSpec | None = None


def as_site(module: Any) -> Site | None:
    """The dense layer in module, or None. Foreign ternary layers come with their scale applied."""
    kind = type(module)
    foreign = kind.__module__.startswith("transformers.")
    if foreign and kind.__name__ == "Conv1D":
        return BitConv1D, module
    if is_hf_bitnet(module):
        return BitLinear, from_hf_layer(module)
    if kind is BitNetLinear:
        return BitLinear, module
    if isinstance(module, nn.Linear) and (
        kind.forward is nn.Linear.forward or _computes_linear(module)
    ):
        return BitLinear, module
    for dense, ternary in ((nn.Conv1d, BitConv1d), (nn.Conv2d, BitConv2d)):
        own = kind.forward is dense.forward and kind._conv_forward is dense._conv_forward
        if isinstance(module, dense) and own and module.groups == 1:
            return ternary, module
    return None


def _computes_linear(linear: nn.Linear) -> bool:
    """Whether a subclass with a forward of its own (Falcon has one) does what nn.Linear does: it
    has nothing but weight and bias, and two random rows come out the same."""
    own = {*linear._parameters, *linear._buffers, *linear._modules}
    weight = linear.weight
    if own != {"weight", "bias"} or weight.is_meta or not weight.is_floating_point():
        return False
    x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    with torch.no_grad():
        expected = functional.linear(x, weight, linear.bias)
        try:
            found = linear(x)
        except Exception:  # whatever it wants instead of a matrix
            return False
    same = torch.is_tensor(found) and found.shape == expected.shape
    # Two roundings apart at most: float16's are near 1e-3 of the largest value.
    return same and bool((found - expected).abs().max() <= 4e-3 * expected.abs().max())


def build(decision: Decision) -> nn.Module | None:
    """The trainable layer a decision asks for, None where the module stays."""
    if decision.site is None:
        return None
    kind, source = decision.site
    if issubclass(kind, BitConv1d | BitConv2d):
        conv: nn.Module = kind.from_conv(source, decision.spec)
        return conv
    assert issubclass(kind, BitLinear)
    return kind.from_linear(source, decision.spec)


def decide(model: nn.Module, config: TernaryConfig) -> Iterator[Decision]:
    """One Decision per path of every layer with weights, shared modules at each of their paths.

    Raises InputError for weights that hold NaN or Inf.
    """
    tied = _tied_weights(model)
    head = _output_head(model) if config.keep_head else None
    for path, module in model.named_modules(remove_duplicate=False):
        site = as_site(module)
        if site is not None:
            yield _decide_site(path, module, site, config, tied, head)
        elif (status := _kept(path, module)) is not None:
            yield Decision(status)


def _decide_site(
    path: str,
    module: nn.Module,
    site: Site,
    config: TernaryConfig,
    tied: dict[int, str],
    head: nn.Module | None,
) -> Decision:
    """Ternary or kept, for a module that could be either."""
    weight = _matrix(site)
    size = weight.numel()
    reason = config.excluded_by(path)
    if reason is None and id(module.weight) in tied:
        reason = f"shares its weight with the embedding {tied[id(module.weight)]}"
    if reason is None and module is head:
        reason = "output head: no other layer reads an input of its width"
    if reason is None and is_conv(module):
        reason = _why_no_conv(module, config)
    if reason is None and weight.shape[1] < config.min_k:
        reason = f"K={weight.shape[1]} is below min_k={config.min_k}"
    if reason is None and not weight.dtype.is_floating_point:
        reason = f"weights are {weight.dtype}, not floating point"
    if reason is None and not is_finite(weight):
        raise InputError(
            "the weights hold NaN or Inf", where=path, fix="check the checkpoint it came from"
        )
    if reason is not None:
        return Decision(LayerStatus(path, "kept", reason, size))
    spec, how = _spec(module, weight, config)
    if spec.quantizer == "threshold" and not bool((weight.abs() > spec.threshold).any()):
        reason = f"no weight exceeds the threshold {spec.threshold}"
        return Decision(LayerStatus(path, "kept", reason, size))
    return Decision(LayerStatus(path, "ternary", how, size), site, spec)


def _spec(module: nn.Module, weight: Tensor, config: TernaryConfig) -> tuple[QuantizerSpec, str]:
    """spec_for, except that Hugging Face's BitNet layers keep the arithmetic they trained with and
    convolutions may have to run in floating point."""
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return conv_spec(module, config)
    spec, how = spec_for(weight, config)
    if not isinstance(module, BitNetLinear) and not is_hf_bitnet(module):
        return spec, how
    if getattr(module, "online_quant", False):
        spec = QuantizerSpec("absmean", granularity="tensor", exact=True)
        how = "already ternary (absmean, tensor scale), quantized as BitNet trained it"
    return replace(spec, activation_bits=8), how


def is_conv(module: nn.Module) -> bool:
    """Whether it is a convolution of any kind."""
    return isinstance(module, nn.modules.conv._ConvNd)


def _why_no_conv(conv: Any, config: TernaryConfig) -> str | None:
    """The reason against a convolution that only convolutions have."""
    if config.convolutions == "none":
        return 'convolutions="none"'
    if config.convolutions == "matmul" and why_float(conv):
        return f'{why_float(conv)}: would run in floating point (convolutions="matmul")'
    if conv.in_channels < config.min_k:
        what = "channel" if conv.in_channels == 1 else "channels"
        return f"reads {conv.in_channels} {what}, below min_k={config.min_k}: few weights to save"
    return None


def _matrix(site: Site) -> Tensor:
    """The site's weight as [N, K]."""
    kind, module = site
    return kind.as_matrix(module.weight.detach())


def _tied_weights(model: nn.Module) -> dict[int, str]:
    """id of each embedding's Parameter -> the embedding's path."""
    return {
        id(module.weight): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def _output_head(model: nn.Module) -> nn.Module | None:
    """The last dense layer or convolution, if its output is as wide as no other one's input.

    That is what a classifier or language-model head looks like whatever it is called, and what a
    block that returns to the residual width is not. A model of one layer has no head.
    """
    sites = [(m, site) for m in model.modules() if (site := as_site(m)) is not None]
    if len(sites) < 2:
        return None
    widths = {_matrix(site).shape[1] for m, site in sites if not is_conv(m)}
    convs: list[Any] = [m for m in model.modules() if is_conv(m)]
    widths |= {m.in_channels for m in convs}
    last, site = sites[-1]
    return None if _matrix(site).shape[0] in widths else last


def _kept(path: str, module: nn.Module) -> LayerStatus | None:
    """The row for a module that has weights of its own and no ternary form; None without any."""
    if isinstance(module, BitLayer | TernaryLayer):
        return LayerStatus(path, "ternary", "already prepared", module.weight.numel())
    parameters = list(module.parameters(recurse=False))
    size = sum(p.numel() for p in parameters)
    if not size:
        return None
    name = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        reason = "embedding: looked up, not multiplied"
    elif isinstance(module, nn.modules.conv._ConvNd):
        reason = _why_no_site(module)
    elif "norm" in name.lower():
        reason = "normalization stays in floating point"
    elif isinstance(module, nn.MultiheadAttention) and not isinstance(
        module, SplitMultiheadAttention
    ):
        reason = "attention whose projections are all excluded"
    elif isinstance(module, nn.Linear):
        reason = f"{name} has a forward of its own"
    elif any(p.dim() == 3 for p in parameters):
        reason = f"{name} holds stacked weights (a 3-D parameter), which have no ternary form yet"
    else:
        reason = f"{name} is no linear layer"
    return LayerStatus(path or "(model)", "kept", reason, size)


def _why_no_site(conv: Any) -> str:
    """The reason against a convolution that as_site refuses."""
    name = type(conv).__name__
    if conv.transposed:
        return f"{name}: transposed convolutions stay in floating point"
    if conv.groups == conv.in_channels > 1:
        return "depthwise convolution: sums over no channels, stays in floating point"
    if conv.groups > 1:
        return f"convolution with groups={conv.groups} stays in floating point"
    if not isinstance(conv, nn.Conv1d | nn.Conv2d):
        return f"{name} stays in floating point"
    return f"{name} has a forward of its own"
