"""A model of any accepted kind -> a module with example inputs (or a checked ONNX file).

``load`` tells the kind from the content and hands it to that kind's loader, one file each;
``save`` writes the recommended file. Nothing here changes weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export.errors import UsageError
from bitnet_export.load.data import ArrayData, load_data
from bitnet_export.load.detect import detect
from bitnet_export.load.inputs import InputSpec, parse_input_spec, parse_input_specs
from bitnet_export.load.model import (
    LoadedModel,
    apply_inputs,
    array_dtype,
    check_runs,
    check_weights,
    inputs_from_user,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "ArrayData",
    "InputSpec",
    "LoadedModel",
    "detect",
    "load",
    "load_data",
    "parse_input_spec",
    "save",
]


def load(
    path: str | Path,
    *,
    factory: str | None = None,
    input_specs: Sequence[str] = (),
    data: str | Path | None = None,
    trust_pickle: bool = False,
) -> LoadedModel:
    """Read a model: a torch.export program, a state_dict or safetensors with ``factory``
    ("package.module:function"), a Hugging Face directory, a GGUF file, an ONNX file, or, with
    trust_pickle, a pickled module.

    input_specs: "name:1x128:int64", dynamic axes named ("ids:batchxseq:int64"); they override
    what the file says. data: npz or safetensors; its first rows become the example inputs.
    Raises InputError or UsageError, with what to do, for anything that cannot be loaded.
    """
    path = Path(path)
    given = parse_input_specs(input_specs)
    arrays = load_data(data) if data is not None else None
    kind = detect(path)
    if factory is not None and kind not in ("torch_save", "safetensors"):
        raise UsageError(
            f"--model is for weights without a module; this is a {kind.replace('_', ' ')}",
            where=str(path),
            fix="leave --model out",
        )
    if kind == "huggingface":
        model = _huggingface(path, arrays, trust_pickle)
    elif kind == "gguf":
        model = _gguf(path, arrays)
    elif kind == "onnx":
        model = _onnx(path)
    else:
        model = _LOADERS[kind](path, factory, trust_pickle)
    if model.module is not None:
        check_weights(model.module, str(path))
    if model.module is not None and not model.example_inputs:
        inputs_from_user(model.module, model, given, arrays)
    else:
        apply_inputs(model, given, arrays)
    for name, tensor in model.example_inputs.items():
        array_dtype(name, tensor, str(path))  # complains of what no runtime can be fed
    if model.module is not None and (given or arrays is not None):
        check_runs(model)
    return model


def save(
    model: torch.nn.Module,
    path: str | Path,
    example_inputs: Any,
    dynamic_shapes: Any = None,
) -> Path:
    """Write ``model`` as a torch.export program, the recommended file: no code needed to read
    it, and none run.

    example_inputs: tensors by forward's argument names, or in its order. dynamic_shapes:
    {"ids": {0: "batch", 1: "sequence"}}, axis names or torch.export.Dim, None for fixed shapes;
    names are kept in the file. Raises InputError if the model cannot be exported.
    """
    from bitnet_export.load import save_program

    return save_program.save(model, path, example_inputs, dynamic_shapes)


def _exported_program(path: Path, factory: str | None, trust: bool) -> LoadedModel:
    from bitnet_export.load.exported_program import load_exported_program

    return load_exported_program(path, trust_pickle=trust)


def _torch_save(path: Path, factory: str | None, trust: bool) -> LoadedModel:
    from torch import nn

    from bitnet_export.load.experts import split_experts
    from bitnet_export.load.precision import in_float32
    from bitnet_export.load.state_dict import build
    from bitnet_export.load.torch_save import read_torch_save

    content = read_torch_save(path, trust_pickle=trust)
    if isinstance(content, nn.Module):
        notes = in_float32(content.eval(), {})
        split_experts(content)
        return LoadedModel(path.stem, "pickle", path, content, notes=notes)
    return LoadedModel(path.stem, "state_dict", path, build(factory, content, path))


def _safetensors(path: Path, factory: str | None, trust: bool) -> LoadedModel:
    from bitnet_export.load.state_dict import build, read_safetensors

    return LoadedModel(path.stem, "state_dict", path, build(factory, read_safetensors(path), path))


def _huggingface(path: Path, arrays: ArrayData | None, trust: bool) -> LoadedModel:
    from bitnet_export.load.huggingface import load_huggingface

    names = list(arrays.arrays) if arrays is not None else []
    return load_huggingface(path, input_names=names, trust_pickle=trust)


def _gguf(path: Path, arrays: ArrayData | None) -> LoadedModel:
    from bitnet_export.load.gguf_file import load_gguf

    return load_gguf(path, input_names=list(arrays.arrays) if arrays is not None else [])


def _onnx(path: Path) -> LoadedModel:
    from bitnet_export.load.onnx_file import load_onnx

    return load_onnx(path)


_LOADERS: dict[str, Callable[[Path, str | None, bool], LoadedModel]] = {
    "exported_program": _exported_program,
    "torch_save": _torch_save,
    "safetensors": _safetensors,
}
