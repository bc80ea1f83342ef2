"""prepare, convert, to_linear on whole models: what is swapped, what is kept and why."""

import copy

import pytest
import torch
from torch import nn

from bitnet_export.errors import InputError, UsageError
from bitnet_export.ternary import (
    BitLinear,
    TernaryConfig,
    TernaryLinear,
    convert,
    prepare,
    to_linear,
)


def _mlp():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48), nn.Linear(48, 10))


def _status(rows):
    return {row.name: row.status for row in rows}


def _reason(rows, name):
    return next(row.reason for row in rows if row.name == name)


def test_round_trip_is_in_place_and_leaves_the_model_as_it_was():
    model = _mlp().eval()
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    rows = prepare(model)
    assert _status(rows) == {"0": "ternary", "2": "ternary", "3": "kept"}
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    to_linear(model)
    x = torch.randn(4, 32)
    assert torch.equal(model(x), before(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_convert_changes_no_bit_and_reports_prepares_rows():
    model = _mlp().eval()
    rows = prepare(model)
    x = torch.randn(4, 32)
    y = model(x)
    assert convert(model) == rows
    assert isinstance(model[0], TernaryLinear)
    assert torch.equal(y, model(x))
    to_linear(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight.unique(dim=1).isfinite().all()


def test_prepare_twice_is_prepare_once():
    model = _mlp()
    prepare(model)
    layer = model[0]
    rows = prepare(model)
    assert model[0] is layer
    assert _status(rows)["0"] == "ternary"


def test_a_shared_module_stays_shared():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(32, 32), nn.Linear(32, 4))
    prepare(model)
    assert model[0] is model[2]
    assert isinstance(model[0], BitLinear)
    convert(model)
    assert model[0] is model[2]
    assert isinstance(model[0], TernaryLinear)
    to_linear(model)
    assert model[0] is model[2]


def test_two_layers_on_one_weight_share_the_packed_one():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4))
    model[1].weight = model[0].weight
    prepare(model)
    assert model[1].weight is model[0].weight
    convert(model)
    assert model[1].packed_weight is model[0].packed_weight
    assert model[1].bias is not model[0].bias


def test_a_weight_tied_to_an_embedding_stays_float():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(50, 32)
            self.body = nn.Linear(32, 32)
            self.out = nn.Linear(32, 50, bias=False)
            self.out.weight = self.words.weight

    model = Tied()
    rows = prepare(model, TernaryConfig(keep_head=False))
    assert _status(rows) == {"words": "kept", "body": "ternary", "out": "kept"}
    assert _reason(rows, "out") == "shares its weight with the embedding words"
    assert model.out.weight is model.words.weight


def test_every_kept_layer_has_a_reason():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(4, 32, 32))

    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3),
            "norm": nn.LayerNorm(32),
            "words": nn.Embedding(10, 32),
            "small": nn.Linear(3, 32),
            "odd": Odd(32, 32),
            "experts": Experts(),
            "classifier": nn.Linear(32, 32),
            "skipped": nn.Linear(32, 32),
            "body": nn.Linear(32, 32),
        }
    )
    config = TernaryConfig(exclude=(*TernaryConfig().exclude, "skip*"))
    rows = prepare(model, config)
    assert {r.name for r in rows if r.status == "ternary"} == {"body"}
    for name, words in {
        "conv": "reads 3 channels",
        "norm": "normalization",
        "words": "embedding",
        "small": "K=3",
        "odd": "forward of its own",
        "experts": "3-D parameter",
        "classifier": "'classifier'",
        "skipped": "'skip*'",
    }.items():
        assert words in _reason(rows, name)


@pytest.mark.parametrize("bias", [True, False])
def test_a_forward_of_its_own_that_does_what_linear_does_counts_as_linear(bias):
    """Falcon has one in every place, to get other roundings."""

    class Own(nn.Linear):
        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    class Noisy(Own):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.noise = nn.Parameter(torch.zeros(32))

    class Picky(nn.Linear):
        def forward(self, x, which):
            return super().forward(x)[which]

    layers = {name: kind(32, 32, bias=bias) for name, kind in (("own", Own), ("noisy", Noisy))}
    model = nn.ModuleDict({**layers, "picky": Picky(32, 32, bias=bias), "body": nn.Linear(32, 32)})
    weight = layers["own"].weight
    rows = prepare(model, TernaryConfig(keep_head=False))
    assert {row.name for row in rows if row.status == "ternary"} == {"own", "body"}
    assert model["own"].weight is weight
    assert _reason(rows, "noisy") == "Noisy has a forward of its own"


def test_include_patterns_and_the_head_rule_can_be_set():
    model = _mlp()
    rows = prepare(model, TernaryConfig(include=("2", "3"), keep_head=False))
    assert _status(rows) == {"0": "kept", "2": "ternary", "3": "ternary"}
    assert "include" in _reason(rows, "0")


def test_threshold_above_every_weight_keeps_the_layer_and_says_so():
    model = _mlp()
    rows = prepare(model, TernaryConfig(quantizer="threshold", threshold=50.0))
    assert not any(r.status == "ternary" for r in rows)
    assert "50.0" in _reason(rows, "0")


def test_already_ternary_layers_survive_untouched():
    model = _mlp()
    weight = torch.randint(-1, 2, (48, 32)).float() * 0.37
    model[0].weight.data.copy_(weight)
    rows = prepare(model, TernaryConfig(quantizer="absmean"))
    assert _reason(rows, "0").startswith("already ternary (tensor scale)")
    convert(model)
    assert model[0].scale.tolist() == [pytest.approx(0.37, rel=0, abs=0)] or torch.equal(
        model[0].weight, weight
    )
    assert torch.equal(model[0].weight, weight)


def test_nan_weights_name_their_layer():
    model = _mlp()
    model[2].weight.data[3, 3] = float("nan")
    with pytest.raises(InputError, match="2: the weights hold NaN"):
        prepare(model)


@pytest.mark.parametrize("model", [nn.Linear(32, 32), nn.MultiheadAttention(32, 4)])
def test_a_bare_layer_cannot_be_replaced_in_place(model):
    with pytest.raises(UsageError, match=r"nn\.Sequential"):
        prepare(model)


def test_convert_without_prepare_is_refused():
    with pytest.raises(UsageError, match="prepare"):
        convert(_mlp())


def test_a_users_own_training_loop():
    torch.manual_seed(1)
    model = _mlp()
    prepare(model)
    x, y = torch.randn(256, 32), torch.randint(0, 10, (256,))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    model.eval()
    trained = model(x)
    convert(model)
    assert torch.equal(trained, model(x))
