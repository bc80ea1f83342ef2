"""The four ways to make a weight ternary, forward and backward.

One shape serves every granularity: the weight is viewed as rows [R, C] that share one scale each
(R = 1 for tensor, N for channel, N*K/group_size for group). Gradients are straight-through and
written out; layers.py calls them from its autograd function. Nothing here knows about modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitnet_export.errors import InputError
from bitnet_export.ternary.config import GROUP_SIZES, TernaryConfig

TWN_FACTOR = 0.7
SCALE_FLOOR = 1e-5


@dataclass(frozen=True)
class QuantizerSpec:
    """How one layer is quantized. exact: its weights were ternary from the start (or trained to be
    by this very quantizer): what it computes is no approximation of the float weights. Under twn,
    while nobody trains them, the common magnitude itself is the scale, not a rounded mean of it."""

    quantizer: str = "twn"
    threshold: float = 0.1
    granularity: str = "channel"
    group_size: int = 0
    activation_bits: int = 8
    exact: bool = False

    @property
    def learned(self) -> bool:
        """Whether the scale is a parameter (alpha) of the layer."""
        return self.quantizer in ("threshold", "lsq")

    @property
    def text(self) -> str:
        """All of it in words: "twn, group 64, A8"."""
        threshold = f" {self.threshold:g}" if self.quantizer == "threshold" else ""
        group = f" {self.group_size}" if self.granularity == "group" else ""
        exact = ", exact" if self.exact else ""
        bits = self.activation_bits
        return f"{self.quantizer}{threshold}, {self.granularity}{group}, A{bits}{exact}"

    def rows(self, weight: Tensor) -> Tensor:
        """weight [N, K] -> float32 view [R, C], one row per scale."""
        w = weight.float()
        if self.granularity == "tensor":
            return w.reshape(1, -1)
        if self.granularity == "group":
            return w.reshape(-1, self.group_size)
        return w

    def scale_shape(self, n: int) -> tuple[int, ...]:
        """Shape of the op's scale operand for N outputs."""
        return {"tensor": (1,), "channel": (n,), "group": (n, -1)}[self.granularity]


def spec_for(weight: Tensor, config: TernaryConfig) -> tuple[QuantizerSpec, str]:
    """weight [N, K] -> (its spec, the reason to show for it).

    Weights that are ternary already keep their own granularity, whatever the config says.
    Group scales need K to be a multiple of the group size; other layers get channel scales.
    """
    spec = QuantizerSpec(
        config.quantizer,
        config.threshold,
        "tensor" if config.quantizer == "threshold" else config.granularity,
        config.group_size,
        config.activation_bits,
    )
    found = find_ternary(weight)
    if found is not None:
        granularity, group_size = found
        exact = replace(
            spec, quantizer="twn", granularity=granularity, group_size=group_size, exact=True
        )
        return exact, f"already ternary ({granularity} scale), kept exactly"
    k = weight.shape[1]
    if spec.granularity == "group" and k % spec.group_size:
        spec = replace(spec, granularity="channel", group_size=0)
        reason = f"{spec.quantizer}, channel scale: K={k} is not a multiple of {config.group_size}"
        return spec, reason
    unit = f"group {spec.group_size}" if spec.group_size else spec.granularity
    return spec, f"{spec.quantizer}, {unit} scale"


def find_ternary(weight: Tensor) -> tuple[str, int] | None:
    """(granularity, group_size) if weight [N, K] is {-s, 0, +s} already, coarsest first."""
    magnitude = weight.detach().abs()
    candidates = [("tensor", 0), ("channel", 0)]
    candidates += [("group", g) for g in reversed(GROUP_SIZES) if weight.shape[1] % g == 0]
    if not magnitude.any():
        return None
    for granularity, group_size in candidates:
        rows = QuantizerSpec(granularity=granularity, group_size=group_size).rows(magnitude)
        # A scale shared by a single weight says nothing: any weight is "ternary" then. Of weights
        # that are not the first few rows tell.
        if rows.shape[1] > 1 and _two_magnitudes(rows[:4, :4096]) and _two_magnitudes(rows):
            return granularity, group_size
    return None


def _two_magnitudes(rows: Tensor) -> bool:
    """Whether each row holds 0 and one other value at the most; rows [R, C], none negative."""
    return bool(((rows == 0) | (rows == rows.amax(1, True))).all())


def initial_alpha(weight: Tensor, spec: QuantizerSpec) -> Tensor | None:
    """Start value of the learned scale, [R] float32, or None for quantizers that compute it.

    threshold: mean |w| over the kept weights. lsq: 2 mean|w|, the paper's 2 mean|w| / sqrt(Qp)
    with Qp = 1.
    """
    w = spec.rows(weight.detach()).abs()
    if spec.quantizer == "threshold":
        kept = w > spec.threshold
        return (w * kept).sum(1) / kept.sum(1).clamp_min(1)
    if spec.quantizer == "lsq":
        return (2 * w.mean(1)).clamp_min(SCALE_FLOOR)
    return None


