"""Turn the functional calls of an exported program's graph back into modules.

torch.export leaves parameters at their old paths but calls ``aten.linear(x, weight, bias)`` on
them, so nothing is left that ``prepare`` could make ternary. ``restore_modules`` puts nn.Linear,
nn.Embedding, nn.Conv1d and nn.Conv2d back: the same Parameter objects at the same paths, hence
the same state_dict keys, with two exceptions. A parameter that does not sit in a module of its
own under the name ``weight`` (nn.MultiheadAttention's ``in_proj_weight``, a bare nn.Parameter)
moves into a new submodule: ``attn.in_proj_weight`` becomes ``attn.in_proj.weight``. A [K, N]
weight (Hugging Face Conv1D, ``x @ w``) becomes a [N, K] Parameter of its own under the same key.
Calls inside higher-order operators (a no_grad region within forward) are left as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

aten = torch.ops.aten


@dataclass(frozen=True)
class _Call:
    """One call that stands for a module. weight and bias are get_attr nodes; x is the position
    of the activations among the arguments, whose node changes as calls before it are replaced."""

    node: fx.Node
    x: int
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool  # the parameter is [K, N]
    kind: type[nn.Module]
    geometry: tuple[tuple[str, Any], ...] = ()  # a convolution's stride, padding, ...


def restore_modules(module: fx.GraphModule) -> list[str]:
    """In place; returns the paths of the modules put back. Calls that share a weight (and bias)
    share one module; a weight that other nodes read as well stays readable for them."""
    calls = [call for node in module.graph.nodes if (call := _match(module, node)) is not None]
    restored: dict[tuple[Any, ...], str] = {}
    taken: set[str] = set()
    for call in _embeddings_last(calls):
        weight = _parameter(module, call.weight)
        bias = _parameter(module, call.bias) if call.bias is not None else None
        key = (id(weight), id(bias), call.transposed, call.kind, call.geometry)
        if key not in restored:
            path = _place(module, call, weight, taken)
            taken.add(path)
            restored[key] = path
            _install(module, path, _build(call, weight, bias))
        _replace_call(module, call, restored[key])
    _drop_moved_parameters(module)
    module.graph.lint()
    module.recompile()
    return list(restored.values())


def _embeddings_last(calls: Iterable[_Call]) -> list[_Call]:
    """A tied head keeps its own path, the embedding then takes the parameter's other one."""
    return sorted(calls, key=lambda call: call.kind is nn.Embedding)


def _match(module: fx.GraphModule, node: fx.Node) -> _Call | None:
    """The module that ``node`` stands for, None if it stands for none."""
    if node.op != "call_function":
        return None
    target, args = node.target, node.args
    if target is aten.linear.default:
        bias = args[2] if len(args) > 2 else node.kwargs.get("bias")
        return _linear(module, node, 0, args[1], bias, transposed=False)
    if target is aten.addmm.default and not node.kwargs:
        return _linear(module, node, 1, args[2], args[0], transposed=True)
    if target in (aten.mm.default, aten.matmul.default):
        return _linear(module, node, 0, args[1], None, transposed=True)
    if target is aten.embedding.default and len(args) < 4:
        weight = args[0]
        if isinstance(weight, fx.Node) and _is_2d(module, weight):
            return _Call(node, 1, weight, None, False, nn.Embedding)
    return _convolution(module, node) if target in _CONVOLUTIONS else None


def _linear(
    module: fx.GraphModule,
    node: fx.Node,
    x: int,
    weight: object,
    bias: object,
    *,
    transposed: bool,
) -> _Call | None:
    if not isinstance(weight, fx.Node):
        return None
    if weight.op == "call_function" and _is_transpose(weight) and transposed:
        source, transposed = weight.args[0], False  # x @ w.T
        weight = source if isinstance(source, fx.Node) else weight
    if not _is_2d(module, weight):
        return None
    if bias is not None:
        rows = _parameter(module, weight).shape[1 if transposed else 0]
        if not isinstance(bias, fx.Node) or bias.op != "get_attr":
            return None
        if tuple(_parameter(module, bias).shape) != (rows,):
            return None
    return _Call(node, x, weight, bias, transposed, nn.Linear)


_CONVOLUTIONS: dict[Any, type[nn.Conv1d] | type[nn.Conv2d]] = {
    aten.conv1d.default: nn.Conv1d,
    aten.conv1d.padding: nn.Conv1d,
    aten.conv2d.default: nn.Conv2d,
    aten.conv2d.padding: nn.Conv2d,
}
# conv2d's arguments after x, weight and bias, and their defaults.
_GEOMETRY = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))


def _convolution(module: fx.GraphModule, node: fx.Node) -> _Call | None:
    args = node.args
    names = dict(zip((name for name, _ in _GEOMETRY), args[3:], strict=False))
    weight, bias = args[1], args[2] if len(args) > 2 else node.kwargs.get("bias")
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return None
    value = _parameter(module, weight)
    if not isinstance(value, nn.Parameter) or not value.is_floating_point():
        return None
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return None
    given = {name: node.kwargs.get(name, names.get(name, usual)) for name, usual in _GEOMETRY}
    axes = value.dim() - 2
    geometry = tuple((name, _per_axis(name, v, axes)) for name, v in given.items())
    return _Call(node, 0, weight, bias, False, _CONVOLUTIONS[node.target], geometry)


