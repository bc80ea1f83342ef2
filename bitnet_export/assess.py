"""Checks, measures and judges one output directory, whether just written or opened again.

The measurements are verify/'s, the verdict and the files report/'s; here is which of them a run
makes, on which shapes and data, and how the rows come together in one Report.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import manifest
from bitnet_export.shapes import parse_case_label
from bitnet_export.subject import Subject, no_intermediate
from bitnet_export.targets.session import open_session

if TYPE_CHECKING:
    from bitnet_export.options import GateOptions
    from bitnet_export.passes import PassResult
    from bitnet_export.report.schema import LayerRow, QualityBlock, Report
    from bitnet_export.ternary import TernaryConfig
    from bitnet_export.verify.feeds import Case, Feed, Sizes

# The full-precision model, where the one exported is a fine-tuned ternary copy of it.
REFERENCE = f"{manifest.INTERMEDIATE}/reference.onnx"
TORCH_RESULTS = f"{manifest.INTERMEDIATE}/torch-ternary.json"
# Rows of the user's data that agreement is measured on, and of random data where there is none.
MAX_ROWS, RANDOM_CASES, BATCH = 512, 8, 32
TORCH, FUNCTION, LOWERED = "torch ternary", "onnx function", "lowered"


def new_report(subject: Subject, config: TernaryConfig, layers: list[LayerRow]) -> Report:
    """A report with everything that needs no measuring."""
    from bitnet_export import env
    from bitnet_export.report.schema import Environment, ModelBlock, Report
    from bitnet_export.verify.layers import layer_weights, with_weights

    record = subject.record
    return Report(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command_line(),
        model=ModelBlock(
            name=record.name,
            kind=record.model["kind"],
            target=record.target,
            dtype=record.dtype,
            source=record.model["source"],
            config={k: v for k, v in asdict(config).items() if k not in ("exclude", "include")},
        ),
        environment=Environment(**env.describe()),
        layers=with_weights(layers, layer_weights(subject.ternary)),
    )


def command_line() -> str:
    """The command that repeats this run, or "" outside the command line tool."""
    tool = Path(sys.argv[0]).name
    if tool not in ("bitnet-export", "__main__.py"):
        return ""
    return shlex.join(["bitnet-export", *sys.argv[1:]])


def add_passes(report: Report, results: Sequence[PassResult], decisions: Sequence[Any]) -> None:
    """Put the passes' results and the target's decisions into the report."""
    from bitnet_export.report.schema import Decision, PassRow, SkipRow

    for r in results:
        skipped = [SkipRow(name=s.where, reason=s.reason) for s in r.skipped]
        report.passes.append(
            PassRow(
                name=r.name,
                rewritten=r.rewritten,
                skipped=skipped,
                notes=r.notes,
                seconds=r.seconds,
            )
        )
    report.decisions += [Decision(**vars(d)) for d in decisions]


# --- measuring ------------------------------------------------------------------------------


def verify(
    report: Report,
    subject: Subject,
    shapes: Sequence[Sizes],
    atol: float | None,
    per_layer: bool,
    on_step: Callable[[str], None] = lambda text: None,
) -> None:
    """Parity rows: torch -> function -> lowered, and every layer against the NumPy reference."""
    from bitnet_export.verify import exact, layers, parity, runners

    cases = _cases_it_takes(report, subject, shapes)
    kinds = tuple(subject.record.parity_kinds)
    implementations: dict[str, Any] = {
        FUNCTION: runners.onnx_runner(
            subject.ternary,
            FUNCTION,
            threads=subject.threads,
            frugal=runners.run_frugally(subject.ternary),
        ),
        LOWERED: runners.onnx_runner(
            subject.model,
            LOWERED,
            threads=subject.threads,
            native=subject.native,
            fuse=subject.fuse,
            frugal=subject.native is None and runners.run_frugally(subject.model),
        ),
    }
    saved = subject.directory / TORCH_RESULTS
    depth = sum(row.status == "ternary" for row in report.layers)
    pairs = [parity.Pair(FUNCTION, LOWERED, kinds, depth)]
    if subject.module is not None:
        implementations[TORCH] = runners.TorchRunner(
            subject.module, subject.examples(), subject.record.outputs, TORCH
        )
    elif saved.is_file():
        implementations[TORCH] = runners.load_results(saved)
    if TORCH in implementations:
        pairs.insert(0, parity.Pair(TORCH, FUNCTION, ("function",), depth))
    on_step(f"whole models at {len(cases)} shapes")
    report.parity += parity.run_parity(
        implementations, pairs, cases, atol=atol, save={TORCH: saved} if subject.module else None
    )
    on_step(f"{depth} layers, each on the input it had, at {len(cases)} shapes")
    report.parity += exact.check_layers(subject.ternary, subject.model, cases, kinds)
    _verify_engine(report, subject, implementations[LOWERED], cases, atol, depth)
    if per_layer:
        errors = layers.compare_layers(
            subject.ternary, subject.model, cases[0].feeds, threads=subject.threads
        )
        report.layers = layers.with_errors(report.layers, errors)


def _cases_it_takes(report: Report, subject: Subject, shapes: Sequence[Sizes]) -> list[Case]:
    """The cases to compare: of a file made elsewhere those that the original runs on, too."""
    cases = subject.cases(shapes)
    refused = subject.refused(cases)
    if len(refused) < len(cases):
        report.warnings += [
            f"not compared at {label}: the original model does not run on it ({reason})"
            for label, reason in refused.items()
        ]
        cases = [case for case in cases if case.label not in refused]
    return cases


def _verify_engine(
    report: Report,
    subject: Subject,
    lowered: Any,
    cases: Sequence[Case],
    atol: float | None,
    depth: int,
) -> None:
    """Parity of the engine with its ONNX model, where there is one and it runs on this machine;
    where it does not, the report says so."""
    from bitnet_export.errors import MissingRequirement
    from bitnet_export.report.schema import Decision
    from bitnet_export.verify.engine_parity import ENGINE, compare_engine

    if not subject.record.environment.get("engines"):
        return
    report.decisions = [d for d in report.decisions if d.name != ENGINE]
    try:
        report.parity += compare_engine(
            subject.directory, subject.record, lowered, cases, name=LOWERED, atol=atol, depth=depth
        )
    except MissingRequirement as error:
        report.decisions.append(Decision(name=ENGINE, choice="not run here", reason=error.what))


def quality_data(subject: Subject, data: Path | None, *, whole: bool) -> tuple[list[Feed], str]:
    """Batches to judge the model on and where they come from.

    whole: every row and array, for a user's metric; else the inputs of the first MAX_ROWS rows. A
    model of a fixed batch gets whole ones only.
    """
    from bitnet_export.load import load_data

    if data is not None and not data.is_dir():
        arrays = load_data(data)
        size = _fixed_batch(subject)
        batches = list(arrays.batches(size or BATCH))
        if size is not None and len(arrays) % size:
            batches = batches[:-1]
        if whole:
            return batches, str(data)
        names = list(subject.record.inputs)
        arrays.select(names)
        kept = batches[: -(-MAX_ROWS // (size or BATCH))]
        return [{n: b[n] for n in names} for b in kept], str(data)
    record = subject.record
    sizes = record.opt_sizes | {a[0]: 4 for a in record.dynamic_axes.values() if 0 in a}
    sizes = record.opt_sizes if subject.refused(subject.cases([sizes])) else sizes
    feeds = []
    for seed in range(RANDOM_CASES):
        seeded = Subject(subject.directory, record, None, subject.examples(), None, seed)
        feeds.append(_shuffled(seeded.cases([sizes])[0].feeds, seed))
    return feeds, "variations of the example inputs; --data gives a real answer"


def _fixed_batch(subject: Subject) -> int | None:
    """Rows of a batch where the model takes no other number, else None."""
    axes = subject.record.dynamic_axes
    fixed = [
        value.shape[0]
        for name, value in subject.examples().items()
        if value.ndim and 0 not in axes.get(name, {})
    ]
    return min(fixed, default=None)


def _shuffled(feeds: Feed, seed: int) -> Feed:
    """The feeds with the elements of each input permuted: other inputs of the same values."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.permuted(value, axis=-1) if value.ndim else value for name, value in feeds.items()
    }


