"""Quantizers against formulas written out here, weight by weight; gradients included."""

import numpy as np
import pytest
import torch

from bitnet_export.errors import InputError, UsageError
from bitnet_export.ternary import TernaryConfig, ternarize_weight
from bitnet_export.ternary.quantizers import (
    QuantizerSpec,
    dequantize,
    find_ternary,
    initial_alpha,
    spec_for,
    straight_through,
    ternarize,
)

SHAPES = [(1, 64), (3, 128), (17, 384), (5, 70)]


def _loop_twn(row):
    threshold = 0.7 * np.mean(np.abs(row), dtype=np.float64)
    trits = np.array([0 if abs(v) <= threshold else np.sign(v) for v in row])
    kept = [abs(float(v)) for v, t in zip(row, trits, strict=True) if t]
    return trits, sum(kept) / max(1, len(kept))


def _loop_absmean(row):
    gamma = np.mean(np.abs(row), dtype=np.float64)
    return np.array([max(-1, min(1, round(float(v) / gamma))) for v in row]), gamma


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "loop"), [("twn", _loop_twn), ("absmean", _loop_absmean)])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_trits_and_scale_equal_the_written_out_formula(shape, name, loop, granularity):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    trits, scale = ternarize_weight(w, TernaryConfig(quantizer=name, granularity=granularity))
    rows = w.reshape(1, -1) if granularity == "tensor" else w
    expected = [loop(row) for row in rows]
    np.testing.assert_array_equal(trits, np.stack([t for t, _ in expected]).reshape(shape))
    np.testing.assert_allclose(scale, [s for _, s in expected], rtol=1e-6)
    assert trits.dtype == np.int8
    assert scale.dtype == np.float32


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_group_is_quantized_as_a_row_of_its_own(group):
    w = np.random.default_rng(2).normal(size=(5, 256)).astype(np.float32)
    config = TernaryConfig(granularity="group", group_size=group)
    trits, scale = ternarize_weight(w, config)
    assert scale.shape == (5, 256 // group)
    by_row, row_scale = ternarize_weight(w.reshape(-1, group))
    np.testing.assert_array_equal(trits.reshape(-1, group), by_row)
    np.testing.assert_array_equal(scale.reshape(-1), row_scale)


def test_threshold_keeps_what_exceeds_it_strictly():
    w = torch.tensor([[0.1, -0.1, 0.100001, -0.5, 0.0]])
    spec = QuantizerSpec("threshold", 0.1, "tensor")
    trits, scale = ternarize(w, spec, initial_alpha(w, spec))
    assert trits.tolist() == [[0, 0, 1, -1, 0]]
    assert scale.item() == pytest.approx((0.100001 + 0.5) / 2)


def test_lsq_rounds_to_the_learned_step():
    w = torch.tensor([[0.2, 0.26, -0.3, 0.9, -2.0]])
    trits, scale = ternarize(w, QuantizerSpec("lsq"), torch.tensor([0.5]))
    assert trits.tolist() == [[0, 1, -1, 1, -1]]
    assert scale.tolist() == [0.5]


@pytest.mark.parametrize("name", ["twn", "absmean"])
def test_identity_gradient_for_computed_scales(name):
    w, g = torch.randn(4, 32), torch.randn(4, 32)
    spec = QuantizerSpec(name)
    grad, grad_alpha = straight_through(g, w, ternarize(w, spec)[0], spec, None)
    assert torch.equal(grad, g)
    assert grad_alpha is None


def test_threshold_alpha_gradient_is_the_sum_over_kept_weights():
    w, g = torch.randn(3, 16), torch.randn(3, 16)
    spec = QuantizerSpec("threshold", 0.5, "tensor")
    alpha = initial_alpha(w, spec)
    trits, _ = ternarize(w, spec, alpha)
    grad, grad_alpha = straight_through(g, w, trits, spec, alpha)
    expected = sum(
        g[i, j].item() * np.sign(w[i, j].item())
        for i in range(3)
        for j in range(16)
        if abs(w[i, j].item()) > 0.5
    )
    assert grad_alpha.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(grad, g)


def test_lsq_gradients_follow_the_paper():
    """arXiv:1902.08153 eq. 3 and 5 with Qn = Qp = 1, gradient scale 1/sqrt(weights per step)."""
    w, g, step = torch.randn(2, 24), torch.randn(2, 24), torch.tensor([0.7, 1.1])
    spec = QuantizerSpec("lsq")
    trits, _ = ternarize(w, spec, step)
    grad, grad_step = straight_through(g, w, trits, spec, step)
    for i in range(2):
        total = 0.0
        for j in range(24):
            v = w[i, j].item() / step[i].item()
            inside = -1 <= v <= 1
            assert grad[i, j].item() == (g[i, j].item() if inside else 0.0)
            local = round(v) - v if inside else float(np.sign(v))
            total += g[i, j].item() * local
        assert grad_step[i].item() == pytest.approx(total / 24**0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("quantizer", ["twn", "absmean", "lsq", "threshold"])
@pytest.mark.parametrize(
    ("scale", "found"),
    [
        (np.float32([0.37]), ("tensor", 0)),
        (np.float32([0.1, 0.013, 3.7])[:, None], ("channel", 0)),
        (np.random.default_rng(0).random((3, 4, 1)).astype(np.float32), ("group", 64)),
    ],
)
def test_ternary_weights_are_kept_exactly_whatever_the_quantizer(quantizer, scale, found):
    trits = np.random.default_rng(3).integers(-1, 2, (3, 256)).astype(np.int8)
    shaped = trits.reshape(3, -1, 64) if scale.ndim == 3 else trits
    w = (shaped * scale).reshape(3, 256).astype(np.float32)
    assert find_ternary(torch.from_numpy(w)) == found
    got, got_scale = ternarize_weight(w, TernaryConfig(quantizer=quantizer))
    np.testing.assert_array_equal(got, trits)
    np.testing.assert_array_equal(got_scale.reshape(-1), scale.reshape(-1))


def test_weights_that_only_look_ternary_are_not():
    w = torch.randn(4, 64)
    assert find_ternary(w) is None
    assert find_ternary(torch.zeros(4, 64)) is None
    w = torch.randint(-1, 2, (4, 64)).float()
    w[0, 0] = 0.5
    assert find_ternary(w) is None or find_ternary(w)[0] != "tensor"


def test_zero_rows_stay_zero_without_nan():
    w = np.zeros((2, 32), np.float32)
    w[1] = np.linspace(-1, 1, 32)
    for quantizer in ("twn", "absmean", "lsq"):
        trits, scale = ternarize_weight(w, TernaryConfig(quantizer=quantizer))
        assert not trits[0].any()
        assert np.isfinite(scale).all()


def test_group_that_does_not_divide_k_falls_back_and_says_so():
    spec, reason = spec_for(torch.randn(2, 100), TernaryConfig(granularity="group", group_size=32))
    assert spec.granularity == "channel"
    assert "K=100 is not a multiple of 32" in reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_weights_are_refused(bad):
    w = np.ones((2, 8), np.float32)
    w[1, 3] = bad
    with pytest.raises(InputError, match="NaN or Inf"):
        ternarize_weight(w)


@pytest.mark.parametrize("shape", [(8,), (2, 0), (2, 3, 4)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(InputError, match=r"\[N, K\]"):
        ternarize_weight(np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"quantizer": "magic"},
        {"granularity": "group"},
        {"granularity": "group", "group_size": 48},
        {"group_size": 64},
        {"activation_bits": 4},
        {"threshold": 0.0},
        {"quantizer": "threshold", "granularity": "group", "group_size": 64},
    ],
)
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(UsageError):
        TernaryConfig(**kwargs)


def test_dequantize_multiplies_each_group():
    trits = torch.tensor([[1.0, -1, 0, 1]])
    assert dequantize(trits, torch.tensor([[2.0, 3.0]])).tolist() == [[2, -2, 0, 3]]
