"""Hugging Face directories out: transformers loads them, with the same trits and logits."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from bitnet_export.checkpoints.huggingface import write_huggingface  # noqa: E402
from bitnet_export.errors import InputError  # noqa: E402
from bitnet_export.load import load, save  # noqa: E402
from bitnet_export.load.hf_bitnet import is_hf_bitnet  # noqa: E402
from bitnet_export.ternary import TernaryConfig, convert, prepare, to_linear  # noqa: E402
from tests.load.bitnet_files import (  # noqa: E402
    TINY,
    assert_equal_but_for_turned_activations,
    write_bitnet,
)
from tests.load.gguf_files import write_llama  # noqa: E402

# Rows of 22: no multiple of 4, so those layers' trits stay unpacked.
ODD = {**TINY, "intermediate_size": 22}


@pytest.fixture(autouse=True)
def without_compiling():
    """transformers compiles its BitNet functions, for seconds each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def ternary_directory(path, granularity="tensor", model_class="LlamaForCausalLM", **config):
    """A model made ternary, written with plain weights: what a finetune's result amounts to."""
    kind = getattr(transformers, model_class)
    model = kind(kind.config_class(**{**TINY, **config})).eval()
    prepare(model, TernaryConfig(granularity=granularity))
    convert(model)
    to_linear(model)
    model.save_pretrained(path)
    return path


def read_back(path, kind="AutoModelForCausalLM"):
    """The directory as transformers loads it, and the exact trits and scale of its layers."""
    model, info = getattr(transformers, kind).from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    layers = {n: m for n, m in model.named_modules() if is_hf_bitnet(m)}
    return model.eval(), {n: (m.weight.detach(), m.weight_scale) for n, m in layers.items()}


@pytest.mark.parametrize("config", [TINY, ODD], ids=["packed", "odd rows"])
@pytest.mark.parametrize("tied", [False, True])
def test_trits_and_logits(tmp_path, config, tied):
    source = ternary_directory(tmp_path / "m", **config, tie_word_embeddings=tied)
    loaded = load(source)
    (tmp_path / "out").mkdir()
    written = write_huggingface(loaded, tmp_path / "out")
    assert len(written.packed) == (14 if config is TINY else 10)
    assert len(written.unpacked) == 14 - len(written.packed)
    theirs, layers = read_back(tmp_path / "out")
    prepare(loaded.module)
    for path, (trits, scale) in layers.items():
        found, found_scale = loaded.module.get_submodule(f"model.{path}").ternarize()
        assert torch.equal(trits, found)
        assert torch.equal(scale, found_scale)
    assert len(layers) == 14
    convert(loaded.module)
    with torch.no_grad():
        expected = theirs(**loaded.example_inputs).logits
        ours = loaded.module(**loaded.example_inputs)
    assert_equal_but_for_turned_activations(ours, expected)


def test_and_back_in(tmp_path):
    """Out and in again: the same trits, scales, embeddings."""
    first = load(ternary_directory(tmp_path / "m"))
    (tmp_path / "out").mkdir()
    write_huggingface(first, tmp_path / "out")
    second = load(tmp_path / "out")
    assert second.float_layers == ["model.lm_head"]
    weights = first.module.state_dict()
    assert weights.keys() == second.module.state_dict().keys()
    for name, value in second.module.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("form", ["bitlinear", "online", "gguf"])
def test_foreign_checkpoints_through(tmp_path, form):
    (tmp_path / "m").mkdir()
    if form == "gguf":
        source = tmp_path / "m/m.gguf"
        write_llama(source)
    else:
        source = tmp_path / "m"
        mode = "online" if form == "online" else "offline"
        write_bitnet(source, "autobitlinear" if mode == "online" else form, mode)
    loaded = load(source)
    (tmp_path / "out").mkdir()
    write_huggingface(loaded, tmp_path / "out")
    _, layers = read_back(tmp_path / "out")
    prepare(loaded.module, TernaryConfig(exclude=tuple(loaded.float_layers)))
    assert len(layers) == 14
    for path, (trits, scale) in layers.items():
        found, found_scale = loaded.module.get_submodule(f"model.{path}").ternarize()
        assert torch.equal(trits, found)
        assert torch.equal(scale, found_scale)


@pytest.mark.parametrize("packed", [True, False])
def test_a_mixture_of_experts(tmp_path, packed):
    """Its experts are no layers in transformers: their trits are written as plain weights."""
    config = {"num_local_experts": 2, "num_experts_per_tok": 1}
    source = ternary_directory(tmp_path / "m", model_class="MixtralForCausalLM", **config)
    loaded = load(source)
    (tmp_path / "out").mkdir()
    written = write_huggingface(loaded, tmp_path / "out", packed=packed)
    assert len(written.packed) == (8 if packed else 0)
    assert len(written.dense) == (8 if packed else 16)
    theirs, layers = read_back(tmp_path / "out")
    assert len(layers) == len(written.packed)
    weights = transformers.MixtralForCausalLM.from_pretrained(source).state_dict()
    found = theirs.state_dict()
    for name, value in weights.items():
        if "experts" in name or not packed:
            assert torch.equal(found[name].float(), value), name
    again = load(tmp_path / "out")
    assert again.module.state_dict().keys() == loaded.module.state_dict().keys()


