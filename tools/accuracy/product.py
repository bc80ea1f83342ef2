"""What a row asks of the product, through its public Python API: fine-tune, export, open again.

Every model is measured as a file in ONNX Runtime: the full-precision one is the float32 ONNX that
the export keeps beside the ternary one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

import bitnet_export as be
from bitnet_export import manifest
from bitnet_export.assess import REFERENCE
from bitnet_export.options import SilentProgress
from bitnet_export.targets.session import open_session


@dataclass(frozen=True)
class Exported:
    """An output directory and what its file weighs beside the full-precision ones."""

    directory: Path
    bytes: int
    fp32_bytes: int
    fp16_bytes: int
    recipe: str

    def session(self, threads: int) -> Any:
        """The deployed model."""
        return be.load_session(self.directory, threads=threads)

    def full_precision(self, threads: int) -> Any:
        """The float32 model it was made from."""
        files = [self.directory / name for name in (REFERENCE, manifest.BASELINE)]
        return open_session(next(f for f in files if f.exists()), threads=threads)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model file and what it took: seconds on the clock and of the processor."""

    file: Path
    seconds: float
    cpu_seconds: float
    steps: int
    batch: int


class Notes(SilentProgress):
    """Keeps what the product says about its choices, and prints a line now and then."""

    def __init__(self, every: int = 25) -> None:
        self.lines: list[str] = []
        self.every = every

    def note(self, text: str) -> None:
        self.lines.append(text)
        print(f"  {text}", flush=True)

    def update(self, done: int, total: int, detail: str = "") -> None:
        if total and done % self.every == 0:
            print(f"  {done}/{total} {detail}", flush=True)


def fine_tune(model: Path, data: Path, output: Path, **settings: Any) -> Tuned:
    """`bitnet-export finetune model --data data`, with the product's defaults but for settings
    (fields of FinetuneOptions)."""
    started, used = time.perf_counter(), time.process_time()
    options = be.FinetuneOptions(model=model, data=data, output=output, overwrite=True, **settings)
    be.run_finetune(options, Notes())
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    from bitnet_export.history import read_history

    found = read_history(output)
    assert found is not None
    return Tuned(output, seconds, cpu, found[1].steps or 0, found[1].batch_size or 0)


def export(
    model: Path, output: Path, activation_bits: int | None = None, **settings: Any
) -> Exported:
    """`bitnet-export model --target ort`, not verified and not timed: the rows measure."""
    report = be.run_export(
        be.ExportOptions(
            model=model,
            target="ort",
            output=output,
            ternary=be.TernaryOptions(activation_bits=activation_bits),
            verify=False,
            bench=False,
            overwrite=True,
            **settings,
        ),
        Notes(),
    )
    assert report.size is not None
    recipe = next((d.choice for d in report.decisions if d.name == "recipe"), "")
    fp32 = report.size.baseline_bytes
    half = _float32_bytes(output / manifest.BASELINE) // 2
    return Exported(output, report.size.bytes, fp32, fp32 - half, recipe)


def _float32_bytes(path: Path) -> int:
    """Bytes of float32 initializers: what a float16 file saves half of."""
    graph = onnx.load(str(path), load_external_data=False).graph
    tensors = (t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    return sum(int(np.prod(t.dims, dtype=np.int64)) * 4 for t in tensors)


def outputs(session: Any, feeds: list[dict[str, npt.NDArray[Any]]]) -> list[npt.NDArray[Any]]:
    """The first output for each feed; inputs the model does not take are left out."""
    names = {described.name for described in session.get_inputs()}
    return [
        np.asarray(session.run(None, {k: v for k, v in feed.items() if k in names})[0])
        for feed in feeds
    ]
