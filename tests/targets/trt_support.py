"""What the TensorRT tests share: small models, and what stands in for a GPU and says so."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest

from bitnet_export import manifest, op
from bitnet_export.options import ExportOptions, SilentProgress
from bitnet_export.targets.base import BuildJob, Lowered


def unavailable(reason: str) -> None:
    """Skip, or fail where CI promises the native parts."""
    if os.environ.get("BITNET_REQUIRE_NATIVE") == "1":
        pytest.fail(f"BITNET_REQUIRE_NATIVE=1, but {reason}", pytrace=False)
    pytest.skip(reason)


def require_rtx() -> None:
    """The real tensorrt-rtx wheel, whose builder needs no GPU."""
    from importlib.util import find_spec

    if find_spec("tensorrt_rtx") is None:
        unavailable("there is no tensorrt_rtx: pip install tensorrt-rtx-cu12 (see constraints.txt)")


@dataclass
class Recorded(SilentProgress):
    """A Progress that keeps what it is told."""

    notes: list[str] = field(default_factory=list)
    updates: list[tuple[int, int, str]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, done: int, total: int, detail: str = "") -> None:
        self.updates.append((done, total, detail))


def job_for(directory, model, *, target="trt-rtx", inputs=None, progress=None, **options):
    """A BuildJob over a model.onnx that is written into ``directory``."""
    from bitnet_export import onnx_io

    directory.mkdir(parents=True, exist_ok=True)
    onnx_io.write_model(model, directory / manifest.MODEL)
    given = ExportOptions(model=directory / "model.pt", target=target, **options)
    return BuildJob(
        directory=directory,
        options=given,
        lowered=Lowered(model, []),
        inputs=inputs or {"x": {"dtype": "float32", "shape": ["batch", 128]}},
        opt={"batch": 1},
        progress=progress or Recorded(),
    )


def digits():
    """An MLP for 8 x 8 digits, wide enough for whole blocks of 128."""
    import torch
    from torch import nn

    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers).eval(), {"input": torch.randn(4, 64)}, {"input": {0: "batch"}}


def lowered_for_rtx(case, **kwargs):
    """x float16 -> one lowered TernaryMatMul -> y."""
    from bitnet_export.passes.lower_rtx import at_rtx_opset, lower_rtx
    from tests.passes.graphs import ternary_model

    return lower_rtx(at_rtx_opset(ternary_model(case, dtype="float16", **kwargs)))[0]


def trt_record(**changes: Any) -> manifest.Manifest:
    """The manifest of a trt directory with an engine, as an export on a T4 writes it."""
    facts = {
        "runtime": "tensorrt",
        "version": "10.14.1",
        "bytes": 1,
        "cuda": "12.9",
        "gpu": "Tesla T4",
        "compute_capability": "7.5",
        "plugin_layers": 2,
        "layers": 9,
        "embedded_plugin": False,
    }
    record = manifest.Manifest(name="model", target="trt", op_version=op.OP_VERSION)
    record.environment = {
        "profile": {"x": {"min": [1, 8], "opt": [4, 8], "max": [8, 8]}},
        "build": {"runtime": "tensorrt"},
        "engines": {manifest.ENGINE: facts | changes},
    }
    return record
