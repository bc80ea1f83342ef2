"""bitnet-export: a trained PyTorch model made ternary and run under ONNX Runtime or TensorRT.

    import bitnet_export as be

    be.save(model, "model.pt", {"x": x}, {"x": {0: "batch"}})     # the recommended model file
    report = be.run_export(be.ExportOptions(model=Path("model.pt"), target="ort"))
    session = be.load_session("out/model-ort")
    (y,) = session.run(None, {"x": x.numpy()})

Training: ``prepare`` a module, train it with ``finetune`` or a loop of your own, ``convert`` it.
Names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitnet_export.convert_run import run_convert
    from bitnet_export.errors import BitnetExportError
    from bitnet_export.finetune_run import run_finetune
    from bitnet_export.load import LoadedModel, save
    from bitnet_export.options import (
        BenchOptions,
        ConvertOptions,
        ExportOptions,
        FinetuneOptions,
        GateOptions,
        TernaryOptions,
        VerifyOptions,
    )
    from bitnet_export.pipeline import run_bench, run_export, run_verify
    from bitnet_export.targets.session import Session, load_session
    from bitnet_export.ternary import BitLinear, TernaryConfig, TernaryLinear
    from bitnet_export.ternary.distill import FinetuneConfig, finetune
    from bitnet_export.ternary.swap import convert, prepare, to_linear

__version__ = "0.1.0"

_HOME = {
    "bitnet_export.convert_run": ("run_convert",),
    "bitnet_export.errors": ("BitnetExportError",),
    "bitnet_export.finetune_run": ("run_finetune",),
    "bitnet_export.load": ("LoadedModel", "save"),
    "bitnet_export.options": (
        "BenchOptions",
        "ConvertOptions",
        "ExportOptions",
        "FinetuneOptions",
        "GateOptions",
        "TernaryOptions",
        "VerifyOptions",
    ),
    "bitnet_export.pipeline": ("run_bench", "run_export", "run_verify"),
    "bitnet_export.targets.session": ("Session", "load_session"),
    "bitnet_export.ternary": ("BitLinear", "TernaryConfig", "TernaryLinear"),
    "bitnet_export.ternary.distill": ("FinetuneConfig", "finetune"),
    "bitnet_export.ternary.swap": ("convert", "prepare", "to_linear"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "BenchOptions",
    "BitLinear",
    "BitnetExportError",
    "ConvertOptions",
    "ExportOptions",
    "FinetuneConfig",
    "FinetuneOptions",
    "GateOptions",
    "LoadedModel",
    "Session",
    "TernaryConfig",
    "TernaryLinear",
    "TernaryOptions",
    "VerifyOptions",
    "__version__",
    "convert",
    "finetune",
    "load_session",
    "prepare",
    "run_bench",
    "run_convert",
    "run_export",
    "run_finetune",
    "run_verify",
    "save",
    "to_linear",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
