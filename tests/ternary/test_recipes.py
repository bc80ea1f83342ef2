"""Recipes: every entry is usable, models pick the one made for them, explicit options win."""

import pytest
import torch
from torch import nn

from bitnet_export.errors import UsageError
from bitnet_export.options import EMBEDDINGS, TernaryOptions
from bitnet_export.ternary import FinetuneConfig, TernaryConfig, prepare
from bitnet_export.ternary.recipes import RECIPES, Traits, choose, find, traits_of, traits_of_onnx

ISSUED = ("encoder", "embedding", "vision", "decoder", "bitnet-b1.58")


def test_the_documented_recipes_are_there():
    assert set(RECIPES) == set(ISSUED)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_every_recipe_makes_valid_configs(recipe):
    assert isinstance(recipe.config(), TernaryConfig)
    assert isinstance(recipe.finetune_config(), FinetuneConfig)
    assert recipe.embeddings in EMBEDDINGS
    assert recipe.summary
    assert recipe.source
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    assert any(row.status == "ternary" for row in prepare(model, recipe.config()))


def test_bitnet_is_absmean_per_tensor_with_int8_activations():
    config = RECIPES["bitnet-b1.58"].config()
    assert (config.quantizer, config.granularity, config.activation_bits) == (
        "absmean",
        "tensor",
        8,
    )


class Encoder(nn.Module):
    """Token ids [B, S] -> what a subclass returns of the hidden states [B, S, 16]."""

    def __init__(self, rows=50):
        super().__init__()
        self.words = nn.Embedding(rows, 16)
        self.positions = nn.Embedding(8, 16)
        self.dense = nn.Linear(16, 16)
        self.out = nn.Linear(16, rows)

    def hidden(self, ids):
        return self.dense(self.words(ids) + self.positions(torch.arange(ids.shape[1])))


class Embedder(Encoder):
    def forward(self, ids):
        return {"last_hidden_state": self.hidden(ids)}


class LanguageModel(Encoder):
    def forward(self, ids):
        return self.out(self.hidden(ids))


class Classifier(Encoder):
    def forward(self, ids):
        return {"logits": self.hidden(ids).mean(1)[:, :8]}


class ClassNumbers(Encoder):
    def forward(self, ids):
        return self.hidden(ids).mean(1).argmax(-1)


IDS = {"ids": torch.arange(8).reshape(2, 4)}
IMAGE = {"x": torch.zeros(1, 1, 8, 8)}


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (Embedder(), IDS, "embedding"),
        (LanguageModel(), IDS, "decoder"),
        # 8 classes, and a table of 8 positions: only the largest table is a vocabulary
        (Classifier(), IDS, "encoder"),
        (ClassNumbers(), IDS, "encoder"),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 10)), IMAGE, "vision"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), IMAGE, "encoder"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_model_picks_its_recipe_and_says_why(module, inputs, expected):
    recipe, reason = choose(traits_of(module, inputs))
    assert recipe.name == expected
    assert reason


def test_names_that_the_file_gives_its_outputs_count():
    class Plain(Encoder):
        def forward(self, ids):
            return (self.hidden(ids),)

    assert choose(traits_of(Plain(), IDS))[0].name == "encoder"
    named = traits_of(Plain(), IDS, output_names=["sentence_embedding"])
    assert choose(named)[0].name == "embedding"


def test_classes_that_predict_masked_tokens_are_no_decoders():
    wide = {"table_rows": 100, "output": "logits", "output_width": 100}
    assert choose(Traits("BertForMaskedLM", **wide))[0].name == "encoder"
    assert choose(Traits("Program", **wide))[0].name == "decoder"
    assert choose(Traits("GPT2LMHeadModel", table_rows=100))[0].name == "decoder"
    assert choose(Traits("LlamaForCausalLM"))[0].name == "decoder"
    assert choose(Traits("BitNetForCausalLM", bitnet=True))[0].name == "bitnet-b1.58"


def test_a_module_that_does_not_run_still_gets_a_recipe():
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    assert choose(traits_of(module, {"x": torch.zeros(5)}))[0].name == "vision"


def test_onnx_graphs_have_traits_too():
    from onnx import TensorProto, helper, numpy_helper

    table = numpy_helper.from_array(torch.zeros(50, 4).numpy(), "table")
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", 3])
    y = helper.make_tensor_value_info("last_hidden_state", TensorProto.FLOAT, ["batch", 3, 4])
    gather = helper.make_node("Gather", ["table", "ids"], ["last_hidden_state"])
    graph = helper.make_graph([gather], "g", [ids], [y], [table])
    traits = traits_of_onnx(helper.make_model(graph))
    assert traits == Traits(table_rows=50, output="last_hidden_state", output_width=4)
    assert choose(traits)[0].name == "embedding"


def test_explicit_options_win_over_the_recipe():
    recipe = RECIPES["bitnet-b1.58"]
    given = TernaryOptions(granularity="group", group_size=64, keep_head=False)
    config = recipe.config(**given.as_kwargs())
    assert (config.quantizer, config.granularity, config.group_size) == ("absmean", "group", 64)
    assert not config.keep_head
    assert recipe.config(**TernaryOptions().as_kwargs()) == recipe.config()
    assert recipe.finetune_config(steps=7, lr=None).steps == 7


def test_a_granularity_leaves_out_the_group_size_of_the_recipe():
    from dataclasses import replace

    grouped = replace(RECIPES["encoder"], ternary={"granularity": "group", "group_size": 64})
    assert grouped.config(granularity="channel").group_size == 0
    assert grouped.config(activation_bits=0).group_size == 64


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="no recipe") as error:
        find("resnet")
    assert "vision" in str(error.value.fix)


def test_models_that_predict_tokens_from_sound_or_images_are_decoders():
    """Whisper has convolutions, too, and Mamba."""
    traits = Traits("Whisper", convolutions=True, table_rows=100, output_width=100)
    assert choose(traits)[0].name == "decoder"
    assert choose(Traits("MambaForCausalLM", convolutions=True))[0].name == "decoder"
    assert choose(Traits("CLIPModel", convolutions=True, table_rows=100))[0].name == "vision"


def test_large_models_have_rates_of_their_own(monkeypatch):
    from bitnet_export.ternary import schedule

    monkeypatch.setattr(schedule, "LEARNING_RATES", ((10, 2e-3), (100, 4e-4)))
    rates = {
        name: [
            schedule.default_lr(nn.Linear(size, 1, bias=False), config.large_lr)
            for size in (10, 100, 101)
        ]
        for name in ("decoder", "encoder")
        for config in [find(name).finetune_config()]
    }
    assert rates == {"decoder": [2e-3, 4e-4, 1.6e-3], "encoder": [2e-3, 4e-4, 4e-4]}
