"""Sensitivity and the budget: the planted layer is found, kept within its bytes, and it helps."""

import pytest
import torch
from torch import nn

from bitnet_export.ternary import BitLinear, TernaryConfig, prepare
from bitnet_export.ternary.sensitivity import (
    LayerSensitivity,
    choose_kept,
    keep_layers,
    measure,
    round_int8,
)

WIDTH = 64


class Residual(nn.Module):
    """Blocks on a residual stream; one of them carries most of the output."""

    def __init__(self, loud=3, depth=6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.gain = [30.0 if i == loud else 0.3 for i in range(depth)]

    def forward(self, x):
        for gain, block in zip(self.gain, self.blocks, strict=True):
            x = x + gain * block(torch.tanh(x))
        return x


def prepared():
    model = Residual()
    x = torch.randn(64, WIDTH)
    with torch.no_grad():
        wanted = model(x)
    prepare(model, TernaryConfig(keep_head=False))
    return model, x, wanted


def distance(model, x, wanted):
    with torch.no_grad():
        return float((model(x) - wanted).norm() / wanted.norm())


def test_the_planted_layer_is_the_most_sensitive_one():
    model, x, _ = prepared()
    told = []
    rows = measure(model, {"x": x}, lambda *a: told.append(a))
    assert [row.name for row in rows] == [f"blocks.{i}" for i in range(6)]
    assert max(rows, key=lambda row: row.error).name == "blocks.3"
    assert told[-1] == (6, 6, "blocks.5")


def test_the_error_is_that_of_one_ternary_layer():
    model, x, wanted = prepared()
    rows = measure(model, {"x": x})
    for i, block in enumerate(model.blocks):
        if i != 3:
            model.blocks[i] = block.to_linear()
    assert rows[3].error == pytest.approx(distance(model, x, wanted), rel=1e-3)


def test_measuring_changes_nothing():
    model, x, wanted = prepared()
    before = distance(model, x, wanted)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure(model, {"x": x})
    assert distance(model, x, wanted) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_bytes_are_those_of_the_files():
    model, x, _ = prepared()
    row = measure(model, {"x": x})[0]
    assert row.float_bytes == 4 * WIDTH * WIDTH
    assert row.ternary_bytes == WIDTH * WIDTH // 4 + 4 * WIDTH
    assert row.int8_bytes == WIDTH * WIDTH + 4 * WIDTH
    assert (row.saved_bytes, row.extra_bytes) == (
        row.float_bytes - row.ternary_bytes,
        row.int8_bytes - row.ternary_bytes,
    )


def test_a_kept_layer_brings_the_output_closer_within_the_budget():
    model, x, wanted = prepared()
    before = distance(model, x, wanted)
    rows = measure(model, {"x": x})
    kept = choose_kept(rows, 0.04)
    assert [row.name for row in kept] == ["blocks.3"]
    assert sum(r.extra_bytes for r in kept) <= 0.04 * sum(r.float_bytes for r in rows)
    keep_layers(model, [row.name for row in kept])
    assert not isinstance(model.blocks[3], BitLinear)
    assert distance(model, x, wanted) < 0.7 * before


def row(name, error, size=1000, can_keep=True):
    return LayerSensitivity(name, error, 4 * size, size, size // 4, can_keep)


def test_the_budget_is_never_overspent_and_goes_by_error_per_byte():
    rows = [row("large", 0.5, 4000), row("small", 0.3, 1000), row("tiny", 0.01, 100)]
    # 20400 bytes of float weights; the large layer costs 3000 more as int8, the small one 750
    assert choose_kept(rows, 0.0) == []
    assert [r.name for r in choose_kept(rows, 0.037)] == ["small"]
    assert [r.name for r in choose_kept(rows, 0.05)] == ["small", "tiny"]
    assert [r.name for r in choose_kept(rows, 1.0)] == ["small", "large", "tiny"]


def test_layers_that_cannot_or_need_not_be_kept_are_left():
    assert choose_kept([row("conv", 0.5, can_keep=False), row("perfect", 0.0)], 1.0) == []


def test_kept_weights_lie_on_the_int8_grid():
    model = nn.Sequential(nn.Linear(32, 8))
    weight = model[0].weight.detach().clone()
    round_int8(model, ["0"])
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = model[0].weight.detach() / scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert float((model[0].weight.detach() - weight).abs().max()) <= float(scale.max()) * 0.51


def test_weights_ternary_from_the_start_are_no_candidates():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.copy_(0.3 * torch.randint(-1, 2, (32, 32)))
    prepare(model, TernaryConfig(keep_head=False))
    rows = measure(model, {"input": torch.randn(8, 32)})
    assert [r.can_keep for r in rows] == [False, True]
