"""Values as people write them, and the option dataclasses they become."""

import click
import pytest

from bitnet_export import options
from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.values import FRACTION, RATIO


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("100 %", 1), ("0", 0)])
def test_fraction(text, value):
    assert FRACTION.convert(text, None, None) == pytest.approx(value)


@pytest.mark.parametrize(("text", "value"), [("2x", 2), ("1.8", 1.8), ("150%", 1.5), (".5x", 0.5)])
def test_ratio(text, value):
    assert RATIO.convert(text, None, None) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5x", "five", "", "-1%", "150%", "1e3", "nan"])
def test_not_a_fraction(text):
    with pytest.raises(click.BadParameter, match="5%"):
        FRACTION.convert(text, None, None)


@pytest.mark.parametrize("text", ["two", "", "-2x", "2xx", "inf"])
def test_not_a_ratio(text):
    with pytest.raises(click.BadParameter, match="2x"):
        RATIO.convert(text, None, None)


def ternary(**changes):
    values = dict(
        recipe=None,
        quantizer=None,
        threshold=None,
        granularity=None,
        group_size=None,
        activation_bits=None,
        exclude=(),
        include=(),
        ternary_head=False,
        convolutions=None,
    )
    return shared.take_ternary({**values, **changes})


def test_defaults_are_those_of_the_dataclass():
    assert ternary() == options.TernaryOptions()


def test_ternary_options_are_accepted_by_ternary_config():
    from bitnet_export.ternary.config import DEFAULT_EXCLUDE, TernaryConfig

    assert TernaryConfig(**ternary().as_kwargs()) == TernaryConfig()
    config = TernaryConfig(**ternary(group_size="64", exclude=("*.query",)).as_kwargs())
    assert (config.granularity, config.group_size) == ("group", 64)
    assert config.exclude == (*DEFAULT_EXCLUDE, "*.query")
    assert TernaryConfig(**ternary(convolutions="matmul").as_kwargs()).convolutions == "matmul"


def test_choices_match_the_rest_of_the_package():
    from bitnet_export.ternary import config

    assert options.QUANTIZERS == config.QUANTIZERS
    assert options.GRANULARITIES == config.GRANULARITIES
    assert options.GROUP_SIZES == config.GROUP_SIZES
    assert options.CONVOLUTIONS == config.CONVOLUTIONS


def test_a_threshold_that_nothing_would_look_at():
    with pytest.raises(click.UsageError, match="--quantizer threshold"):
        ternary(threshold=0.05)
    assert ternary(threshold=0.05, quantizer="threshold").threshold == 0.05


def test_group_size_against_granularity():
    with pytest.raises(click.UsageError, match="--granularity group"):
        ternary(granularity="channel", group_size="64")
    assert ternary(granularity="group").group_size == 128


@pytest.mark.parametrize(
    ("model", "directory"),
    [("a/model.v2.pt", "out/model.v2-ort"), ("dir-1.5b", "out/dir-1.5b-ort")],
)
def test_default_directory(tmp_path, monkeypatch, model, directory):
    monkeypatch.chdir(tmp_path)
    if "." not in model.split("/")[-1][:4]:
        (tmp_path / "dir-1.5b").mkdir(exist_ok=True)
    from pathlib import Path

    assert options.ExportOptions(model=Path(model)).directory == Path(directory)
