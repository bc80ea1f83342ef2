"""torch.export programs: the file that bitnet_export.save writes, and its way back to a module.

The archive is checked before torch reads it (archive_guard.py). The module that comes out takes
the program's inputs by name and returns its flat outputs; its layers are real modules again
(restore_modules.py).
"""

from __future__ import annotations

import inspect
import io
import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bitnet_export.errors import InputError, StageError
from bitnet_export.load.archive_guard import check_archive
from bitnet_export.load.model import LoadedModel, forward_names
from bitnet_export.load.restore_modules import restore_modules

aten = torch.ops.aten
EXTRA_FILE = "bitnet_export.json"

DynamicShapes = Mapping[str, Mapping[int, Any] | Sequence[Any] | None]


def save(
    model: nn.Module,
    path: str | Path,
    example_inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor,
    dynamic_shapes: DynamicShapes | None = None,
) -> Path:
    """Write ``model`` as a torch.export program, the file bitnet-export reads best.

    example_inputs: tensors by forward's argument names, or in its order; dynamic axes need a
    size of at least 2 there. dynamic_shapes: {"ids": {0: "batch", 1: "sequence"}}, axis names
    or torch.export.Dim; names are kept in the file. The model is put in eval mode for the export.
    Written beside ``path`` and renamed into place. Raises InputError if it cannot be exported.
    """
    path = Path(path)
    args, kwargs = _call_arguments(example_inputs)
    _check_names(model, kwargs or {})
    dims: dict[str, Any] = {}
    shapes = {k: _with_dims(v, dims) for k, v in dynamic_shapes.items()} if dynamic_shapes else None
    was_training = model.training
    model.eval()
    try:
        with _quiet_torch(), _without_cache(model):
            program = _export(model, args, kwargs, shapes)
    except Exception as e:
        raise InputError(
            f"torch.export cannot export the model: {_first_lines(e)}",
            where=type(model).__name__,
            fix="try without dynamic_shapes, or name fewer dynamic axes; torch.export's "
            "documentation lists what it cannot trace",
        ) from e
    finally:
        model.train(was_training)
    extra: dict[str, Any] = {
        "dynamic_axes": _axis_names(dynamic_shapes or {}),
        # A module may name its outputs in an attribute, as the Hugging Face wrapper does.
        "output_names": list(getattr(model, "output_names", None) or []),
    }
    write_program(program, path, extra)
    return path


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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(buffer.getbuffer())
        os.replace(temporary, path)
    except OSError as e:
        raise StageError(
            f"the file cannot be written: {os.strerror(e.errno or 0).lower()}",
            where=str(path),
            fix="free some space, or write elsewhere",
        ) from e
    finally:
        temporary.unlink(missing_ok=True)


def load_exported_program(path: Path, *, trust_pickle: bool = False) -> LoadedModel:
    """A torch.export archive -> its module, example inputs and dynamic axes.

    Raises InputError for a damaged archive or, without trust_pickle, one that runs code.
    """
    if not trust_pickle:
        check_archive(path)
    program, extra = read_program(path)
    names, examples = _example_inputs(program, path)
    module = flat_module(program)
    restore_modules(module)
    axes = extra.get("dynamic_axes") or _guess_axis_names(program, names)
    return LoadedModel(
        name=path.stem,
        kind="exported_program",
        source=path,
        module=module,
        example_inputs=examples,
        dynamic_axes={
            name: {int(i): str(axis) for i, axis in dims.items()} for name, dims in axes.items()
        },
        axis_limits=_axis_limits(program, names, axes),
        output_names=extra.get("output_names") or _output_names(program),
    )


