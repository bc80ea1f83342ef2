"""The weights of a loaded model under the names of the module it came from, and its trits.

A torch.export program is read again as the file has it: restored modules transpose some weights
and rename others (load/restore_modules.py), the file's own state_dict does neither.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from bitnet_export.errors import InputError, StageError
from bitnet_export.load.exported_program import read_program
from bitnet_export.load.hf_bitnet import BitNetLinear
from bitnet_export.load.hf_inputs import HuggingFaceModule
from bitnet_export.load.model import LoadedModel
from bitnet_export.ternary.config import TernaryConfig
from bitnet_export.ternary.quantizers import QuantizerSpec, spec_for, ternarize

WRAPPER = "model."


def own_weights(loaded: LoadedModel, *, wrapped: bool = False) -> dict[str, Tensor]:
    """Name -> tensor, on no device but the CPU, names and layouts those of the original module.

    wrapped: a program that was saved from a Hugging Face model, whose names have our wrapper's
    prefix. Raises InputError for an ONNX file.
    """
    module = loaded.module
    if module is None:
        raise InputError(
            "an ONNX file has no module whose checkpoint could be written",
            where=str(loaded.source),
            fix="pass the PyTorch model it came from",
        )
    if loaded.kind == "exported_program":
        program, _ = read_program(loaded.source)
        weights = {name: value.detach() for name, value in program.state_dict.items()}
        if wrapped and all(name.startswith(WRAPPER) for name in weights):
            weights = {name.removeprefix(WRAPPER): value for name, value in weights.items()}
        return weights
    if isinstance(module, HuggingFaceModule):
        module = module.model
    return {name: value.detach() for name, value in module.state_dict().items()}


def trits_of(weight: Tensor, *, online: bool = False) -> tuple[Tensor, Tensor] | None:
    """weight [N, K] -> (trits [N, K] float32, scale [1], [N] or [N, G] float32), or None where it
    is not ternary. online: latent BitNet weights, made ternary by absmean."""
    if online:
        return ternarize(weight, QuantizerSpec("absmean", granularity="tensor"))
    spec, _ = spec_for(weight, TernaryConfig())
    return ternarize(weight, spec) if spec.exact else None


def ternary_layers(module: nn.Module) -> list[str]:
    """Paths of the layers whose weights, a matrix or a convolution's, are trits times a scale."""
    found = []
    for path, layer in module.named_modules():
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
            continue
        if isinstance(layer, nn.Embedding) or not weight.is_floating_point():
            continue
        online = isinstance(layer, BitNetLinear) and layer.online_quant
        if trits_of(weight.detach().flatten(1), online=online) is not None:
            found.append(path)
    return found


def check_ternary(loaded: LoadedModel) -> list[str]:
    """ternary_layers of a loaded model. Raises InputError where there is none."""
    layers = ternary_layers(loaded.module) if loaded.module is not None else []
    if loaded.module is not None and not layers:
        raise InputError(
            "none of its layers is ternary: there is nothing to convert",
            where=str(loaded.source),
            fix=f"make it ternary first: bitnet-export finetune {loaded.source} --data YOUR_DATA",
        )
    return layers


def write_state_dict(loaded: LoadedModel, path: Path, *, wrapped: bool = False) -> int:
    """Write the weights to ``path``, whole or not at all: safetensors by that suffix, else
    torch.save; -> how many layers are ternary.

    Ternary layers hold {-s, 0, +s}, or for an online BitNet checkpoint its latent weights:
    ``prepare`` finds the same trits and scale in them, so that training goes on where it stood.
    """
    layers = check_ternary(loaded)
    weights = own_weights(loaded, wrapped=wrapped)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(weights, temporary, path.suffix)
        os.replace(temporary, path)
    except OSError as error:
        raise StageError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            fix="free some space or choose another place with -o",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(layers)


def _save(weights: dict[str, Tensor], path: Path, suffix: str) -> None:
    if suffix != ".safetensors":
        torch.save(weights, path)
        return
    from safetensors.torch import save_file

    # One name a storage is the format's rule; a tied weight is written under each of its names,
    # so that load_state_dict finds them all.
    whole: dict[str, Any] = {name: value.clone().contiguous() for name, value in weights.items()}
    save_file(whole, path, metadata={"format": "pt"})
