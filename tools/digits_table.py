"""Measure what ternary costs on scikit-learn digits, and keep the table in docs/accuracy.md.

    python tools/digits_table.py            # 5 seeds, prints the table
    python tools/digits_table.py --write    # and puts it into docs/accuracy.md

For each seed: train a model in full precision, make it ternary without training (post-training),
then distil it from the full-precision one without labels. All three are exported and their test
accuracy is measured in ONNX Runtime. Files are weighed as --target ort writes them. Only the
table's numbers come from here; what they mean is told in docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import copy
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from digits_models import Cnn, Mlp, VisionTransformer
from torch import nn

from bitnet_export.export import export_module
from bitnet_export.options import ExportOptions
from bitnet_export.passes import FoldBatchNorm, run_passes
from bitnet_export.targets.base import target_for
from bitnet_export.ternary import FinetuneConfig, TernaryConfig, convert, finetune, prepare

DOC = Path(__file__).parent.parent / "docs" / "accuracy.md"
BEGIN, END = "<!-- digits:begin -->", "<!-- digits:end -->"
BATCH = 64
FORMS = ("full precision", "post-training", "distilled")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": Mlp,
    "vision transformer": VisionTransformer,
    "CNN": Cnn,
}


@dataclass(frozen=True)
class Digits:
    """Images [n, 8, 8] float32 in 0..1 and labels [n] int64, a quarter held out for testing."""

    train_x: npt.NDArray[np.float32]
    train_y: npt.NDArray[np.int64]
    test_x: npt.NDArray[np.float32]
    test_y: npt.NDArray[np.int64]

    @classmethod
    def load(cls, seed: int) -> Digits:
        """A stratified split of scikit-learn's digits."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        bunch: Any = load_digits()
        images = bunch.images.astype(np.float32) / 16
        tx, ex, ty, ey = train_test_split(
            images, bunch.target, test_size=0.25, random_state=seed, stratify=bunch.target
        )
        return cls(tx, ty, ex, ey)


@dataclass
class Accuracies:
    """Test accuracy in percent, one a seed, by model and form; sizes: bytes of the model's file in
    float32 and as --target ort writes it."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, model: str, form: str, accuracy: float) -> None:
        self.values.setdefault((model, form), []).append(accuracy)

    def rows(self) -> list[str]:
        """Markdown rows: mean (least-most over seeds) of each form, worst loss, bytes."""
        return [self._row(model) for model in dict.fromkeys(model for model, _ in self.values)]

    def _row(self, model: str) -> str:
        by_form = [self.values[model, form] for form in FORMS]
        cells = [f"{statistics.mean(v):.2f} ({min(v):.2f}-{max(v):.2f})" for v in by_form]
        losses = [full - ternary for full, ternary in zip(by_form[0], by_form[2], strict=True)]
        cells += [f"{statistics.mean(losses):+.2f}", f"{max(losses):+.2f}"]
        before, after = self.sizes[model]
        cells.append(f"{before / 1e3:.0f} -> {after / 1e3:.0f} kB ({before / after:.1f}x)")
        return f"| {model} | " + " | ".join(cells) + " |"


def train(model: nn.Module, data: Digits, steps: int, seed: int) -> None:
    """Full-precision training with labels: AdamW, cosine schedule."""
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(model: nn.Module, data: Digits) -> float:
    """Test accuracy in percent of the exported model in ONNX Runtime."""
    import onnxruntime as ort

    proto = _export(model)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": data.test_x})
    return float(np.mean(np.asarray(logits).argmax(1) == data.test_y) * 100)


def _export(model: nn.Module) -> Any:
    return export_module(model, {"image": torch.zeros(2, 8, 8)}, {"image": {0: "batch"}})


def file_sizes(name: str, config: TernaryConfig) -> tuple[int, int]:
    """Bytes of the model in float32 and lowered by --target ort; no training changes them."""
    model = MODELS[name]().eval()
    full = _export(model)
    prepare(model, config)
    convert(model)
    ternary, _ = run_passes(_export(model), [FoldBatchNorm()])
    lowered = target_for("ort").lower(ternary, ExportOptions(Path(name)), {}).model
    return full.ByteSize(), lowered.ByteSize()


def measure(
    name: str, seed: int, train_steps: int, distil_steps: int, config: TernaryConfig
) -> dict[str, float]:
    """One seed of one model -> accuracy of its three forms."""
    torch.manual_seed(seed)
    data = Digits.load(seed)
    teacher = MODELS[name]()
    train(teacher, data, train_steps, seed)
    teacher.eval()
    student = copy.deepcopy(teacher)
    prepare(student, config)
    untrained = copy.deepcopy(student)
    convert(untrained)
    settings = FinetuneConfig(
        steps=distil_steps, batch_size=BATCH, eval_every=0, teacher_cache_mb=256, seed=seed
    )
    finetune(student, teacher, {"image": data.train_x}, settings)
    convert(student)
    forms = (teacher, untrained, student)
    return {form: accuracy(m, data) for form, m in zip(FORMS, forms, strict=True)}


def table(results: Accuracies, seeds: int, seconds: float, command: str) -> str:
    """The markdown between the markers."""
    head = "| model | " + " | ".join(FORMS) + " | lost, mean | lost, worst seed | file |"
    source = (
        f"Test accuracy in percent, mean (least-most) over {seeds} seeds; 450 held-out images."
        f" Measured by `{command}` in {seconds:.0f} s: {_machine()}."
    )
    return "\n".join([head, "|---" * 7 + "|", *results.rows(), "", source])


def write(text: str, doc: Path = DOC) -> None:
    """Replace what is between the markers in doc."""
    page = doc.read_text("utf-8")
    if BEGIN not in page or END not in page:
        raise SystemExit(f"{doc} has no {BEGIN} ... {END} to write between")
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    doc.write_text(pattern.sub(lambda _: f"{BEGIN}\n{text}\n{END}", page), "utf-8")


def _machine() -> str:
    import onnxruntime as ort

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        processor = found.group(1) if found else processor
    return (
        f"{processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__},"
        f" ONNX Runtime {ort.__version__}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and with --write update the page; 1 if a mean loss exceeds 2 points."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--train-steps", type=int, default=500)
    parser.add_argument("--distil-steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="update docs/accuracy.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    started, results = time.perf_counter(), Accuracies()
    for name in options.models:
        results.sizes[name] = file_sizes(name, TernaryConfig())
        for seed in range(options.seeds):
            forms = measure(name, seed, options.train_steps, options.distil_steps, TernaryConfig())
            for form, value in forms.items():
                results.add(name, form, value)
            shown = ", ".join(f"{form} {value:.2f}" for form, value in forms.items())
            print(f"{name}, seed {seed}: {shown}", file=sys.stderr, flush=True)
    given = arguments if arguments is not None else sys.argv[1:]
    command = " ".join(["python tools/digits_table.py", *given])
    text = table(results, options.seeds, time.perf_counter() - started, command)
    print(text)
    if options.write:
        write(text)
    lost = [
        statistics.mean(results.values[name, FORMS[0]])
        - statistics.mean(results.values[name, FORMS[2]])
        for name in options.models
    ]
    return int(max(lost) > 2.0)


if __name__ == "__main__":
    raise SystemExit(main())
