"""What a transformers model is fed and what it gives back, as tensors with names.

module_kind picks a wrapper by the model's main input; input_specs reads the shapes from its
configuration. Loading the model is huggingface.py's work.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError, first_line
from bitnet_export.load.inputs import InputSpec

# Pixels a side where the config does not say: that of ImageNet's classifiers.
USUAL_IMAGE = 224
# A second of speech, where raw samples are read.
USUAL_SAMPLES = 16000
OWN_WAY = "write it with bitnet_export.save(model, path, example_inputs) and pass that file"


class HuggingFaceModule(nn.Module):
    """A transformers model with tensors in and tensors out, in the order of output_names.

    Subclasses name forward's inputs, so that exporters see them.
    """

    inputs: tuple[str, ...] = ()

    def __init__(self, model: nn.Module, output_names: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.output_names = list(output_names)

    def run(self, **inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        outputs = self.model(**inputs, return_dict=True)
        kept = tuple(outputs[name] for name in self.output_names)
        return kept[0] if len(kept) == 1 else kept


class TextModule(HuggingFaceModule):
    inputs = ("input_ids", "attention_mask")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.run(input_ids=input_ids, attention_mask=attention_mask)


class SegmentedTextModule(HuggingFaceModule):
    inputs = ("input_ids", "attention_mask", "token_type_ids")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> Any:
        return self.run(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        )


class EncoderDecoderModule(HuggingFaceModule):
    inputs = ("input_ids", "attention_mask", "decoder_input_ids")

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
    ) -> Any:
        return self.run(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids
        )


class ImageModule(HuggingFaceModule):
    inputs = ("pixel_values",)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.run(pixel_values=pixel_values)


class AudioModule(HuggingFaceModule):
    inputs = ("input_values",)

    def forward(self, input_values: torch.Tensor) -> Any:
        return self.run(input_values=input_values)


class SpectrumModule(HuggingFaceModule):
    inputs = ("input_features",)

    def forward(self, input_features: torch.Tensor) -> Any:
        return self.run(input_features=input_features)


class AudioToTextModule(HuggingFaceModule):
    inputs = ("input_values", "decoder_input_ids")

    def forward(self, input_values: torch.Tensor, decoder_input_ids: torch.Tensor) -> Any:
        return self.run(input_values=input_values, decoder_input_ids=decoder_input_ids)


class SpectrumToTextModule(HuggingFaceModule):
    inputs = ("input_features", "decoder_input_ids")

    def forward(self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor) -> Any:
        return self.run(input_features=input_features, decoder_input_ids=decoder_input_ids)


class ImageToTextModule(HuggingFaceModule):
    inputs = ("pixel_values", "decoder_input_ids")

    def forward(self, pixel_values: torch.Tensor, decoder_input_ids: torch.Tensor) -> Any:
        return self.run(pixel_values=pixel_values, decoder_input_ids=decoder_input_ids)


class ImageAndTextModule(HuggingFaceModule):
    """Two towers that meet in a similarity: as many images as texts."""

    inputs = ("input_ids", "attention_mask", "pixel_values")

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> Any:
        return self.run(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values
        )


# By main input: (an encoder, a decoder behind it).
_KINDS: dict[str, tuple[type[HuggingFaceModule], type[HuggingFaceModule]]] = {
    "input_ids": (TextModule, EncoderDecoderModule),
    "pixel_values": (ImageModule, ImageToTextModule),
    "input_values": (AudioModule, AudioToTextModule),
    "input_features": (SpectrumModule, SpectrumToTextModule),
}


def module_kind(
    model: nn.Module, config: Any, path: Path, input_names: Collection[str]
) -> type[HuggingFaceModule]:
    """The wrapper for a model. input_names: what the user's data holds, empty without any: an
    optional input that is not among them is left out. Raises InputError for another main input."""
    main = getattr(model, "main_input_name", "input_ids")
    if main not in _KINDS:
        raise InputError(
            f"{type(model).__name__} takes {main}, for which there are no example inputs",
            where=str(path),
            fix=OWN_WAY,
        )
    plain, with_decoder = _KINDS[main]
    if getattr(config, "is_encoder_decoder", False):
        return with_decoder
    if plain is not TextModule:
        return plain
    takes = inspect.signature(model.forward).parameters
    if "pixel_values" in takes and hasattr(model, "logit_scale"):
        return ImageAndTextModule
    wants_segments = not input_names or "token_type_ids" in input_names
    if "token_type_ids" in takes and wants_segments and getattr(config, "type_vocab_size", 0) > 1:
        return SegmentedTextModule
    return plain


def input_specs(kind: type[HuggingFaceModule], config: Any, notes: list[str]) -> list[InputSpec]:
    """What config says about the inputs; what it does not say is assumed and noted."""
    return [_spec(name, config, notes) for name in kind.inputs]


def _spec(name: str, config: Any, notes: list[str]) -> InputSpec:
    if name == "pixel_values":
        return _image(_part(config, "vision_config", "encoder"), notes)
    if name == "input_values":
        return InputSpec(name, _audio(config))
    if name == "input_features":
        return InputSpec(name, _spectrum(config))
    decodes = name.startswith("decoder")
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
