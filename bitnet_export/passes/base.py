"""What a graph pass is, what it reports, and how a list of them runs.

A pass says in words what it needs (``requires``) and what holds afterwards (``ensures``), changes
an onnx-graphsurgeon graph in place and returns what it rewrote and, with a reason a user can
read, what it left alone.
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bitnet_export import onnx_io, op
from bitnet_export.errors import BitnetExportError, StageError, UsageError, first_line

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Skip:
    """A place a pass looked at and left alone."""

    where: str
    reason: str


@dataclass
class PassResult:
    """What one pass did. ``name`` and ``seconds`` are filled in by run_passes.

    ternarized: layer -> how it became ternary, from the passes that make TernaryMatMuls.
    """

    rewritten: int = 0
    skipped: list[Skip] = field(default_factory=list)
    ternarized: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    name: str = ""
    seconds: float = 0.0

    def skip(self, where: str, reason: str) -> None:
        """Record a place left alone."""
        self.skipped.append(Skip(where, reason))


class Pass(ABC):
    """One rewrite of the graph. Optional ones can be left out with --skip-pass NAME."""

    name: ClassVar[str]
    requires: ClassVar[str]
    ensures: ClassVar[str]
    optional: ClassVar[bool] = True

    @abstractmethod
    def run(self, graph: gs.Graph) -> PassResult:
        """Change ``graph`` in place."""


def run_passes(
    model: onnx.ModelProto,
    passes: Sequence[Pass],
    *,
    skip: Sequence[str] = (),
    on_pass: Callable[[str], None] = lambda name: None,
) -> tuple[onnx.ModelProto, list[PassResult]]:
    """Run ``passes`` in order over ``model`` -> (new model, one result a pass that ran).

    Raises UsageError for a name in ``skip`` that is no optional pass, StageError where one breaks.
    """
    check_skippable(skip)
    graph = onnx_io.to_graph(model)
    results = []
    for one in passes:
        if one.name in skip:
            results.append(PassResult(name=one.name, notes=["left out with --skip-pass"]))
            continue
        on_pass(one.name)
        started = time.perf_counter()
        try:
            with onnx_io.quiet_graphsurgeon():
                result = one.run(graph)
            graph.cleanup().toposort()
        except BitnetExportError:
            raise
        except Exception as error:
            leave_out = f"leave it out with --skip-pass {one.name}, and " if one.optional else ""
            raise StageError(
                f"pass {one.name} failed: {first_line(error)}", fix=f"{leave_out}report it"
            ) from error
        result.name, result.seconds = one.name, time.perf_counter() - started
        results.append(result)
    return onnx_io.from_graph(graph, model), results


def check_skippable(names: Sequence[str]) -> None:
    """Raise UsageError for a name that is no optional pass."""
    from bitnet_export.passes import OPTIONAL_PASSES

    unknown = [name for name in names if name not in OPTIONAL_PASSES]
    if unknown:
        raise UsageError(
            f"{', '.join(unknown)}: no optional pass of that name",
            where="--skip-pass",
            fix=f"choose from {', '.join(OPTIONAL_PASSES)}",
        )


def is_op(node: Any, *names: str) -> bool:
    """Whether a node is a standard operator of one of ``names``. Other domains have operators of
    the same names that are something else: ONNX Runtime's blocked Conv, a function "MatMul"."""
    return node.op in names and not node.domain


def is_constant(tensor: Any) -> bool:
    """Whether a tensor is an initializer or the output of a Constant node; reads no values."""
    import onnx_graphsurgeon as gs

    made_by_constant = len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant"
    return isinstance(tensor, gs.Constant) or made_by_constant


def constant_values(tensor: Any) -> np.ndarray | None:
    """The array behind a constant or initializer, or None for a computed tensor."""
    import onnx_graphsurgeon as gs

    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant":
        value = tensor.inputs[0].attrs.get("value")
        return None if value is None else np.asarray(value.values)
    return None


@dataclass
class TernaryNode:
    """A TernaryMatMul of the graph, opened: its tensors and constants, ready to be rewritten."""

    node: gs.Node
    attributes: op.TernaryAttributes
    x: Any
    y: Any
    packed_weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None

    @property
    def layer(self) -> str:
        """Module path."""
        return onnx_io.layer_of(self.node)

    @property
    def is_half(self) -> bool:
        """Whether X and Y are float16."""
        return self.x.dtype == np.float16

    @classmethod
    def of(cls, node: gs.Node) -> TernaryNode:
        """Open ``node``. An all-zero bias counts as none."""
        names = ("K", "N", "group_size", "activation_bits")
        found = [constant_values(t) for t in node.inputs[1:] if not t.is_empty()]
        values = [v for v in found if v is not None]
        if len(values) < len(found):
            raise StageError(
                "a TernaryMatMul whose weights are computed cannot be lowered",
                where=onnx_io.layer_of(node),
                fix="do not skip fold-constants, or make its operands initializers",
            )
        bias = values[2] if len(values) > 2 else None
        return cls(
            node=node,
            attributes=op.TernaryAttributes(**{k: node.attrs[k] for k in names if k in node.attrs}),
            x=node.inputs[0],
            y=node.outputs[0],
            packed_weight=values[0],
            scale=values[1],
            bias=bias if bias is not None and bias.any() else None,
        )


