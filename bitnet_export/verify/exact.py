"""Every ternary layer recomputed by the NumPy reference from the input it really had.

End to end, one int8 activation that rounds the other way can grow from layer to layer, so whole
models agree only to within noise. Layer by layer, on the layer's own input, the integer part is
exact: this is the check that finds a wrong kernel, packing or scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io, onnx_tensors, op, packing
from bitnet_export.errors import StageError
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.layers import layer_name, open_exposed
from bitnet_export.verify.parity import Difference, Pair, compare_arrays, parity_row
from bitnet_export.verify.results import ParityRow
from bitnet_export.verify.runners import run_session
from bitnet_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    import onnx

LAYER_TOLERANCES = {
    "int8": Tolerance(2e-6, 0.999999, "integer sums are exact; a few float32 roundings of scaling"),
    "function": Tolerance(2e-6, 0.999999, "integer sums are exact; float32 rounding of scaling"),
    "float": Tolerance(1e-5, 0.999999, "float32 sums in another order"),
    "fp16": Tolerance(
        1e-2,
        0.9999,
        "result and recorded input are rounded to float16, but ONNX Runtime's CPU keeps the input "
        "in float32 between layers: an int8 activation may round the other way",
        same_dtype=False,
    ),
    "float-activations": Tolerance(
        2e-3, 0.99999, "scale and result are rounded to float16; nothing to flip", same_dtype=False
    ),
    "int8-tensor": Tolerance(5e-2, 0.99, "one activation scale a tensor instead of one a row"),
    # 3.2 % is the most seen: a gated feed-forward's last layer, whose inputs have long tails.
    "2bit": Tolerance(5e-2, 0.999, "MatMulNBits quantizes activations per block of 128, not row"),
}


# What layers may put out in one run. Their rows are no more than the elements of the largest feed;
# how many they are is seen on the first layer, where that estimate is too large.
GROUP_BYTES = 1 << 30


@dataclass(frozen=True)
class _Layer:
    name: str
    x: str
    y: str
    attributes: op.TernaryAttributes
    packed_weight: np.ndarray
    scale: np.ndarray
    bias: np.ndarray | None


@dataclass(frozen=True)
class _Result:
    """used: how much of its tolerance a layer uses up."""

    layer: _Layer
    difference: Difference
    tolerance: Tolerance
    used: float


def check_layers(
    ternary_path: Path, path: Path, cases: Sequence[Case], kinds: Sequence[str]
) -> list[ParityRow]:
    """One row a case: the layer of ``path`` that strays furthest from the reference.

    ternary_path: the model with one bitnet::TernaryMatMul a layer, from which the weights and
    tensor names come; no rows where it has none, because all that is ternary are convolutions that
    run in floating point. kinds: what the lowering changed, as for tolerances.tolerance_for.
    Raises StageError where no layer of one model is found in the other.
    """
    known = _layers(onnx_io.read_model(ternary_path))
    if not known:
        return []
    lowered = onnx_io.read_model(path)
    made = {t for n in lowered.graph.node for t in n.output} | {i.name for i in lowered.graph.input}
    layers = [la for la in known if {la.x, la.y} <= made]
    if not layers:
        raise StageError("no ternary layer is found again after lowering", where=str(path))
    tensors = list(dict.fromkeys(name for layer in layers for name in (layer.x, layer.y)))
    session = open_exposed(path, tensors)
    rows = [_check_case(session, layers, case, kinds) for case in cases]
    return [row for row in rows if row is not None]


def _check_case(
    session: Any, layers: Sequence[_Layer], case: Case, kinds: Sequence[str]
) -> ParityRow | None:
    """The row of one case, None where no layer has anything to compare. The layers are run in
    groups, for all they compute may be more than fits into memory."""
    results: list[_Result] = []
    waiting, seen = list(layers), 0
    bound = max((np.asarray(value).size for value in case.feeds.values()), default=1)
    while waiting:
        count = _fitting(waiting, seen or bound)
        if not seen and count < len(waiting):
            count = 1
        group, waiting = waiting[:count], waiting[count:]
        tensors = dict.fromkeys(name for layer in group for name in (layer.x, layer.y))
        values = run_session(session, case.feeds, list(tensors))
        seen = max(seen, *(values[layer.x].size // layer.attributes.K for layer in group))
        # Layers that got no rows, as an expert that no token chose, have nothing to compare.
        results += [_compare(layer, values, kinds) for layer in group if values[layer.x].size]
    if not results:
        return None
    worst = max(results, key=lambda r: (not r.difference, np.nan_to_num(r.used)))
    pair = Pair("NumPy reference", f"each of {len(results)} layers on its own input", ("exact",))
    return parity_row(pair, case.label, worst.layer.name, worst.difference, worst.tolerance)


def _fitting(layers: Sequence[_Layer], rows: int) -> int:
    """How many of the first layers, one at least, put out GROUP_BYTES together at the most, where
    their inputs have so many rows."""
    sizes = np.cumsum([4 * rows * (la.attributes.K + la.attributes.N) for la in layers])
    return max(1, int((sizes <= GROUP_BYTES).sum()))


def _layers(model: onnx.ModelProto) -> list[_Layer]:
    from onnx import helper

    constants = {t.name: t for t in model.graph.initializer}
    fields = ("K", "N", "group_size", "activation_bits")
    found = []
    for node in model.graph.node:
        if node.op_type != op.OP_TYPE or any(i not in constants for i in node.input[1:] if i):
            continue
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        packed, scale, *bias = (onnx_tensors.values(constants[i]) for i in node.input[1:] if i)
        if packed.dtype == np.int32:
            packed = packing.from_int32(packed)
        found.append(
            _Layer(
                layer_name(node),
                node.input[0],
                node.output[0],
                op.TernaryAttributes(**{k: attributes[k] for k in fields if k in attributes}),
                packed,
                scale,
                bias[0] if bias else None,
            )
        )
    return found


def _compare(layer: _Layer, values: dict[str, np.ndarray], kinds: Sequence[str]) -> _Result:
    """One layer's output against the reference on the input it had."""
    x, y = values[layer.x], values[layer.y]
    attributes = layer.attributes
    if "float-activations" in kinds:  # what was lowered: the product without int8 rounding
        attributes = replace(attributes, activation_bits=0)
    want = op.reference_ternary_matmul(
        x, layer.packed_weight, layer.scale, layer.bias, attributes=attributes
    )
    tolerance = _tolerance(layer, kinds)
    difference = compare_arrays(want, y, tolerance)
    used = difference.max_abs / difference.limit if difference.limit else 0.0
    return _Result(layer, difference, tolerance, used)


def _tolerance(layer: _Layer, kinds: Sequence[str]) -> Tolerance:
    """The tolerance that applies to one layer: the loosest of what was done to it."""
    if "float-activations" in kinds:
        return LAYER_TOLERANCES["float-activations"]
    tolerance = _of_kernel(layer, kinds)
    half = LAYER_TOLERANCES["fp16"]
    return half if "fp16" in kinds and tolerance.relative < half.relative else tolerance


def _of_kernel(layer: _Layer, kinds: Sequence[str]) -> Tolerance:
    exact = layer.attributes.activation_bits == 8 and not layer.attributes.group_size
    if "2bit" in kinds and ("int8" not in kinds or not exact):
        return LAYER_TOLERANCES["2bit"]
    if "int8-tensor" in kinds:
        return LAYER_TOLERANCES["int8-tensor"]
    return LAYER_TOLERANCES["int8" if layer.attributes.activation_bits else "float"]
