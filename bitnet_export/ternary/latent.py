"""Float weights that a quantizer turns into given trits and scales.

Calibration chooses trits and scales; training and export recompute them from the float weight.
``latent_weight`` moves the original weights as little as it can until that gives the chosen ones:
they keep their order inside a row, so that training can go on as if nothing had happened.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitnet_export.ternary.quantizers import TWN_FACTOR, QuantizerSpec, ternarize

# Distance kept from a threshold, as a part of it: more than the rounding of float16.
MARGIN = 0.01
ROUNDS = 12


def latent_weight(
    weight: Tensor, trits: Tensor, scale: Tensor, spec: QuantizerSpec
) -> tuple[Tensor, Tensor | None]:
    """weight [N, K], wanted trits [N, K] and scale [1], [N] or [N, G] -> (weight whose ternary
    form they are, learned alpha [R] or None). scale comes back to float rounding, trits exactly.

    Rows for which no small change is found get the ternary weights themselves; the scale of a row
    without any weight means nothing and is not kept.
    """
    s = scale.reshape(-1, 1).float()
    w, t = spec.rows(weight.detach()), spec.rows(trits)
    if spec.learned:
        limit = s / 2 if spec.quantizer == "lsq" else torch.full_like(s, spec.threshold)
        pushed = _push(_along(w, t), t, limit)
        return (pushed * _sign(w, t)).reshape(weight.shape), s[:, 0].clone()
    magnitude = _along(w, t)
    for _ in range(ROUNDS):
        magnitude = _rescale(magnitude, t, s, spec)
        limit = _limit(magnitude, spec)
        if bool((_push(magnitude, t, limit, 0.5) == magnitude).all()):
            break
        magnitude = _push(magnitude, t, limit)
    result = (_rescale(magnitude, t, s, spec) * _sign(w, t)).reshape(weight.shape)
    made = spec.rows(ternarize(result, spec)[0])
    wrong = (made != t).any(1, keepdim=True) | (t == 0).all(1, keepdim=True)
    plain = _plain(t, s, spec)
    return torch.where(wrong, plain, spec.rows(result)).reshape(weight.shape), None


def _along(w: Tensor, t: Tensor) -> Tensor:
    """|w|, or 0 where a kept weight has the wrong sign: it has the farthest way to go."""
    return torch.where((t != 0) & (w.sign() != t), torch.zeros_like(w), w.abs())


def _sign(w: Tensor, t: Tensor) -> Tensor:
    return torch.where(t == 0, w.sign(), t)


def _push(magnitude: Tensor, t: Tensor, limit: Tensor, margin: float = 1.0) -> Tensor:
    """Kept weights above limit [R, 1], dropped ones below it."""
    kept = magnitude.maximum(limit * (1 + margin * MARGIN))
    dropped = magnitude.minimum(limit * (1 - margin * MARGIN))
    return torch.where(t != 0, kept, dropped)


def _limit(magnitude: Tensor, spec: QuantizerSpec) -> Tensor:
    """[R, 1]: above it the quantizer keeps a weight."""
    factor = TWN_FACTOR if spec.quantizer == "twn" else 0.5
    return factor * magnitude.mean(1, keepdim=True)


def _rescale(magnitude: Tensor, t: Tensor, s: Tensor, spec: QuantizerSpec) -> Tensor:
    """The whole row so that the scale the quantizer computes from it is s [R, 1]."""
    kept = (t != 0).float()
    if spec.quantizer == "twn":
        mean = (magnitude * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
    else:
        mean = magnitude.mean(1, keepdim=True)
    return magnitude * (s / mean.clamp_min(1e-30))


def _plain(t: Tensor, s: Tensor, spec: QuantizerSpec) -> Tensor:
    """Rows of one magnitude only, which every computed quantizer gives back."""
    if spec.quantizer == "twn":
        return t * s
    share = (t != 0).float().mean(1, keepdim=True).clamp_min(1e-30)
    return t * s / share