def test_a_program_needs_its_base(tmp_path):
    source = ternary_directory(tmp_path / "m")
    loaded = load(source)
    save(loaded.module, tmp_path / "m.pt", loaded.example_inputs, loaded.dynamic_axes)
    program = load(tmp_path / "m.pt")
    with pytest.raises(InputError, match="--base DIR"):
        write_huggingface(program, tmp_path)
    other = ternary_directory(tmp_path / "other", hidden_size=64)
    with pytest.raises(InputError, match=r"not those of the LlamaForCausalLM in .*other"):
        write_huggingface(program, tmp_path, base=other)
    (tmp_path / "out").mkdir()
    write_huggingface(program, tmp_path / "out", base=source)
    _, layers = read_back(tmp_path / "out")
    weights = loaded.module.model.state_dict()
    for path, (trits, scale) in layers.items():
        assert torch.equal(trits * scale, weights[f"{path}.weight"])


def test_plain_weights_of_what_was_packed(tmp_path):
    """A file of finetune goes back to its BitNet directory, whose configuration says packed."""
    (tmp_path / "m").mkdir()
    write_bitnet(tmp_path / "m")
    loaded = load(tmp_path / "m")
    save(loaded.module, tmp_path / "m.pt", loaded.example_inputs, loaded.dynamic_axes)
    for model in (loaded, load(tmp_path / "m.pt")):
        out = tmp_path / model.kind
        out.mkdir()
        write_huggingface(model, out, base=tmp_path / "m", packed=False)
        theirs, layers = read_back(out)
        assert not layers
        for name, value in loaded.module.model.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value), name


def test_norms_inside_the_layers_have_no_place_in_plain_ones(tmp_path):
    (tmp_path / "m").mkdir()
    write_bitnet(tmp_path / "m")
    loaded = load(tmp_path / "m")
    layer = loaded.module.model.model.layers[0].self_attn.q_proj
    layer.rms_norm = torch.nn.RMSNorm(32)
    with pytest.raises(InputError, match=r"norm inside model.layers.0.self_attn.q_proj[\s\S]*hf-b"):
        write_huggingface(loaded, tmp_path, packed=False)


@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_more_than_one_scale_has_no_place(tmp_path, granularity):
    if granularity == "group":
        pytest.importorskip("gguf")
        write_llama(tmp_path / "m.gguf", scales="block")
        loaded = load(tmp_path / "m.gguf")
    else:
        loaded = load(ternary_directory(tmp_path / "m", granularity))
    with pytest.raises(InputError, match=r"one scale a layer.*\n.*--granularity tensor"):
        write_huggingface(loaded, tmp_path)
    (tmp_path / "out").mkdir()
    written = write_huggingface(loaded, tmp_path / "out", packed=False)
    assert len(written.dense) == 14
    again = load(tmp_path / "out")
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value)


def test_a_name_that_ends_like_another(tmp_path):
    """transformers would keep pre_classifier, too, for it ends with classifier."""
    config = {"dim": 32, "hidden_dim": 64, "n_layers": 1, "n_heads": 4, "num_labels": 3}
    kind = transformers.DistilBertForSequenceClassification
    model = kind(transformers.DistilBertConfig(**config, vocab_size=50)).eval()
    prepare(model, TernaryConfig(granularity="tensor"))
    convert(model)
    to_linear(model)
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "out").mkdir()
    written = write_huggingface(load(tmp_path / "m"), tmp_path / "out")
    assert "pre_classifier" in written.packed
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == ["^classifier$"]
    _, layers = read_back(tmp_path / "out", "AutoModelForSequenceClassification")
    assert set(layers) == set(written.packed)


def test_gpt2_layers_are_no_linear_layers(tmp_path):
    config = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    prepare(model, TernaryConfig(granularity="tensor"))
    convert(model)
    to_linear(model)
    model.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    (tmp_path / "out").mkdir()
    written = write_huggingface(loaded, tmp_path / "out", packed=False)
    assert len(written.dense) == 4
    again = load(tmp_path / "out").module.state_dict()
    assert all(torch.equal(again[n], w) for n, w in loaded.module.state_dict().items())


def test_a_layer_of_zeros_keeps_its_bias(tmp_path):
    source = ternary_directory(tmp_path / "m", attention_bias=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(0.25)
    model.save_pretrained(source)
    (tmp_path / "out").mkdir()
    write_huggingface(load(source), tmp_path / "out")
    back = load(tmp_path / "out").module.model.model.layers[0].self_attn.q_proj
    assert not back.weight.any()
    torch.testing.assert_close(back.bias, layer.bias)
