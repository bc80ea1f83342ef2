"""Compute what depends on constants only, so that weights stand as initializers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export.passes.base import Pass, PassResult, constant_values, is_constant, is_op

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

# Different at every run, though all their inputs are constant.
_RANDOM = {
    *("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"),
    *("Bernoulli", "Multinomial"),
}
# ONNX numbers of the types that are cast here; elements from which a constant is large.
_FLOATS: dict[int, Any] = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    11: np.dtype(np.float64),
}
_LARGE = 1 << 14
_WEIGHT_READERS = ("MatMul", "Gemm", "Transpose")


class FoldConstants(Pass):
    """Exporters leave transposes, casts and dequantization on weights; fold them first.

    Left alone: random numbers, and the transpose of a tensor that is an embedding table, too,
    which would be stored twice.
    """

    name = "fold-constants"
    requires = "onnxruntime, which evaluates the constants"
    ensures = "no other node has only constant inputs"

    def run(self, graph: gs.Graph) -> PassResult:
        """Fold, with onnx-graphsurgeon's own folding after what it leaves out."""
        before = len(graph.nodes)
        result = PassResult()
        for node in graph.nodes:
            if is_op(node, "DequantizeLinear"):
                _fold_dequantize(node)
            elif node.op in _RANDOM:
                result.skip(node.name or node.outputs[0].name, "makes random numbers")
            elif _is_tied(node):
                result.skip(node.inputs[0].name, "an embedding and a weight, stored once")
        _fold_by_hand(graph)
        graph.cleanup()
        with _quiet_onnxruntime():
            graph.fold_constants(
                size_threshold=None,
                should_exclude_node=lambda node: node.op in _RANDOM or _is_tied(node),
            )
        graph.cleanup()
        result.rewritten = before - len(graph.nodes)
        return result


def _fold_by_hand(graph: gs.Graph) -> None:
    """Transposes, casts and copies of large constants, which onnx-graphsurgeon would serialize:
    past 2 GB it folds nothing and says nothing. A transpose is a view and takes no memory."""
    for node in graph.nodes:  # in topological order
        if not is_op(node, "Transpose", "Cast", "Identity") or _is_tied(node):
            continue
        values = constant_values(node.inputs[0])
        y = node.outputs[0]
        if values is None or values.size < _LARGE or any(y is out for out in graph.outputs):
            continue
        if node.op == "Transpose":
            values = np.transpose(values, node.attrs.get("perm"))
        elif node.op == "Cast":
            dtype = _FLOATS.get(node.attrs["to"])
            if dtype is None or values.dtype not in _FLOATS.values():
                continue
            with np.errstate(over="ignore"):
                values = values.astype(dtype)
        y.inputs.clear()
        y.to_constant(values)


@contextmanager
def _quiet_onnxruntime() -> Iterator[None]:
    """onnx-graphsurgeon's sessions would tell the user which of their optimizations fail."""
    try:
        import onnxruntime as ort
    except ImportError:  # then nothing is folded
        yield
        return
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # ONNX Runtime's own default; it does not tell


def _is_tied(node: gs.Node) -> bool:
    """A Transpose of a constant that a Gather reads as well."""
    if not is_op(node, "Transpose") or not is_constant(node.inputs[0]):
        return False
    return any(is_op(reader, "Gather") for reader in node.inputs[0].outputs)


def _fold_dequantize(node: gs.Node) -> None:
    """Weights stored as integers and a scale become floats; onnx-graphsurgeon never folds those.

    Only where a product reads them: other quantized tensors keep their size.
    """
    y = node.outputs[0]
    values = [None if t.is_empty() else constant_values(t) for t in node.inputs]
    given = [v for t, v in zip(node.inputs, values, strict=True) if not t.is_empty()]
    if any(v is None for v in given) or not all(is_op(n, *_WEIGHT_READERS) for n in y.outputs):
        return
    x, scale = np.asarray(values[0]), np.asarray(values[1])
    zero = values[2] if len(values) > 2 and values[2] is not None else np.zeros_like(scale)
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)

    def spread(v: np.ndarray) -> np.ndarray:
        if v.size == 1:
            return v.reshape(())
        if block:
            return np.repeat(v, block, axis).take(np.arange(x.shape[axis]), axis)
        return v.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])

    centred = x.astype(np.float32) - spread(np.asarray(zero).astype(np.float32))
    y.to_constant((centred * spread(scale).astype(np.float32)).astype(scale.dtype))
    y.inputs.clear()
