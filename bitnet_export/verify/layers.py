"""Layer by layer: where does the lowered model stray from the function model, and how sparse is it?

Both graphs run with every ternary layer's output exposed. The errors are cumulative, as in real
use: the first layer that jumps is the one to look at. Whole outputs are parity.py's business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, onnx_tensors, op, packing
from bitnet_export.errors import InputError
from bitnet_export.passes.lower_rtx import int4_weights
from bitnet_export.passes.pack_convolutions import channel_trits
from bitnet_export.targets.session import open_session
from bitnet_export.verify.parity import cosine_similarity
from bitnet_export.verify.results import LayerRow, finite
from bitnet_export.verify.runners import run_frugally, run_session

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class LayerError:
    """How far a layer's output strays; None where a value is not finite."""

    max_abs: float | None
    relative_error: float | None
    cosine: float | None
    kernel: str = ""


@dataclass(frozen=True)
class LayerWeights:
    """Size and sparsity of one TernaryMatMul's weights."""

    inputs: int
    outputs: int
    sparsity: float


def layer_name(node: onnx.NodeProto) -> str:
    """The module path a node came from, or its own name."""
    found = next((p.value for p in node.metadata_props if p.key == onnx_io.LAYER_KEY), "")
    return found or node.name or node.output[0]


def layer_weights(function_path: Path | str) -> dict[str, LayerWeights]:
    """K, N and the part of zeros of every TernaryMatMul and ternary Conv of a model, by layer."""
    from onnx import helper

    model = onnx_io.read_model(Path(function_path))
    constants = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type not in (op.OP_TYPE, "Conv") or node.input[1] not in constants:
            continue
        if node.op_type == "Conv":
            ternary = channel_trits(onnx_tensors.values(constants[node.input[1]]))
            if ternary is not None:
                found[layer_name(node)] = _weights_of(ternary[0])
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        packed = onnx_tensors.values(constants[node.input[1]])
        if packed.dtype == np.int32:
            packed = packing.from_int32(packed)
        found[layer_name(node)] = _weights_of(packing.unpack(packed, attributes["K"]))
    return found


def _weights_of(trits: np.ndarray) -> LayerWeights:
    """trits [N, K]."""
    return LayerWeights(trits.shape[1], trits.shape[0], float((trits == 0).mean()))


def compare_layers(
    function_path: Path | str,
    lowered_path: Path | str,
    feeds: dict[str, np.ndarray],
    *,
    threads: int | None = None,
) -> dict[str, LayerError]:
    """The error of every layer found in both models, in graph order.

    A layer's output in the lowered model is the tensor of the TernaryMatMul's own output name,
    else the last output of the nodes that carry the layer's path. Empty for a model without
    TernaryMatMul. Raises InputError where no layer is found in both.
    """
    function = onnx_io.read_model(Path(function_path))
    lowered = onnx_io.read_model(Path(lowered_path))
    pairs = match_layers(function, lowered)
    if not pairs and not any(node.op_type == op.OP_TYPE for node in function.graph.node):
        return {}
    if not pairs:
        raise InputError(
            f"no TernaryMatMul of {function_path} is found again",
            where=str(lowered_path),
            fix="compare the two files of one export",
        )
    references, others = (
        run_session(open_exposed(path, [p[side] for p in pairs.values()], threads), feeds)
        for side, path in enumerate((function_path, lowered_path))
    )
    kernels = {name: kernel_behind(lowered, tensor) for name, (_, tensor) in pairs.items()}
    return {
        name: layer_error(references[a], others[b], kernels[name]) for name, (a, b) in pairs.items()
    }


def match_layers(function: onnx.ModelProto, lowered: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Layer -> (output tensor in the function model, output tensor in the lowered one)."""
    produced = {name for node in lowered.graph.node for name in node.output}
    last = {layer_name(node): node.output[0] for node in lowered.graph.node}
    pairs = {}
    for node in function.graph.node:
        if node.op_type != op.OP_TYPE:
            continue
        name, tensor = layer_name(node), node.output[0]
        other = tensor if tensor in produced else last.get(name)
        if other is not None:
            pairs[name] = (tensor, other)
    return pairs


def layer_error(reference: np.ndarray, other: np.ndarray, kernel: str = "") -> LayerError:
    """Largest difference, RMS(difference) / RMS(reference) and cosine of two outputs."""
    if reference.shape != other.shape:
        return LayerError(None, None, None, kernel)
    a, b = reference.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    if not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return LayerError(None, None, None, kernel)
    size = float(np.linalg.norm(a))
    stray = float(np.linalg.norm(a - b))
    relative = stray / size if size else (0.0 if stray == 0 else None)
    return LayerError(finite(np.abs(a - b).max()), relative, cosine_similarity(a, b), kernel)


def with_errors(rows: Iterable[LayerRow], errors: dict[str, LayerError]) -> list[LayerRow]:
    """``rows`` with the errors of the layers that were compared."""
    return [
        replace(row, **{k: v for k, v in vars(errors[row.name]).items() if v or k != "kernel"})
        if row.name in errors
        else row
        for row in rows
    ]


def with_weights(rows: Iterable[LayerRow], weights: dict[str, LayerWeights]) -> list[LayerRow]:
    """``rows`` with K, N and sparsity of the layers in ``weights``."""
    return [replace(row, **vars(weights[row.name])) if row.name in weights else row for row in rows]


_MATMULS = (
    "MatMulNBits",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    op.OP_TYPE,
)


def kernel_behind(model: onnx.ModelProto, tensor: str) -> str:
    """The operator that multiplies for ``tensor``: the nearest one upstream, "" where none is.

    Not by layer name: merged siblings share one product and a Split.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    waiting, seen = [tensor], set()
    for name in waiting:  # breadth first; grows while it is walked
        node = producers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op_type in _MATMULS:
            return str(node.op_type)
        waiting += node.input
    return ""


def open_exposed(path: Path | str, tensors: Sequence[str], threads: int | None = None) -> Any:
    """A session of the model at ``path`` with ``tensors`` added to its outputs. No file is written:
    external tensors stay where they are."""
    import onnx

    path = Path(path)
    model = onnx_io.read_model(path)
    known = {value.name for value in model.graph.output}
    for name in dict.fromkeys(tensors):
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    return open_session(
        onnx_tensors.named_beside_each(model).SerializeToString(),
        threads=threads,
        fuse=not int4_weights(model),
        frugal=run_frugally(path),
        data_folder=path.parent.absolute(),
    )
