"""torch.export programs, which bitnet_export.save writes (save_program.py), and their way back to
a module.

The archive is checked before torch reads it (archive_guard.py). The module that comes out takes
the program's inputs by name and returns its flat outputs; its layers are real modules again
(restore_modules.py).
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bitnet_export.errors import InputError
from bitnet_export.load.archive_guard import check_archive
from bitnet_export.load.model import LoadedModel
from bitnet_export.load.precision import in_float32
from bitnet_export.load.restore_modules import restore_modules

aten = torch.ops.aten
EXTRA_FILE = "bitnet_export.json"


def load_exported_program(path: Path, *, trust_pickle: bool = False) -> LoadedModel:
    """A torch.export archive -> its module, example inputs and dynamic axes.

    Raises InputError for a damaged archive or, without trust_pickle, one that runs code.
    """
    if not trust_pickle:
        check_archive(path)
    program, extra = read_program(path)
    names, examples = _example_inputs(program, path)
    module = flat_module(program)
    notes = in_float32(module, examples)
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
        notes=notes,
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
def quiet_torch() -> Iterator[None]:
    """torch.export logs warnings about its own internals that a user can do nothing about."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # what it logs as an error it raises, too
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
        with quiet_torch(), path.open("rb") as file:
            program = torch.export.load(file, extra_files=extra)
    except Exception as e:
        raise InputError(
            f"torch {torch.__version__} cannot read the exported program: {first_lines(e)}",
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


def first_lines(error: Exception, lines: int = 3) -> str:
    """The beginning of a torch error, which can run to pages."""
    text = [line for line in str(error).splitlines() if line.strip()]
    return "\n".join(text[:lines]) or type(error).__name__