def flat_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as a plain module: tensors in by name, a tensor or a tuple of them out.

    Unlike ``program.module()`` it can be trained, copied and exported again: no input guards,
    no pytree wrapping, dropout and batch norm in inference form, train() and eval() allowed.
    """
    lifted = program.module(check_guards=False)
    graph = lifted.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.nodes):
        if node.op == "placeholder":
            node.type = None
            if not node.users and not isinstance(node.meta.get("val"), torch.Tensor):
                graph.erase_node(node)  # an input that was None or a constant
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # fixes dtype and device, so it would forbid half and bfloat16
        elif node.target is aten.dropout.default:
            node.update_arg(2, False)
        elif node.target is aten.batch_norm.default:
            node.update_arg(5, False)
        elif node.op == "output":
            tensors = tuple(a for a in _leaves(node.args[0]) if isinstance(a, fx.Node))
            node.args = (tensors[0] if len(tensors) == 1 else tensors,)
    _tie(lifted)
    module = fx.GraphModule(lifted, graph, class_name="ExportedModule")
    for name, child in lifted.named_modules():
        child.training = False
        if name and isinstance(child, fx.GraphModule):
            child.recompile()
    return module.eval()


def _tie(module: nn.Module) -> None:
    """One Parameter for all paths that view the same memory: an archive keeps a tied weight once
    but hands out a Parameter for each of its names."""
    first: dict[tuple[Any, ...], nn.Parameter] = {}
    for path, p in list(module.named_parameters(remove_duplicate=False)):
        key = (p.data_ptr(), p.dtype, p.shape, p.stride())
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, first.setdefault(key, p))


def _leaves(tree: Any) -> list[Any]:
    return list(torch.utils._pytree.tree_leaves(tree))


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


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """torch.export logs warnings about its own internals that a user can do nothing about."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def read_program(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """A torch.export archive -> (program, what bitnet_export.save kept beside it). Raises
    InputError where torch cannot read it. Only for archives that check_archive passed or whose
    author is trusted."""
    extra: dict[str, Any] = {EXTRA_FILE: ""}
    _register_output_types(path)
    try:
        # A file object, because torch refuses names that do not end in .pt2.
        with _quiet_torch(), path.open("rb") as file:
            program = torch.export.load(file, extra_files=extra)
    except Exception as e:
        raise InputError(
            f"torch {torch.__version__} cannot read the exported program: {_first_lines(e)}",
            where=str(path),
            fix="write it again with this version of torch: bitnet_export.save(model, path, ...)",
        ) from e
    text = extra[EXTRA_FILE]
    return program, json.loads(text) if text else {}


def _register_output_types(path: Path) -> None:
    """Import transformers' output classes where the program returns one of them: torch.export
    can only read containers that somebody registered."""
    with zipfile.ZipFile(path) as archive:
        model = next((n for n in archive.namelist() if n.endswith("models/model.json")), None)
        if model is None or b"transformers." not in archive.read(model):
            return
    try:
        import transformers.modeling_outputs  # noqa: F401
    except ImportError as e:
        raise InputError(
            "the program returns a transformers output class, and transformers is not installed",
            where=str(path),
            fix="pip install transformers, or export a model that returns plain tensors",
        ) from e


def _example_inputs(
    program: torch.export.ExportedProgram, path: Path
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The names of the tensor inputs in order, and the example tensors kept in the file."""
    names = list(program.graph_signature.user_inputs)
    values = _leaves(program.example_inputs) if program.example_inputs else []
    if len(values) != len(names):
        raise InputError(
            "the exported program holds no example inputs",
            where=str(path),
            fix="write it again: bitnet_export.save(model, path, example_inputs)",
        )
    pairs = zip(names, values, strict=True)
    kept = {str(n): v.detach().clone() for n, v in pairs if isinstance(v, torch.Tensor)}
    if not kept:
        raise InputError("the exported program has no tensor inputs", where=str(path))
    return list(kept), kept


def _output_names(program: torch.export.ExportedProgram) -> list[str] | None:
    """The keys of a dict or ModelOutput; None for tensors and tuples."""
    spec = program.call_spec.out_spec
    keys = spec.context if spec is not None else None
    if isinstance(keys, list | tuple) and keys and all(isinstance(k, str) for k in keys):
        flat = len(spec.children()) == spec.num_leaves  # no nested containers
        return [str(k) for k in keys] if flat else None
    return None


def _input_symbols(
    program: torch.export.ExportedProgram, names: list[str]
) -> Iterator[tuple[str, int, Any]]:
    """(input, dimension, symbolic expression) of each dynamic axis."""
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            for i, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    yield node.name, i, size.node.expr


def _guess_axis_names(
    program: torch.export.ExportedProgram, names: list[str]
) -> dict[str, dict[int, str]]:
    """Names for the axes of a file that has none: a symbol first met at dimension 0 is the
    batch, at dimension 1 the sequence; equal symbols share a name."""
    known: dict[str, str] = {}
    axes: dict[str, dict[int, str]] = {}
    for name, i, expression in _input_symbols(program, names):
        symbol = str(expression)
        if symbol not in known:
            guess = {0: "batch", 1: "sequence"}.get(i, f"dim{i}")
            known[symbol] = guess if guess not in known.values() else f"{name}_{guess}"
        axes.setdefault(name, {})[i] = known[symbol]
    return axes


def _axis_limits(
    program: torch.export.ExportedProgram,
    names: list[str],
    axes: Mapping[str, Mapping[Any, Any]],
) -> dict[str, int]:
    """The largest size of each named axis, where the program bounds it."""
    limits: dict[str, int] = {}
    for name, i, expression in _input_symbols(program, names):
        bounds = program.range_constraints.get(expression)
        dims = axes.get(name, {})
        axis = dims.get(i, dims.get(str(i)))
        if bounds is not None and axis is not None and bounds.upper.is_Integer:
            limits[str(axis)] = int(bounds.upper)
    return limits


def _call_arguments(
    example_inputs: Mapping[str, torch.Tensor] | Sequence[torch.Tensor] | torch.Tensor,
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor] | None]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), None
    return tuple(example_inputs), None


def _check_names(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise InputError for an input that is no argument of forward."""
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        return
    names = forward_names(model)
    unknown = [name for name in inputs if name not in names]
    if unknown:
        raise InputError(
            f"forward has no argument {unknown[0]}; it has {', '.join(names)}",
            where="example_inputs",
            fix="name the tensors after forward's arguments, or pass them as a tuple",
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
        items = axes.items() if isinstance(axes, Mapping) else enumerate(axes or ())
        named = {i: str(getattr(a, "__name__", a)) for i, a in items if _is_named(a)}
        if named:
            names[name] = named
    return names


def _is_named(axis: Any) -> bool:
    return isinstance(axis, str) or isinstance(getattr(axis, "__name__", None), str)


def _first_lines(error: Exception, lines: int = 3) -> str:
    text = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(text[:lines]) or type(error).__name__
