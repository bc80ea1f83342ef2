"""The trits and scales of one layer that change its output least, given what the layer reads.

All errors are sums over samples of (x q - y)^2, which need only the products X^T X and X^T Y:
the layer's inputs are seen once and never kept. Nothing here knows modules or quantizer specs'
latent weights; calibrate.py runs the model, latent.py writes the result back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitnet_export.ternary.quantizers import QuantizerSpec, dequantize

# Thresholds tried, in units of mean |w| (0.7 is TWN's own).
FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
# Added to the diagonal of X^T X, as a part of its mean: what the samples leave open goes by |w|.
# K / M more of it, because from M samples a covariance of K inputs is known no better.
DAMPING = 0.05
SWEEPS = 3
BLOCK = 64


@dataclass(frozen=True)
class LayerProblem:
    """hessian [K, K] = X^T X / M (damped), target [N, K]: the float weights whose output is
    closest to the full-precision layer's on these inputs. error(trits, scale) is relative."""

    hessian: Tensor
    target: Tensor

    def error(self, trits: Tensor, scale: Tensor) -> float:
        """Mean square of the output error / mean square of the output."""
        difference = dequantize(trits, scale) - self.target
        lost = ((difference @ self.hessian) * difference).sum()
        whole = ((self.target @ self.hessian) * self.target).sum()
        return float(lost / whole.clamp_min(1e-30))


def layer_problem(weight: Tensor, inputs: Tensor, taught: Tensor, centred: bool) -> LayerProblem:
    """weight [N, K], inputs [M, K] as the ternary model has them, taught [M, K] as the full-
    precision model has them -> what is to be solved.

    The target makes up for the errors of the layers before (least squares, arXiv:2504.02692).
    centred: the layer has a bias, which takes care of the means.
    """
    if centred:
        inputs, taught = inputs - inputs.mean(0), taught - taught.mean(0)
    w = weight.detach().float()
    hessian = inputs.t() @ inputs / len(inputs)
    damping = (DAMPING + hessian.shape[0] / len(inputs)) * hessian.diagonal().mean().clamp_min(
        1e-12
    )
    hessian.diagonal().add_(damping)
    wanted = (inputs.t() @ taught / len(inputs)) @ w.t() + damping * w.t()
    return LayerProblem(hessian, torch.linalg.solve(hessian, wanted).t().contiguous())


def solve(
    problem: LayerProblem, spec: QuantizerSpec, sweeps: int = SWEEPS
) -> tuple[Tensor, Tensor]:
    """-> (trits [N, K], scale in the op's shape) of small output error.

    Thresholds from a grid first, then scales by least squares, then, sweeps times, every weight
    in turn gets the best trit given all the others (coordinate descent, arXiv:2309.01885).
    """
    trits, scale = best_thresholds(problem, spec)
    scale = refit_scales(problem, trits, scale)
    for _ in range(sweeps):
        trits = _sweep(problem, trits, scale)
        scale = refit_scales(problem, trits, scale)
    return trits, scale


def best_thresholds(problem: LayerProblem, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """For each scale of its own the threshold of FACTORS with the least error, weights taken as
    independent (the diagonal of the hessian)."""
    w = spec.rows(problem.target)
    importance = spec.rows(problem.hessian.diagonal().expand_as(problem.target).contiguous())
    mean = w.abs().mean(1, keepdim=True)
    best = torch.full((len(w),), torch.inf)
    trits, scale = torch.zeros_like(w), torch.zeros(len(w))
    for factor in FACTORS:
        t = w.sign() * (w.abs() > factor * mean)
        s = (importance * w * t).sum(1) / (importance * t * t).sum(1).clamp_min(1e-30)
        error = (importance * (w - s[:, None] * t).square()).sum(1)
        better = error < best
        best = torch.where(better, error, best)
        trits[better], scale[better] = t[better], s[better]
    n = len(problem.target)
    return trits.reshape(problem.target.shape), scale.reshape(spec.scale_shape(n))


def refit_scales(problem: LayerProblem, trits: Tensor, scale: Tensor) -> Tensor:
    """The scales by least squares for fixed trits; groups of a row one after the other. A scale
    that would not be positive stays what it was."""
    k = trits.shape[1]
    error = (dequantize(trits, scale) - problem.target) @ problem.hessian
    if scale.dim() == 1:
        step, curve = trits * error, trits * (trits @ problem.hessian)
        axis: tuple[int, ...] = (0, 1) if len(scale) == 1 else (1,)
        moved = scale - step.sum(axis) / curve.sum(axis).clamp_min(1e-30)
        return torch.where(moved > 0, moved, scale)
    scale, size = scale.clone(), k // scale.shape[1]
    for group in range(scale.shape[1]):
        part = slice(group * size, (group + 1) * size)
        t, rows = trits[:, part], problem.hessian[part]
        curve = (t * (t @ rows[:, part])).sum(1).clamp_min(1e-30)
        moved = scale[:, group] - (t * error[:, part]).sum(1) / curve
        moved = torch.where(moved > 0, moved, scale[:, group])
        error += (moved - scale[:, group])[:, None] * (t @ rows)
        scale[:, group] = moved
    return scale


def _sweep(problem: LayerProblem, trits: Tensor, scale: Tensor) -> Tensor:
    """Every column once: the trit that minimizes the error, all other columns given.

    error [N, K] is the gradient (q - target) H; it is brought up to date within a block column by
    column and for the rest once a block.
    """
    hessian, k = problem.hessian, trits.shape[1]
    trits = trits.clone()
    s = dequantize(torch.ones_like(trits), scale).clamp_min(1e-30)
    error = (trits * s - problem.target) @ hessian
    curve = hessian.diagonal()
    for first in range(0, k, BLOCK):
        last = min(first + BLOCK, k)
        local, change = error[:, first:last].clone(), torch.zeros(len(trits), last - first)
        for j in range(last - first):
            column = first + j
            wanted = trits[:, column] - local[:, j] / (curve[column] * s[:, column])
            new = wanted.round_().clamp_(-1, 1)
            change[:, j] = (new - trits[:, column]) * s[:, column]
            trits[:, column] = new
            local += change[:, j, None] * hessian[column, first:last]
        error += change @ hessian[first:last]
    return trits
