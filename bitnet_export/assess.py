"""Checks, measures and judges one output directory, whether just written or opened again.

The measurements are verify/'s, the verdict and the files report/'s; here is which of them a run
makes, on which shapes and data, and how the rows come together in one Report.
"""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import manifest, op
from bitnet_export.compress import PlainModel
from bitnet_export.errors import InputError
from bitnet_export.shapes import parse_case_label
from bitnet_export.targets.session import native_library, open_session

if TYPE_CHECKING:
    import onnx

    from bitnet_export.load import LoadedModel
    from bitnet_export.options import BenchOptions, GateOptions, VerifyOptions
    from bitnet_export.passes import PassResult
    from bitnet_export.report.schema import LayerRow, QualityBlock, Report
    from bitnet_export.ternary import TernaryConfig
    from bitnet_export.verify.feeds import Case, Feed, Sizes

INPUTS = f"{manifest.INTERMEDIATE}/inputs.npz"
# The full-precision model, where the one exported is a fine-tuned ternary copy of it.
REFERENCE = f"{manifest.INTERMEDIATE}/reference.onnx"
TORCH_RESULTS = f"{manifest.INTERMEDIATE}/torch-ternary.json"
# Rows of the user's data that agreement is measured on, and of random data where there is none.
MAX_ROWS, RANDOM_CASES, BATCH = 512, 8, 32
TORCH, FUNCTION, LOWERED = "torch ternary", "onnx function", "lowered"


@dataclass
class Subject:
    """A directory with its manifest, and the torch module where there still is one."""

    directory: Path
    record: manifest.Manifest
    module: Any = None
    example_inputs: dict[str, Any] | None = None
    threads: int | None = None
    seed: int = 0
    plain: PlainModel | None = None

    @property
    def baseline(self) -> Path:
        """The full-precision ONNX."""
        return self.directory / manifest.BASELINE

    @property
    def ternary(self) -> Path:
        """The ONNX with one TernaryMatMul a layer."""
        return self.directory / manifest.TERNARY

    @property
    def model(self) -> Path:
        """What is deployed, decompressed where it is at rest."""
        if self.plain is None:
            self.plain = PlainModel(self.directory / manifest.MODEL)
        return self.plain.path

    @property
    def native(self) -> Path | None:
        """The native library the model runs with here, as load_session would choose it."""
        return native_library() if self.record.target == "onnx" else None

    @property
    def fuse(self) -> bool:
        """Whether ONNX Runtime may fuse int4 weights into its own kernel, which is less exact than
        the TensorRT-RTX that the model is for."""
        return self.record.target != "trt-rtx"

    def examples(self) -> dict[str, Any]:
        """Example inputs by name, from memory or from the directory."""
        if self.example_inputs is not None:
            return self.example_inputs
        with np.load(self.directory / INPUTS) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def cases(self, shapes: Sequence[Sizes]) -> list[Case]:
        """The inputs to run, the same ones whenever the directory is checked."""
        from bitnet_export.verify.feeds import make_cases

        return make_cases(shapes, self.examples(), self.record.dynamic_axes, seed=self.seed)


# --- what is recorded -----------------------------------------------------------------------


