"""What fine-tuning settles before it trains, and what opens the file that it writes."""

import numpy as np
import pytest
import torch

from bitnet_export import history
from bitnet_export.errors import InputError, UsageError
from bitnet_export.finetune_run import (
    _open_trainable,
    _samples,
    finetune_for_export,
    run_finetune,
)
from bitnet_export.load import load, save
from bitnet_export.opening import load_model
from bitnet_export.options import ExportOptions, FinetuneOptions, SilentProgress
from bitnet_export.report.schema import FinetuneBlock
from bitnet_export.stages import Stages
from tests.load.models import Branching, Mlp

FACTORY = "tests.load.models:mlp"


@pytest.fixture
def weights(tmp_path):
    torch.save(Mlp().state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "calib.npz", input=np.arange(48, dtype=np.uint8).reshape(4, 12))
    return tmp_path / "weights.pt"


def test_a_model_that_cannot_be_written_is_refused_before_training(tmp_path, weights):
    torch.save(Branching().state_dict(), weights)
    options = FinetuneOptions(
        model=weights,
        factory="tests.load.models:branching",
        input_specs=("x:batchx12",),
        data=tmp_path / "calib.npz",
    )
    np.savez(tmp_path / "calib.npz", x=np.ones((4, 12), np.float32))
    with pytest.raises(InputError, match=r"torch\.export cannot export"):
        _open_trainable(options, Stages(SilentProgress()))


def test_samples_have_the_dtypes_of_the_inputs(tmp_path, weights):
    loaded = load(weights, factory=FACTORY, input_specs=["input:batchx12"])
    data = _samples(loaded, tmp_path / "calib.npz")
    assert data.arrays["input"].dtype == np.float32
    assert data.arrays["input"][1, 0] == 12
    np.savez(tmp_path / "calib.npz", other=np.ones((4, 12)), label=np.ones(4))
    with pytest.raises(InputError, match="no array input; it has other, label"):
        _samples(loaded, tmp_path / "calib.npz")
    assert _samples(loaded, tmp_path) == tmp_path  # text


def test_the_factory_is_for_what_a_file_was_trained_from(tmp_path, weights):
    file = save(Mlp(), tmp_path / "ternary.pt", {"input": torch.ones(2, 12)})
    options = ExportOptions(model=file, factory=FACTORY)
    with pytest.raises(UsageError, match="leave --model out"):
        load_model(options, SilentProgress())
    history.write_history(file, weights, 8, FinetuneBlock(steps=1))
    assert load_model(options, SilentProgress()).kind == "exported_program"
    source = ExportOptions(model=weights, factory=FACTORY, input_specs=("input:2x12",))
    assert load_model(source, SilentProgress()).kind == "state_dict"


class Warned(SilentProgress):
    """Keeps the warnings."""

    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


def test_a_ternary_model_that_teaches_itself_is_told(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    inputs = {"input": torch.randn(4, 32)}
    source = save(net, tmp_path / "net.pt", inputs, {"input": {0: "batch"}})
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "d.npz",
        input=rng.standard_normal((80, 32)).astype(np.float32),
        target=rng.integers(0, 4, 80),
    )

    def warnings(model, **changes):
        said = Warned()
        output = tmp_path / f"{model.stem}-{len(changes)}.pt"
        options = FinetuneOptions(model, data=tmp_path / "d.npz", output=output, steps=2, **changes)
        return run_finetune(options, said), said.warnings

    ternary, said = warnings(source)
    assert not said
    _, said = warnings(ternary)
    assert "is ternary already and is taught by itself" in said[0]
    assert f"fine-tune {source} with more --steps" in said[0]
    _, said = warnings(ternary, labels="target")
    assert not said


def test_an_export_fine_tunes_on_text_with_the_models_own_tokenizer(tmp_path, monkeypatch):
    from bitnet_export.ternary import distill
    from bitnet_export.ternary.recipes import RECIPES

    seen = {}

    def finetune(student, teacher, data, config, **given):
        seen.update(given, data=data)
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "finetune", finetune)
    (tmp_path / "tokenizer.json").write_text("{}")
    loaded = load(save(Mlp(), tmp_path / "m.pt", {"input": torch.ones(32, 12)}))
    options = ExportOptions(tmp_path, data=tmp_path, finetune_steps=1)
    with pytest.raises(KeyboardInterrupt):
        finetune_for_export(loaded, None, RECIPES["encoder"], options, SilentProgress())
    assert seen["tokenizer"] == seen["data"] == tmp_path