def _per_axis(name: str, value: Any, axes: int) -> Any:
    """A number for each axis: aten also takes one for all of them."""
    if isinstance(value, str) or name == "groups":
        return value
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _is_transpose(node: fx.Node) -> bool:
    """node swaps the two axes of a matrix."""
    if node.target in (aten.t.default, aten.numpy_T.default):
        return True
    if node.target is aten.transpose.int:
        return {int(str(d)) % 2 for d in node.args[1:3]} == {0, 1}
    if node.target is not aten.permute.default:
        return False
    return str(node.args[1]) in ("[1, 0]", "[-1, -2]", "[-1, 0]", "[1, -2]")


def _is_2d(module: fx.GraphModule, node: fx.Node) -> bool:
    """node reads a floating-point matrix Parameter."""
    if node.op != "get_attr":
        return False
    value = _parameter(module, node)
    return isinstance(value, nn.Parameter) and value.ndim == 2 and value.is_floating_point()


def _parameter(module: nn.Module, node: fx.Node) -> nn.Parameter:
    owner, _, name = str(node.target).rpartition(".")
    parameter: nn.Parameter = getattr(module.get_submodule(owner), name)
    return parameter


def _place(module: nn.Module, call: _Call, weight: nn.Parameter, taken: set[str]) -> str:
    """The path for the new module: the parameter's own where it is called ``weight`` and shares
    its owner with nothing but a bias, a free name next to it otherwise."""
    paths = [str(call.weight.target)]
    # Tied parameters have several paths; remove_duplicate would show only the first.
    aliases = module.named_parameters(remove_duplicate=False)
    paths += [path for path, p in aliases if p is weight and path != paths[0]]
    for path in paths:
        owner, _, name = path.rpartition(".")
        if name == "weight" and owner and owner not in taken and _only_linear(module, owner):
            return owner
    stem = paths[0].removesuffix("weight").rstrip("._") or "linear"
    path, attempt = stem, 1
    while path in taken or _exists(module, path):
        attempt += 1
        path = f"{stem}_{attempt}"
    return path


def _only_linear(module: nn.Module, path: str) -> bool:
    owner = module.get_submodule(path)
    names = {name for name, _ in owner.named_parameters(recurse=False)}
    return (
        names <= {"weight", "bias"}
        and not list(owner.children())
        and not list(owner.named_buffers(recurse=False))
    )


def _exists(module: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    return hasattr(module.get_submodule(owner), name)


def _build(call: _Call, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Module:
    """The module around the given Parameters; no memory is allocated for weights."""
    if call.transposed:
        weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
    new: Any
    if call.geometry:
        options: dict[str, Any] = dict(call.geometry)
        inputs = weight.shape[1] * options["groups"]
        kind: Any = call.kind
        new = kind(inputs, weight.shape[0], tuple(weight.shape[2:]), **options, device="meta")
        new.weight, new.bias = weight, bias
        return cast(nn.Module, new.eval())
    rows, columns = weight.shape
    if call.kind is nn.Embedding:
        padding = call.node.args[2] if len(call.node.args) > 2 else None
        index = padding if isinstance(padding, int) and padding >= 0 else None
        new = nn.Embedding(rows, columns, padding_idx=index, device="meta")
    else:
        new = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        if bias is not None:
            new.bias = bias
    new.weight = weight
    return cast(nn.Module, new.eval())


def _install(module: nn.Module, path: str, new: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, new)


def _replace_call(module: fx.GraphModule, call: _Call, path: str) -> None:
    x = call.node.args[call.x]
    with module.graph.inserting_before(call.node):
        new = module.graph.call_module(path, (x,))
    new.meta.update({k: v for k, v in call.node.meta.items() if k == "val"})
    call.node.replace_all_uses_with(new)
    operands = [n for n in call.node.all_input_nodes if n is not x]
    module.graph.erase_node(call.node)
    for operand in operands:
        _erase_unused(module.graph, operand)


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a weight's reader, and the transpose between, once nobody uses it."""
    if node.users or node.op == "placeholder":
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        _erase_unused(graph, source)


def _drop_moved_parameters(module: fx.GraphModule) -> None:
    """Delete parameters that moved into a new module and that the graph no longer reads."""
    read = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    inside = {
        f"{path}.{name}"
        for path, child in module.named_modules(remove_duplicate=False)
        if isinstance(child, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d)
        for name, _ in child.named_parameters()
    }
    owned = {id(p) for path, p in module.named_parameters() if path in inside}
    for path, parameter in list(module.named_parameters(remove_duplicate=False)):
        if path in inside or path in read or id(parameter) not in owned:
            continue
        owner, _, name = path.rpartition(".")
        delattr(module.get_submodule(owner), name)