def input_arrays(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """The example inputs as arrays, to be kept in the directory."""
    from bitnet_export.verify.feeds import as_arrays

    return as_arrays(loaded.example_inputs)


def named_axes(loaded: LoadedModel) -> dict[str, dict[int, str]] | None:
    """dynamic_axes as load.save takes them."""
    return loaded.dynamic_axes or None


def describe_graph(
    model: onnx.ModelProto, loaded: LoadedModel
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The manifest's inputs (dtype, shape with axis names) and output names."""
    from onnx import helper

    inputs: dict[str, dict[str, Any]] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        named = loaded.dynamic_axes.get(value.name, {})
        shape = [
            d.dim_value or named.get(axis) or d.dim_param for axis, d in enumerate(tensor.shape.dim)
        ]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        inputs[value.name] = {"dtype": dtype, "shape": shape}
    return inputs, [value.name for value in model.graph.output]


def ternary_layer_names(model: onnx.ModelProto) -> list[str]:
    """The layer path of every TernaryMatMul."""
    from bitnet_export.verify.layers import layer_name

    return [layer_name(n) for n in model.graph.node if n.op_type == op.OP_TYPE]


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
) -> None:
    """Parity rows: torch -> function -> lowered, and every layer against the NumPy reference."""
    from bitnet_export.verify import exact, layers, parity, runners

    cases = subject.cases(shapes)
    kinds = tuple(subject.record.parity_kinds)
    implementations: dict[str, Any] = {
        FUNCTION: runners.onnx_runner(subject.ternary, FUNCTION, threads=subject.threads),
        LOWERED: runners.onnx_runner(
            subject.model,
            LOWERED,
            threads=subject.threads,
            native=subject.native,
            fuse=subject.fuse,
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
    report.parity += parity.run_parity(
        implementations, pairs, cases, atol=atol, save={TORCH: saved} if subject.module else None
    )
    report.parity += exact.check_layers(subject.ternary, subject.model, cases, kinds)
    _verify_engine(report, subject, implementations[LOWERED], cases, atol, depth)
    if per_layer:
        errors = layers.compare_layers(
            subject.ternary, subject.model, cases[0].feeds, threads=subject.threads
        )
        report.layers = layers.with_errors(report.layers, errors)


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
    report: Report, subject: Subject, metric: str | None, data: Path | None
) -> None:
    """The user's metric, else the agreement with full precision."""
    from bitnet_export.verify import quality, runners

    reference = subject.directory / REFERENCE
    if not reference.is_file():
        reference = subject.baseline
    if not reference.is_file():
        raise _no_intermediate(subject)
    before, after = (
        runners.feed_function(open_session(path, threads=subject.threads, native=native, fuse=fuse))
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
        raise _no_intermediate(subject)
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


def _no_intermediate(subject: Subject) -> InputError:
    return InputError(
        "holds no full-precision model to compare with: it was written with --no-keep-intermediate "
        f"or {manifest.INTERMEDIATE}/ was deleted",
        where=str(subject.directory),
        fix="export again, or pass the full-precision ONNX file with --baseline",
    )


def shapes_of(subject: Subject) -> list[Sizes]:
    """The axis sizes an opened directory is compared at."""
    from bitnet_export.verify.feeds import derive_shapes

    record = subject.record
    return derive_shapes(subject.examples(), record.dynamic_axes, None, record.opt_sizes or None)


# --- opening again, judging, writing --------------------------------------------------------


def open_directory(options: VerifyOptions | BenchOptions) -> Subject:
    """Check the manifest of a directory and open it. Raises InputError saying what is wrong."""
    record = manifest.check_manifest(options.directory)
    threads = getattr(options, "threads", None)
    subject = Subject(
        options.directory,
        record,
        threads=threads if isinstance(threads, int) else None,
        seed=options.seed,
    )
    if not (options.directory / INPUTS).is_file():
        raise _no_intermediate(subject)
    return subject


def previous_report(subject: Subject) -> Report:
    """The report of the export, to be brought up to date."""
    from dataclasses import replace

    from bitnet_export import env
    from bitnet_export.report.json_io import load_report
    from bitnet_export.report.schema import Environment

    report = load_report(subject.directory / "report.json")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return replace(
        report, created=now, command=command_line(), environment=Environment(**env.describe())
    )


def judge(report: Report, gates: GateOptions, *, parity: bool) -> Report:
    """The report with its gates evaluated; limits of an earlier run stay where none is given."""
    from dataclasses import replace

    from bitnet_export.report import gates as judging

    earlier = {row.name: row.limit for row in report.gates if hasattr(gates, row.name)}
    kept = {name: limit for name, limit in earlier.items() if getattr(gates, name) is None}
    return judging.judge(report, replace(gates, **kept), parity=parity)


def write(report: Report, directory: Path) -> None:
    """report.json, .html, .md and junit.xml."""
    from bitnet_export.report.write import write_report

    write_report(report, directory)
