"""The tool behind docs/models.md: every model it names can be made, and a failure shows."""

import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    import architectures

    return architectures


def test_every_model_it_names_can_be_made(tool):
    specs = [spec for family in tool.FAMILIES.values() for spec in family]
    assert len({spec.model for spec in specs}) == len(specs)
    for spec in specs:
        model = spec.make()
        assert type(model).__name__ == spec.model
        assert sum(p.numel() for p in model.parameters()) < 500_000


def test_one_goes_through(tool, tmp_path, capsys):
    (spec,) = (s for s in tool.FAMILIES["images"] if s.model == "ViTForImageClassification")
    outcome = tool.try_one("images", spec, tmp_path)
    assert outcome.problem == ""
    assert outcome.ternary == "12"  # of two blocks; the patch projection reads 3 channels
    done, of = outcome.agree.split(" of ")
    assert done == of != "0"


def test_a_failure_is_in_the_table(tool, tmp_path):
    spec = tool.Spec("PatchTSTModel", dict(d_model=16, ffn_dim=32, num_attention_heads=2))
    outcome = tool.try_one("series", spec, tmp_path)
    assert "takes past_values" in outcome.problem
    assert outcome.problem in tool.table([outcome])
