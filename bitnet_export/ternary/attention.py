"""nn.MultiheadAttention with its projections as separate layers that can be made ternary.

torch's own module reads in_proj_weight inside one fused function, so no layer can be swapped
into it. SplitMultiheadAttention computes the same attention through four linear submodules
(q_proj, k_proj, v_proj, out_proj) and still saves and loads the original's state dict keys.
Also here: keeping nn.TransformerEncoder(Layer) off its fused path, which reads weights directly.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COPIED = (
    "embed_dim",
    "kdim",
    "vdim",
    "num_heads",
    "head_dim",
    "dropout",
    "batch_first",
    "add_zero_attn",
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_TERNARY_MARK = "_bitnet_float_fast_path"


class SplitMultiheadAttention(nn.MultiheadAttention):
    """Drop-in for nn.MultiheadAttention; made by ``from_attention``, undone by ``to_attention``.

    Same forward signature and results: self- and cross-attention, all masks, need_weights,
    batch_first, unbatched inputs, bias_k/bias_v, add_zero_attn, kdim/vdim.
    """

    q_proj: Any
    k_proj: Any
    v_proj: Any
    packed_projection: bool

    def __init__(self) -> None:
        raise TypeError("use SplitMultiheadAttention.from_attention")

    @classmethod
    def from_attention(cls, source: Any) -> SplitMultiheadAttention:
        """source -> the same attention on split copies of its input projection."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        for name in _COPIED:
            setattr(new, name, getattr(source, name))
        # False keeps the fused paths of torch away; what the source had is in packed_projection.
        new._qkv_same_embed_dim = False
        new.packed_projection = source._qkv_same_embed_dim
        new.register_parameter("bias_k", source.bias_k)
        new.register_parameter("bias_v", source.bias_v)
        if source._qkv_same_embed_dim:
            weights = list(source.in_proj_weight.detach().chunk(3))
        else:
            weights = [getattr(source, f"{name}_weight").detach() for name in PROJECTIONS]
        bias = source.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        for name, w, b in zip(PROJECTIONS, weights, biases, strict=True):
            new.add_module(name, _linear(w.clone(), None if b is None else b.clone()))
        new.add_module("out_proj", _linear(source.out_proj.weight, source.out_proj.bias))
        new._add_state_dict_hooks()
        return new.train(source.training)

    def to_attention(self) -> nn.MultiheadAttention:
        """The nn.MultiheadAttention again; every projection must be an nn.Linear."""
        with torch.device("meta"):
            new = nn.MultiheadAttention(
                self.embed_dim,
                self.num_heads,
                self.dropout,
                bias=self.q_proj.bias is not None,
                add_bias_kv=self.bias_k is not None,
                add_zero_attn=self.add_zero_attn,
                kdim=self.kdim,
                vdim=self.vdim,
                batch_first=self.batch_first,
            )
        new.load_state_dict(self.state_dict(), assign=True)
        new.requires_grad_(True)
        return new.train(self.training)

    @property
    def in_proj_weight(self) -> Tensor | None:  # type: ignore[override]
        """[3E, E] for code that reads it; None where the original had none."""
        if not self.packed_projection:
            return None
        return torch.cat([getattr(self, name).weight for name in PROJECTIONS])

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """[3E] or None."""
        if self.q_proj.bias is None:
            return None
        return torch.cat([getattr(self, name).bias for name in PROJECTIONS])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass attn_mask as well")
        batched = query.dim() == 3
        # One tensor given three times stays one: the graph passes merge projections by input.
        same_key, same_value = key is query, value is key
        query = self._batch_major(query, batched)
        key = query if same_key else self._batch_major(key, batched)
        value = key if same_value else self._batch_major(value, batched)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        mask = self._merged_mask(attn_mask, key_padding_mask, q)
        q, k, v, mask = self._heads(q, k, v, mask)
        y, weights = self._attend(q, k, v, mask, need_weights)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return y.squeeze(0), None if weights is None else weights.squeeze(0)
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _batch_major(self, x: Tensor, batched: bool) -> Tensor:
        """x as [B, L, E], from any of the three layouts the original takes."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _merged_mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor
    ) -> Tensor | None:
        """Both masks as one additive [B or 1, heads or 1, L or 1, S], or None."""
        merged = None
        if attn_mask is not None:
            merged = _additive(attn_mask, q.dtype)
            if merged.dim() == 3:
                merged = merged.unflatten(0, (-1, self.num_heads))
            else:
                merged = merged[None, None]
        if padding is not None:
            padding = _additive(padding, q.dtype)[:, None, None, :]
            merged = padding if merged is None else merged + padding
        return merged

    def _heads(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Append bias_k/bias_v and the zero key, split heads: [B, S, E] -> [B, heads, S, D]."""
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], dim=1)
            extra += 1
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            extra += 1
        if extra and mask is not None:
            mask = F.pad(mask, (0, extra))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return q, k, v, mask

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[B, heads, L, D] each -> (y [B, heads, L, D], weights [B, heads, L, S] or None)."""
        dropout = self.dropout if self.training else 0.0
        if not need_weights:
            return F.scaled_dot_product_attention(q, k, v, mask, dropout), None
        scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout:
            weights = F.dropout(weights, dropout)
        return weights @ v, weights

    def _add_state_dict_hooks(self) -> None:
        self.register_state_dict_post_hook(_merge_keys)
        self.register_load_state_dict_pre_hook(_split_keys)


def _merge_keys(
    module: SplitMultiheadAttention, state: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    """q_proj.weight, ... -> in_proj_weight, ...; packed ternary layers keep their own keys."""
    names = [f"{prefix}{name}" for name in PROJECTIONS]
    if not all(f"{name}.weight" in state for name in names):
        return
    weights = [state.pop(f"{name}.weight") for name in names]
    if module.packed_projection:
        state[f"{prefix}in_proj_weight"] = torch.cat(weights)
    else:
        state.update({f"{name}_weight": w for name, w in zip(names, weights, strict=True)})
    if f"{names[0]}.bias" in state:
        state[f"{prefix}in_proj_bias"] = torch.cat([state.pop(f"{name}.bias") for name in names])


def _split_keys(
    module: SplitMultiheadAttention, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """The inverse of _merge_keys, for loading."""
    names = [f"{prefix}{name}" for name in PROJECTIONS]
    if (packed := state.pop(f"{prefix}in_proj_weight", None)) is not None:
        state.update({f"{n}.weight": w for n, w in zip(names, packed.chunk(3), strict=True)})
    for name in names:
        if (weight := state.pop(f"{name}_weight", None)) is not None:
            state[f"{name}.weight"] = weight
    if (bias := state.pop(f"{prefix}in_proj_bias", None)) is not None:
        state.update({f"{n}.bias": b for n, b in zip(names, bias.chunk(3), strict=True)})


def guard_fast_paths(model: nn.Module, is_ternary: type | tuple[type, ...]) -> None:
    """Keep transformer encoders with a ternary layer inside off torch's fused path; give those
    without one their own setting back. Idempotent; call after any replacement."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            attribute, off = "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder):
            attribute, off = "use_nested_tensor", False
        else:
            continue
        inside = any(isinstance(m, is_ternary) for m in module.modules())
        saved = module.__dict__.get(_TERNARY_MARK)
        if inside and saved is None:
            setattr(module, _TERNARY_MARK, (getattr(module, attribute),))
            setattr(module, attribute, off)
        elif not inside and saved is not None:
            setattr(module, attribute, saved[0])
            delattr(module, _TERNARY_MARK)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask (True: hidden) as 0 / -inf; a float mask as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear on the given tensors; Parameters stay the same objects."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    if bias is not None:
        linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
    return linear