def ternarize(
    weight: Tensor, spec: QuantizerSpec, alpha: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> (trits [N, K] float32 in {-1, 0, 1}, scale float32 [1], [N] or [N, G]).

    No autograd: gradients are ``straight_through``'s. alpha: the learned scale, [R], for
    "threshold" and "lsq".
    """
    with torch.no_grad():
        w = spec.rows(weight)
        if spec.quantizer == "twn":
            trits, scale = _twn(w, spec.exact)
        elif spec.quantizer == "absmean":
            scale = w.abs().mean(1).clamp_min(SCALE_FLOOR)
            # Times the reciprocal, as BitNet's own code does: its checkpoints get the same trits.
            trits = (w * (1.0 / scale)[:, None]).round_().clamp_(-1, 1)
        else:
            if alpha is None:
                raise InputError(f"quantizer {spec.quantizer!r} needs its learned alpha")
            scale = alpha.detach().float()
            if spec.quantizer == "threshold":
                trits = w.sign().mul_(w.abs() > spec.threshold)
            else:
                scale = scale.clamp_min(SCALE_FLOOR)
                trits = (w / scale[:, None]).round_().clamp_(-1, 1)
    return trits.reshape(weight.shape), scale.reshape(spec.scale_shape(weight.shape[0]))


def _twn(w: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Ternary weight networks (arXiv:1605.04711): threshold 0.7 mean|w|, scale the mean |w| over
    the kept weights. w [R, C] -> trits [R, C], scale [R]."""
    magnitude = w.abs()
    kept = (magnitude > TWN_FACTOR * magnitude.mean(1, keepdim=True)).float()
    trits = w.sign().mul_(kept)
    if exact:
        largest = magnitude.amax(1)
        if bool(((magnitude == 0) | (magnitude == largest[:, None])).all()):
            return trits, largest
    count = kept.sum(1).clamp_min_(1)
    return trits, magnitude.mul_(kept).sum(1) / count


def dequantize(trits: Tensor, scale: Tensor) -> Tensor:
    """trits [N, K], scale [1], [N] or [N, G] -> trits * scale [N, K] float32."""
    n, k = trits.shape
    if scale.dim() == 2:
        return (trits.reshape(n, scale.shape[1], -1) * scale[:, :, None]).reshape(n, k)
    return trits * scale[:, None]


def straight_through(
    grad: Tensor, weight: Tensor, trits: Tensor, spec: QuantizerSpec, alpha: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """grad [N, K] = dL/d(trits * scale) -> (dL/dweight [N, K], dL/dalpha [R] or None).

    twn, absmean, threshold: the identity for the weight, as in BitNet. threshold also trains its
    scale: dL/dalpha = sum over the layer of grad * trit. lsq (arXiv:1902.08153, eq. 3-5): the
    weight's gradient passes where |w| <= alpha, alpha's is sum grad * (trit - w/alpha inside, trit
    outside) / sqrt(weights per alpha).
    """
    if not spec.learned:
        return grad, None
    assert alpha is not None
    g, t = spec.rows(grad), spec.rows(trits)
    if spec.quantizer == "threshold":
        return grad, (g * t).sum(1)
    v = spec.rows(weight) / alpha.detach().clamp_min(SCALE_FLOOR)[:, None]
    inside = v.abs() <= 1
    grad_alpha = (g * torch.where(inside, t - v, t)).sum(1) / g.shape[1] ** 0.5
    return (g * inside).reshape(grad.shape), grad_alpha


def ternarize_weight(
    weight: npt.NDArray[np.floating], config: TernaryConfig | None = None
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """w [N, K] float -> (trits [N, K] int8, scale float32 [1], [N] or [N, K/group_size]).

    NumPy in and out, for graph passes; the maths is that of the torch layers. Weights that are
    {-s, 0, +s} already come back exactly, trits and scale. Raises InputError for NaN, Inf or a
    rank other than 2.
    """
    array = np.asarray(weight)
    if array.ndim != 2 or 0 in array.shape:
        raise InputError(f"weights must be [N, K] with N, K >= 1, got shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise InputError("the weights hold NaN or Inf", fix="check the checkpoint")
    w = torch.from_numpy(np.require(array, np.float32, ["C", "W"]))  # W: torch wants it writable
    spec, _ = spec_for(w, config or TernaryConfig())
    trits, scale = ternarize(w, spec, initial_alpha(w, spec))
    return trits.numpy().astype(np.int8), scale.numpy()
