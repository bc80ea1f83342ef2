"""Fine-tuning as a run of its own and as a stage of an export.

The training loop is ternary/distill.py's; here it gets its model, teacher, data and settings, and
what it made is written as a model file.
"""

from __future__ import annotations

import copy
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import history
from bitnet_export.errors import InputError, UsageError
from bitnet_export.opening import load_model, own_tokenizer, pick_recipe, ternary_config, unmatched
from bitnet_export.options import ExportOptions, FinetuneOptions, Progress, SilentProgress
from bitnet_export.stages import Stages, on_step

if TYPE_CHECKING:
    from torch import nn

    from bitnet_export.load import ArrayData, LoadedModel
    from bitnet_export.report.schema import FinetuneBlock
    from bitnet_export.ternary import TernaryConfig
    from bitnet_export.ternary.finetune_config import FinetuneConfig, FinetuneResult
    from bitnet_export.ternary.parallel import Group
    from bitnet_export.ternary.recipes import Recipe


# Kinds of models that torch.export has not seen yet, nor others of their architecture.
NEVER_EXPORTED = ("state_dict", "pickle")


def run_finetune(options: FinetuneOptions, progress: Progress | None = None) -> Path:
    """Model file + data -> a ternary model file (torch.export program), the teacher's own weights
    made ternary and trained to answer as it does. Returns the file; its weights are exactly
    {-s, 0, +s}, which ``export`` recognises and keeps.

    Processes that torchrun or accelerate started share the work; rank 0 writes the file.
    """
    from bitnet_export.ternary.parallel import joined

    with joined(options.device) as group:
        return _finetune_together(options, progress or SilentProgress(), group)


def _finetune_together(options: FinetuneOptions, progress: Progress, group: Group) -> Path:
    stage = Stages(progress)
    loaded = _open_trainable(options, stage)
    recipe, _ = pick_recipe(options, loaded, progress)
    ternary, config = ternary_config(recipe, options, loaded), _config(recipe, options)
    check_batch(loaded, config.batch_size)
    with stage("ternarize", ternary.quantizer):
        teacher = _prepare(loaded, ternary, options, progress)
    with stage("fine-tune", f"{config.steps} steps"):
        result = _train(loaded, teacher, options, config, progress)
    if not group.leads:
        return options.file
    with stage("save", str(options.file)):
        _save(loaded, options.file)
    best = result.best
    progress.note(f"held-out loss {best['loss']:.4g} at step {int(best['step'])}")
    block = history.finetune_block(result, config)
    history.write_history(options.file, options.model, ternary.activation_bits, block, recipe.name)
    return options.file


def _open_trainable(options: FinetuneOptions, stage: Stages) -> LoadedModel:
    """The model of the options, which must be a module that can be written when it is trained; and
    there must be data."""
    import torch

    if options.data is None:
        raise UsageError(
            "fine-tuning needs data",
            where="finetune",
            fix="pass --data FILE.npz, a safetensors file, or a directory of text with --tokenizer",
        )
    if options.threads:
        torch.set_num_threads(options.threads)
    with stage("load", str(options.model)):
        loaded = load_model(options, stage.progress)
    if loaded.module is None:
        raise InputError(
            "an ONNX file cannot be trained",
            where=str(options.model),
            fix="fine-tune the PyTorch model it came from (bitnet_export.save writes it)",
        )
    if loaded.kind in NEVER_EXPORTED:
        from bitnet_export.load.save_program import export_program

        with stage("check", "torch.export"):
            export_program(loaded.module, loaded.example_inputs, loaded.dynamic_axes)
    return loaded


