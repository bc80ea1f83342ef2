"""A decoder that generates token by token: keys and values of earlier tokens go in, all come out.

``with_kv_cache`` wraps a loaded Hugging Face decoder so that its cache is named tensors, two a
layer, as runtimes hand them from step to step: one key and one value tensor [batch, heads, past,
head size], with all earlier tokens in them, for layers that look back a window, too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError, UsageError
from bitnet_export.load.hf_inputs import longest, wrapper_class
from bitnet_export.load.model import LoadedModel

FLAG = "--kv-cache"
IDS, MASK = "input_ids", "attention_mask"
# From this opset on attention, rotary embeddings and RMS norms are operators: a token then takes
# a quarter of the nodes, and no copy of the cache for grouped heads.
OPSET = 23
FORCE_GQA = "TRANSFORMERS_SDPA_FORCE_GQA"
BATCH, NEW, PAST = "batch", "sequence", "past_sequence"
# One token at a time, after some: what kernels are chosen for and speed is measured at.
USUAL_SIZES = {NEW: 1, PAST: 128}
# Of the example inputs: different from each other, so that a confusion of axes shows.
EXAMPLE_BATCH, EXAMPLE_NEW, EXAMPLE_PAST = 2, 3, 13


class CachedDecoder(nn.Module):
    """A transformers decoder with tensors in (cache_inputs names them) and tensors out."""

    def __init__(self, model: nn.Module, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.output_names = ["logits", *_cache_names("present", layers)]

    def run(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """logits [batch, sequence, vocabulary], then every layer's key and value."""
        from transformers import DynamicCache

        past = [inputs[name] for name in _cache_names("past_key_values", self.layers)]
        # As transformers' generate: padding on the left takes no positions. One row for each of
        # the batch, too: ONNX Runtime's rotary embedding wants them.
        positions = (inputs[MASK].cumsum(-1) - 1).clamp(min=0)[:, past[0].shape[2] :]
        with _grouped_heads():
            outputs = self.model(
                input_ids=inputs[IDS],
                attention_mask=inputs[MASK],
                position_ids=positions,
                past_key_values=DynamicCache(list(zip(past[0::2], past[1::2], strict=True))),
                use_cache=True,
                return_dict=True,
            )
        present = [
            t for layer in outputs.past_key_values.layers for t in (layer.keys, layer.values)
        ]
        return (outputs.logits, *present)


def with_kv_cache(loaded: LoadedModel) -> LoadedModel:
    """``loaded`` with the cache as inputs and outputs.

    Inputs: input_ids [batch, sequence], attention_mask [batch, past_sequence + sequence] and, for
    each layer i, past_key_values_i_key and _value [batch, heads, past_sequence, head size].
    Outputs: logits, and present_i_key, present_i_value with the new tokens appended: the next
    step's past. A past of length 0 begins a text. Raises UsageError for a model that is no
    Hugging Face decoder, InputError for one with another kind of cache.
    """
    model = getattr(loaded.module, "model", None)
    config = loaded.hf_config
    if not isinstance(model, nn.Module) or config is None or not _is_decoder(model):
        raise UsageError(
            "only Hugging Face decoders (..ForCausalLM) have a cache to export",
            where=FLAG,
            fix="leave it out, or export a module with cache tensors among its inputs",
        )
    cache = _example_cache(model, loaded)
    layers, names = len(cache) // 2, _cache_names("past_key_values", len(cache) // 2)
    vocabulary = config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    inputs = {
        IDS: torch.randint(vocabulary, (EXAMPLE_BATCH, EXAMPLE_NEW), generator=generator),
        MASK: torch.ones(EXAMPLE_BATCH, EXAMPLE_PAST + EXAMPLE_NEW, dtype=torch.int64),
    } | dict(zip(names, cache, strict=True))
    decoder = wrapper_class(CachedDecoder, tuple(inputs))(model, layers).eval()
    _check_answers(decoder, inputs, loaded)
    loaded.module = decoder
    loaded.example_inputs = inputs
    loaded.dynamic_axes = {IDS: {0: BATCH, 1: NEW}, MASK: {0: BATCH, 1: f"{PAST} + {NEW}"}}
    loaded.dynamic_axes |= {name: {0: BATCH, 2: PAST} for name in names}
    loaded.axis_limits = {}  # the limit is one of past and new tokens together
    loaded.output_names = decoder.output_names
    loaded.usual_sizes = _usual_sizes(longest(config))
    return loaded


