"""Hugging Face directories from ternary models: packed BitNet, or plain weights.

Packed means ``AutoBitLinear``, offline: uint8 trits of which transformers unpacks four rows a byte,
and a weight_scale that it multiplies by, so that a scale comes back bit for bit (``BitLinear``
divides). It knows one scale a layer, in nn.Linear only. Any architecture of transformers can be
loaded that way, for its quantizer swaps the layers whatever the model is.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.checkpoints.weights import WRAPPER, check_ternary, own_weights, trits_of
from bitnet_export.errors import InputError
from bitnet_export.load.experts import LinearExperts, join_experts, split_experts
from bitnet_export.load.hf_bitnet import (
    CODES_PER_BYTE,
    BitNetLinear,
    absmean_ternary,
    pack_rows,
)
from bitnet_export.load.hf_inputs import HuggingFaceModule
from bitnet_export.load.huggingface import import_transformers, read_config
from bitnet_export.load.model import LoadedModel

# What lies beside the weights and is worth keeping.
_COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "preprocessor_config.json", "chat_template*", "spiece*"),
)


@dataclass
class Written:
    """What became of the layers. packed: as uint8 trits. unpacked: trits in float32, for their
    rows are no multiple of 4. dense: ternary, but no nn.Linear of transformers (convolutions,
    experts): {-s, 0, +s} in float32."""

    packed: list[str] = field(default_factory=list)
    unpacked: list[str] = field(default_factory=list)
    dense: list[str] = field(default_factory=list)


def write_huggingface(
    loaded: LoadedModel, directory: Path, *, base: Path | None = None, packed: bool = True
) -> Written:
    """Write config.json, safetensors and the tokenizer files into ``directory``, which exists.

    base: for a model file that finetune wrote, the Hugging Face directory or GGUF file it was
    trained from. packed: False writes {-s, 0, +s} as plain float32 weights, of any granularity.
    Raises InputError where the model is no Hugging Face model, its names do not fit ``base`` or,
    packed, a layer has more than one scale.
    """
    ternary = check_ternary(loaded)
    model, source = _architecture(loaded, base)
    weights = own_weights(loaded, wrapped=True)
    _check_names(weights, model, loaded.source, source)
    written = Written()
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    if packed:
        tensors = _pack(model, weights, loaded.source, written)
        config.quantization_config = _quantization(model, written)
    else:
        _check_plain(model, loaded.source)
        tensors = {name: value.float() for name, value in _dense(model, weights).items()}
        if hasattr(config, "quantization_config"):  # base's, whose weights were packed
            del config.quantization_config
    stored = {*written.packed, *written.unpacked}
    named = [p if f"{p}.weight" in weights else p.removeprefix(WRAPPER) for p in ternary]
    written.dense = [path for path in named if path not in stored]
    from huggingface_hub import save_torch_state_dict

    tensors = join_experts(model, tensors)
    save_torch_state_dict(tensors, directory, metadata={"format": "pt"})
    config.save_pretrained(directory)
    if source.is_dir():
        _copy_companions(source, directory)
    return written


def _architecture(loaded: LoadedModel, base: Path | None) -> tuple[Any, Path]:
    """(transformers model that names and types the layers, where its configuration is from)."""
    if isinstance(loaded.module, HuggingFaceModule):
        return loaded.module.model, loaded.source
    if base is None:
        raise InputError(
            "it is no Hugging Face model, and which one it was made from is not recorded",
            where=str(loaded.source),
            fix="pass --base DIR, the Hugging Face directory it was fine-tuned from, or --to "
            "state-dict",
        )
    transformers = import_transformers("a Hugging Face directory")
    config = read_config(transformers, base, False)
    name = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, name, None)
    with torch.device("meta"):
        if model_class is not None:
            model = model_class(config)
        else:
            auto = transformers.AutoModel if base.is_dir() else transformers.AutoModelForCausalLM
            model = auto.from_config(config)
    split_experts(model)  # as wrap does
    return model, base


def _check_names(weights: dict[str, Tensor], model: Any, source: Path, base: Path) -> None:
    """Raise InputError where the weights are not those of the architecture."""
    expected = model.state_dict()
    odd = [n for n, w in weights.items() if n not in expected or expected[n].shape != w.shape]
    # A tied weight is listed once; a pooler without weights was left out when it was loaded.
    lacking = [n for n, _ in model.named_parameters() if n not in weights]
    lacking = [n for n in lacking if not n.startswith("pooler.")]
    if odd or lacking:
        raise InputError(
            f"its weights are not those of the {type(model).__name__} in {base}: "
            + ", ".join((odd or lacking)[:4]),
            where=str(source),
            fix="pass --base with the directory it was fine-tuned from",
        )


def _check_plain(model: nn.Module, source: Path) -> None:
    """Raise InputError where layers hold norms of their own, which transformers would drop."""
    normed = [p for p, m in model.named_modules() if getattr(m, "rms_norm", None) is not None]
    if normed:
        raise InputError(
            f"a plain layer has no place for the norm inside {normed[0]} (use_rms_norm)",
            where=str(source),
            fix="write --to hf-bitnet, which keeps it, or --to state-dict",
        )


def _dense(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with latent ones made ternary."""
    found = dict(weights)
    for path, layer in model.named_modules():
        if isinstance(layer, BitNetLinear) and layer.online_quant:
            found[f"{path}.weight"] = absmean_ternary(weights[f"{path}.weight"])
    return found


