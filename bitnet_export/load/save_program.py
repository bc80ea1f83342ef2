"""Any module -> a torch.export program on disk: what bitnet_export.save does.

Reading one is exported_program.py's work.
"""

from __future__ import annotations

import inspect
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError, StageError
from bitnet_export.load.experts import experts_split
from bitnet_export.load.exported_program import EXTRA_FILE, first_lines, quiet_torch
from bitnet_export.load.inputs import without_size_one
from bitnet_export.load.model import forward_names

DynamicShapes = Mapping[str, Mapping[int, Any] | Sequence[Any] | None]
Examples = Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor


def save(
    model: nn.Module,
    path: str | Path,
    example_inputs: Examples,
    dynamic_shapes: DynamicShapes | None = None,
) -> Path:
    """Write ``model`` as a torch.export program, the file bitnet-export reads best.

    example_inputs: tensors by forward's argument names, or in its order; one of size 1 along a
    dynamic axis is repeated there. dynamic_shapes: {"ids": {0: "batch", 1: "sequence"}}, axis
    names or torch.export.Dim; names are kept in the file. The model is put in eval mode for the
    export. Written beside ``path`` and renamed into place. Raises InputError if it cannot be
    exported.
    """
    path = Path(path)
    program = export_program(model, example_inputs, dynamic_shapes)
    extra: dict[str, Any] = {
        "dynamic_axes": _axis_names(dynamic_shapes or {}),
        # A module may name its outputs in an attribute, as the Hugging Face wrapper does.
        "output_names": list(getattr(model, "output_names", None) or []),
    }
    write_program(program, path, extra)
    return path


def export_program(
    model: nn.Module, example_inputs: Examples, dynamic_shapes: DynamicShapes | None = None
) -> torch.export.ExportedProgram:
    """What save writes; the arguments are the same. Raises InputError if it cannot be exported."""
    args, kwargs = _call_arguments(model, example_inputs, dynamic_shapes or {})
    _check_names(model, kwargs or {}, "example_inputs")
    _check_names(model, dynamic_shapes or {}, "dynamic_shapes")
    dims: dict[str, Any] = {}
    shapes = {k: _with_dims(v, dims) for k, v in dynamic_shapes.items()} if dynamic_shapes else None
    was_training = model.training
    model.eval()
    try:
        with quiet_torch(), _without_cache(model), experts_split(model):
            return _export(model, args, kwargs, shapes)
    except Exception as e:
        raise InputError(
            f"torch.export cannot export the model: {first_lines(e)}",
            where=type(model).__name__,
            fix=_advice(str(e), dynamic=bool(shapes)),
        ) from e
    finally:
        model.train(was_training)


def _advice(text: str, *, dynamic: bool) -> str:
    """What to do about an error of torch.export."""
    if "not a known type" in text:
        return "return tensors from forward, or a tuple, list or dict of them"
    if "data-dependent" in text:
        return "replace control flow that depends on tensor values by torch.where or torch.cond"
    if dynamic:
        return (
            "try without dynamic_shapes, or name fewer dynamic axes; torch.export's "
            "documentation lists what it cannot trace"
        )
    return "torch.export's documentation lists what it cannot trace"


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None, shapes: Any
) -> torch.export.ExportedProgram:
    """torch.export.export, with axes bounded where torch asks for a bound (a table of positions
    has an end). An axis that would have to become static is an error."""
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as e:
        if not shapes or "Suggested fixes" not in str(e):
            raise
        refine = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes
        # The parser wants nothing behind the list of fixes, where torch puts general advice.
        bounded: Any = refine(str(e).split("\n\nThe error above")[0], shapes)
        if any(
            isinstance(axis, int) for axes in bounded.values() for axis in (axes or {}).values()
        ):
            raise
        return torch.export.export(model, args, kwargs, dynamic_shapes=bounded)


def write_program(
    program: torch.export.ExportedProgram, path: Path, extra: Mapping[str, Any]
) -> None:
    """program and what torch does not keep (axis names) -> path, whole or not at all."""
    # Through memory: torch's own file writer ends the process where the disk is full.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={EXTRA_FILE: json.dumps(extra)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    except OSError as e:
        raise StageError(
            f"the file cannot be written: {os.strerror(e.errno or 0).lower()}",
            where=str(path),
            fix="free some space, or write elsewhere",
        ) from e
    finally:
        with suppress(OSError):  # where it could not be made it cannot be removed
            temporary.unlink(missing_ok=True)


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Hugging Face decoders return their cache, an object torch.export does not know."""
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    if use_cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


def _call_arguments(
    model: nn.Module,
    example_inputs: Examples,
    shapes: DynamicShapes,
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor] | None]:
    """The examples as torch.export takes them, none of size 1 along a dynamic axis."""
    if isinstance(example_inputs, Mapping):
        return (), _repeated(example_inputs, shapes)
    one = isinstance(example_inputs, torch.Tensor)
    values = (example_inputs,) if one else tuple(example_inputs)
    names = forward_names(model)
    if len(names) < len(values):  # forward takes *args
        return values, None
    return tuple(_repeated(dict(zip(names, values, strict=False)), shapes).values()), None


def _repeated(inputs: Mapping[str, Any], shapes: DynamicShapes) -> dict[str, Any]:
    axes = {name: [i for i, axis in _axes(of) if _is_dynamic(axis)] for name, of in shapes.items()}
    tensors = {name: t for name, t in inputs.items() if isinstance(t, torch.Tensor)}
    return dict(inputs) | without_size_one(tensors, axes)


def _axes(axes: Mapping[int, Any] | Sequence[Any] | None) -> Iterable[tuple[int, Any]]:
    """(dimension, what dynamic_shapes says of it)."""
    return axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())


def _is_dynamic(axis: Any) -> bool:
    return not (axis is None or isinstance(axis, int) or axis == torch.export.Dim.STATIC)


def _check_names(model: nn.Module, inputs: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a name that is no argument of forward."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return
    names = forward_names(model)
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise InputError(
            f"forward has no argument {unknown[0]}; it has {', '.join(names)}",
            where=where,
            fix="use the names of forward's arguments",
        )


def _with_dims(axes: Any, dims: dict[str, Any]) -> Any:
    """Axis names -> torch.export.Dim, one for each name; anything else as it is."""
    if not isinstance(axes, Mapping):
        return axes
    return {
        i: dims.setdefault(axis, torch.export.Dim(axis)) if isinstance(axis, str) else axis
        for i, axis in axes.items()
    }


def _axis_names(dynamic_shapes: DynamicShapes) -> dict[str, dict[int, str]]:
    names: dict[str, dict[int, str]] = {}
    for name, axes in dynamic_shapes.items():
        named = {i: str(getattr(a, "__name__", a)) for i, a in _axes(axes) if _is_named(a)}
        if named:
            names[name] = named
    return names


def _is_named(axis: Any) -> bool:
    return isinstance(axis, str) or isinstance(getattr(axis, "__name__", None), str)
