"""Finds convolutions in a foreign graph that are matrix products over the channels.

Kernel 1, no padding, no groups: x [B, C, *size] channels last, times W[N, C]^T. All others stay
convolutions, with a reason. What is done to a site is matmul_sites.py's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import onnx_io
from bitnet_export.passes.base import Builder, PassResult, constant_values, is_op
from bitnet_export.passes.matmul_sites import MatMulSite
from bitnet_export.passes.pack_convolutions import SMALLEST, channel_trits

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

_TO_THE_END = 2**31 - 1
_TERNARY = "ternary weights, "  # what the reason of a convolution that pack-convolutions takes says


@dataclass
class ConvSite(MatMulSite):
    """y = Conv(x, weight [K, N] as [N, K, 1, ...]) (+ bias [N])."""

    strides: tuple[int, ...] = ()

    @property
    def is_conv(self) -> bool:
        """Whether it replaces a convolution."""
        return True

    def replace(
        self, builder: Builder, trits: np.ndarray, scale: np.ndarray, activation_bits: int
    ) -> None:
        """Slice (where strided) + Transpose + TernaryMatMul + Transpose in place of the Conv."""
        axes, layer = len(self.strides), self.layer
        x, y, dtype = self.x, self.y, self.x.dtype
        onnx_io.set_layer(self.nodes[0], layer).outputs.clear()
        if any(s > 1 for s in self.strides):
            bounds = ([0] * axes, [_TO_THE_END] * axes, range(2, axes + 2), self.strides)
            literals = [builder.literal(list(v), np.int64) for v in bounds]
            x = builder.node("Slice", [x, *literals], layer=layer, dtype=dtype)
        last = [0, *range(2, axes + 2), 1]
        self.x = builder.node("Transpose", [x], layer=layer, dtype=dtype, attrs={"perm": last})
        self.y = builder.variable_like(f"{layer}/channels_last", self.x, len(trits), dtype)
        product = self.y
        super().replace(builder, trits, scale, activation_bits)
        first = [0, axes + 1, *range(1, axes + 1)]
        attrs = {"perm": first}
        builder.node("Transpose", [product], layer=layer, dtype=dtype, attrs=attrs, output=y)


def find_conv_sites(graph: gs.Graph, result: PassResult) -> list[ConvSite]:
    """Every Conv that is a matrix product; the others go to result.skipped."""
    sites = []
    for node in graph.nodes:
        if not is_op(node, "Conv", "ConvTranspose"):
            continue
        weight = constant_values(node.inputs[1])
        reason = _why_no_site(node, weight)
        if reason or weight is None:
            result.skip(onnx_io.layer_of(node), reason)
            continue
        n, k, *kernel = weight.shape
        bias = constant_values(node.inputs[2]) if len(node.inputs) > 2 else None
        strides = tuple(node.attrs.get("strides") or [1] * len(kernel))
        matrix = weight.reshape(n, k).T
        sites.append(ConvSite([node], node.inputs[0], node.outputs[0], matrix, bias, strides))
    return sites


def is_ternary_conv(reason: str) -> bool:
    """Whether a convolution with this reason against a site has ternary weights all the same."""
    return reason.startswith(_TERNARY)


def _why_no_site(node: gs.Node, weight: Any) -> str:
    """The reason against a convolution, "" for none."""
    if node.op == "ConvTranspose":
        return "transposed convolutions stay in floating point"
    if weight is None:
        return "the kernel is computed, not a weight"
    if weight.dtype not in (np.float32, np.float16):
        return f"the weight is {weight.dtype}, not float32 or float16"
    if len(node.inputs) > 2 and not node.inputs[2].is_empty() and _bias_is_computed(node):
        return "the bias is computed"
    kernel = "x".join(map(str, weight.shape[2:]))
    if node.attrs.get("group", 1) > 1:
        return f"convolution with group={node.attrs['group']} stays in floating point"
    if math.prod(weight.shape[2:]) > 1:
        packed = weight.size >= SMALLEST and channel_trits(weight) is not None
        ternary = _TERNARY if packed else ""
        return f"{ternary}runs as floating point Conv: kernel {kernel}"
    if any(node.attrs.get("pads") or ()):
        return f"runs as floating point Conv: kernel {kernel} with padding"
    return ""


def _bias_is_computed(node: gs.Node) -> bool:
    return constant_values(node.inputs[2]) is None
