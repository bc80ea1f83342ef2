"""Hugging Face directories: config.json and weights, read from local files only.

The class comes from the config's ``architectures``, AutoModel where that names none. The model
is wrapped so that it takes named tensors and returns named tensors: no caches, no tuples of
hidden states, no pooler that the checkpoint has no weights for.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError, MissingRequirement
from bitnet_export.load.inputs import InputSpec, axis_sizes, make_inputs
from bitnet_export.load.model import LoadedModel

# SDPA exports with dynamic shapes and becomes one Softmax between two MatMuls, as eager does,
# but keeps the additive mask in one place, which ONNX Runtime's fusions recognise.
ATTENTION = "sdpa"


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


def load_huggingface(
    path: Path, *, input_names: Collection[str] = (), trust_pickle: bool = False
) -> LoadedModel:
    """A directory -> its wrapped module with inputs from its config; batch, and sequence where
    there is one, are dynamic.

    input_names: what the user's data holds; an optional input (token_type_ids) that is not among
    them is left to the model's default. Empty: no data, all inputs.

    Raises MissingRequirement without transformers, InputError for a directory it cannot use.
    """
    transformers = _transformers()
    config = _config(transformers, path, trust_pickle)
    model, missing = _model(transformers, config, path, trust_pickle)
    model.eval()
    dropped = _drop_untrained_pooler(model, missing)
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing from it: {', '.join(sorted(missing)[:4])}",
            where=str(path),
            fix="the architecture in config.json is not the one that was saved; write it again "
            "with save_pretrained",
        )
    kind = _module_class(model, config, path, input_names)
    wrapper = kind(model)
    specs = _input_specs(kind, config)
    limit = getattr(config, "max_position_embeddings", None)
    inputs = make_inputs(specs, limit=limit)
    wrapper.output_names = _output_names(model, inputs)
    axes = axis_sizes(specs)
    return LoadedModel(
        name=path.resolve().name,
        kind="huggingface",
        source=path,
        module=wrapper.eval(),
        example_inputs=inputs,
        dynamic_axes={s.name: s.dynamic_axes for s in specs if s.dynamic_axes},
        axis_limits={a: limit for a in axes if limit and a.endswith("sequence")},
        output_names=wrapper.output_names,
        hf_config=config,
        notes=[f"left out {dropped}: the checkpoint has no weights for it"] if dropped else [],
    )


def _transformers() -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError as e:
        raise MissingRequirement(
            "a Hugging Face directory needs the transformers package",
            fix="pip install 'bitnet-export[hf]'",
        ) from e
    return transformers


def _config(transformers: Any, path: Path, trust: bool) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust
        )
    except (OSError, ValueError, KeyError) as e:
        raise InputError(
            f"transformers {transformers.__version__} cannot read its config.json: {_first(e)}",
            where=str(path),
            fix="pass --trust-pickle if the model brings its own code and you trust it"
            if "trust_remote_code" in str(e)
            else "check config.json, above all model_type",
        ) from e
    if getattr(config, "use_cache", None):
        config.use_cache = False  # no cache tensors among the outputs
    return config


def _model(transformers: Any, config: Any, path: Path, trust: bool) -> tuple[nn.Module, set[str]]:
    """The model and the names of weights its files lack."""
    name = (getattr(config, "architectures", None) or [""])[0]
    model_class = getattr(transformers, name, None) or transformers.AutoModel
    arguments: dict[str, Any] = dict(
        config=config,
        local_files_only=True,
        output_loading_info=True,
        dtype="auto",
        attn_implementation=ATTENTION,
    )
    if model_class is transformers.AutoModel:
        arguments["trust_remote_code"] = trust
    try:
        with _quiet():
            try:
                model, info = model_class.from_pretrained(path, **arguments)
            except ValueError as e:
                if "attention" not in str(e).lower():
                    raise
                arguments["attn_implementation"] = "eager"  # a model without SDPA
                model, info = model_class.from_pretrained(path, **arguments)
    except Exception as e:  # transformers and safetensors raise their own kinds
        raise InputError(
            f"its weights cannot be loaded into {model_class.__name__}: {_first(e)}",
            where=str(path),
            fix="it needs model.safetensors next to config.json, whole and of this architecture",
        ) from e
    return model.float(), set(info["missing_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws progress bars and tables of missing keys; this package says the same
    in one sentence."""
    from transformers.utils import logging as hf_logging

    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def _drop_untrained_pooler(model: nn.Module, missing: set[str]) -> str:
    """Remove a pooler that would have random weights, and its keys from ``missing``."""
    keys = {k for k in missing if k.split(".")[0] == "pooler"}
    if not keys or not isinstance(getattr(model, "pooler", None), nn.Module):
        return ""
    model.add_module("pooler", None)
    missing -= keys
    return "pooler_output"


def _module_class(
    model: nn.Module, config: Any, path: Path, input_names: Collection[str]
) -> type[HuggingFaceModule]:
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return ImageModule
    if main == "input_values":
        return AudioModule
    if main != "input_ids":
        raise InputError(
            f"{type(model).__name__} takes {main}, for which there are no example inputs",
            where=str(path),
            fix="write it with bitnet_export.save(model, path, example_inputs) and pass that file",
        )
    if getattr(config, "is_encoder_decoder", False):
        return EncoderDecoderModule
    takes_segments = "token_type_ids" in inspect.signature(model.forward).parameters
    wants_segments = not input_names or "token_type_ids" in input_names
    if takes_segments and wants_segments and getattr(config, "type_vocab_size", 0) > 1:
        return SegmentedTextModule
    return TextModule


def _input_specs(kind: type[HuggingFaceModule], config: Any) -> list[InputSpec]:
    if kind is ImageModule:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return [InputSpec("pixel_values", ("batch", channels, height, width))]
    if kind is AudioModule:
        return [InputSpec("input_values", ("batch", 16000))]
    vocabulary = config.get_text_config().vocab_size
    return [
        InputSpec(
            name,
            ("batch", "decoder_sequence" if name.startswith("decoder") else "sequence"),
            "int64",
            high=vocabulary,
        )
        for name in kind.inputs
    ]


def _output_names(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The tensors among the model's outputs, by name, in order."""
    with torch.no_grad():
        outputs = model(**inputs, return_dict=True)
    names = [name for name, value in outputs.items() if isinstance(value, torch.Tensor)]
    # An encoder-decoder also hands out its encoder's states: a by-product of the logits.
    return [n for n in names if not (n.startswith("encoder_") and len(names) > 1)]


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
