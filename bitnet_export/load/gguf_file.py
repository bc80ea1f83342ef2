"""GGUF files (llama.cpp): a decoder with its weights as stored, TQ1_0 and TQ2_0 trits exact.

transformers reads the file (``gguf_file=``): its tensor names, its configuration, the rows of
query and key put back in order. Dequantized, a ternary block is trit times float16 scale, exact
in float32, and the export finds trits and scales again: one for the tensor, a row or 128 weights,
whichever is the coarsest that fits. What else is in the file (Q4_K, F16) comes as floats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from bitnet_export.errors import InputError
from bitnet_export.load.gguf_header import TERNARY_TYPES, GgufHeader, read_header
from bitnet_export.load.huggingface import import_transformers, load_checkpoint, read_config, wrap
from bitnet_export.load.model import LoadedModel


def load_gguf(path: Path, *, input_names: Collection[str] = ()) -> LoadedModel:
    """A GGUF file -> its transformers model, wrapped as a Hugging Face directory's is.

    Where the file has ternary layers, its other linear layers are named in ``float_layers``.
    Raises InputError (damaged, or an architecture that transformers does not read from GGUF),
    MissingRequirement without transformers or gguf.
    """
    header = read_header(path)
    transformers = import_transformers("a GGUF file")
    _check_architecture(transformers, header, path)
    config = read_config(transformers, path, False)
    model, missing = load_checkpoint(transformers, config, path, False)
    config.architectures = [type(model).__name__]
    loaded = wrap(model, missing, config, path, input_names)
    loaded.name, loaded.kind = path.stem, "gguf"
    types = Counter(tensor.type for tensor in header.tensors.values())
    if any(kind in types for kind in TERNARY_TYPES):
        loaded.float_layers = _float_layers(model, header)
        held = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
        loaded.notes.append(f"{header.architecture} GGUF with {held} tensors")
    return loaded


def _check_architecture(transformers: Any, header: GgufHeader, path: Path) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    # Sections of the same table that are no architectures.
    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})
    name = header.architecture
    # transformers renames qwen2moe to qwen2_moe and the like before it looks.
    plain = {n.replace("_", "").replace("-", "") for n in known} | {"t5encoder"}
    if name.replace("_", "").replace("-", "") not in plain:
        raise InputError(
            f"its architecture is {name or 'not named'}; transformers {transformers.__version__} "
            f"reads {', '.join(known)} from GGUF",
            where=str(path),
            fix="pass the Hugging Face directory the file was converted from",
        )


def _float_layers(model: nn.Module, header: GgufHeader) -> list[str]:
    """Paths, in the wrapped module, of the linear layers that the file does not hold as trits."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config={})
    names = get_gguf_hf_weights_map(model, processor)
    ternary = {
        names[name].removesuffix(".weight")
        for name, tensor in header.tensors.items()
        if tensor.type in TERNARY_TYPES and name in names
    }
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"model.{path}" for path in linear if path not in ternary]
