"""Finding blocks and attention projections by structure and name, and hearing what they say."""

import pytest
import torch
from torch import nn

from bitnet_export.ternary import prepare
from bitnet_export.ternary.observe import (
    Capture,
    hidden_sites,
    projection_sites,
    repeated_blocks,
)


class Attention(nn.Module):
    def __init__(self, names, width=32):
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(width, width * (3 if len(names) == 1 else 1)))

    def forward(self, x):
        return x + sum(layer(x)[..., : x.shape[-1]] for layer in self.children())


def stack(*names):
    model = nn.Sequential(*(Attention(names) for _ in range(3)))
    prepare(model)
    return model


@pytest.mark.parametrize(
    "names", [("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("wq", "wk", "wv")]
)
def test_projections_of_the_last_attention_are_found_by_name(names):
    assert projection_sites(stack(*names)) == [f"2.{name}" for name in names]


@pytest.mark.parametrize("name", ["c_attn", "query_key_value", "qkv"])
def test_a_fused_projection_is_one_site(name):
    assert projection_sites(stack(name)) == [f"2.{name}"]


def test_no_attention_no_sites():
    assert projection_sites(stack("up", "down")) == []
    assert projection_sites(stack("query", "key", "other")) == []


def test_blocks_are_the_sites_of_hidden_states_in_call_order():
    model = stack("query", "key", "value")
    assert repeated_blocks(model) == ["0", "1", "2"]
    assert hidden_sites(model, lambda: model(torch.ones(1, 2, 32))) == ["0", "1", "2"]
    flat = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    prepare(flat)
    assert hidden_sites(flat, lambda: flat(torch.ones(1, 32))) == ["0", "2"]


def test_capture_hears_only_while_it_runs():
    model = stack("query", "key", "value")
    x = torch.ones(1, 2, 32)
    with Capture(model, ["1", "0.key"]) as capture:
        model(x)
        result, seen = capture.run(lambda: model(x))
        model(x)
        assert capture.seen == []
    assert [path for path, _ in seen] == ["0.key", "1"]
    assert torch.equal(model[2](seen[1][1]), result)
    with pytest.raises(RuntimeError), Capture(model, ["1"]) as capture:
        capture.run(lambda: model(torch.ones(1, 2, 5)))
