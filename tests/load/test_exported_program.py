"""torch.export programs come back as modules: same outputs, same keys, trainable, exportable."""

import copy
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import nn

from bitnet_export.errors import InputError
from bitnet_export.load import load, save
from tests.load.models import (
    BATCH_SEQUENCE,
    Awkward,
    Branching,
    Mlp,
    TiedTransformer,
    tiny_model,
)

IDS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(1))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
TEXT_AXES = dict.fromkeys(TEXT, BATCH_SEQUENCE)
BATCH = {0: "batch"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """case -> (model, its exported program as torch reads it, as load reads it); made once."""
    directory = tmp_path_factory.mktemp("programs")

    @cache
    def make(case):
        build, inputs, axes, _ = CASES[case]
        model = build().eval()
        path = save(model, directory / f"{case}.pt", inputs, axes)
        with path.open("rb") as file:
            return model, torch.export.load(file), load(path)

    return make


def flat(outputs):
    return [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


CASES = {
    "mlp": (Mlp, {"input": torch.randn(3, 12)}, {"input": BATCH}, 2),
    "transformer": (TiedTransformer, {"ids": IDS}, {"ids": BATCH_SEQUENCE}, 9),
    "awkward": (Awkward, {"x": torch.randn(3, 8)}, {"x": BATCH}, 4),
    "bert": (lambda: tiny_model("bert"), TEXT, TEXT_AXES, 7),
    "llama": (lambda: tiny_model("llama", "ForCausalLM"), TEXT, TEXT_AXES, 8),
    "gpt2": (lambda: tiny_model("gpt2", "LMHeadModel"), TEXT, TEXT_AXES, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_same_outputs_and_layers(case, exported):
    _, inputs, axes, linears = CASES[case]
    _, program, loaded = exported(case)
    with torch.no_grad():
        expected = flat(program.module()(**inputs))
        by_name = flat(loaded.module(**inputs))
        in_order = flat(loaded.module(*inputs.values()))
    assert len(expected) == len(by_name) == len(in_order) > 0
    for a, b, c in zip(expected, by_name, in_order, strict=True):
        # The module may add in another order than the program's decomposed operators.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(b, c, rtol=0, atol=0)
    assert sum(isinstance(m, nn.Linear) for m in loaded.module.modules()) == linears
    assert loaded.dynamic_axes == axes
    assert list(loaded.example_inputs) == list(inputs)


@pytest.mark.parametrize("case", ["mlp", "bert", "llama", "gpt2"])
def test_state_dict_keys_are_kept(case, exported):
    model, _, loaded = exported(case)
    own = loaded.module.state_dict()
    for name, tensor in model.state_dict().items():
        transposed = case == "gpt2" and ".c_" in name and tensor.ndim == 2
        assert torch.equal(own[name].t() if transposed else own[name], tensor), name
    persistent = set(dict(model.named_buffers())) | set(model.state_dict())
    assert set(own) <= persistent


def test_attention_weights_move_into_a_linear(exported):
    model, _, loaded = exported("transformer")
    own, theirs = set(loaded.module.state_dict()), set(model.state_dict())
    attention = "encoder.layers.0.self_attn"
    assert isinstance(loaded.module.get_submodule(f"{attention}.in_proj"), nn.Linear)
    for key in theirs:  # the flat names stay for whoever reads them, the new ones are added
        assert key in own or "in_proj" in key
    assert {k for k in own - theirs if ".in_proj." not in k} == set()


def test_tied_weights_stay_tied(exported):
    _, _, loaded = exported("transformer")
    module = loaded.module
    assert isinstance(module.embedding, nn.Embedding)
    assert isinstance(module.head, nn.Linear)
    assert module.embedding.weight is module.head.weight


def test_one_layer_called_twice_stays_one(exported):
    _, _, loaded = exported("awkward")
    calls = [n.target for n in loaded.module.graph.nodes if n.op == "call_module"]
    assert calls.count("shared") == 2
    assert "constant" in dict(loaded.module.named_buffers())  # x @ buffer is no layer


def test_dict_outputs_keep_their_names(exported):
    _, _, loaded = exported("awkward")
    assert loaded.output_names == ["z", "buffer"]


def test_can_be_copied_trained_and_halved(exported):
    _, _, loaded = exported("mlp")
    student = copy.deepcopy(loaded.module).train()
    x = torch.randn(4, 12)
    student(input=x).sum().backward()
    assert student.get_submodule("0").weight.grad is not None
    assert loaded.module.get_submodule("0").weight.grad is None
    # Dropout was in the program; a loaded model is in eval mode and deterministic.
    assert torch.equal(loaded.module(x), loaded.module(x))
    assert copy.deepcopy(loaded.module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_training_mode_is_restored_and_inference_saved(tmp_path):
    model = Mlp().train()
    save(model, tmp_path / "m.pt", {"input": torch.randn(3, 12)})
    assert model.training
    loaded = load(tmp_path / "m.pt")
    assert loaded.dynamic_axes == {}
    assert loaded.dynamic_shapes() is None


def test_limits_of_axes_are_found(exported):
    _, _, loaded = exported("bert")
    assert loaded.axis_limits == {"sequence": 24}  # max_position_embeddings
    assert loaded.output_names == ["last_hidden_state", "pooler_output"]


def test_axis_names_of_foreign_programs_are_guessed(tmp_path):
    batch, length = torch.export.Dim("b"), torch.export.Dim("n")
    program = torch.export.export(
        TiedTransformer().eval(), (IDS,), dynamic_shapes={"ids": {0: batch, 1: length}}
    )
    torch.export.save(program, tmp_path / "m.pt2")
    assert load(tmp_path / "m.pt2").dynamic_axes == {"ids": BATCH_SEQUENCE}


@pytest.mark.parametrize("case", ["transformer", "llama"])
def test_exports_again_with_dynamic_shapes(case, exported):
    import onnxruntime as ort

    inputs = CASES[case][1]
    _, _, loaded = exported(case)
    program = torch.onnx.export(
        loaded.module,
        (),
        kwargs=loaded.example_inputs,
        dynamo=True,
        dynamic_shapes=loaded.dynamic_shapes(),
        verbose=False,
    )
    session = ort.InferenceSession(program.model_proto.SerializeToString())
    feeds = {name: torch.ones(3, 7, dtype=torch.int64) for name in inputs}
    (actual,) = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    with torch.no_grad():
        expected = loaded.module(**feeds)
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=0, atol=1e-5)


def test_prepare_finds_the_layers(exported):
    from bitnet_export.ternary import prepare

    module = copy.deepcopy(exported("bert")[2].module)
    statuses = prepare(module)
    assert sum(s.status == "ternary" for s in statuses) >= 4


def test_save_is_atomic_and_explains(tmp_path):
    class DataDependent(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(InputError, match=r"torch\.export cannot export"):
        save(DataDependent(), tmp_path / "m.pt", torch.ones(2))
    assert list(tmp_path.iterdir()) == []


def test_what_to_do_where_torch_gives_up(tmp_path):
    @dataclass
    class Answer:
        y: torch.Tensor

    class Structured(Mlp):
        def forward(self, x):
            return Answer(super().forward(x))

    x = {"x": torch.ones(2, 12)}
    with pytest.raises(InputError, match="return tensors from forward"):
        save(Structured(), tmp_path / "m.pt", x)
    with pytest.raises(InputError, match=r"control flow .* by torch\.where"):
        save(Branching(), tmp_path / "m.pt", x, {"x": BATCH})
    with pytest.raises(InputError, match="dynamic_shapes: forward has no argument z; it has x"):
        save(Branching(), tmp_path / "m.pt", x, {"z": BATCH})


@pytest.mark.parametrize("inputs", [torch.ones(1, 12), {"input": torch.ones(1, 12)}])
def test_a_batch_of_one_can_be_dynamic(tmp_path, inputs):
    loaded = load(save(Mlp(), tmp_path / "m.pt", inputs, {"input": BATCH}))
    assert loaded.dynamic_axes == {"input": BATCH}
    assert loaded.module(torch.ones(5, 12)).shape == (5, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_type_are_loaded_as_float32(tmp_path, dtype):
    class Casting(Mlp):
        def forward(self, x):
            scale = torch.tensor([0.5], dtype=self[0].weight.dtype)
            return super().forward(x.to(self[0].weight.dtype) * scale)

    model = Casting().eval()
    expected = model(torch.ones(2, 12) / 3).detach()
    loaded = load(save(model.to(dtype), tmp_path / "m.pt", torch.ones(2, 12) / 3))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.notes == [f"its {str(dtype)[6:]} weights are loaded as float32"]
    # bfloat16 weights have 8 bits
    torch.testing.assert_close(
        loaded.module(*loaded.example_inputs.values()), expected, rtol=0.02, atol=0.02
    )


def test_overrides(files):
    loaded = load(files / "mlp.pt2", input_specs=["input:7x12"])
    assert loaded.example_inputs["input"].shape == (7, 12)
    assert loaded.dynamic_axes == {}
    with pytest.raises(InputError, match="no input named x"):
        load(files / "mlp.pt2", input_specs=["x:7x12"])


def test_data_becomes_the_example(files, tmp_path):
    import numpy as np

    np.savez(tmp_path / "d.npz", ids=np.full((4, 9), 3))
    loaded = load(files / "tied.pt", data=tmp_path / "d.npz")
    assert loaded.example_inputs["ids"].tolist() == [[3] * 9] * 2
    for bad, message in (
        (np.zeros((4, 9, 2)), "the model takes"),
        (np.full((4, 9), 0.5), "no int64, which the model takes"),
        (np.full((4, 9), np.nan), "36 NaN values of 36"),
        (np.full((4, 9), "a"), "not numbers"),
    ):
        np.savez(tmp_path / "bad.npz", ids=bad)
        with pytest.raises(InputError, match=message):
            load(files / "tied.pt", data=tmp_path / "bad.npz")


def test_wrong_input_names_are_explained(tmp_path):
    with pytest.raises(InputError, match="no argument x; it has input"):
        save(Mlp(), tmp_path / "m.pt", {"x": torch.ones(2, 12)})
    save(Mlp(), tmp_path / "m.pt", torch.ones(2, 12))
    save(Mlp(), tmp_path / "m.pt", (torch.ones(2, 12),))
    assert list(load(tmp_path / "m.pt").example_inputs) == ["input"]
