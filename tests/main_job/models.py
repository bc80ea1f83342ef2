"""The models the main job is tested on: small enough for seconds each, and the digits metric."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper, save_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from digits_models import Cnn, Mlp, VisionTransformer


def digits_model(name: str) -> nn.Module:
    """A classifier of digits, smaller than the ones of docs/accuracy.md."""
    build = {
        "mlp": lambda: Mlp(128),
        "vit": lambda: VisionTransformer(blocks=1),
        "cnn": lambda: Cnn(),
    }
    return build[name]()


class Encoder(nn.Module):
    """[B, S, 32] -> [B, S, 32], torch's own encoder with its norms after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


@cache
def digits() -> dict[str, np.ndarray]:
    """scikit-learn's digits, images [n, 8, 8] in 0..1: 1,400 to train on, 397 held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = (data.images / 16).astype(np.float32)[order]
    labels = data.target.astype(np.int64)[order]
    return {
        "train_x": images[:1400],
        "train_y": labels[:1400],
        "test_x": images[1400:],
        "test_y": labels[1400:],
    }


def train(model: nn.Module, steps: int) -> nn.Module:
    """A classifier of digits, in a few seconds."""
    data = digits()
    x, y = torch.tensor(data["train_x"]), torch.tensor(data["train_y"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def accuracy(run: Any, data: Sequence[dict[str, np.ndarray]]) -> float:
    """The --metric of the digits tests: part of the held-out images named right."""
    right = total = 0
    for batch in data:
        (logits,) = run({"image": batch["image"]}).values()
        right += int((logits.argmax(-1) == batch["label"]).sum())
        total += len(batch["label"])
    return right / total


# --- Hugging Face --------------------------------------------------------------------------

TINY = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
)


def huggingface(kind: str, directory: Path) -> Path:
    """A tiny random model, saved as transformers does: config.json and safetensors."""
    import transformers

    torch.manual_seed(0)
    causal = dict(TINY, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**TINY)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**causal)),
        "tied-llama": lambda: transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**dict(causal, vocab_size=600), tie_word_embeddings=True)
        ),
        "mixtral": lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**causal, num_local_experts=3, num_experts_per_tok=1)
        ),
        "bitnet": lambda: transformers.BitNetForCausalLM(transformers.BitNetConfig(**causal)),
    }[kind]()
    if kind == "bitnet":
        make_ternary(model)
    model.save_pretrained(directory)
    return directory


def make_ternary(model: nn.Module) -> None:
    """Give the blocks' linear layers weights that are {-s, 0, +s} already, as BitNet's are."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in name:
                scale = module.weight.abs().mean()
                module.weight.copy_((module.weight / scale).round().clamp(-1, 1) * scale)


# --- ONNX made without this package --------------------------------------------------------

FOREIGN_WIDTHS = (64, 96, 96, 10)


def foreign_weights(ternary: Sequence[int] = ()) -> dict[str, np.ndarray]:
    """w0 [K, N], b0 [N], w1 ... of an MLP; layers in ``ternary`` hold trits times a scale."""
    rng = np.random.default_rng(3)
    weights: dict[str, np.ndarray] = {}
    for i, (k, n) in enumerate(itertools.pairwise(FOREIGN_WIDTHS)):
        w = rng.standard_normal((k, n)) / np.sqrt(k)
        if i in ternary:
            w = rng.integers(-1, 2, (k, n)) * rng.uniform(0.05, 0.2, n)
        weights |= {f"w{i}": w.astype(np.float32), f"b{i}": (rng.standard_normal(n) / 9)}
        weights[f"b{i}"] = weights[f"b{i}"].astype(np.float32)
    return weights


def foreign_mlp(path: Path, ternary: Sequence[int] = (), opset: int = 17) -> Path:
    """x [batch, 64] -> Gemm, Relu, Gemm, Relu, MatMul + Add -> Softmax, as another tool would
    write it: Gemm with transB, an older opset, initializers that are also inputs, no metadata."""
    weights = foreign_weights(ternary)
    nodes = [
        helper.make_node("Gemm", ["x", "w0", "b0"], ["h0"], name="dense_0", transB=1),
        helper.make_node("Relu", ["h0"], ["r0"], name="relu_0"),
        helper.make_node("Gemm", ["r0", "w1", "b1"], ["h1"], name="dense_1", transB=1),
        helper.make_node("Relu", ["h1"], ["r1"], name="relu_1"),
        helper.make_node("MatMul", ["r1", "w2"], ["m2"], name="dense_2"),
        helper.make_node("Add", ["b2", "m2"], ["h2"], name="bias_2"),
        helper.make_node("Softmax", ["h2"], ["probabilities"], name="softmax", axis=-1),
    ]
    weights = {k: v.T.copy() if k in ("w0", "w1") else v for k, v in weights.items()}
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "foreign",
        [
            info("x", TensorProto.FLOAT, ["batch", 64]),
            *(info(k, TensorProto.FLOAT, v.shape) for k, v in weights.items()),
        ],
        [info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    save_model(model, path)
    return path
