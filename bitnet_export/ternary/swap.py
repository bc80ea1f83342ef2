"""prepare, convert and to_linear: swapping layers in a model, in place and back.

prepare: dense layers -> BitLinear and BitConv2d (trainable). convert: those -> TernaryLinear and
TernaryConv (packed), or a dense convolution with ternary weights. to_linear undoes either. What is
swapped is decided in sites.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from bitnet_export.errors import InputError, UsageError
from bitnet_export.load.experts import restore_experts, split_experts
from bitnet_export.load.model import is_finite
from bitnet_export.ternary.attention import (
    PROJECTIONS,
    SplitMultiheadAttention,
    guard_fast_paths,
)
from bitnet_export.ternary.config import LayerStatus, TernaryConfig
from bitnet_export.ternary.layers import BitLayer, TernaryLayer
from bitnet_export.ternary.sites import as_site, build, decide

_STATUS = "_bitnet_layer_status"
_TERNARY = (BitLayer, TernaryLayer)


def prepare(model: nn.Module, config: TernaryConfig | None = None) -> list[LayerStatus]:
    """Swap the model's linear layers and convolutions for ternary ones, in place; -> a row per
    layer with weights.

    nn.Linear, Hugging Face's Conv1D and BitNet layers, the projections of nn.MultiheadAttention,
    and nn.Conv1d and nn.Conv2d without groups qualify. Parameters stay the same objects (an
    attention's fused in_proj_weight is split into copies), modules used at several paths stay
    shared, state dict keys stay what they were. Layers prepared before are left alone. The experts
    of transformers' mixtures become linear layers first, with Parameters and state dict keys of
    their own.

    Raises UsageError if the model itself is one layer, InputError for weights with NaN or Inf.
    """
    config = config or TernaryConfig()
    if as_site(model) is not None or isinstance(model, nn.MultiheadAttention):
        raise UsageError(
            f"the model is itself a {type(model).__name__}, which cannot be replaced in place",
            where="prepare",
            fix="wrap it: prepare(nn.Sequential(layer))",
        )
    split_experts(model)
    _replace(model, lambda path, m: _split(path, m, config))
    decisions = {d.status.name: d for d in decide(model, config)}

    def to_trainable(path: str, _: nn.Module) -> nn.Module | None:
        return build(decisions[path]) if path in decisions else None

    _replace(model, to_trainable)
    guard_fast_paths(model, _TERNARY)
    rows = [d.status for d in decisions.values()]
    setattr(model, _STATUS, rows)
    return rows


def convert(model: nn.Module) -> list[LayerStatus]:
    """Freeze every BitLinear and BitConv2d into a packed layer, in place; -> prepare's rows.

    Layers that share a weight share the packed one. A convolution that runs in floating point
    becomes an ordinary one with weights {-s, 0, +s}. Outputs do not change by a bit (float32).
    Raises UsageError if there is nothing to convert, InputError if training left NaN or Inf.
    """
    packed: dict[object, tuple[Tensor, Tensor]] = {}
    before = list(model.modules())  # keeps the ids in ``packed`` alive

    def to_packed(path: str, module: nn.Module) -> nn.Module | None:
        if not isinstance(module, BitLayer):
            return None
        if not is_finite(module.weight):
            raise InputError("the weights hold NaN or Inf", where=path, fix="train it again")
        new = module.freeze()
        if isinstance(new, TernaryLayer):
            key = (id(module.weight), module.spec, id(module.alpha))
            new.packed_weight, new.scale = packed.setdefault(key, (new.packed_weight, new.scale))
        return new

    _replace(model, to_packed)
    if not any(isinstance(m, _TERNARY) for m in before):
        raise UsageError(
            "there is no BitLinear or BitConv2d layer to convert",
            where="convert",
            fix="call prepare(model) first; its rows say why each layer was kept",
        )
    del before
    guard_fast_paths(model, _TERNARY)
    return _rows(model)


def to_linear(model: nn.Module) -> None:
    """Undo prepare or convert, in place.

    A layer prepare made gives back its float weight (the same Parameter); one convert made the
    dequantized weight, since the float weight is gone. Attention modules get their fused
    projection back, transformers' mixtures of experts their weights of three dimensions.
    """
    _replace(model, lambda _, m: m.to_linear() if isinstance(m, _TERNARY) else None)
    _replace(model, _fuse)
    restore_experts(model)
    guard_fast_paths(model, _TERNARY)
    model.__dict__.pop(_STATUS, None)


def _replace(model: nn.Module, build: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Replace each module for which build returns another one, at all of its paths alike."""
    built: dict[int, nn.Module | None] = {}
    found = list(model.named_modules(remove_duplicate=False))
    for path, module in found:
        if not path:
            continue
        if id(module) not in built:
            built[id(module)] = build(path, module)
        new = built[id(module)]
        if new is not None:
            model.set_submodule(path, new)


def _split(path: str, module: nn.Module, config: TernaryConfig) -> nn.Module | None:
    """Open up an attention module unless all of its projections are excluded."""
    if type(module) is not nn.MultiheadAttention:
        return None
    names = [f"{path}.{name}" for name in (*PROJECTIONS, "out_proj")]
    if all(config.excluded_by(name) for name in names):
        return None
    return SplitMultiheadAttention.from_attention(module)


def _fuse(_: str, module: nn.Module) -> nn.Module | None:
    """Close a split attention again once its projections are dense."""
    if isinstance(module, SplitMultiheadAttention):
        return module.to_attention()
    return None


def _rows(model: nn.Module) -> list[LayerStatus]:
    """The rows prepare left on the model, or for a model prepared in parts, fresh ones."""
    rows: list[LayerStatus] | None = getattr(model, _STATUS, None)
    if rows is not None:
        return rows
    return [
        replace(d.status, reason="not prepared") if d.site is not None else d.status
        for d in decide(model, TernaryConfig(exclude=("*",)))
    ]