def ternary_nodes(graph: gs.Graph) -> list[TernaryNode]:
    """Every TernaryMatMul in domain ``bitnet``, in graph order."""
    return [TernaryNode.of(n) for n in graph.nodes if n.op == op.OP_TYPE and n.domain == op.DOMAIN]


class Builder:
    """Adds nodes for one layer at a time, named after it. Equal constants are one tensor."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._tensors: dict[str, Any] = dict(graph.tensors())
        for subgraph in graph.subgraphs(recursive=True):  # their names must not be reused either
            self._tensors |= subgraph.tensors()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Any] = {}

    def constant(self, values: np.ndarray, name: str) -> Any:
        """A constant tensor: a new one of about this name, or the one that holds equal values."""
        import onnx_graphsurgeon as gs

        array = np.ascontiguousarray(values)
        digest = hashlib.blake2b(array.reshape(-1).view(np.uint8).data, digest_size=16).digest()
        key = (array.dtype.str, np.shape(values), digest)
        if key not in self._constants:
            self._constants[key] = gs.Constant(self.unique(name), array.reshape(np.shape(values)))
        return self._constants[key]

    def literal(self, values: Any, dtype: Any) -> Any:
        """A small constant that belongs to no layer."""
        return self.constant(np.asarray(values, dtype), "bitnet.literal")

    def unique(self, hint: str) -> str:
        """A tensor name not in use yet."""
        name, count = hint, 1
        while name in self._tensors:
            name, count = f"{hint}.{count}", count + 1
        self._tensors[name] = None
        return name

    def node(
        self,
        op_type: str,
        inputs: Sequence[Any],
        *,
        layer: str,
        dtype: Any,
        attrs: dict[str, Any] | None = None,
        output: Any = None,
        domain: str | None = None,
        hint: str = "",
    ) -> Any:
        """Append a node for ``layer`` and return its (only) output tensor."""
        import onnx_graphsurgeon as gs

        name = f"{layer}/{hint or op_type}"
        out = output if output is not None else gs.Variable(self.unique(name), dtype=dtype)
        node = gs.Node(
            op_type,
            name=self.unique(f"{name}:node"),
            attrs=dict(attrs or {}),
            inputs=list(inputs),
            outputs=[out],
            domain=domain,
        )
        self.graph.nodes.append(onnx_io.set_layer(node, layer))
        return out

    def absent(self) -> Any:
        """The empty tensor that stands for an optional input left out."""
        import onnx_graphsurgeon as gs

        return gs.Variable.empty()

    def split(self, x: Any, outputs: Sequence[Any], sizes: Sequence[int], *, layer: str) -> None:
        """Append a Split of x's last axis into ``outputs`` of ``sizes``."""
        import onnx_graphsurgeon as gs

        node = gs.Node(
            "Split",
            name=self.unique(f"{layer}/Split:node"),
            attrs={"axis": -1},
            inputs=[x, self.literal(list(sizes), np.int64)],
            outputs=list(outputs),
        )
        self.graph.nodes.append(onnx_io.set_layer(node, layer))

    def variable_like(self, name: str, tensor: Any, last: int, dtype: Any = None) -> Any:
        """A tensor of ``tensor``'s type (or dtype) and shape, its last dimension replaced."""
        import onnx_graphsurgeon as gs

        shape = [*tensor.shape[:-1], last] if tensor.shape else None
        return gs.Variable(self.unique(name), dtype=dtype or tensor.dtype, shape=shape)


def float32_ends(builder: Builder, t: TernaryNode, cast: dict[int, Any]) -> tuple[Any, Any]:
    """(x, y) of a layer for operators that take float32 only: behind Casts where it is float16.

    cast: the inputs cast so far, by id, for layers that share one.
    """
    if not t.is_half:
        return t.x, t.y
    if id(t.x) not in cast:
        cast[id(t.x)] = builder.node(
            "Cast", [t.x], layer=t.layer, dtype=np.float32, attrs={"to": 1}, hint="to_float32"
        )
    y = builder.variable_like(f"{t.layer}/float32", t.y, t.attributes.N, np.float32)
    builder.node(
        "Cast", [y], layer=t.layer, dtype=np.float16, attrs={"to": 10}, output=t.y, hint="to_half"
    )
    return cast[id(t.x)], y


def make_ternary_node(
    builder: Builder,
    *,
    layer: str,
    x: Any,
    y: Any,
    attributes: op.TernaryAttributes,
    packed_weight: np.ndarray,
    scale: np.ndarray,
    bias: np.ndarray | None,
) -> None:
    """Append the TernaryMatMul y = x W^T scale + bias; a missing bias becomes shared zeros [N]."""
    if bias is None:
        zeros = np.zeros(attributes.N, np.float32)
        bias_tensor = builder.constant(zeros, f"bitnet.no_bias.{attributes.N}")
    else:
        bias_tensor = builder.constant(bias.astype(np.float32), f"{layer}.bias")
    builder.node(
        op.OP_TYPE,
        [
            x,
            builder.constant(packed_weight, f"{layer}.packed_weight"),
            builder.constant(scale.astype(np.float32), f"{layer}.scale"),
            bias_tensor,
        ],
        layer=layer,
        dtype=x.dtype or np.float32,
        attrs=dict(attributes.as_dict()),
        output=y,
        domain=op.DOMAIN,
    )
