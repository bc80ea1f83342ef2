"""prepare, convert, to_linear and finetune on models with convolutions."""

import copy

import pytest
import torch
from torch import nn

from bitnet_export.errors import UsageError
from bitnet_export.ternary import (
    FinetuneConfig,
    TernaryConfig,
    convert,
    finetune,
    prepare,
    to_linear,
)
from bitnet_export.ternary.conv import BitConv2d, TernaryConv


def _cnn():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(32, 32, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


def _ternary(rows):
    return {row.name for row in rows if row.status == "ternary"}


def _reasons(rows):
    return {row.name: row.reason for row in rows}


def test_round_trip_is_in_place_and_leaves_the_model_as_it_was():
    model = _cnn()
    before = copy.deepcopy(model)
    parameters = list(model.parameters())
    rows = prepare(model)
    assert _ternary(rows) == {"3", "5", "7"}
    assert list(model.state_dict()) == list(before.state_dict())
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    x = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), before(x))
    to_linear(model)
    assert torch.equal(model(x), before(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]


def test_convert_changes_no_bit_and_its_dense_form_is_recognised_exactly():
    model, x = _cnn(), torch.randn(2, 3, 8, 8)
    rows = prepare(model)
    y = model(x)
    assert convert(model) == rows
    assert [type(model[i]) for i in (3, 5, 7)] == [nn.Conv2d, TernaryConv, TernaryConv]
    assert torch.equal(model(x), y)
    to_linear(model)
    assert [type(model[i]) for i in (3, 5, 7)] == [nn.Conv2d] * 3
    again = prepare(model)
    assert all("already ternary" in row.reason for row in again if row.status == "ternary")
    assert _ternary(again) == _ternary(rows)
    assert torch.equal(model(x), y)


def test_how_each_runs_is_said():
    reasons = _reasons(prepare(_cnn()))
    assert reasons["0"] == "reads 3 channels, below min_k=16: few weights to save"
    assert reasons["3"] == (
        "ternary weights (twn, channel scale), runs as floating point Conv: kernel 3x3"
    )
    assert reasons["5"] == reasons["7"] == "twn, channel scale"
    assert "head" in reasons["10"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TernaryConfig(convolutions="matmul"), {"5", "7"}),
        (TernaryConfig(convolutions="none", keep_head=False), {"10"}),
        (TernaryConfig(min_k=3), {"0", "3", "5", "7"}),
        (TernaryConfig(exclude=("5",)), {"3", "7"}),
    ],
    ids=["matmul", "none", "min_k", "exclude"],
)
def test_the_configuration_decides_which(config, expected):
    assert _ternary(prepare(_cnn(), config)) == expected


def test_group_scales_apply_where_there_is_a_product():
    model = _cnn()
    reasons = _reasons(prepare(model, TernaryConfig(granularity="group", group_size=32)))
    assert reasons["3"].startswith("ternary weights (twn, channel scale)")
    assert reasons["5"] == "twn, group 32 scale"
    assert model[3].spec.group_size == 0


@pytest.mark.parametrize(
    ("conv", "words"),
    [
        (nn.Conv2d(32, 32, 3, groups=32), "depthwise"),
        (nn.Conv2d(32, 32, 1, groups=4), "groups=4"),
        (nn.ConvTranspose2d(32, 32, 2), "transposed"),
        (nn.Conv3d(32, 32, 1), "Conv3d"),
    ],
    ids=["depthwise", "groups", "transposed", "3-D"],
)
def test_other_convolutions_are_kept_with_the_reason(conv, words):
    model = nn.ModuleDict({"conv": conv, "body": nn.Linear(32, 32)})
    rows = prepare(model)
    assert _ternary(rows) == {"body"}
    assert words in _reasons(rows)["conv"]


def test_a_convolution_with_a_forward_of_its_own_is_kept():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    model = nn.ModuleDict({"conv": Standardized(32, 32, 1), "body": nn.Linear(32, 32)})
    assert "forward of its own" in _reasons(prepare(model))["conv"]


def test_a_convolution_to_classes_is_a_head():
    model = nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 10, 1))
    rows = prepare(model)
    assert _ternary(rows) == {"0", "1"}
    assert "output head" in _reasons(rows)["2"]


def test_a_depthwise_convolution_reads_what_the_one_before_it_makes():
    """Its width counts: a last 1x1 convolution that feeds nothing narrower is not a head."""
    model = nn.Sequential(nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, groups=24))
    assert _ternary(prepare(model)) == {"0"}
    assert isinstance(model[0], BitConv2d)


def test_a_convolution_alone_is_refused():
    with pytest.raises(UsageError, match="itself a Conv2d"):
        prepare(nn.Conv2d(16, 16, 1))


def test_two_layers_on_one_kernel_share_the_packed_one():
    model = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    model[1].weight = model[0].weight
    prepare(model)
    convert(model)
    assert model[1].packed_weight is model[0].packed_weight
    assert model[2].packed_weight is not model[0].packed_weight


def test_fine_tuning_trains_every_kind_and_lowers_the_loss():
    teacher = _cnn()
    student = copy.deepcopy(teacher)
    prepare(student)
    before = [student[i].ternarize()[0] for i in (3, 5, 7)]
    settings = FinetuneConfig(steps=40, batch_size=16, lr=3e-3, eval_every=20)
    result = finetune(student, teacher, {"input": torch.randn(96, 3, 8, 8)}, settings)
    assert result.evaluations[-1]["loss"] < result.history[0]["loss"]
    for i, trits in zip((3, 5, 7), before, strict=True):
        assert not torch.equal(student[i].ternarize()[0], trits)
