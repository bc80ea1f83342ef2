"""Hugging Face directories: config.json and weights, read from local files only.

The class comes from the config's ``architectures``, AutoModel where that names none. The model
is wrapped so that it takes named tensors and returns named tensors: no caches, no tuples of
hidden states, no pooler that the checkpoint has no weights for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError, MissingRequirement
from bitnet_export.load.experts import split_experts
from bitnet_export.load.hf_bitnet import fold_bitnet_layers
from bitnet_export.load.hf_inputs import (
    HuggingFaceModule,
    input_specs,
    inputs_of,
    longest,
    output_names,
    wrapper_class,
)
from bitnet_export.load.inputs import axis_sizes, make_inputs
from bitnet_export.load.model import LoadedModel

# SDPA exports with dynamic shapes and becomes one Softmax between two MatMuls, as eager does,
# but keeps the additive mask in one place, which ONNX Runtime's fusions recognise.
ATTENTION = "sdpa"


def load_huggingface(
    path: Path, *, input_names: Collection[str] = (), trust_pickle: bool = False
) -> LoadedModel:
    """A directory -> its wrapped module with inputs from its config; batch, and sequence where
    there is one, are dynamic.

    input_names: what the user's data holds; an optional input (token_type_ids) that is not among
    them is left to the model's default. Empty: no data, all inputs.

    Raises MissingRequirement without transformers, InputError for a directory it cannot use.
    """
    transformers = import_transformers("a Hugging Face directory")
    config = read_config(transformers, path, trust_pickle)
    model, missing = load_checkpoint(transformers, config, path, trust_pickle)
    return wrap(model, missing, config, path, input_names)


def wrap(
    model: nn.Module, missing: set[str], config: Any, path: Path, input_names: Collection[str]
) -> LoadedModel:
    """A transformers model and the names its files lack -> LoadedModel, with example inputs and
    output names. BitNet layers become plain ones; the others are named in float_layers. Experts
    become linear layers."""
    bitnet = fold_bitnet_layers(model)
    _forget_quantizer(model, path, known=bool(bitnet) or not path.is_dir())
    model.float().eval()
    split_experts(model)
    dropped = _drop_untrained_pooler(model, missing)
    if missing:
        raise InputError(
            f"{len(missing)} weights are missing from it: {', '.join(sorted(missing)[:4])}",
            where=str(path),
            fix="the architecture in config.json is not the one that was saved; write it again "
            "with save_pretrained",
        )
    names = inputs_of(model, config, path, input_names)
    wrapper = wrapper_class(HuggingFaceModule, names)(model)
    notes = [f"left out {dropped}: the checkpoint has no weights for it"] if dropped else []
    specs = input_specs(names, config, notes)
    limit = longest(config)
    inputs = make_inputs(specs, limit=limit)
    wrapper.output_names = output_names(model, inputs, path)
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
        notes=notes,
        float_layers=_float_layers(model, bitnet),
    )


def _forget_quantizer(model: Any, path: Path, *, known: bool) -> None:
    """Let transformers treat the model as the ordinary one it now is: it refuses to cast what a
    quantizer loaded. known: its layers are plain by now. Raises InputError where they are not."""
    if not getattr(model, "is_quantized", False):
        return
    if not known:
        settings = getattr(model.config, "quantization_config", None)
        method = getattr(settings, "quant_method", None) or "another method"
        raise InputError(
            f"its weights are quantized with {getattr(method, 'value', method)}, which is no "
            "ternary format",
            where=str(path),
            fix="pass the model in full precision, a BitNet checkpoint or a GGUF file",
        )
    model.is_quantized = False
    for attribute in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _float_layers(model: nn.Module, bitnet: Collection[str]) -> list[str]:
    """Paths, in the wrapped module, of the linear layers of a BitNet model that are none."""
    if not bitnet:
        return []
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"model.{path}" for path in linear if path not in set(bitnet)]


def import_transformers(what: str) -> Any:
    """The transformers package, quiet. Raises MissingRequirement saying that ``what`` needs it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError as e:
        raise MissingRequirement(
            f"{what} needs the transformers package",
            fix="pip install 'bitnet-export[hf]'",
        ) from e
    return transformers


def _source(path: Path) -> dict[str, Any]:
    """path as from_pretrained takes it: a directory, or a GGUF file in one."""
    if path.is_dir():
        return {"pretrained_model_name_or_path": path}
    return {"pretrained_model_name_or_path": path.resolve().parent, "gguf_file": path.name}


def read_config(transformers: Any, path: Path, trust: bool) -> Any:
    """The configuration of a directory or GGUF file. Raises InputError where there is none."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            **_source(path), local_files_only=True, trust_remote_code=trust
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


def load_checkpoint(
    transformers: Any, config: Any, path: Path, trust: bool
) -> tuple[nn.Module, set[str]]:
    """A directory or GGUF file -> the model and the names of weights its files lack."""
    model_class = _model_class(transformers, config, path)
    arguments: dict[str, Any] = dict(
        **_source(path),
        config=config,
        local_files_only=True,
        output_loading_info=True,
        # A float16 scale times a trit is exact in float32, in bfloat16 it is not.
        dtype="auto" if path.is_dir() else torch.float32,
        attn_implementation=ATTENTION,
    )
    if model_class is transformers.AutoModel:
        arguments["trust_remote_code"] = trust
    try:
        # transformers compiles what unpacks BitNet weights, for which a machine may lack a
        # compiler; run once, plain is faster.
        with _quiet(), torch.compiler.set_stance("force_eager"):
            try:
                model, info = model_class.from_pretrained(**arguments)
            except ValueError as e:
                if "attention" not in str(e).lower():
                    raise
                arguments["attn_implementation"] = "eager"  # a model without SDPA
                model, info = model_class.from_pretrained(**arguments)
    except ImportError as e:
        raise MissingRequirement(
            f"transformers needs another package for this model: {_first(e)}",
            where=str(path),
            fix="pip install 'bitnet-export[hf]', or the package it names",
        ) from e
    except Exception as e:  # transformers and safetensors raise their own kinds
        raise InputError(
            f"its weights cannot be loaded into {model_class.__name__}: {_first(e)}",
            where=str(path),
            fix="it needs model.safetensors next to config.json, whole and of this architecture",
        ) from e
    return model, set(info["missing_keys"])


def _model_class(transformers: Any, config: Any, path: Path) -> Any:
    """The class that config names; a GGUF file names none, and holds a language model."""
    name = (getattr(config, "architectures", None) or [""])[0]
    if not name and not path.is_dir():
        seq2seq = getattr(config, "is_encoder_decoder", False)
        return transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return getattr(transformers, name, None) or transformers.AutoModel


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws progress bars and tables of missing keys; this package says the same
    in one sentence."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as hf_logging

    gguf: Any = modeling_gguf_pytorch_utils
    gguf_bar = gguf.tqdm  # the one bar that its switch does not reach
    gguf.tqdm = lambda items, **_: items
    level = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
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


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
