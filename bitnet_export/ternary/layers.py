"""BitLinear, the layer that is trained, and TernaryLinear, the frozen packed one.

Both compute y through torch_op.ternary_linear, so converting changes no bit of the output. What
convolutions share with them is in BitLayer and TernaryLayer; the convolutions are in conv.py. How
weights become trits is in quantizers.py; which layers are replaced is decided in sites.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from bitnet_export.op import TernaryAttributes
from bitnet_export.ternary import torch_op
from bitnet_export.ternary.config import TernaryConfig
from bitnet_export.ternary.quantizers import (
    QuantizerSpec,
    dequantize,
    initial_alpha,
    spec_for,
    ternarize,
)
from bitnet_export.ternary.straight_through import ternary_linear_ste


class BitLayer(nn.Module, ABC):
    """A trainable layer whose forward uses the ternary form of its float weight.

    Mixed into the torch layer it stands for. State dict keys stay ``weight`` and ``bias``; the
    learned-scale quantizers add ``alpha``, which is computed when a plain layer's state dict is
    loaded.
    """

    weight: Tensor
    alpha: nn.Parameter | None
    spec: QuantizerSpec

    def _adopt(self, spec: QuantizerSpec) -> None:
        self.spec = spec
        alpha = initial_alpha(self.matrix, spec)
        self.register_parameter("alpha", None if alpha is None else nn.Parameter(alpha))

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """weight as stored -> [N, K]."""
        return weight

    @property
    def matrix(self) -> Tensor:
        """The float weight as [N, K], however it is stored."""
        return self.as_matrix(self.weight)

    def ternarize(self) -> tuple[Tensor, Tensor]:
        """(trits [N, K] float32, scale float32) as the forward uses them."""
        return ternarize(self.matrix, self.spec, self.alpha)

    @abstractmethod
    def freeze(self) -> nn.Module:
        """The layer that computes the same with weights that are ternary for good."""

    @abstractmethod
    def to_linear(self) -> nn.Module:
        """The layer it was, with the float weight (the same Parameter objects)."""

    def extra_repr(self) -> str:
        s = self.spec
        return f"{super().extra_repr()}, {s.quantizer}, {s.granularity}, A{s.activation_bits}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Loading a plain layer's entries sets alpha to its start value for that weight."""
        key = prefix + "alpha"
        if self.alpha is not None and key not in state_dict and prefix + "weight" in state_dict:
            weight = self.as_matrix(state_dict[prefix + "weight"])
            state_dict[key] = initial_alpha(weight, self.spec)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class BitLinear(BitLayer, nn.Linear):
    """nn.Linear whose forward uses the ternary form of its float weight; the training form.

    State dict keys stay ``weight`` and ``bias``; the learned-scale quantizers add ``alpha``,
    which is computed when a plain nn.Linear's state dict is loaded. Forward in train and eval
    mode is the same and equals ``TernaryLinear.from_bitlinear(self)`` bit for bit (float32; under
    autocast the matmul runs in autocast's dtype).
    """

    transposed = False  # whether weight is stored [K, N]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: TernaryConfig | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.rms_norm: nn.Module | None = None
        self._adopt(spec_for(self.matrix, config or TernaryConfig())[0])

    @classmethod
    def from_linear(
        cls,
        linear: Any,
        spec: QuantizerSpec | TernaryConfig | None = None,
    ) -> BitLinear:
        """linear: anything with weight [N, K] ([K, N] for BitConv1D) and bias -> a BitLinear on
        the same Parameter objects. spec: how; a TernaryConfig is resolved for this weight."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        weight = linear.weight
        new.register_parameter("weight", weight)
        new.register_parameter("bias", getattr(linear, "bias", None))
        new.out_features, new.in_features = new.matrix.shape
        new.rms_norm = getattr(linear, "rms_norm", None)
        if not isinstance(spec, QuantizerSpec):
            spec = spec_for(new.matrix, spec or TernaryConfig())[0]
        new._adopt(spec)
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return ternary_linear_ste(input, self.matrix, self.alpha, self.bias, self.spec)

    def freeze(self) -> TernaryLinear:
        """TernaryLinear.from_bitlinear."""
        return TernaryLinear.from_bitlinear(self)

    def to_linear(self) -> nn.Module:
        """The nn.Linear it was, with the float weight (the same Parameter objects)."""
        return _restore(self, self.weight, self.bias)


class BitConv1D(BitLinear):
    """BitLinear in the place of Hugging Face's Conv1D (GPT-2): weight stays stored [K, N]."""

    transposed = True

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """weight [K, N] -> [N, K]."""
        return weight.t()

    @property
    def nx(self) -> int:
        """Conv1D's name for in_features."""
        return self.in_features

    @property
    def nf(self) -> int:
        """Conv1D's name for out_features."""
        return self.out_features


