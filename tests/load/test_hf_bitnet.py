"""Hugging Face BitNet checkpoints: trits and scale untouched, transformers' own code the judge."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bitnet_export.errors import InputError, MissingRequirement  # noqa: E402
from bitnet_export.load import load  # noqa: E402
from bitnet_export.load.hf_bitnet import (  # noqa: E402
    BitNetLinear,
    absmean_ternary,
    from_hf_layer,
    pack_rows,
    unpack_rows,
)
from bitnet_export.ternary import TernaryConfig, convert, prepare  # noqa: E402
from tests.load.bitnet_files import (  # noqa: E402
    assert_equal_but_for_turned_activations,
    write_bitnet,
)

OFFLINE = ["bitlinear", "autobitlinear"]


@pytest.fixture(autouse=True)
def without_compiling():
    """transformers compiles these small functions, for seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_packing_is_that_of_transformers():
    from transformers.integrations.bitnet import pack_weights, unpack_weights

    trits = torch.randint(-1, 2, (20, 7)).float()
    packed = pack_rows(trits)
    assert torch.equal(packed, pack_weights(trits.clone()))
    assert torch.equal(unpack_rows(packed), unpack_weights(packed, torch.float32))
    assert torch.equal(unpack_rows(packed), trits)


@pytest.mark.parametrize("linear_class", OFFLINE)
def test_offline_trits_and_scale(tmp_path, linear_class):
    layers = write_bitnet(tmp_path, linear_class)
    loaded = load(tmp_path)
    assert loaded.float_layers == ["model.lm_head"]
    prepare(loaded.module, TernaryConfig(activation_bits=0))
    for path, (trits, weight_scale) in layers.items():
        module = loaded.module.get_submodule(f"model.{path}")
        found, scale = module.ternarize()
        assert torch.equal(found, trits)
        expected = 1 / weight_scale if linear_class == "bitlinear" else weight_scale
        assert torch.equal(scale, expected)
        assert module.spec.activation_bits == 8  # as it was trained


@pytest.mark.parametrize(
    ("linear_class", "mode"), [*((c, "offline") for c in OFFLINE), ("autobitlinear", "online")]
)
def test_the_whole_model_computes_what_transformers_computes(tmp_path, linear_class, mode):
    write_bitnet(tmp_path, linear_class, mode)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    loaded = load(tmp_path)
    assert isinstance(loaded.module.model.model.layers[1].mlp.ffn_sub_norm, nn.Module)
    with torch.no_grad():
        expected = theirs(**loaded.example_inputs).logits
        prepare(loaded.module)
        convert(loaded.module)
        ours = loaded.module(**loaded.example_inputs)
    assert_equal_but_for_turned_activations(ours, expected)


def test_online_trits_are_those_of_transformers_and_the_latent_weights_stay(tmp_path):
    from transformers.integrations.bitnet import WeightQuant

    layers = write_bitnet(tmp_path, "autobitlinear", "online")
    loaded = load(tmp_path)
    prepare(loaded.module)
    for path, (latent, _) in layers.items():
        module = loaded.module.get_submodule(f"model.{path}")
        assert torch.equal(module.weight, latent)
        trits, _ = module.ternarize()
        quantized = WeightQuant.apply(latent)
        assert torch.equal(trits, quantized.sign())
        assert torch.equal(absmean_ternary(latent), quantized)


def test_layers_left_out_of_the_quantization_stay_floats(tmp_path):
    kept = "model.layers.0.mlp.up_proj"
    write_bitnet(tmp_path, kept=("lm_head", kept))
    assert load(tmp_path).float_layers == [f"model.{kept}", "model.lm_head"]


@pytest.mark.parametrize("linear_class", OFFLINE)
@pytest.mark.parametrize("norm", [False, True])
def test_bias_and_norm(linear_class, norm):
    from transformers.integrations import bitnet

    trits = torch.randint(-1, 2, (12, 64)).float()
    if linear_class == "bitlinear":
        layer = bitnet.BitLinear(64, 12, bias=True, dtype=torch.float32, use_rms_norm=norm)
        layer.weight = nn.Buffer(pack_rows(trits))
    else:
        layer = bitnet.AutoBitLinear(64, 12, bias=True, use_rms_norm=norm)
        layer.weight.data.copy_(trits)
    layer.weight_scale.fill_(0.731)
    layer.bias.data.copy_(torch.randn(12))
    new = from_hf_layer(layer)
    assert type(new) is BitNetLinear
    model = nn.Sequential(new)
    prepare(model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-3)
        assert (new(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_another_quantization_is_refused(tmp_path, monkeypatch):
    from bitnet_export.load import huggingface

    write_bitnet(tmp_path)
    monkeypatch.setattr(huggingface, "fold_bitnet_layers", lambda model: [])
    with pytest.raises(InputError, match="quantized with bitnet, which is no ternary format"):
        load(tmp_path)


def test_missing_package(tmp_path, monkeypatch):
    from transformers.quantizers import quantizer_bitnet

    write_bitnet(tmp_path)
    monkeypatch.setattr(quantizer_bitnet, "is_accelerate_available", lambda: False)
    with pytest.raises(MissingRequirement, match=r"accelerate"):
        load(tmp_path)


def test_damaged_codes(tmp_path):
    from safetensors.torch import load_file, save_file

    write_bitnet(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 255
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj.*code 3"):
        load(tmp_path)
