"""state_dicts, safetensors and pickles: the factory, the keys, the word of trust, the inputs."""

import pytest
import torch

from bitnet_export.errors import InputError, UsageError
from bitnet_export.load import load
from tests.load.models import Mlp, NoSignature

FACTORY = "tests.load.models:mlp"
X = "input:batchx12"


@pytest.mark.parametrize("name", ["sd.pt", "checkpoint.pt", "mlp.safetensors"])
def test_weights_with_a_factory(files, name):
    loaded = load(files / name, factory=FACTORY, input_specs=[X])
    expected = load(files / "mlp.pt2").module.state_dict()
    assert loaded.kind == "state_dict"
    assert not loaded.module.training
    for key, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, expected[key])
    assert loaded.dynamic_axes == {"input": {0: "batch"}}
    assert loaded.module(**loaded.example_inputs).shape == (2, 5)


def test_weights_without_a_factory(files):
    with pytest.raises(UsageError, match=r"--model package\.module:function"):
        load(files / "sd.pt")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_package.models:make", "importing no_such_package"),
        ("tests.load.models:nothing", "has no nothing"),
        ("tests.load.models:no_module", "returned int"),
        ("tests.load.models:BATCH_SEQUENCE", "neither a function"),
        ("tests.load.models:tiny_model", "without arguments failed"),
        ("tests.load.models", "not package.module:function"),
    ],
)
def test_bad_factories(files, factory, message):
    with pytest.raises(UsageError, match=message):
        load(files / "sd.pt", factory=factory)


def test_factory_for_a_whole_model(files):
    with pytest.raises(UsageError, match="leave --model out"):
        load(files / "mlp.pt2", factory=FACTORY)


def test_keys_that_do_not_fit(tmp_path):
    state = Mlp().state_dict()
    state["0.weight"] = torch.zeros(9, 9)
    state["extra.weight"] = state.pop("3.weight")
    torch.save(state, tmp_path / "sd.pt")
    with pytest.raises(InputError) as error:
        load(tmp_path / "sd.pt", factory=FACTORY, input_specs=[X])
    text = str(error.value)
    assert "1 missing from the file: 3.weight" in text
    assert "1 not in the model: extra.weight" in text
    assert "0.weight (file [9, 9], model [16, 12])" in text


def test_data_parallel_prefix(tmp_path):
    state = {f"module.{k}": v for k, v in Mlp().state_dict().items()}
    torch.save(state, tmp_path / "sd.pt")
    load(tmp_path / "sd.pt", factory=FACTORY, input_specs=[X])


def test_tied_weights_saved_once(tmp_path):
    from safetensors.torch import save_model

    from tests.load.models import TiedTransformer

    save_model(TiedTransformer(), tmp_path / "tied.safetensors")
    loaded = load(
        tmp_path / "tied.safetensors",
        factory="tests.load.models:TiedTransformer",
        input_specs=["ids:batchxsequence:int64"],
    )
    assert loaded.module.head.weight is loaded.module.embedding.weight
    assert loaded.example_inputs["ids"].max() < 20  # within the vocabulary


def test_missing_input_shape_gives_the_flag(files):
    with pytest.raises(InputError, match=r"--input input:batchx12"):
        load(files / "sd.pt", factory=FACTORY)
    with pytest.raises(InputError, match=r"--input ids:batchxsequence:int64"):
        load_tied_without_inputs(files)


def load_tied_without_inputs(files):
    from safetensors.torch import save_model

    from tests.load.models import TiedTransformer

    path = files / "tied.safetensors"
    save_model(TiedTransformer(), path)
    return load(path, factory="tests.load.models:TiedTransformer")


def test_inputs_from_data(files, tmp_path):
    import numpy as np

    np.savez(tmp_path / "d.npz", input=np.ones((5, 12), np.float32), labels=np.arange(5))
    loaded = load(files / "sd.pt", factory=FACTORY, data=tmp_path / "d.npz")
    assert loaded.example_inputs["input"].shape == (2, 12)
    assert loaded.dynamic_axes == {"input": {0: "batch"}}
    np.savez(tmp_path / "d.npz", other=np.ones((5, 12)))
    with pytest.raises(InputError, match="forward takes input"):
        load(files / "sd.pt", factory=FACTORY, data=tmp_path / "d.npz")


def test_wrong_input_name(files):
    with pytest.raises(InputError, match="no argument y; it has input"):
        load(files / "sd.pt", factory=FACTORY, input_specs=["y:1x12"])


@pytest.mark.parametrize("name", ["whole.pt", "old.pt"])
def test_pickles_need_trust(files, name):
    with pytest.raises(InputError, match="runs whatever code") as refusal:
        load(files / name)
    assert "bitnet_export.save" in str(refusal.value)
    assert "--trust-pickle" in str(refusal.value)
    loaded = load(files / name, trust_pickle=True, input_specs=["x:batchx4"])
    assert loaded.kind == "pickle"
    assert isinstance(loaded.module, NoSignature)


def test_refusal_names_the_classes(files):
    with pytest.raises(InputError, match=r"tests\.load\.models\.NoSignature"):
        load(files / "whole.pt")


def test_pickle_is_not_executed(tmp_path, capfd):
    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="runs whatever code"):
        load(tmp_path / "evil.pt")
    assert "must never" not in capfd.readouterr().out


def test_pickle_of_code_that_is_gone(tmp_path, monkeypatch):
    import tests.load.models as models

    torch.save(NoSignature(), tmp_path / "gone.pt")
    monkeypatch.delattr(models, "NoSignature")
    with pytest.raises(InputError, match="needs code that is not here"):
        load(tmp_path / "gone.pt", trust_pickle=True)


@pytest.mark.parametrize("content", [torch.zeros(3), {"epoch": 3}, {}])
def test_no_model_in_it(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"neither a state_dict|no state_dict"):
        load(tmp_path / "x.pt", factory=FACTORY)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_weights_name_the_tensor(tmp_path, bad):
    model = Mlp()
    with torch.no_grad():
        model[3].weight[1, 2] = bad
    torch.save(model.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"3\.weight holds 1 NaN or Inf value of 80"):
        load(tmp_path / "nan.pt", factory=FACTORY, input_specs=[X])


def test_empty_layer(tmp_path):
    torch.save({"weight": torch.zeros(4, 0), "bias": torch.zeros(4)}, tmp_path / "k0.pt")
    with pytest.raises(InputError, match="K = 0"):
        load(tmp_path / "k0.pt", factory="tests.load.models:k_zero", input_specs=["input:1x1"])