def _usual_sizes(limit: int | None) -> dict[str, int]:
    """One new token behind a text of some length: at most half of what the model has positions
    for, so that twice that fits as well."""
    past = USUAL_SIZES[PAST] if limit is None else min(USUAL_SIZES[PAST], limit // 2)
    return USUAL_SIZES | {PAST: past}


def take_weights(decoder: LoadedModel, trained: LoadedModel) -> None:
    """Put the parameters of ``trained``, a fine-tuned copy of ``decoder``, into ``decoder``, which
    takes its name and source as well. Raises InputError where they do not fit."""
    assert decoder.module is not None
    assert trained.module is not None
    weights = dict(trained.module.named_parameters(remove_duplicate=False))
    for name, parameter in decoder.module.named_parameters(remove_duplicate=False):
        if name not in weights or weights[name].shape != parameter.shape:
            raise InputError(
                f"has no {name} {list(parameter.shape)} for the decoder it was trained from, "
                f"{decoder.source}",
                where=str(trained.source),
                fix="fine-tune the decoder again, or export without " + FLAG,
            )
        parameter.data.copy_(weights[name].data)
    decoder.name, decoder.kind, decoder.source = trained.name, trained.kind, trained.source


@contextmanager
def _grouped_heads() -> Iterator[None]:
    """transformers repeats keys and values for query heads that share them, which copies the whole
    cache for every token; the attention operator can share them itself."""
    before = os.environ.get(FORCE_GQA)
    os.environ[FORCE_GQA] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_GQA]
        else:
            os.environ[FORCE_GQA] = before


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}_{i}_{part}" for i in range(layers) for part in ("key", "value")]


def _is_decoder(model: nn.Module) -> bool:
    arguments = inspect.signature(model.forward).parameters
    return "past_key_values" in arguments and hasattr(model, "lm_head")


def _past_ids() -> torch.Tensor:
    return 3 + torch.arange(EXAMPLE_BATCH * EXAMPLE_PAST).reshape(EXAMPLE_BATCH, -1)


def _check_answers(
    decoder: CachedDecoder, inputs: dict[str, torch.Tensor], loaded: LoadedModel
) -> None:
    """Raise InputError where the logits are not those of the whole text without a cache."""
    with torch.no_grad():
        found = decoder(**inputs)[0]
        whole = decoder.model(input_ids=torch.cat([_past_ids(), inputs[IDS]], 1), use_cache=False)
        expected = whole.logits[:, -EXAMPLE_NEW:]
    # Another order of sums is far below that, tokens that were not seen far above.
    if not bool((found - expected).abs().max() <= 1e-2 * expected.abs().max()):
        raise InputError(
            f"{type(decoder.model).__name__} answers otherwise with a cache of plain tensors",
            where=str(loaded.source),
            fix=f"leave {FLAG} out",
        )


def _example_cache(model: nn.Module, loaded: LoadedModel) -> list[torch.Tensor]:
    """What the model caches for some tokens: keys and values, layer by layer.

    The cache it is given forgets nothing; layers that look back a window only have masks for that.
    """
    from transformers import DynamicCache

    past: Any = DynamicCache()
    with torch.no_grad(), suppress(Exception):  # whatever one with another cache raises
        model(input_ids=_past_ids(), past_key_values=past, use_cache=True, return_dict=True)
    layers = getattr(past, "layers", None) or []
    cache = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
    plain = [t for t in cache if isinstance(t, torch.Tensor) and t.shape[2:3] == (EXAMPLE_PAST,)]
    if not cache or len(plain) < len(cache):
        raise InputError(
            f"{type(model).__name__} caches something else than a key and a value a layer",
            where=str(loaded.source),
            fix=f"leave {FLAG} out",
        )
    return [t.contiguous() for t in plain]
