"""Measure one row: full precision, post-training, fine-tuned by the product, set by hand.

What comes out is a Record: plain data, written as JSON after every form, so that an interrupted
run keeps what it had. Each value is that of an ONNX file in ONNX Runtime.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accuracy import product
from accuracy.rows import Row

FULL, POST, TUNED = "full precision", "post-training", "fine-tuned"
CALIBRATED = "post-training, calibrated"
FLOAT_ACTIVATIONS = ", float activations"


@dataclass
class Form:
    """One measured model. seconds, cpu_seconds: of its fine-tuning, or of the export that
    calibrated it, on the clock and of the processor (less than that where the machine was
    shared)."""

    name: str
    value: float
    bytes: int
    seed: int | None = None
    steps: int | None = None
    batch: int | None = None
    seconds: float | None = None
    cpu_seconds: float | None = None
    recipe: str = ""


@dataclass
class Record:
    """All of a row, with where and how it was measured."""

    row: str
    model: str
    data: str
    metric: str
    command: str
    date: str
    machine: dict[str, Any]
    threads: int
    fp32_bytes: int = 0
    fp16_bytes: int = 0
    forms: list[Form] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """Of every seed of a form."""
        return [form.value for form in self.forms if form.name == name]

    @classmethod
    def read(cls, path: Path) -> Record:
        """What write wrote."""
        stored = json.loads(path.read_text("utf-8"))
        return cls(**{**stored, "forms": [Form(**form) for form in stored["forms"]]})

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")


@dataclass(frozen=True)
class Plan:
    """How much to measure. steps None: the recipe's. alternatives: names of some of the row's.
    float_activations: also export every model with activations left in floating point.
    calibrated: also post-training on data."""

    work: Path
    threads: int = 2
    seeds: int = 1
    steps: int | None = None
    alternatives: tuple[str, ...] = ()
    float_activations: bool = True
    calibrated: bool = True


def measure(
    row: Row,
    plan: Plan,
    command: str,
    keep: Callable[[Record], None],
    earlier: Record | None = None,
) -> Record:
    """Everything the plan asks of a row; keep is called after each form.

    earlier: a record of the same row, whose forms are taken over and not measured again.
    """
    record = Record(
        row.name, row.model, row.data_text, row.metric, command, _today(), machine(), plan.threads
    )
    if earlier is not None:
        record.forms = list(earlier.forms)
        record.fp32_bytes, record.fp16_bytes = earlier.fp32_bytes, earlier.fp16_bytes
        record.command = f"{earlier.command}; {command}"
    source = row.source(plan.work / row.name)
    directory = plan.work / f"{row.name}-data"
    job = _Job(row, plan, record, source, row.data(source, directory), directory, keep)
    job.post_training()
    if plan.calibrated:
        job.calibrated()
    for seed in range(plan.seeds):
        job.tuned(TUNED, seed, {})
    for name in plan.alternatives:
        job.tuned(name, 0, row.alternatives[name])
    return record


@dataclass
class _Job:
    """A row being measured. directory: where what is made of the row's texts goes."""

    row: Row
    plan: Plan
    record: Record
    source: Path
    data: Path
    directory: Path
    keep: Callable[[Record], None]

    def post_training(self) -> None:
        """The full-precision model, and its ternary forms without any training."""
        for bits, suffix in self._activations():
            if self._has(POST + suffix):
                continue
            made = product.export(self.source, self._path("post-training"), bits)
            if not self.record.forms:
                self.record.fp32_bytes, self.record.fp16_bytes = made.fp32_bytes, made.fp16_bytes
                value = self._score(made.full_precision(self.plan.threads), made)
                self._add(Form(FULL, value, made.fp32_bytes))
            value = self._score(made.session(self.plan.threads), made)
            self._add(Form(POST + suffix, value, made.bytes, recipe=made.recipe))

    def calibrated(self) -> None:
        """Trits and scales chosen on data, still without training."""
        if self._has(CALIBRATED):
            return
        data = self.row.calibration(self.source, self.directory)
        started, used = time.perf_counter(), time.process_time()
        made = product.export(self.source, self._path("calibrated"), 8, data=data)
        took = time.perf_counter() - started, time.process_time() - used
        value = self._score(made.session(self.plan.threads), made)
        form = Form(CALIBRATED, value, made.bytes, recipe=made.recipe)
        form.seconds, form.cpu_seconds = round(took[0], 1), round(took[1], 1)
        self._add(form)

    def tuned(self, name: str, seed: int, settings: Mapping[str, Any]) -> None:
        """Fine-tune with int8 activations; the same file is also exported with float ones."""
        wanted = [(bits, name + end) for bits, end in self._activations()]
        if all(self._has(form, seed) for _, form in wanted):
            return
        given = dict(self.row.settings(self.source, self.directory)) | dict(settings)
        if self.plan.steps is not None:
            given["steps"] = self.plan.steps
        file = self._path(f"{name.replace(' ', '-')}-{seed}.pt")
        made = product.fine_tune(
            self.source, self.data, file, seed=seed, threads=self.plan.threads, **given
        )
        for bits, form_name in wanted:
            if self._has(form_name, seed):
                continue
            exported = product.export(file, self._path(file.stem), bits)
            value = self._score(exported.session(self.plan.threads), exported)
            form = Form(form_name, value, exported.bytes, seed, made.steps, made.batch)
            form.seconds, form.cpu_seconds = round(made.seconds, 1), round(made.cpu_seconds, 1)
            form.recipe = exported.recipe
            self._add(form)

    def _has(self, name: str, seed: int | None = None) -> bool:
        """Whether an earlier run measured that."""
        return any((form.name, form.seed) == (name, seed) for form in self.record.forms)

    def _activations(self) -> list[tuple[int, str]]:
        """(activation bits, what the form's name says of it)."""
        return [(8, ""), (0, FLOAT_ACTIVATIONS)][: 1 + self.plan.float_activations]

    def _score(self, session: Any, made: product.Exported) -> float:
        return self.row.score(session, made.full_precision(self.plan.threads), self.source)

    def _add(self, form: Form) -> None:
        print(f"{self.row.name}: {form.name}: {form.value:.4g}", flush=True)
        self.record.forms.append(form)
        self.keep(self.record)

    def _path(self, name: str) -> Path:
        path = self.plan.work / f"{self.row.name}-out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def table(row: Row, record: Record) -> str:
    """The record as a markdown table, what it was measured with under it."""
    lines = [
        f"| form | {record.metric} | {row.loss_text} | file | fp32 | fp16 | steps | time |",
        "|---" * 8 + "|",
    ]
    (full,) = record.values(FULL)
    names = dict.fromkeys(form.name for form in record.forms)
    lines += [_line(row, record, name, full) for name in names]
    return "\n".join([*lines, "", _origin(row, record, full)])


