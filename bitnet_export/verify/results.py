"""What each measurement found, as plain rows: the vocabulary of verify/ and of report.json.

Only data lives here, with the meaning and unit of every key beside it (docs/report.md is made
from that). How the rows are measured is the business of the sibling modules, how they are
stored and judged that of report/. Numbers that came out NaN or infinite are stored as None,
never as a number: JSON has no NaN, and a None never passes.
"""

# ruff: noqa: RUF009 -- described() is dataclasses.field with documentation

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from typing import Any


def described(doc: str, unit: str = "", *, default: Any = MISSING, key: str = "") -> Any:
    """A dataclass field with its documentation. key: the JSON name where it is no identifier.

    A default of type ``list`` or ``dict`` is taken as a factory.
    """
    metadata = {"doc": doc, "unit": unit, "key": key}
    if default in (list, dict):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def finite(value: float) -> float | None:
    """value, or None where it is NaN or infinite; numpy scalars become Python floats."""
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class SizePart:
    """Bytes and weights of one part of an ONNX file, in the baseline and in the output."""

    baseline_bytes: int = described("bytes of this part in the baseline file", "bytes")
    bytes: int = described("bytes of this part in the output file", "bytes")
    weights: int = described(
        "weights this part stands for (packed codes counted one by one); 0 for the graph",
        "count",
        default=0,
    )
    bits_per_weight: float | None = described(
        "8 x bytes / weights, scales and biases included; null where there are no weights",
        "bits",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class EngineSize:
    """A TensorRT or TensorRT-RTX engine that was built beside the ONNX file."""

    file: str = described("the engine's file name")
    bytes: int = described("the engine file: weights, compiled code and all", "bytes")
    ratio: float = described("baseline_bytes / bytes: full-precision ONNX over engine", "times")
    runtime: str = described("what runs it, `TensorRT-RTX 1.7.1` for instance")
    built_for: str = described("GPU model, or compute capabilities it was built for")
    weights: str = described("how it holds the ternary layers' weights: int4, float16, 2-bit")


@dataclass(frozen=True, kw_only=True)
class SizeBlock:
    """The whole deployment's ONNX bytes against the baseline's; external data counted."""

    baseline_dtype: str = described("element type of most of the baseline's weights (fp32, fp16)")
    baseline_bytes: int = described("the baseline ONNX file and its external data", "bytes")
    bytes: int = described("the output ONNX file and its external data", "bytes")
    ratio: float = described("baseline_bytes / bytes", "times")
    by_part: dict[str, SizePart] = described(
        "`linear`, `embeddings`, `rest` (other tensors) and `graph` (nodes and names); "
        "their bytes sum to the totals exactly"
    )
    fp32_bytes: int | None = described(
        "what the baseline weighs with all its floating-point tensors in fp32",
        "bytes",
        default=None,
    )
    fp16_bytes: int | None = described("the same in fp16", "bytes", default=None)
    ratio_fp32: float | None = described("fp32_bytes / bytes", "times", default=None)
    ratio_fp16: float | None = described("fp16_bytes / bytes", "times", default=None)
    compression: str = described(
        "`zstd` where the output is kept compressed (`--compress`): bytes, ratios and parts are "
        "then those of the compressed file",
        default="",
    )
    unpacked_bytes: int | None = described(
        "the output ONNX file before compression; null without", "bytes", default=None
    )
    code_bits_per_weight: float | None = described(
        "8 x bytes of the packed ternary codes alone, as stored, / ternary weights; null where "
        "there are no packed codes",
        "bits",
        default=None,
    )
    engines: list[EngineSize] = described(
        "engines that were built, each a file that is deployed in place of the ONNX file",
        default=list,
    )


@dataclass(frozen=True, kw_only=True)
class EmbeddingRow:
    """A table or head that is stored in 8 or 4 bits, against its floating-point values."""

    name: str = described("the table's name in the graph")
    bits: int = described("bits of a code", "bits")
    rows: int = described("rows of the table (vocabulary)", "count")
    columns: int = described("weights of a row", "count")
    block: int = described("weights that share a scale", "count")
    relative_error: float | None = described("RMS of the difference / RMS of the table", "fraction")
    max_abs: float | None = described("largest difference")


@dataclass(frozen=True, kw_only=True)
class SpeedRow:
    """Latency of one input shape: the same runtime, options and feeds for both models."""

    shape: str = described("input shape, `batch=1,sequence=16`, or `static`")
    threads: int = described("intra-op threads of both sessions", "count")
    baseline: str = described("what it is measured against, `fp32 ONNX` for instance")
    baseline_ms: float = described("median latency of the baseline", "ms")
    ms: float = described("median latency of the output", "ms")
    ratio: float = described("baseline_ms / ms; above 1 the ternary model is faster", "times")
    baseline_p90_ms: float = described("90th percentile of the baseline", "ms")
    baseline_p99_ms: float = described("99th percentile of the baseline", "ms")
    p90_ms: float = described("90th percentile of the output", "ms")
    p99_ms: float = described("99th percentile of the output", "ms")
    baseline_samples_ms: list[float] = described("every timed run of the baseline, in order", "ms")
    samples_ms: list[float] = described("every timed run of the output, in order", "ms")
    provider: str = described("the ONNX Runtime execution provider that ran both")
    baseline_memory_bytes: int | None = described(
        "resident memory a fresh process gains by loading and running the baseline; "
        "null where it was not measured",
        "bytes",
        default=None,
    )
    memory_bytes: int | None = described("the same for the output", "bytes", default=None)


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One output of one pair of implementations that should agree, for one input shape."""

    pair: str = described("the two implementations, `torch ternary -> onnx function`")
    shape: str = described("input shape, `batch=3,sequence=7`, or `static`")
    output: str = described("name of the output compared")
    max_abs: float | None = described(
        "largest absolute difference; null where it is not finite or cannot be computed"
    )
    cosine: float | None = described(
        "cosine similarity of the flattened outputs; null likewise", "-1 to 1"
    )
    tolerance: float | None = described(
        "the largest max_abs allowed: the pair's relative tolerance x output_scale"
    )
    passed: bool = described("whether the row is within its tolerances", key="pass")
    reason: str = described("why the row failed; empty where it passed", default="")
    output_scale: float | None = described(
        "largest absolute value of the reference output", default=None
    )
    relative_tolerance: float | None = described(
        "the pair's tolerance as a fraction of output_scale", "fraction", default=None
    )
    min_cosine: float | None = described("smallest cosine allowed", "-1 to 1", default=None)
    basis: str = described("why the tolerance is what it is", default="")


@dataclass(frozen=True, kw_only=True)
class QualityRow:
    """One metric on one output; the float model against the ternary one."""

    metric: str = described("name of the metric")
    output: str = described("the output it was taken on; empty for a metric of the whole run")
    baseline: float | None = described("what the full-precision model reaches (itself: 1, or 0)")
    value: float | None = described("what the ternary model reaches")
    higher_is_better: bool = described("direction of the metric", default=True)


@dataclass(frozen=True, kw_only=True)
class QualityBlock:
    """How good the ternary model is: the metric the gate looks at, and all others beside it."""

    metric: str = described("the headline metric: the user's, else agreement with full precision")
    baseline: float | None = described("the metric of the full-precision model")
    value: float | None = described("the metric of the ternary model")
    loss: float | None = described(
        "the part of the baseline that was lost, (baseline - value) / |baseline|, the sign "
        "turned where lower is better; negative where ternary is better; null: not measurable",
        "fraction",
    )
    samples: int = described("input rows the metric saw", "count", default=0)
    higher_is_better: bool = described("direction of the metric", default=True)
    rows: list[QualityRow] = described("every metric on every output", default=list)
    source: str = described("where the inputs came from", default="")


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One layer: what became of it and, where it was compared, how far it strays."""

    name: str = described("module path, or node name in a foreign ONNX file")
    status: str = described("`ternary`, `int8` (`--keep-budget`), or `kept` in floating point")
    reason: str = described("why it has that status", default="")
    inputs: int | None = described("K, the layer's input features", "count", default=None)
    outputs: int | None = described("N, the layer's output features", "count", default=None)
    sparsity: float | None = described("part of its weights that are 0", "fraction", default=None)
    sensitivity: float | None = described(
        "RMS change of the model's main output / RMS of that output if this layer alone is "
        "ternary, before calibration (`--sensitivity`, `--keep-budget`)",
        "fraction",
        default=None,
    )
    saved_bytes: int | None = described(
        "what the ternary form of its weights and scales saves over float32", "bytes", default=None
    )
    plain_error: float | None = described(
        "RMS error of the layer's output / RMS of that output on the calibration samples, as the "
        "quantizer alone makes it",
        "fraction",
        default=None,
    )
    output_error: float | None = described("the same after calibration", "fraction", default=None)
    kernel: str = described("the operator that runs it, `MatMulNBits` for instance", default="")
    max_abs: float | None = described(
        "largest difference of its output to the function model's (`--per-layer`)", default=None
    )
    relative_error: float | None = described(
        "RMS of that difference / RMS of the output", "fraction", default=None
    )
    cosine: float | None = described(
        "cosine similarity of the two outputs", "-1 to 1", default=None
    )
