"""bitnet::ternary_matmul, the op of op.py as a torch custom op.

Its numbers are those of ``op.reference_ternary_matmul``. BitLinear's forward goes through the
same functions, which is why a converted layer gives the same bits. The op exists so that
torch.export sees one node per layer; it is for correctness, not for speed.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bitnet_export import packing
from bitnet_export.errors import InputError
from bitnet_export.op import ABSMAX_FLOOR, INT8_MAX, MAX_EXACT_K


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] float32 -> (xq [M, K] float32, integers in [-128, 127]; a [M, 1]), x ~ xq * a.

    The torch form of op.quantize_activations. A row with NaN has NaN in ``a`` and so in y.
    """
    a = x.abs().amax(dim=-1, keepdim=True).clamp_min(ABSMAX_FLOOR) / INT8_MAX
    xq = (x / a).round_().clamp_(-INT8_MAX - 1, INT8_MAX)
    return xq.nan_to_num_(nan=0.0), a


def matmul_trits(left: Tensor, trits: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """left [M, K], trits [N, K], scale [1], [N] or [N, K/group_size] -> [M, N].

    float32 holds the integer sums exactly (K <= op.MAX_EXACT_K), so summation order cannot show.
    """
    if not group_size:
        return (left @ trits.t()) * scale
    y = left.new_zeros(left.shape[0], trits.shape[0], dtype=torch.float32)
    for group, column in enumerate(scale.unbind(1)):
        k = slice(group * group_size, (group + 1) * group_size)
        y += (left[:, k] @ trits[:, k].t()) * column
    return y


def quantize_input(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor | None]:
    """x [..., K] -> (left [M, K] float32, a [M, 1]), or (x as rows, None) for float activations."""
    left = x.reshape(-1, x.shape[-1]).float()
    return quantize_rows(left) if activation_bits else (left, None)


def project(
    left: Tensor,
    a: Tensor | None,
    trits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
) -> Tensor:
    """quantize_input's result and the layer's operands -> y [M, N] float32, in the op's order:
    sums, weight scale, activation scale, bias."""
    y = matmul_trits(left, trits, scale, group_size)
    if a is not None:
        y = y * a
    return y if bias is None else y + bias.float()


def ternary_linear(
    x: Tensor,
    trits: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    """x [..., K] any float dtype, trits [N, K] float32 -> y [..., N] in x's dtype.

    All arithmetic is float32, under autocast too: this is the reference semantics.
    """
    n, k = trits.shape
    if activation_bits and k > MAX_EXACT_K:
        raise InputError(f"K={k} exceeds {MAX_EXACT_K}, the largest K with exact integer sums")
    with torch.autocast(x.device.type, enabled=False):
        left, a = quantize_input(x, activation_bits)
        y = project(left, a, trits, scale, bias, group_size)
    return y.reshape(*x.shape[:-1], n).to(x.dtype)


@cache
def _trits_of_byte() -> npt.NDArray[np.float32]:
    """[256, 4]: the trits in each byte. NaN for bytes that hold the unused code 0.

    No tensor: one made while torch traces a model is a fake one, and would stay.
    """
    quads = np.array(list(product((-1, 0, 1), repeat=packing.CODES_PER_BYTE)), np.int8)
    table = np.full((256, packing.CODES_PER_BYTE), np.nan, np.float32)
    table[packing.pack(quads)[:, 0]] = quads
    return table


def unpack_trits(packed_weight: Tensor, k: int) -> Tensor:
    """packed_weight [N, K'/4] uint8 -> trits [N, K] float32; corrupt bytes give NaN."""
    table = torch.from_numpy(_trits_of_byte()).to(packed_weight.device)
    quads = torch.nn.functional.embedding(packed_weight.int(), table)
    return quads.flatten(1)[:, :k]


def pack_trits(trits: Tensor) -> Tensor:
    """trits [N, K] any dtype -> packed_weight [N, K'/4] uint8 on the same device."""
    return torch.from_numpy(packing.pack(trits.detach().cpu().numpy())).to(trits.device)


@torch.library.custom_op("bitnet::ternary_matmul", mutates_args=())
def ternary_matmul(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    K: int,
    N: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    """x [..., K] float -> y [..., N] in x's dtype; operands as in op.py.

    scale and bias are float32; bias may be None. Raises InputError where a shape does not fit.
    """
    _check_operands(x, packed_weight, scale, bias, K, N, group_size)
    trits = unpack_trits(packed_weight, K)
    return ternary_linear(x, trits, scale, bias, group_size, activation_bits)


@ternary_matmul.register_fake
def _(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    K: int,
    N: int,
    group_size: int,
    activation_bits: int,
) -> Tensor:
    _check_operands(x, packed_weight, scale, bias, K, N, group_size)
    return x.new_empty((*x.shape[:-1], N))


def _check_operands(
    x: Tensor,
    packed_weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    k: int,
    n: int,
    group_size: int,
) -> None:
    """Only comparisons with constants, so that dynamic shapes stay dynamic."""
    if k < 1 or n < 1:
        raise InputError(f"ternary_matmul needs K >= 1 and N >= 1, got K={k}, N={n}")
    if x.dim() < 1 or x.shape[-1] != k:
        raise InputError(f"x must be [..., {k}], got {list(x.shape)}")
    if tuple(packed_weight.shape) != (n, packing.packed_row_bytes(k)):
        raise InputError(
            f"packed_weight must be [{n}, {packing.packed_row_bytes(k)}],"
            f" got {list(packed_weight.shape)}"
        )
    scales = ((n, k // group_size),) if group_size else ((1,), (n,))
    if (group_size and k % group_size) or tuple(scale.shape) not in scales:
        raise InputError(
            f"scale must be one of {[list(s) for s in scales]} (K={k},"
            f" group_size={group_size}), got {list(scale.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise InputError(f"bias must be [{n}], got {list(bias.shape)}")