def _line(row: Row, record: Record, name: str, full: float) -> str:
    forms = [form for form in record.forms if form.name == name]
    values, first = [form.value for form in forms], forms[0]
    spread = f" ({_number(min(values))} to {_number(max(values))})" if len(values) > 1 else ""
    mean = statistics.mean(values)
    lost = "" if name == FULL else f"{row.loss(full, mean):.3g}"
    ratios = [f"{whole / first.bytes:.2f}x" for whole in (record.fp32_bytes, record.fp16_bytes)]
    seconds = [form.seconds for form in forms if form.seconds is not None]
    cpu = [form.cpu_seconds for form in forms if form.cpu_seconds is not None]
    took = ""
    if seconds:
        took = f"{statistics.mean(seconds) / 60:.1f} min"
    if cpu:
        took += f" ({statistics.mean(cpu) / 60:.1f} of CPU)"
    steps = f"{first.steps} of {first.batch}" if first.steps else ""
    size = f"{first.bytes / 1e6:.1f} MB"
    cells = [name, _number(mean) + spread, lost, size, *ratios, steps, took]
    return f"| {' | '.join(cells)} |"


SUMMARY = (FULL, POST, CALIBRATED, TUNED, TUNED + FLOAT_ACTIVATIONS)


def summary(records: list[tuple[Row, Record]]) -> str:
    """A line a row: the means over seeds of its main forms, the loss, and the file."""
    head = ["model", "metric", *SUMMARY, "lost", "allowed", "file over fp32, fp16"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, record in records:
        (full,) = record.values(FULL)
        means = [statistics.mean(record.values(name) or [math.nan]) for name in SUMMARY]
        # The product's own int8 form: the fine-tuned one, where that was measured.
        last = next(form for form in reversed(record.forms) if form.name in (POST, TUNED))
        lost = ""
        if record.values(TUNED):
            lost = f"{row.loss(full, means[SUMMARY.index(TUNED)]):.3g} {row.loss_text}"
        allowed = "" if row.limit is None else f"{row.limit:g}"
        ratios = [f"{whole / last.bytes:.2f}x" for whole in (record.fp32_bytes, record.fp16_bytes)]
        numbers = ["" if math.isnan(mean) else _number(mean) for mean in means]
        cells = [row.model, row.metric, *numbers, lost, allowed, ", ".join(ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(row: Row, record: Record) -> bool:
    """Whether the fine-tuned mean over seeds is measured and within the row's limit; True for a
    row without one."""
    (full,) = record.values(FULL)
    tuned = [row.loss(full, value) for value in record.values(TUNED)]
    return row.limit is None or (bool(tuned) and statistics.mean(tuned) <= row.limit)


def _origin(row: Row, record: Record, full: float) -> str:
    """What was measured, how often, and whether it reaches the limit."""
    tuned = [row.loss(full, value) for value in record.values(TUNED)]
    seeds = "1 seed" if len(tuned) <= 1 else f"{len(tuned)} seeds, mean (least to most)"
    verdict = ""
    if row.limit is not None and tuned:
        lost = statistics.mean(tuned)
        word = "Reached" if reached(row, record) else "Missed"
        verdict = f" {word}: {lost:.3g} {row.loss_text}, {row.limit:g} allowed."
    versions = record.machine
    return (
        f"{record.model}; {record.data}; {seeds}.{verdict} Measured on {record.date} by"
        f" `{record.command}`: {versions['processor']}, {record.threads} thread(s) on"
        f" {versions['cores']} cores, load {versions['load']:.1f} when it began,"
        f" torch {versions['torch']}, ONNX Runtime {versions['onnxruntime']}."
    )


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"


def machine() -> dict[str, Any]:
    """Processor, cores, load at the start, versions."""
    import onnxruntime
    import torch
    import transformers

    processor, info = platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        processor = found.group(1).strip() if found else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "transformers": transformers.__version__,
    }


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
