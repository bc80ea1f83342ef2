"""The loss functions: padding never counts, and a batch may be worked off in parts."""

import math

import pytest
import torch

from bitnet_export.ternary import losses

MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])


def sequences(seed, width=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, width, generator=generator)


LOSSES = {
    "logits": lambda s, t, m: losses.kl_divergence(s, t, 2.0, m),
    "cosine": losses.cosine_distance,
    "squared": losses.squared_error,
    "relation": losses.relation_divergence,
}


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_on_the_teacher_itself_and_something_elsewhere(name):
    s, t = sequences(0), sequences(1)
    assert LOSSES[name](t, t, MASK) == pytest.approx(0, abs=1e-6)
    assert LOSSES[name](s, t, MASK) > 0.01


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_nowhere(name):
    s, t = sequences(0), sequences(1)
    expected = LOSSES[name](s, t, MASK)
    padding = (MASK == 0)[..., None]
    noisy = LOSSES[name](s.masked_fill(padding, 9.0), t.masked_fill(padding, -7.0), MASK)
    assert noisy == pytest.approx(float(expected), rel=1e-5)
    assert LOSSES[name](s, t, torch.ones_like(MASK)) != pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_over_parts_is_that_of_the_batch(name):
    s, t = sequences(0), sequences(1)
    whole = LOSSES[name](s, t, MASK)
    parts = [LOSSES[name](s[i : i + 2], t[i : i + 2], MASK[i : i + 2]) for i in (0, 2)]
    assert sum(parts) / 2 == pytest.approx(float(whole), rel=1e-5)


def test_similarity_error_is_that_of_all_pairs_and_is_shared_out_evenly():
    s, t = (losses.pool(sequences(seed), MASK).requires_grad_() for seed in (0, 1))

    def cosines(x):
        return torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1)

    pairs = torch.triu_indices(4, 4, 1)
    error = (cosines(s) - cosines(t)).square()[pairs[0], pairs[1]].mean()
    together = losses.similarity_error(s, t, s, t, 0)
    assert together.item() == pytest.approx(error.item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(together, s, retain_graph=True)
    (full,) = torch.autograd.grad(error, s, retain_graph=True)
    assert torch.allclose(gradient, full / 2, atol=1e-6)  # the other half is the other one's
    parts = [losses.similarity_error(s[i : i + 2], t[i : i + 2], s, t, i) for i in (0, 2)]
    shared = (parts[0] + parts[1]) / 2
    assert shared.item() == pytest.approx(error.item(), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(shared, s)[0], gradient, atol=1e-6)


def test_relation_compares_each_heads_softmax_over_the_unmasked_keys():
    """Against the formula of MiniLMv2 (arXiv:2012.15828), position by position."""
    s, t, size = sequences(0), sequences(1), 32
    total = 0.0
    for sample, mask in enumerate(MASK.bool()):
        divergences = []
        for head in range(64 // size):
            part = slice(head * size, (head + 1) * size)
            x, y = s[sample, mask, part], t[sample, mask, part]
            p, q = ((z @ z.T / math.sqrt(size)).softmax(-1) for z in (y, x))
            divergences.append((p * (p / q).log()).sum(-1).mean())
        total += sum(divergences) / len(divergences)
    assert losses.relation_divergence(s, t, MASK, size) == pytest.approx(float(total / 4), rel=1e-4)


def test_outputs_of_other_ranks_are_taken_as_they_are():
    s, t = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 3.0, 2.0])
    assert losses.squared_error(s, t, None) == pytest.approx(5 / 3)
    image = torch.ones(2, 3, 4, 4)
    assert losses.energy(2 * image, MASK[:2]) == pytest.approx(4)
    assert losses.relative_to(0.0) > 0
