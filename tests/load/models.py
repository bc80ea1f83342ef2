"""Small models and the files that hold them, shared by the loader tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

torch.set_num_threads(1)

BATCH_SEQUENCE = {0: "batch", 1: "sequence"}


class Mlp(nn.Sequential):
    """x [batch, 12] -> [batch, 5]."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 5))


class TiedTransformer(nn.Module):
    """ids [batch, sequence] -> logits; the head shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.embedding(ids)))


class Awkward(nn.Module):
    """Every spelling of a matrix product with a parameter, and one layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1d_weight = nn.Parameter(torch.randn(8, 6))
        self.conv1d_bias = nn.Parameter(torch.randn(6))
        self.bare = nn.Parameter(torch.randn(6, 6))
        self.shared = nn.Linear(6, 6)
        self.register_buffer("constant", torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.addmm(self.conv1d_bias, x, self.conv1d_weight)
        y = self.shared(torch.relu(self.shared(y)))
        z = y @ self.bare.T + y @ self.bare
        return {"z": z, "buffer": y @ self.constant}


class NoSignature(nn.Module):
    """A layer type that no file can hold without pickling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Branching(Mlp):
    """Control flow that depends on values, which torch.export cannot trace."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def mlp() -> nn.Module:
    return Mlp()


def branching() -> nn.Module:
    return Branching()


def no_module() -> int:
    return 3


def tiny_config(kind: str) -> Any:
    import transformers

    common: dict[str, Any] = dict(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    if kind == "bert":
        return transformers.BertConfig(**common, intermediate_size=32, max_position_embeddings=24)
    if kind == "llama":
        return transformers.LlamaConfig(
            **common, intermediate_size=32, num_key_value_heads=1, max_position_embeddings=64
        )
    if kind == "gpt2":
        return transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32
        )
    return transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=4,
    )


def tiny_model(kind: str, head: str = "Model") -> Any:
    import transformers

    torch.manual_seed(0)
    name = {"bert": "Bert", "llama": "Llama", "gpt2": "GPT2", "vit": "ViT"}[kind] + head
    return getattr(transformers, name)(tiny_config(kind)).eval()


def save_huggingface(directory: Path, kind: str, head: str = "Model") -> Any:
    model = tiny_model(kind, head)
    model.save_pretrained(directory)
    return model


def k_zero() -> nn.Module:
    return nn.Linear(0, 4)
