"""Calibration: one run of the model on sample inputs, in which every layer is made ternary anew
when its turn comes, knowing what the layers before it have become.

A better start for fine-tuning, and for deployment without it. Which trits and scales a layer gets
is calibrate_layer.py's; here are the order, the inputs, and the bias that takes up the mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.errors import InputError, UsageError
from bitnet_export.ternary import torch_op
from bitnet_export.ternary.calibrate_layer import SWEEPS, LayerProblem, layer_problem, solve
from bitnet_export.ternary.calling import call
from bitnet_export.ternary.latent import latent_weight
from bitnet_export.ternary.layers import BitLayer, BitLinear
from bitnet_export.ternary.quantizers import dequantize

METHODS = ("none", "scale", "trits")
# Input rows (tokens) of a layer that are looked at, and the memory for all layers' together.
MAX_ROWS, ROW_BYTES = 4096, 1 << 30
# One row in so many is not fitted to but judges whether the layer gains.
HELD_OUT = 8

OnLayer = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CalibratedLayer:
    """One layer: mean square of its output error / of its output, with the weights it had before
    and has now, on inputs the ternary model gives it that it was not fitted to (biases moved by
    the mean error in both cases). A layer that would not gain stays as it was."""

    name: str
    before: float
    after: float


def calibrate(
    student: nn.Module,
    inputs: Mapping[str, Tensor],
    method: str = "trits",
    *,
    seed: int = 0,
    on_layer: OnLayer | None = None,
) -> list[CalibratedLayer]:
    """Choose new trits and scales for a prepared model's linear layers, in place; -> a row each.

    inputs: one batch by name, the samples to look at; 64 to 256 sentences are enough. method:
    "scale" chooses thresholds and scales, "trits" also each weight in view of the others,
    "none" does nothing. on_layer(done, total, name) is told after each. Left as they are: layers
    whose weights were ternary from the start, layers that share their parameters with
    another module, layers the run does not reach, convolutions.

    Biases move by the mean of the error. The float weights change so that the quantizer gives
    the chosen trits: training goes on from there.
    """
    if method not in METHODS:
        raise UsageError(f"calibration must be one of {', '.join(METHODS)}, got {method!r}")
    layers = {path: m for path, m in student.named_modules() if isinstance(m, BitLinear)}
    held = _held_by_others(student)
    layers = {
        path: layer
        for path, layer in layers.items()
        if not layer.spec.exact and not held & {id(layer.weight), id(layer.bias)}
    }
    if method == "none" or not layers:
        return []
    run = _Run(student, layers, inputs, method, seed, on_layer or (lambda *_: None))
    with torch.no_grad():
        taught = run.teach()
        return run.calibrate(taught)


def _held_by_others(model: nn.Module) -> set[int]:
    """ids of the parameters that modules which are not ternary compute with, and of those that
    several modules do: what suits one layer would be done to the other."""
    held: set[int] = set()
    seen: set[int] = set()
    for module in model.modules():
        own = {id(p) for p in module.parameters(recurse=False)}
        held |= own & seen if isinstance(module, BitLayer) else own
        seen |= own
    return held


def dense_forwards(model: nn.Module) -> dict[str, Callable[..., Any]]:
    """Path of every ternary layer -> the forward of the dense layer it is now, on a copy of the
    weights: what the model computed before anything changes them. A layer whose weights were
    ternary from the start, or latent ones of a BitNet in training, is dense with its trits."""
    forwards: dict[str, Callable[..., Any]] = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BitLayer):
            dense = layer.to_linear()
            product: Any = dense[-1] if isinstance(dense, nn.Sequential) else dense
            if layer.spec.exact:
                ternary = dequantize(*layer.ternarize())
                like = product.weight
                stored = ternary.t() if getattr(layer, "transposed", False) else ternary
                product.weight = nn.Parameter(stored.reshape(like.shape).to(like.dtype), False)
            for name in ("weight", "bias"):
                value = getattr(product, name)
                if value is not None:
                    setattr(product, name, nn.Parameter(value.detach().clone(), False))
            forwards[path] = dense.forward
    return forwards


class ForwardAs:
    """While it lasts, the modules at these paths compute the given forwards."""

    def __init__(self, model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> None:
        self.modules = [(model.get_submodule(path), f) for path, f in forwards.items()]

    def __enter__(self) -> None:
        for module, forward in self.modules:
            module.forward = forward

    def __exit__(self, *_: object) -> None:
        for module, _forward in self.modules:
            module.__dict__.pop("forward", None)


class _Run:
    """One calibration: which rows of a layer's input are looked at, and what is done with them."""

    def __init__(
        self,
        student: nn.Module,
        layers: dict[str, BitLinear],
        inputs: Mapping[str, Tensor],
        method: str,
        seed: int,
        on_layer: OnLayer,
    ) -> None:
        self.student, self.layers, self.inputs = student, layers, inputs
        self.sweeps = SWEEPS if method == "trits" else 0
        self.seed, self.on_layer = seed, on_layer
        widths = sum(layer.in_features for layer in layers.values())
        self.rows = max(64, min(MAX_ROWS, ROW_BYTES // (4 * widths)))
        self.masks = [v.bool() for name, v in inputs.items() if "mask" in name.lower()]
        self.done: dict[str, CalibratedLayer] = {}
        self.written: set[int] = set()  # weights done: a layer may come twice, or share its weight

    def teach(self) -> dict[str, Tensor]:
        """The inputs [M, K] that every layer has in full precision."""
        taught: dict[str, Tensor] = {}
        last: list[Any] = [None, None]

        def see(path: str) -> Any:
            def hook(layer: BitLinear, arguments: tuple[Tensor, ...]) -> None:
                # Layers that read the same tensor (query, key, value) share its rows.
                if last[0] is not arguments[0]:
                    last[0], last[1] = arguments[0], self._pick(arguments[0])
                taught.setdefault(path, _normed(layer, last[1]))

            return hook

        with ForwardAs(self.student, dense_forwards(self.student)):
            self._run_hooked(see)
        return taught

    def calibrate(self, taught: dict[str, Tensor]) -> list[CalibratedLayer]:
        """Run once more; each layer is calibrated on its input, then computes with the result."""

        def see(path: str) -> Any:
            def hook(layer: BitLinear, arguments: tuple[Tensor, ...]) -> None:
                if path not in taught or id(layer.weight) in self.written:
                    return
                self.written.add(id(layer.weight))
                seen = _normed(layer, self._pick(arguments[0]))
                known = taught.pop(path)
                # Routed layers may see other rows than in full precision.
                self.done[path] = self._calibrate(
                    path, layer, seen, known if known.shape == seen.shape else seen
                )
                self.on_layer(len(self.done), len(self.layers), path)

            return hook

        self._run_hooked(see)
        return list(self.done.values())

    def _run_hooked(self, make: Callable[[str], Any]) -> None:
        with ExitStack() as stack:
            for path, layer in self.layers.items():
                stack.callback(layer.register_forward_pre_hook(make(path)).remove)
            call(self.student, self.inputs)

    def _pick(self, x: Tensor) -> Tensor:
        """[..., K] -> at most self.rows rows [M, K], padding left out, the same at every call."""
        mask = next((m for m in self.masks if m.shape == x.shape[:-1]), None)
        rows = x.reshape(-1, x.shape[-1]) if mask is None else x[mask]
        if len(rows) > self.rows:
            generator = torch.Generator().manual_seed(self.seed)
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.rows]]
        return rows.float()

    def _calibrate(
        self, path: str, layer: BitLinear, seen: Tensor, taught: Tensor
    ) -> CalibratedLayer:
        left, a = torch_op.quantize_input(seen, layer.spec.activation_bits)
        x = left if a is None else left * a
        if not bool(x.isfinite().all() and taught.isfinite().all()):
            raise InputError("the layer's input holds NaN or Inf", where=path)
        old = layer.matrix.detach().float().clone()
        fit = len(x) - len(x) // HELD_OUT
        problem = layer_problem(old, x[:fit], taught[:fit], layer.bias is not None)
        wanted = taught @ old.t()

        def error_and_drift(trits: Tensor, scale: Tensor) -> tuple[float, Tensor]:
            made = torch_op.project(left, a, trits, scale, None, layer.spec.group_size)
            off = wanted - made
            drift = off[:fit].mean(0) if layer.bias is not None else off.new_zeros(off.shape[1])
            judged = slice(fit if fit < len(x) else 0, None)
            whole = wanted[judged].square().sum().clamp_min(1e-30)
            return float((off[judged] - drift).square().sum() / whole), drift

        before, _ = error_and_drift(*layer.ternarize())
        trits, scale = solve(problem, layer.spec, self.sweeps)
        after, drift = error_and_drift(trits, scale)
        if not after < before:
            return CalibratedLayer(path, before, before)
        _write(layer, problem, trits, scale)
        if layer.bias is not None:
            layer.bias.copy_((layer.bias.float() + drift).to(layer.bias.dtype))
        return CalibratedLayer(path, before, after)


def _normed(layer: BitLinear, rows: Tensor) -> Tensor:
    """What the product reads, where the layer begins with a norm of its own."""
    return rows if layer.rms_norm is None else layer.rms_norm(rows)


def _write(layer: BitLinear, problem: LayerProblem, trits: Tensor, scale: Tensor) -> None:
    """Put weights into the layer whose ternary form is trits and scale."""
    latent, alpha = latent_weight(problem.target, trits, scale, layer.spec)
    stored = latent.t() if layer.transposed else latent
    layer.weight.copy_(stored.to(layer.weight.dtype))
    if alpha is not None and layer.alpha is not None:
        layer.alpha.copy_(alpha.reshape(layer.alpha.shape))
