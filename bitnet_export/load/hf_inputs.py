"""What a transformers model is fed and what it gives back, as tensors with names.

inputs_of goes by the model's main input; input_specs reads the shapes from its configuration.
Loading the model is huggingface.py's work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from bitnet_export.errors import InputError, first_line
from bitnet_export.load.inputs import InputSpec

# Pixels a side where the config does not say: that of ImageNet's classifiers.
USUAL_IMAGE = 224
# A second of speech, where raw samples are read.
USUAL_SAMPLES = 16000
Wrapper = TypeVar("Wrapper", bound=nn.Module)
OWN_WAY = "write it with bitnet_export.save(model, path, example_inputs) and pass that file"


class HuggingFaceModule(nn.Module):
    """A transformers model with tensors in and tensors out, in the order of output_names.

    wrapper_class gives it a forward.
    """

    def __init__(self, model: nn.Module, output_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.output_names = list(output_names)

    def run(self, inputs: dict[str, torch.Tensor]) -> Any:
        """The outputs that are kept: a tensor, or a tuple of them."""
        outputs = self.model(**inputs, return_dict=True)
        kept = tuple(outputs[name] for name in self.output_names)
        return kept[0] if len(kept) == 1 else kept


def wrapper_class(base: type[Wrapper], names: Sequence[str]) -> type[Wrapper]:
    """``base`` with a forward whose arguments are ``names`` and go to its run: torch.export,
    torch.onnx and whoever calls the module by position read them from the signature."""

    def forward(self: Any, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        return self.run(dict(zip(names, args, strict=False)) | kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    described: Callable[..., Any] = forward
    described.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in ("self", *names)]
    )
    made: type[Wrapper] = type(base.__name__, (base,), {"forward": described})
    return made


TEXT = ("input_ids", "attention_mask")
SEGMENTED_TEXT = (*TEXT, "token_type_ids")
# Two towers that meet in a similarity: as many images as texts.
TEXT_AND_IMAGE = (*TEXT, "pixel_values")
DECODER = "decoder_input_ids"
# What is read, by the main input.
_INPUTS = {name: (name,) for name in ("pixel_values", "input_values", "input_features")} | {
    "input_ids": TEXT
}


def inputs_of(model: nn.Module, config: Any, path: Path, given: Collection[str]) -> tuple[str, ...]:
    """The inputs of a model, in order. given: what the user's data holds, empty without any: an
    optional input that is not among them is left out. Raises InputError for another main input."""
    main = getattr(model, "main_input_name", "input_ids")
    if main not in _INPUTS:
        raise InputError(
            f"{type(model).__name__} takes {main}, for which there are no example inputs",
            where=str(path),
            fix=OWN_WAY,
        )
    names = _INPUTS[main]
    if getattr(config, "is_encoder_decoder", False):
        return (*names, DECODER)
    if names is not TEXT:
        return names
    takes = inspect.signature(model.forward).parameters
    if "pixel_values" in takes and hasattr(model, "logit_scale"):
        return TEXT_AND_IMAGE
    wants_segments = not given or "token_type_ids" in given
    if "token_type_ids" in takes and wants_segments and getattr(config, "type_vocab_size", 0) > 1:
        return SEGMENTED_TEXT
    return names


def input_specs(names: Sequence[str], config: Any, notes: list[str]) -> list[InputSpec]:
    """What config says about the inputs; what it does not say is assumed and noted."""
    return [_spec(name, config, notes) for name in names]


def _spec(name: str, config: Any, notes: list[str]) -> InputSpec:
    if name == "pixel_values":
        return _image(_part(config, "vision_config", "encoder"), notes)
    if name == "input_values":
        return InputSpec(name, _audio(config))
    if name == "input_features":
        return InputSpec(name, _spectrum(config))
    decodes = name == DECODER
    vocabulary = _text_part(config, decodes).vocab_size
    axis = "decoder_sequence" if decodes else "sequence"
    return InputSpec(name, ("batch", axis), "int64", high=vocabulary)


def longest(config: Any) -> int | None:
    """The longest text that a model has positions for; None where its config does not say."""
    found: int | None = getattr(_text_part(config), "max_position_embeddings", None)
    return found


def _text_part(config: Any, decoder: bool = False) -> Any:
    """The configuration of what reads tokens. transformers' own answer leaves two towers whole."""
    return _part(config.get_text_config(decoder=decoder), "text_config")


def _part(config: Any, *names: str) -> Any:
    """The first of these parts that config has, or config itself."""
    found = (getattr(config, name, None) for name in names)
    return next((part for part in found if hasattr(part, "to_dict")), config)


def _image(config: Any, notes: list[str]) -> InputSpec:
    size = getattr(config, "image_size", None)
    if size is None:  # a ResNet takes any
        size = USUAL_IMAGE
        notes.append(
            f"config.json names no image size: {size} x {size} pixels are assumed; "
            f"--input pixel_values:batchx3x{size}x{size} sets them"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return InputSpec("pixel_values", ("batch", getattr(config, "num_channels", 3), height, width))


def _audio(config: Any) -> tuple[int | str, ...]:
    """Raw samples, or for the Audio Spectrogram Transformer its spectrogram."""
    if config.model_type == "audio-spectrogram-transformer":
        return ("batch", config.max_length, config.num_mel_bins)
    return ("batch", USUAL_SAMPLES)


def _spectrum(config: Any) -> tuple[int | str, ...]:
    """Whisper: mel bins by frames, two frames a position; others: frames by features."""
    if config.model_type == "whisper":
        return ("batch", config.num_mel_bins, 2 * config.max_source_positions)
    names = ("feature_projection_input_dim", "input_feat_per_channel", "num_mel_bins")
    features = next((getattr(config, n) for n in names if hasattr(config, n)), 80)
    return ("batch", "sequence", features)


def output_names(model: nn.Module, inputs: dict[str, torch.Tensor], path: Path) -> list[str]:
    """The tensors among the model's outputs, by name, in order. Raises InputError for a model that
    takes other inputs than those of its kind."""
    try:
        with torch.no_grad():
            outputs = model(**inputs, return_dict=True)
        names = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
    except Exception as e:  # whatever the model raises
        raise InputError(
            f"{type(model).__name__} does not run on {', '.join(inputs)} alone: {first_line(e)}",
            where=str(path),
            fix=OWN_WAY,
        ) from e
    if not names:
        raise InputError(f"{type(model).__name__} returns no tensors", where=str(path), fix=OWN_WAY)
    # An encoder-decoder also hands out its encoder's states: a by-product of the logits.
    return [n for n in names if not (n.startswith("encoder_") and len(names) > 1)]