def measure_quality(
    report: Report,
    subject: Subject,
    metric: str | None,
    data: Path | None,
    full_precision: Path | None = None,
) -> None:
    """The user's metric, else the agreement with full precision.

    full_precision: an ONNX file of that model, None: the one kept in the directory.
    """
    from bitnet_export.verify import quality, runners

    kept = (subject.directory / REFERENCE, subject.baseline)
    reference = full_precision or next((file for file in kept if file.is_file()), None)
    if reference is None:
        raise no_intermediate(subject)
    before, after = (
        runners.feed_function(
            open_session(
                path,
                threads=subject.threads,
                native=native,
                fuse=fuse,
                frugal=native is None and runners.run_frugally(path),
                takes_turns=True,
            )
        )
        for path, native, fuse in (
            (reference, None, True),
            (subject.model, subject.native, subject.fuse),
        )
    )
    feeds, source = quality_data(subject, data, whole=metric is not None)
    if metric is not None:
        report.quality = quality.measure_metric(metric, before, after, feeds, source)
    else:
        report.quality = quality.measure_agreement(before, after, feeds, source)


def agreement_text(block: QualityBlock) -> str:
    """ "cosine with full precision 0.83"."""
    value = "could not be measured" if block.value is None else f"{block.value:.3g}"
    return f"{block.metric} {value} (full precision {block.baseline:.3g}, on {block.source})"


