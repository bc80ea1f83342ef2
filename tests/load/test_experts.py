"""Mixtures of experts as linear layers; transformers' own modules are the judge."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from bitnet_export.errors import InputError  # noqa: E402
from bitnet_export.load import load, save  # noqa: E402
from bitnet_export.load.experts import (  # noqa: E402
    LinearExperts,
    experts_split,
    is_experts,
    join_experts,
    split_experts,
)
from bitnet_export.load.state_dict import build  # noqa: E402
from bitnet_export.ternary import BitLinear, convert, prepare, to_linear  # noqa: E402

COMMON = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=64,
    num_experts_per_tok=2,
    pad_token_id=0,
)
# Weights [E, out, in]; the same beside a shared expert; [E, in, out] interleaved, with biases.
CONFIGS = {
    "Mixtral": dict(num_local_experts=4),
    "Qwen2Moe": dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    "GptOss": dict(num_local_experts=4, head_dim=8),
}


def make(name="Mixtral"):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**COMMON, **CONFIGS[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.config.use_cache = False
    for parameter in model.parameters():  # of which some start as zeros
        nn.init.normal_(parameter, std=0.2)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(14).reshape(2, 7)).logits


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(request.param)


def test_the_same_numbers_and_the_same_weights_back(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    paths = split_experts(model)
    assert len(paths) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert split_experts(model) == []
    joined = join_experts(model, model.state_dict())
    assert joined.keys() == before.keys()
    assert all(torch.equal(joined[name], value) for name, value in before.items())


def test_every_expert_becomes_ternary_and_learns(model):
    rows = {row.name: row.status for row in prepare(model)}
    experts = [name for name in rows if ".experts." in name]
    assert len(experts) == 2 * 4 * 2
    assert {rows[name] for name in experts} == {"ternary"}
    model(torch.arange(14).reshape(2, 7)).logits.square().mean().backward()
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    learned = [m for m in layers if m.weight.grad is not None and bool(m.weight.grad.any())]
    assert len(learned) > len(layers) / 2  # an expert that no token chose learns nothing


def test_and_back_to_transformers_own_module(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model)
    to_linear(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    prepare(model)
    convert(model)
    expected = logits(model)
    to_linear(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    again.config.use_cache = False
    prepare(again)  # finds the trits it had; only activations are rounded
    torch.testing.assert_close(logits(again), expected, rtol=1e-3, atol=1e-4)


def test_an_expert_nobody_chose_and_an_index_that_is_nobodys():
    experts = make().model.layers[0].mlp.experts
    split = LinearExperts(experts)
    experts.config._experts_implementation = "eager"  # the others take no such index
    x, weights = torch.randn(3, 16), torch.rand(3, 2)
    chosen = torch.tensor([[1, 4], [1, 4], [4, 2]])  # 4 experts: 4 stands for none
    expected = experts(x, chosen, weights)
    torch.testing.assert_close(split(x, chosen, weights), expected, rtol=1e-5, atol=1e-6)
    nobody = torch.full((3, 2), 4)
    assert not split(x, nobody, weights).any()


def test_saving_leaves_the_users_model_as_it_is(model, tmp_path):
    before = {name: id(value) for name, value in model.named_parameters()}
    ids = torch.arange(14).reshape(2, 7)
    expected = logits(model)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids).logits

    save(Logits(), tmp_path / "m.pt", {"input_ids": ids}, {"input_ids": {0: "batch", 1: "s"}})
    assert {name: id(value) for name, value in model.named_parameters()} == before
    loaded = load(tmp_path / "m.pt").module
    for batch in (ids, ids[:1, :3]):
        with torch.no_grad():
            expected = model(batch).logits
            torch.testing.assert_close(loaded(batch), expected, rtol=1e-5, atol=1e-6)
    rows = prepare(loaded)
    assert sum(".experts." in row.name and row.status == "ternary" for row in rows) == 16


def test_a_context_restores_after_an_error():
    model = make()

    def fail():
        with experts_split(model):
            assert isinstance(model.model.layers[0].mlp.experts, LinearExperts)
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail()
    assert is_experts(model.model.layers[0].mlp.experts)


def test_weights_of_either_form_load_into_a_factory(tmp_path, monkeypatch):
    model = make()
    expected = logits(model)
    whole = model.state_dict()
    split_experts(model)
    monkeypatch.setattr("tests.load.models.mixture", make, raising=False)
    for weights in (whole, model.state_dict()):
        built = build("tests.load.models:mixture", weights, tmp_path)
        torch.testing.assert_close(logits(built), expected, rtol=1e-5, atol=1e-6)


def test_a_form_that_is_not_known_is_refused():
    model = make()
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.experts.*not supported"):
        split_experts(model)
