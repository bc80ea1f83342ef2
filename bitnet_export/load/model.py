"""LoadedModel, what every loader returns, and the checks that every loaded model must pass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export.errors import InputError, first_line
from bitnet_export.load.data import Array, ArrayData, as_dtype
from bitnet_export.load.inputs import InputSpec, apply_overrides, make_inputs

if TYPE_CHECKING:
    import torch

# Rows of --data that become the example inputs.
DATA_ROWS = 2


@dataclass
class LoadedModel:
    """A model of any accepted kind, ready for the stages that follow.

    name: for titles, the file's stem or the Hugging Face model's name.
    kind: "exported_program", "state_dict", "huggingface", "gguf", "onnx" or "pickle".
    module: in eval mode, called with example_inputs by name or in order; None for kind "onnx".
    onnx_path: the file, for kind "onnx" only.
    example_inputs: plausible tensors in forward's argument order.
    dynamic_axes: {"ids": {0: "batch", 1: "sequence"}}; {} means that every shape is static.
    axis_limits: the largest size of a dynamic axis, where the model has one.
    output_names: None where the model does not name them.
    usual_sizes: sizes of axes in everyday use, where those of the example inputs are not typical.
    notes: what was assumed about the inputs, worth telling the user.
    float_layers: of a checkpoint that is ternary already, the linear layers that are not: they
        stay in floating point.
    """

    name: str
    kind: str
    source: Path
    module: torch.nn.Module | None = None
    onnx_path: Path | None = None
    example_inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    dynamic_axes: dict[str, dict[int, str]] = field(default_factory=dict)
    axis_limits: dict[str, int] = field(default_factory=dict)
    output_names: list[str] | None = None
    usual_sizes: dict[str, int] = field(default_factory=dict)
    hf_config: Any | None = None
    notes: list[str] = field(default_factory=list)
    float_layers: list[str] = field(default_factory=list)

    @property
    def fixed_batch(self) -> int | None:
        """Samples in a batch where the model takes no other number, else None."""
        fixed = [
            tensor.shape[0]
            for name, tensor in self.example_inputs.items()
            if tensor.dim() and 0 not in self.dynamic_axes.get(name, {})
        ]
        return min(fixed, default=None)

    def dynamic_shapes(self) -> dict[str, dict[int, Any]] | None:
        """dynamic_axes as torch.export takes them: one bounded Dim for each axis name, {} for
        static inputs; None if every shape is static."""
        import torch

        names = {axis for axes in self.dynamic_axes.values() for axis in axes.values()}
        dims = {name: torch.export.Dim(name, max=self.axis_limits.get(name)) for name in names}
        shapes = {
            name: {i: dims[axis] for i, axis in self.dynamic_axes.get(name, {}).items()}
            for name in self.example_inputs
        }
        return shapes if names else None


def check_weights(module: torch.nn.Module, where: str) -> None:
    """Raise InputError, with the tensor's name, for an empty parameter or one with NaN or Inf.

    Buffers may be empty, or hold -Inf (attention masks), but not NaN.
    """
    for name, tensor in module.named_parameters():
        if tensor.is_meta:
            raise InputError(f"{name} has no data: it is missing from the file", where=where)
        if tensor.numel() == 0:
            raise InputError(
                f"{name} has shape {list(tensor.shape)}: a layer with K = 0 or N = 0 computes "
                "nothing",
                where=where,
                fix="remove the layer from the model",
            )
        _check_finite(name, tensor, where, infinity=tensor.is_floating_point())
    for name, buffer in module.named_buffers():
        _check_finite(name, buffer, where, infinity=False)


def _check_finite(name: str, tensor: torch.Tensor, where: str, *, infinity: bool) -> None:
    """Raise InputError for NaN and, where asked, Inf."""
    if not tensor.is_floating_point():
        return
    if is_finite(tensor):
        return
    # One-byte floats have no isfinite.
    values = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
    bad = int((~values.isfinite() if infinity else values.isnan()).sum())
    if bad:
        raise InputError(
            f"{name} holds {bad} NaN or Inf value{'s' if bad > 1 else ''} of {tensor.numel()}",
            where=where,
            fix="the training diverged or the file is damaged; use an earlier checkpoint",
        )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats is known to hold neither NaN nor Inf. Its extremes tell, in a
    twentieth of the time that looking at each number takes; one-byte floats have none."""
    if tensor.element_size() == 1 or not tensor.numel():
        return not tensor.numel()
    return all(bool(extreme.isfinite()) for extreme in tensor.detach().aminmax())


