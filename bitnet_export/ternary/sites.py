"""Which modules of a model can be ternary, and for the others the reason why not.

Only looks; swap.py replaces. A site is a dense layer whose whole work is x @ W^T + b.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.errors import InputError
from bitnet_export.load.hf_bitnet import BitNetLinear, from_hf_layer, is_hf_bitnet
from bitnet_export.ternary.attention import SplitMultiheadAttention
from bitnet_export.ternary.config import LayerStatus, TernaryConfig
from bitnet_export.ternary.layers import BitConv1D, BitLinear, TernaryLinear
from bitnet_export.ternary.quantizers import QuantizerSpec, spec_for

Site = tuple[type[BitLinear], Any]
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
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return BitLinear, module
    return None


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
    if reason is None and weight.shape[1] < config.min_k:
        reason = f"K={weight.shape[1]} is below min_k={config.min_k}"
    if reason is None and not weight.dtype.is_floating_point:
        reason = f"weights are {weight.dtype}, not floating point"
    if reason is None and not bool(torch.isfinite(weight).all()):
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
    """spec_for, except that Hugging Face's BitNet layers keep the arithmetic they trained with."""
    spec, how = spec_for(weight, config)
    if not isinstance(module, BitNetLinear) and not is_hf_bitnet(module):
        return spec, how
    if getattr(module, "online_quant", False):
        spec = QuantizerSpec("absmean", granularity="tensor")
        how = "absmean, tensor scale, as BitNet trained it"
    return replace(spec, activation_bits=8), how


def _matrix(site: Site) -> Tensor:
    """The site's weight as [N, K]."""
    kind, module = site
    weight = module.weight.detach()
    return weight.t() if kind.transposed else weight


def _tied_weights(model: nn.Module) -> dict[int, str]:
    """id of each embedding's Parameter -> the embedding's path."""
    return {
        id(module.weight): path
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }


def _output_head(model: nn.Module) -> nn.Module | None:
    """The last dense layer, if its output is as wide as no other dense layer's input.

    That is what a classifier or language-model head looks like whatever it is called, and what a
    block that returns to the residual width is not. A model of one layer has no head.
    """
    sites = [(m, site) for m in model.modules() if (site := as_site(m)) is not None]
    if len(sites) < 2:
        return None
    widths = {_matrix(site).shape[1] for _, site in sites}
    last, site = sites[-1]
    return None if _matrix(site).shape[0] in widths else last


def _kept(path: str, module: nn.Module) -> LayerStatus | None:
    """The row for a module that has weights of its own and no ternary form; None without any."""
    if isinstance(module, BitLinear | TernaryLinear):
        size = module.in_features * module.out_features
        return LayerStatus(path, "ternary", "already prepared", size)
    parameters = list(module.parameters(recurse=False))
    size = sum(p.numel() for p in parameters)
    if not size:
        return None
    name = type(module).__name__
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        reason = "embedding: looked up, not multiplied"
    elif isinstance(module, nn.modules.conv._ConvNd):
        reason = "convolutions stay in floating point"
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
