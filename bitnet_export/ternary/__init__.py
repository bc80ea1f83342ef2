"""Turning a module ternary: quantizers, layers, prepare and convert, fine-tuning.

Stands after load and before export. Names are resolved on first use, so that importing this
package costs nothing until torch is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_export.ternary.config import DEFAULT_EXCLUDE, LayerStatus, TernaryConfig
    from bitnet_export.ternary.distill import (
        FinetuneConfig,
        FinetuneResult,
        StepInfo,
        finetune,
    )
    from bitnet_export.ternary.layers import BitLinear, TernaryLinear
    from bitnet_export.ternary.quantizers import ternarize_weight
    from bitnet_export.ternary.swap import convert, prepare, to_linear

_HOME = {
    "DEFAULT_EXCLUDE": "config",
    "FinetuneConfig": "distill",
    "FinetuneResult": "distill",
    "LayerStatus": "config",
    "StepInfo": "distill",
    "TernaryConfig": "config",
    "convert": "swap",
    "finetune": "distill",
    "prepare": "swap",
    "to_linear": "swap",
    "BitLinear": "layers",
    "TernaryLinear": "layers",
    "ternarize_weight": "quantizers",
}

__all__ = [
    "DEFAULT_EXCLUDE",
    "BitLinear",
    "FinetuneConfig",
    "FinetuneResult",
    "LayerStatus",
    "StepInfo",
    "TernaryConfig",
    "TernaryLinear",
    "convert",
    "finetune",
    "prepare",
    "ternarize_weight",
    "to_linear",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