def apply_inputs(
    model: LoadedModel, given: Mapping[str, InputSpec], data: ArrayData | None
) -> None:
    """Put the user's --input and --data over a loaded model's own example inputs, in place."""
    if given:
        _override_specs(model, given)
    if data is not None:
        _use_data(model, data, static=False)


def inputs_from_user(
    module: torch.nn.Module,
    model: LoadedModel,
    given: Mapping[str, InputSpec],
    data: ArrayData | None,
) -> None:
    """Example inputs for a module that brings none: from --input, --data, or an attribute
    example_inputs / example_input_array of the module. Raises InputError with the exact flag.
    """
    names = forward_names(module)
    if given:
        unknown = [n for n in given if names and n not in names]
        if unknown:
            raise InputError(
                f"forward has no argument {unknown[0]}; it has {', '.join(names)}",
                where=str(model.source),
                fix="correct the name in --input",
            )
        ordered = [given[n] for n in names if n in given] or list(given.values())
        ordered = [_with_vocabulary(spec, module) for spec in ordered]
        model.example_inputs = make_inputs(ordered, note=model.notes.append)
        model.dynamic_axes = {s.name: s.dynamic_axes for s in ordered if s.dynamic_axes}
    if data is not None:
        _use_data(model, data, static=not given, names=names)
    if not given and data is None:
        model.example_inputs = _own_inputs(module, names)
    if not model.example_inputs:
        flags = " ".join(spec.flag() for spec in plausible_specs(module))
        raise InputError(
            "the shape of its inputs is not known",
            where=str(model.source),
            fix=f"pass {flags} (names make an axis dynamic, numbers fix it), or --data FILE.npz",
        )


def forward_names(module: torch.nn.Module) -> list[str]:
    """The named arguments of forward, in order."""
    parameters = inspect.signature(module.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def plausible_specs(module: torch.nn.Module) -> list[InputSpec]:
    """A guess at each required input of forward, read off the module's first layer."""
    from torch import nn

    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.default is p.empty and p.kind <= p.KEYWORD_ONLY]
    names = [n for n in names if n not in ("args", "kwargs")] or ["x"]
    dims: tuple[int | str, ...] = ("batch", 64)
    dtype = "float32"
    for layer in module.modules():
        if isinstance(layer, nn.Embedding):
            dims, dtype = ("batch", "sequence"), "int64"
        elif isinstance(layer, nn.Conv2d):
            dims = ("batch", layer.in_channels, 224, 224)
        elif isinstance(layer, nn.Conv1d):
            dims = ("batch", layer.in_channels, "length")
        elif isinstance(layer, nn.Linear):
            dims = ("batch", layer.in_features)
        else:
            continue
        break
    return [InputSpec(name, dims, dtype) for name in names]


def _with_vocabulary(spec: InputSpec, module: torch.nn.Module) -> InputSpec:
    """Bounds integer inputs by the smallest embedding, so that any of them may be looked up."""
    from torch import nn

    sizes = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    return replace(spec, high=min(sizes)) if sizes and "int" in spec.dtype else spec


def _own_inputs(module: torch.nn.Module, names: list[str]) -> dict[str, torch.Tensor]:
    import torch

    own = getattr(module, "example_inputs", None)
    if own is None:
        own = getattr(module, "example_input_array", None)  # PyTorch Lightning's name
    if isinstance(own, Mapping):
        return dict(own)
    if isinstance(own, torch.Tensor):
        own = (own,)
    return dict(zip(names, own, strict=False)) if isinstance(own, list | tuple) else {}


def _override_specs(model: LoadedModel, given: Mapping[str, InputSpec]) -> None:
    known = {
        name: InputSpec(
            name,
            tuple(
                model.dynamic_axes.get(name, {}).get(i, size) for i, size in enumerate(tensor.shape)
            ),
            str(tensor.dtype).removeprefix("torch."),
            high=_exclusive_bound(tensor),
        )
        for name, tensor in model.example_inputs.items()
    }
    specs = apply_overrides(known, given, str(model.source))
    limit = min(model.axis_limits.values(), default=None)
    fresh = make_inputs(list(specs.values()), limit=limit, note=model.notes.append)
    # Inputs not overridden keep their own values unless a shared axis has changed its size.
    for name, tensor in model.example_inputs.items():
        kept = name not in given and fresh[name].shape == tensor.shape
        model.example_inputs[name] = tensor if kept else fresh[name]
    model.dynamic_axes = {n: s.dynamic_axes for n, s in specs.items() if s.dynamic_axes}


