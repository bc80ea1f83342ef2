"""What every run begins with: the model read as its options say, and the recipe for it.

Reading files is load/'s work, what recipes there are ternary/recipes.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_export import history, onnx_io
from bitnet_export.errors import InputError, UsageError
from bitnet_export.options import (
    ExportOptions,
    FinetuneOptions,
    ModelOptions,
    Progress,
    TernaryOptions,
    VerifyOptions,
)

if TYPE_CHECKING:
    import onnx

    from bitnet_export.load import LoadedModel
    from bitnet_export.manifest import Manifest
    from bitnet_export.ternary import TernaryConfig
    from bitnet_export.ternary.recipes import Recipe, Traits


def load_model(options: ModelOptions, progress: Progress) -> LoadedModel:
    """What load() makes of the model the options name; its notes are told. Of a file that finetune
    wrote, the factory is for what that was trained from."""
    from bitnet_export.load import load

    data = options.data
    if data is not None and data.is_dir():
        data = None  # a directory of text is for fine-tuning only
    trained = history.read_history(options.model) is not None
    loaded = load(
        options.model,
        factory=None if trained else options.factory,
        input_specs=options.input_specs,
        data=data,
        trust_pickle=options.trust_pickle,
    )
    if isinstance(options, ExportOptions) and options.kv_cache:
        loaded = _with_kv_cache(loaded, options, progress)
    for note in loaded.notes:
        progress.note(note)
    return loaded


def _with_kv_cache(loaded: LoadedModel, options: ExportOptions, progress: Progress) -> LoadedModel:
    """A decoder with its cache as inputs; a file that finetune wrote has no cache in it, so its
    weights go back into the decoder it was trained from."""
    from bitnet_export.load.kv_cache import take_weights, with_kv_cache

    if options.target not in ("onnx", "ort"):
        raise UsageError(
            f"--target {options.target} has no optimization profile for a growing cache",
            where="--kv-cache",
            fix="use --target onnx or ort, or leave the cache out",
        )
    source = history.origin(options.model)
    if source is None:
        return with_kv_cache(loaded)
    original = load_model(replace(options, model=source, kv_cache=False), progress)
    take_weights(original, loaded)
    return with_kv_cache(original)


def export_loaded(
    loaded: LoadedModel, opset: int | None = None, *, path: Path | None = None
) -> onnx.ModelProto:
    """The module, as it is now, as ONNX. opset: None for the exporter's default. path: where it
    will be written; the tensors of a large model are beside that file already."""
    from bitnet_export.export import export_module

    assert loaded.module is not None
    return export_module(
        loaded.module,
        loaded.example_inputs,
        loaded.dynamic_axes,
        axis_limits=loaded.axis_limits,
        opset=opset,
        output_names=loaded.output_names,
        data=None if path is None else onnx_io.data_file(path),
    )


def drop_fixed_axes(loaded: LoadedModel, model: onnx.ModelProto) -> list[str]:
    """Take axes that came out fixed off ``loaded.dynamic_axes``: a forward that loops over tokens
    is traced for one length. -> a warning for each name."""
    warnings = {}
    for value in model.graph.input:
        axes = loaded.dynamic_axes.get(value.name, {})
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis not in axes or not dim.HasField("dim_value"):
                continue
            name = axes[axis]
            warnings[name] = (
                f"the exported model takes {name} = {dim.dim_value} only: its forward does other "
                f"things at every size of axis {axis} of {value.name}, as a loop over it does"
            )
    kept = {
        name: {axis: symbol for axis, symbol in axes.items() if symbol not in warnings}
        for name, axes in loaded.dynamic_axes.items()
    }
    loaded.dynamic_axes = {name: axes for name, axes in kept.items() if axes}
    return list(warnings.values())


def reference_onnx(options: VerifyOptions, record: Manifest, progress: Progress) -> onnx.ModelProto:
    """The model of --reference as ONNX, its inputs and outputs those of the directory's record.

    Raises InputError naming an input or output that one of the two lacks.
    """
    assert options.reference is not None
    source = ModelOptions(
        model=options.reference,
        factory=options.factory,
        input_specs=options.input_specs,
        trust_pickle=options.trust_pickle,
    )
    loaded = load_model(source, progress)
    if loaded.module is None:
        assert loaded.onnx_path is not None
        model = onnx_io.read_model(loaded.onnx_path)
    else:
        model = export_loaded(loaded)
    unknown = {value.name for value in model.graph.input} - record.inputs.keys()
    missing = set(record.outputs) - {value.name for value in model.graph.output}
    if unknown or missing:
        different = [f"input {name}" for name in sorted(unknown)]
        different += [f"no output {name}" for name in sorted(missing)]
        raise InputError(
            f"is not the model the directory was made from: it has {', '.join(different)}",
            where=str(options.reference),
            fix=f"the directory was exported from {record.model['source']}",
        )
    return model


def pick_recipe(
    options: ExportOptions | FinetuneOptions, loaded: LoadedModel, progress: Progress
) -> tuple[Recipe, str]:
    """The recipe asked for, else that the file was fine-tuned with, else what suits the model;
    and why. Said as a note."""
    from bitnet_export.ternary import recipes

    trained = history.trained_recipe(options.model)
    if options.ternary.recipe is not None:
        recipe, reason = recipes.find(options.ternary.recipe), "asked for"
    elif trained in recipes.RECIPES:
        recipe, reason = recipes.RECIPES[trained], "the model was fine-tuned with it"
    else:
        recipe, reason = recipes.choose(_traits(loaded))
    progress.note(f"recipe: {recipe.name} ({reason}); --recipe NAME chooses another")
    return recipe, reason


def ternary_config(
    recipe: Recipe, options: ExportOptions | FinetuneOptions, loaded: LoadedModel
) -> TernaryConfig:
    """The recipe with the options over it. What a ternary checkpoint holds in floating point
    stays so."""
    config = recipe.config(**options.ternary.as_kwargs())
    return replace(config, exclude=(*config.exclude, *loaded.float_layers))


def unmatched(options: TernaryOptions, layers: Sequence[str]) -> list[str]:
    """A warning for each pattern of --exclude and --include that names none of the layers: most
    likely a slip."""
    from bitnet_export.ternary.config import DEFAULT_EXCLUDE

    given = [("--exclude", p) for p in options.exclude or () if p not in DEFAULT_EXCLUDE]
    given += [("--include", pattern) for pattern in options.include or ()]
    return [
        f"{flag} {pattern} matches no layer; the report lists their names"
        for flag, pattern in given
        if not any(fnmatchcase(name, pattern) for name in layers)
    ]


def _traits(loaded: LoadedModel) -> Traits:
    from bitnet_export.ternary import recipes

    if loaded.module is None:
        assert loaded.onnx_path is not None
        return recipes.traits_of_onnx(onnx_io.read_model(loaded.onnx_path))
    return recipes.traits_of(
        loaded.module, loaded.example_inputs, loaded.hf_config, loaded.output_names
    )


def own_tokenizer(model: Path) -> Path | None:
    """The tokenizer that lies in a Hugging Face model directory."""
    return model if (model / "tokenizer.json").is_file() else None
