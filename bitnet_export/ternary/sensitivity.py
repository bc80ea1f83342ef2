"""How much each layer alone costs, and which ones a budget of bytes keeps at int8.

``measure`` makes one layer ternary at a time and looks at the model's output; ``choose_kept``
spends a size budget where it saves most error a byte. The picture is the report's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export import packing
from bitnet_export.ternary.calibrate import ForwardAs, OnLayer, dense_forwards
from bitnet_export.ternary.calling import call
from bitnet_export.ternary.layers import BitLayer, BitLinear
from bitnet_export.ternary.losses import primary_output

FLOAT_BYTES, INT8_MAX = 4, 127


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. error: RMS of the change of the model's output / RMS of the output, if this layer
    alone is ternary. *_bytes: its weights and scales as float32, int8 per channel, and ternary.
    can_keep: it is a linear layer that was not ternary from the start."""

    name: str
    error: float
    float_bytes: int
    int8_bytes: int
    ternary_bytes: int
    can_keep: bool = True

    @property
    def saved_bytes(self) -> int:
        """What making it ternary saves."""
        return self.float_bytes - self.ternary_bytes

    @property
    def extra_bytes(self) -> int:
        """What keeping it at int8 costs."""
        return self.int8_bytes - self.ternary_bytes


def measure(
    student: nn.Module, inputs: Mapping[str, Tensor], on_layer: OnLayer | None = None
) -> list[LayerSensitivity]:
    """A row for every ternary layer of a prepared model, in the model's order; changes nothing.

    inputs: one batch by name; padded positions (an input called like a mask) do not count. One
    run of the model for each layer; on_layer(done, total, name) is told after each.
    """
    layers = {path: m for path, m in student.named_modules() if isinstance(m, BitLayer)}
    dense = dense_forwards(student)
    rows = []
    with torch.no_grad():
        with ForwardAs(student, dense):
            wanted = _output(student, inputs)
        for path, layer in layers.items():
            with ForwardAs(student, {p: f for p, f in dense.items() if p != path}):
                made = _output(student, inputs)
            difference = (made - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30)
            rows.append(_row(path, layer, float(difference.sqrt())))
            if on_layer is not None:
                on_layer(len(rows), len(layers), path)
    return rows


def choose_kept(rows: Sequence[LayerSensitivity], budget: float) -> list[LayerSensitivity]:
    """The layers to keep at int8: most error a byte first, as long as their extra bytes fit into
    budget, a fraction of the layers' float32 bytes. A layer without error is not kept."""
    left = budget * sum(row.float_bytes for row in rows)
    kept = []
    candidates = [row for row in rows if row.can_keep and row.error > 0 and row.extra_bytes > 0]
    for row in sorted(candidates, key=lambda r: r.error / r.extra_bytes, reverse=True):
        if row.extra_bytes <= left:
            left -= row.extra_bytes
            kept.append(row)
    return kept


def keep_layers(student: nn.Module, names: Sequence[str]) -> None:
    """Give the BitLinear layers at these paths, and wherever else the same module is used, their
    dense form back, with weights on the int8 grid of round_int8."""
    wanted = {id(student.get_submodule(name)) for name in names}
    dense: dict[int, nn.Module] = {}
    for path, module in list(student.named_modules(remove_duplicate=False)):
        if isinstance(module, BitLayer) and id(module) in wanted:
            if id(module) not in dense:
                dense[id(module)] = module.to_linear()
            student.set_submodule(path, dense[id(module)])
    round_int8(student, names)


def round_int8(student: nn.Module, names: Sequence[str]) -> None:
    """Round the weights of these layers, in place, to 255 steps per output channel: what the
    deployed file stores, so that every form of the model computes with the same weights."""
    for name in names:
        found = student.get_submodule(name)
        layer: Any = found[-1] if isinstance(found, nn.Sequential) else found
        channels = 1 if type(layer).__name__ == "Conv1D" else 0
        with torch.no_grad():
            w = layer.weight
            scale = w.abs().amax(1 - channels, keepdim=True).clamp_min(1e-30) / INT8_MAX
            w.copy_((w / scale).round_().mul_(scale))


def _row(path: str, layer: BitLayer, error: float) -> LayerSensitivity:
    n, k = layer.matrix.shape
    scales = layer.ternarize()[1].numel()
    return LayerSensitivity(
        path,
        error,
        float_bytes=FLOAT_BYTES * n * k,
        int8_bytes=n * k + FLOAT_BYTES * n,
        ternary_bytes=n * packing.packed_row_bytes(k) + FLOAT_BYTES * scales,
        can_keep=isinstance(layer, BitLinear) and not layer.spec.exact,
    )


def _output(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The main output's vectors [positions, D], float32, padding left out."""
    y = primary_output(call(model, inputs))[1].float()
    masks: list[Any] = [v for name, v in inputs.items() if "mask" in name.lower()]
    mask = next((m for m in masks if m.shape == y.shape[:-1]), None)
    return y.reshape(-1, y.shape[-1] if y.dim() else 1) if mask is None else y[mask.bool()]