def _exclusive_bound(tensor: torch.Tensor) -> int | None:
    """One past the largest example value of an integer tensor: a safe range for more of them."""
    if "int" not in str(tensor.dtype) or not tensor.numel():
        return None
    return max(int(tensor.max()) + 1, 2)


def _use_data(
    model: LoadedModel, data: ArrayData, *, static: bool, names: list[str] | None = None
) -> None:
    """The first rows of data become the example inputs. static: nothing is known about the axes
    yet, so only the batch becomes dynamic."""
    import torch

    wanted = list(model.example_inputs) or [n for n in names or [] if n in data.arrays]
    arrays = data.select(wanted) if wanted else {}
    if not arrays:
        raise InputError(
            f"no array of it is an input of the model; it has {', '.join(data.arrays)}, "
            f"forward takes {', '.join(names or ['unnamed arguments'])}",
            where=data.source,
            fix="save the arrays under the names of forward's arguments",
        )
    for name, array in arrays.items():
        _check_values(name, array, data.source)
        rows = DATA_ROWS if len(array) >= DATA_ROWS else 1
        fixed = model.example_inputs.get(name)
        if fixed is not None and 0 not in model.dynamic_axes.get(name, {}):
            rows = fixed.shape[0] if fixed.ndim else rows
        example = array[:rows]
        if fixed is not None:
            _check_fits(name, example, fixed, model, data.source)
            example = as_dtype(example, array_dtype(name, fixed, data.source), name, data.source)
        elif example.dtype == np.float64:
            example = example.astype(np.float32)
        model.example_inputs[name] = torch.from_numpy(example.copy())
        if static and rows >= DATA_ROWS:
            model.dynamic_axes[name] = {0: "batch"}


def check_runs(model: LoadedModel) -> None:
    """Raise InputError unless the module runs on its example inputs: here it is still plain that
    they are at fault, not the export."""
    import torch

    assert model.module is not None
    try:
        with torch.no_grad():
            model.module(**model.example_inputs)
    except Exception as e:  # whatever the module raises
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in model.example_inputs.items())
        raise InputError(
            f"the model does not run on {shapes}: {first_line(e)}",
            where=str(model.source),
            fix="correct the sizes in --input, or the arrays of --data",
        ) from e


def array_dtype(name: str, tensor: torch.Tensor, where: str) -> np.dtype[Any]:
    """The numpy dtype an input is fed in. Raises InputError for bfloat16, which numpy lacks."""
    try:
        return tensor.new_empty(0).numpy().dtype
    except TypeError as e:
        raise InputError(
            f"input {name} is {tensor.dtype}, which numpy arrays cannot hold",
            where=where,
            fix="let the model take float32 and cast it inside",
        ) from e


def _check_values(name: str, array: Array, where: str) -> None:
    """Raise InputError for an array that is no input of any model: text, or NaN among numbers."""
    if array.dtype.kind not in "biuf":
        raise InputError(f"array {name} holds {array.dtype}, not numbers", where=where)
    bad = int(np.isnan(array).sum()) if array.dtype.kind == "f" else 0
    if bad:
        raise InputError(
            f"array {name} holds {bad} NaN value{'s' if bad > 1 else ''} of {array.size}",
            where=where,
            fix="remove those samples",
        )


def _check_fits(
    name: str, array: Array, known: torch.Tensor, model: LoadedModel, where: str
) -> None:
    axes = model.dynamic_axes.get(name, {})
    fits = array.ndim == known.ndim and all(
        i in axes or a == b for i, (a, b) in enumerate(zip(array.shape, known.shape, strict=True))
    )
    if not fits:
        expected = [axes.get(i, size) for i, size in enumerate(known.shape)]
        raise InputError(
            f"array {name} gives shape {list(array.shape)}, the model takes {expected}",
            where=where,
        )