def measure_sizes(report: Report, subject: Subject) -> None:
    """Bytes by part, against the full-precision file."""
    from dataclasses import replace

    from bitnet_export.verify.embeddings import embedding_errors
    from bitnet_export.verify.size import engine_sizes, size_block

    if subject.baseline.is_file():
        at_rest = subject.directory / manifest.MODEL
        size = size_block(subject.baseline, subject.model, at_rest)
        engines = engine_sizes(subject.record.environment, size.baseline_bytes)
        report.size = replace(size, engines=engines)
        weights = sum(part.weights for part in report.size.by_part.values())
        report.model = replace(report.model, weights=weights)
    if subject.ternary.is_file():
        report.embeddings = embedding_errors(subject.ternary, subject.model)


def bench(
    report: Report,
    subject: Subject,
    *,
    baseline: Path | None = None,
    shapes: Sequence[str] = (),
    samples: int = 50,
    on_case: Callable[[str], None] = lambda label: None,
) -> None:
    """Latency rows against full precision, at the given shapes or the opt shape."""
    from bitnet_export.verify.speed import measure_speed

    before = baseline or subject.baseline
    if not before.is_file():
        raise no_intermediate(subject)
    opt = subject.record.opt_sizes
    sizes = [parse_case_label(s, opt) for s in shapes] or [opt]
    if subject.record.target in ("trt", "trt-rtx"):
        from bitnet_export.verify.engine_speed import measure_engine_speed

        report.speed += measure_engine_speed(
            subject.directory, subject.record, before, subject.cases(sizes), samples=samples
        )
        return
    report.speed += measure_speed(
        before,
        subject.model,
        subject.cases(sizes),
        threads=subject.threads,
        samples=samples,
        native=subject.native,
        on_case=on_case,
    )


# --- judging, writing -----------------------------------------------------------------------


def judge(report: Report, gates: GateOptions, *, parity: bool) -> Report:
    """The report with its gates evaluated, by the limits of this run and no others."""
    from bitnet_export.report import gates as judging

    return judging.judge(report, gates, parity=parity)


def write(report: Report, directory: Path) -> None:
    """report.json, .html, .md and junit.xml."""
    from bitnet_export.report.write import write_report

    write_report(report, directory)
