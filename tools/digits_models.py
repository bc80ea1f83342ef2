"""Classifiers of scikit-learn's digits: the models of docs/accuracy.md and of the main job's tests.

Only the modules. Each takes images [B, 8, 8] in 0..1 and gives logits [B, 10].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """64-width-width-10."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.layers(image.flatten(1))
        return logits


class VisionTransformer(nn.Module):
    """16 patches of 2 x 2, blocks of width 64 with 4 heads."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 64)
        self.position = nn.Parameter(torch.randn(1, 16, 64) * 0.02)
        block = nn.TransformerEncoderLayer(
            64, 4, 128, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, image: Tensor) -> Tensor:
        patches = image.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3)
        x = self.patch(patches.flatten(3).flatten(1, 2)) + self.position
        logits: Tensor = self.head(self.norm(self.encoder(x).mean(1)))
        return logits


class Cnn(nn.Module):
    """Kernels of 3 x 3 and 1 x 1 in turn, one of each with stride 2, batch norm after each."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, width, 3),
            *_convolution(width, 2 * width, 3, 2),
            *_convolution(2 * width, 2 * width, 1),
            *_convolution(2 * width, 2 * width, 3),
            *_convolution(2 * width, 4 * width, 1, 2),
        )
        self.head = nn.Linear(4 * width, 10)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(image.unsqueeze(1)).mean((2, 3)))
        return logits


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
