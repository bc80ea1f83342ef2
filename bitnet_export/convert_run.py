"""The command ``convert``: a model that is ternary, written as another kind of checkpoint.

Loads and checks; what is written how is checkpoints/'s work.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_export import history
from bitnet_export.options import ConvertOptions, Progress, SilentProgress
from bitnet_export.output_dir import check_replaceable, staged

if TYPE_CHECKING:
    from bitnet_export.load import LoadedModel


def run_convert(options: ConvertOptions, progress: Progress | None = None) -> Path:
    """Write ``options.model`` as ``options.to`` and return where: a file of weights or a Hugging
    Face directory. Appears whole or not at all.

    Raises InputError where the model is not ternary or has no place in that format.
    """
    from bitnet_export.load import load

    progress = progress or SilentProgress()
    output = options.path
    if options.to != "state-dict":
        check_replaceable(output, options.overwrite)
    progress.stage("load", str(options.model))
    loaded = load(
        options.model,
        factory=options.factory,
        input_specs=options.input_specs,
        data=options.data,
        trust_pickle=options.trust_pickle,
    )
    for note in loaded.notes:
        progress.note(note)
    trained = history.read_history(options.model)
    if trained is not None and trained[2] == 0 and options.to == "hf-bitnet":
        progress.warn(
            "it was fine-tuned with floating-point activations; Hugging Face's BitNet layers "
            "quantize them to int8"
        )
    progress.stage("convert", options.to)
    source = options.base or history.origin(options.model)
    if source is not None and not source.exists():
        source = None
    _WRITERS[options.to](loaded, output, source, options, progress)
    return output


def _state_dict(
    loaded: LoadedModel, output: Path, base: Path | None, options: ConvertOptions, told: Progress
) -> None:
    from bitnet_export.checkpoints.weights import write_state_dict
    from bitnet_export.load import detect

    wrapped = base is not None and base.exists() and detect(base) in ("huggingface", "gguf")
    layers = write_state_dict(loaded, output, wrapped=wrapped)
    told.note(f"{layers} ternary layers")


def _huggingface(
    loaded: LoadedModel, output: Path, base: Path | None, options: ConvertOptions, told: Progress
) -> None:
    from bitnet_export.checkpoints.huggingface import write_huggingface
    from bitnet_export.load import detect

    if base is not None and (not base.exists() or detect(base) not in ("huggingface", "gguf")):
        base = None
    with staged(output, options.overwrite) as out:
        written = write_huggingface(loaded, out, base=base, packed=options.to == "hf-bitnet")
    for text, layers in (
        ("packed, four trits a byte", written.packed),
        ("with trits in float32: their outputs are no multiple of 4", written.unpacked),
        ("with plain float32 weights {-s, 0, +s}", written.dense),
    ):
        if layers:
            told.note(f"{len(layers)} ternary layers {text}")


_WRITERS: dict[str, Callable[[LoadedModel, Path, Path | None, ConvertOptions, Progress], None]] = {
    "state-dict": _state_dict,
    "hf-bitnet": _huggingface,
    "huggingface": _huggingface,
}
