"""State dicts of ternary models: the original names and layouts, and the same trits on going on."""

import pytest
import torch
from torch import nn

import bitnet_export.load as loading
from bitnet_export.checkpoints.weights import own_weights, trits_of, write_state_dict
from bitnet_export.errors import InputError
from bitnet_export.load import load
from bitnet_export.ternary import TernaryConfig, convert, prepare, to_linear

CONFIGS = [
    TernaryConfig(),
    TernaryConfig(granularity="tensor", quantizer="absmean"),
    TernaryConfig(granularity="group", group_size=32),
]


def make():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 64), nn.Linear(64, 5))


def made_ternary(config):
    """-> (module with {-s, 0, +s} weights, {path: (trits, scale)})."""
    model = make().eval()
    prepare(model, config)
    found = {n: m.ternarize() for n, m in model.named_modules() if hasattr(m, "ternarize")}
    convert(model)
    to_linear(model)
    return model, found


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.granularity)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_training_goes_on_with_the_same_trits(tmp_path, config, suffix):
    model, trits = made_ternary(config)
    loading.save(model, tmp_path / "m.pt", {"input": torch.randn(2, 64)}, {"input": {0: "batch"}})
    _check_trits(load(tmp_path / "m.pt").module, trits)  # finetune's output, fine-tuned again
    count = write_state_dict(load(tmp_path / "m.pt"), tmp_path / f"w{suffix}")
    assert count == 2
    weights = _read(tmp_path / f"w{suffix}")
    assert set(weights) == set(model.state_dict())
    again = make()
    again.load_state_dict(weights)
    _check_trits(again, trits)
    loss = again(torch.randn(4, 64)).square().mean()
    loss.backward()
    assert all(again.get_submodule(p).weight.grad.abs().sum() > 0 for p in trits)


def _check_trits(model, trits):
    """prepare finds the trits and scales; the weights decide, not the config."""
    rows = prepare(model, TernaryConfig(quantizer="lsq"))
    reasons = [row.reason for row in rows if row.status == "ternary"]
    assert all(reason.startswith("already ternary") for reason in reasons)
    assert len(reasons) == len(trits)
    for path, (expected, scale) in trits.items():
        found, found_scale = model.get_submodule(path).ternarize()
        assert torch.equal(found, expected)
        assert torch.equal(found_scale.expand_as(scale), scale)


def _read(path):
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def test_names_and_layouts_are_the_modules_own(tmp_path):
    """A restored program renames in_proj_weight and transposes x @ w; its state dict does not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.out = nn.Linear(32, 32)

        def forward(self, x):
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model = Net().eval()
    with torch.no_grad():
        model.out.weight.copy_(torch.randint(-1, 2, (32, 32)) * 0.5)
    loading.save(model, tmp_path / "m.pt", {"x": torch.randn(2, 3, 32)})
    loaded = load(tmp_path / "m.pt")
    assert set(loaded.module.state_dict()) != set(model.state_dict())
    weights = own_weights(loaded)
    assert set(weights) == set(model.state_dict())
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())


def test_a_dense_model_and_an_onnx_file_are_refused(tmp_path, dense_onnx):
    loading.save(make().eval(), tmp_path / "m.pt", {"input": torch.randn(2, 64)})
    with pytest.raises(InputError, match=r"none of its layers is ternary.*\n.*finetune"):
        write_state_dict(load(tmp_path / "m.pt"), tmp_path / "w.pt")
    with pytest.raises(InputError, match="an ONNX file has no module"):
        write_state_dict(load(dense_onnx), tmp_path / "w.pt")
    assert not list(tmp_path.glob("*w.pt*"))


def test_trits_of_dense_weights():
    assert trits_of(torch.randn(4, 32)) is None