def _pack(
    model: Any, weights: dict[str, Tensor], source: Path, written: Written
) -> dict[str, Tensor]:
    """The state_dict that transformers' BitNet quantizer reads."""
    tensors = {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}
    refused = []
    experts = _in_experts(model)
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or f"{path}.weight" not in weights:
            continue
        if path in experts:
            continue
        online = isinstance(layer, BitNetLinear) and layer.online_quant
        found = trits_of(weights[f"{path}.weight"].float(), online=online)
        if found is None:
            continue
        trits, scale = found
        if scale.numel() != 1:
            refused.append(f"{path} ({scale.numel()} scales)")
            continue
        if not bool(scale):
            scale = torch.ones_like(scale)  # a layer of zeros, whose bias is divided by it
        whole = trits.shape[0] % CODES_PER_BYTE == 0
        tensors[f"{path}.weight"] = pack_rows(trits) if whole else trits
        tensors[f"{path}.weight_scale"] = scale.reshape(1)
        if f"{path}.bias" in tensors:
            tensors[f"{path}.bias"] = tensors[f"{path}.bias"] / scale  # which it scales as well
        (written.packed if whole else written.unpacked).append(path)
    if refused:
        raise InputError(
            f"Hugging Face's BitNet format has one scale a layer, and {len(refused)} layers have "
            f"more: {', '.join(refused[:3])}",
            where=str(source),
            fix="fine-tune with --granularity tensor, or write plain weights with --to huggingface",
        )
    return tensors


def _in_experts(model: nn.Module) -> set[str]:
    """Paths of experts' projections: in transformers they are no layers that a quantizer swaps."""
    mixtures = [(p, m) for p, m in model.named_modules() if isinstance(m, LinearExperts)]
    return {f"{path}.{name}" for path, m in mixtures for name, _ in m.named_modules()}


def _quantization(model: Any, written: Written) -> dict[str, Any]:
    """config.json's quantization_config."""
    stored = {*written.packed, *written.unpacked}
    experts = _in_experts(model)
    linear = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    linear = {p: m for p, m in linear.items() if p not in experts}
    norms = [getattr(linear[path], "rms_norm", None) for path in stored]
    settings: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": _not_converted(list(linear), stored),
    }
    if any(norm is not None for norm in norms):
        eps = next(norm.variance_epsilon for norm in norms if norm is not None)
        settings |= {"use_rms_norm": True, "rms_norm_eps": eps}
    return settings


def _not_converted(linear: list[str], stored: Collection[str]) -> list[str]:
    """modules_to_not_convert: plain paths, but where transformers, which also matches the ends of
    names, would take ``classifier`` for ``pre_classifier`` an anchored expression."""
    kept = [path for path in linear if path not in stored]
    return [
        rf"^{re.escape(path)}$" if any(other.endswith(path) for other in stored) else path
        for path in kept
    ]


def _copy_companions(source: Path, directory: Path) -> None:
    for pattern in _COMPANIONS:
        for file in source.glob(pattern):
            if file.is_file() and not (directory / file.name).exists():
                shutil.copy2(file, directory / file.name)