class TernaryLayer(nn.Module, ABC):
    """A frozen ternary layer: packed_weight uint8 [N, K'/4], scale and bias float32.

    Not trainable: no gradient flows through it. What it reads and writes is its subclasses' matter.
    """

    packed_weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        attributes: TernaryAttributes,
        packed_weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.attributes = attributes
        self.register_buffer("packed_weight", packed_weight)
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.dense_dtype = torch.float32

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The dequantized weight in the shape of the layer it stands for."""

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        at = self.attributes
        return torch_op.ternary_matmul(
            x,
            self.packed_weight,
            self.scale,
            self.bias,
            at.K,
            at.N,
            at.group_size,
            at.activation_bits,
        )

    def dense_matrix(self) -> Tensor:
        """The dequantized weight [N, K] in the dtype it was trained in."""
        trits = torch_op.unpack_trits(self.packed_weight, self.attributes.K)
        return dequantize(trits, self.scale).to(self.dense_dtype)

    def dense_bias(self) -> nn.Parameter | None:
        """The bias as a Parameter of a dense layer."""
        return None if self.bias is None else nn.Parameter(self.bias.to(self.dense_dtype))

    @abstractmethod
    def to_linear(self) -> nn.Module:
        """A dense layer with the dequantized weight; the trits are not trainable."""

    def _apply(self, fn: Any, recurse: bool = True) -> TernaryLayer:
        """model.half() and the like move the layer but leave scale and bias float32: that is the
        op's contract, and rounded scales would change every output."""
        kept = {name: getattr(self, name) for name in ("scale", "bias")}
        super()._apply(fn, recurse)
        for name, original in kept.items():
            if original is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, original.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        at = self.attributes
        return (
            f"in_features={at.K}, out_features={at.N}, bias={self.bias is not None},"
            f" group_size={at.group_size}, activation_bits={at.activation_bits}"
        )


class TernaryLinear(TernaryLayer):
    """A frozen ternary linear layer. Made by ``from_bitlinear``."""

    def __init__(
        self,
        attributes: TernaryAttributes,
        packed_weight: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(attributes, packed_weight, scale, bias)
        self.rms_norm: nn.Module | None = None
        self.transposed = False

    @classmethod
    def from_bitlinear(cls, layer: BitLinear) -> TernaryLinear:
        """Freeze a BitLinear; its weight is read once and no longer referred to."""
        trits, scale = layer.ternarize()
        n, k = trits.shape
        at = TernaryAttributes(k, n, layer.spec.group_size, layer.spec.activation_bits)
        new = cls(at, torch_op.pack_trits(trits), scale.clone(), layer.bias)
        new.rms_norm = layer.rms_norm
        new.transposed = layer.transposed
        new.dense_dtype = layer.weight.dtype
        return new.train(layer.training)

    @property
    def in_features(self) -> int:
        """K."""
        return self.attributes.K

    @property
    def out_features(self) -> int:
        """N."""
        return self.attributes.N

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, [N, K] ([K, N] in a Conv1D's place), computed on each access.

        For code that asks a layer for its weight's dtype or device, and for reading.
        """
        weight = self.dense_matrix()
        return weight.t() if self.transposed else weight

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N] in the input's dtype."""
        if self.rms_norm is not None:
            input = self.rms_norm(input)
        return self.product(input)

    def to_linear(self) -> nn.Module:
        """An nn.Linear (or Conv1D) with the dequantized weight; the trits are not trainable."""
        return _restore(self, nn.Parameter(self.weight.contiguous()), self.dense_bias())


def _restore(layer: BitLinear | TernaryLinear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A dense layer of the kind ``layer`` replaced, on the given parameters."""
    dense: Any
    if layer.transposed:
        from transformers.pytorch_utils import Conv1D

        dense = Conv1D(layer.out_features, layer.in_features)
    else:
        with torch.device("meta"):
            dense = nn.Linear(layer.in_features, layer.out_features, bias is not None)
    dense.weight = weight
    dense.bias = bias
    if layer.rms_norm is not None:
        dense = nn.Sequential(layer.rms_norm, dense)
    return dense.train(layer.training)