def _config(recipe: Recipe, options: FinetuneOptions) -> FinetuneConfig:
    """The recipe's settings with those of the options that have a name in it; None and, of bf16,
    False leave one to the recipe."""
    from bitnet_export.ternary.finetune_config import FinetuneConfig

    names = {field.name for field in fields(FinetuneConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return recipe.finetune_config(**given | {"bf16": options.bf16 or None})


def _prepare(
    loaded: LoadedModel, ternary: TernaryConfig, options: FinetuneOptions, progress: Progress
) -> nn.Module:
    """Make the module trainable as a ternary one, in place; -> the teacher, a copy from before."""
    from bitnet_export.ternary import prepare

    assert loaded.module is not None
    teacher = copy.deepcopy(loaded.module).to(options.device)
    statuses = prepare(loaded.module, ternary)
    for text in unmatched(options.ternary, [s.name for s in statuses]):
        progress.warn(text)
    changed = [s.reason for s in statuses if s.status == "ternary"]
    if changed and options.labels is None and all("already ternary" in r for r in changed):
        progress.warn(_own_teacher(options.model))
    loaded.module.to(options.device)
    return teacher


def _own_teacher(model: Path) -> str:
    """What to know when a model that is ternary already is fine-tuned without labels."""
    source = history.origin(model)
    better = f"; to win back more, fine-tune {source} with more --steps" if source else ""
    return (
        f"{model} is ternary already and is taught by itself: it only learns to make up for int8 "
        f"activations{better}, or pass --labels"
    )


def _train(
    loaded: LoadedModel,
    teacher: nn.Module,
    options: FinetuneOptions,
    config: FinetuneConfig,
    progress: Progress,
) -> FinetuneResult:
    from bitnet_export.ternary.distill import finetune

    assert loaded.module is not None
    assert options.data is not None
    result = finetune(
        loaded.module,
        teacher,
        _samples(loaded, options.data),
        config,
        eval_data=options.eval_data and _samples(loaded, options.eval_data),
        tokenizer=options.tokenizer or own_tokenizer(options.model),
        progress=on_step(progress),
    )
    for text in result.missing:
        progress.note(f"not in the loss: {text}")
    return result


def _samples(loaded: LoadedModel, path: Path) -> Path | ArrayData:
    """A file of arrays, the model's inputs among them in the dtypes it takes; a directory of text
    as it is. Raises InputError for an input that is missing or does not fit."""
    from bitnet_export.load import ArrayData, load_data
    from bitnet_export.load.data import as_dtype
    from bitnet_export.load.model import array_dtype

    if path.is_dir():
        return path
    data = load_data(path)
    inputs = data.select(list(loaded.example_inputs))
    for name, array in inputs.items():
        dtype = array_dtype(name, loaded.example_inputs[name], data.source)
        inputs[name] = as_dtype(array, dtype, name, data.source)
    return ArrayData(data.arrays | inputs, data.source)


def _save(loaded: LoadedModel, output: Path) -> None:
    """The trained module as a model file of plain linear layers."""
    from bitnet_export.load import save
    from bitnet_export.ternary import convert, to_linear

    assert loaded.module is not None
    convert(loaded.module.cpu())
    to_linear(loaded.module)
    save(loaded.module, output, loaded.example_inputs, loaded.dynamic_axes or None)


def finetune_for_export(
    loaded: LoadedModel,
    teacher: Any,
    recipe: Recipe,
    options: ExportOptions,
    progress: Progress,
) -> FinetuneBlock:
    """--finetune-steps: train the prepared module in place, on --data."""
    from bitnet_export.ternary.distill import finetune

    if options.data is None:
        raise UsageError(
            "needs data to train on",
            where="--finetune-steps",
            fix="pass --data FILE.npz with arrays named like the model's inputs",
        )
    assert loaded.module is not None
    config = recipe.finetune_config(steps=options.finetune_steps, seed=options.seed)
    check_batch(loaded, config.batch_size)
    result = finetune(
        loaded.module,
        teacher,
        _samples(loaded, options.data),
        config,
        tokenizer=own_tokenizer(options.model),
        progress=on_step(progress),
    )
    return history.finetune_block(result, config)


def check_batch(loaded: LoadedModel, size: int) -> None:
    """Raise UsageError where the batch is fixed and the model cannot take ``size`` samples."""
    import torch

    from bitnet_export.ternary.calling import call

    fixed = loaded.fixed_batch
    if fixed is None or fixed == size:
        return
    assert loaded.module is not None
    device = next(loaded.module.parameters()).device
    twice = {
        name: torch.cat([tensor, tensor]).to(device) if tensor.dim() else tensor.to(device)
        for name, tensor in loaded.example_inputs.items()
    }
    try:
        with torch.no_grad():
            call(loaded.module, twice)
    except Exception as error:  # whatever a model of fixed shapes raises
        fix = "save it with a dynamic batch axis (dynamic_shapes of bitnet_export.save)"
        raise UsageError(
            f"its batch is fixed at {fixed}; it cannot be trained with {size} samples a step",
            where=str(loaded.source),
            fix=fix + (", or finetune it with --batch-size 1" if fixed == 1 else ""),
        ) from error
