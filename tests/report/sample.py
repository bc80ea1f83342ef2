"""Reports to render and judge in tests: realistic in shape and size, their numbers made up."""

from dataclasses import replace

import numpy as np

from bitnet_export.report.gates import GateLimits, judge
from bitnet_export.report.schema import (
    Decision,
    Environment,
    FinetuneBlock,
    FinetunePoint,
    LayerRow,
    ModelBlock,
    ParityRow,
    PassRow,
    QualityBlock,
    QualityRow,
    Report,
    SizeBlock,
    SizePart,
    SkipRow,
    SpeedRow,
    StageRow,
)

LIMITS = GateLimits(min_speedup=1.5, min_compression=5.0, max_quality_loss=0.25)
KINDS = ("attention.query", "attention.key", "attention.value", "attention.output.dense")
KINDS += ("intermediate.dense", "output.dense")


def speed_row(shape="batch=1,sequence=16", ms=1.9, baseline_ms=4.5, threads=1, seed=0):
    rng = np.random.default_rng(seed)
    before, after = (m * (1 + rng.gamma(1.2, 0.03, 200)) for m in (baseline_ms, ms))
    spread = [np.percentile(side, (50, 90, 99)).tolist() for side in (before, after)]
    return SpeedRow(
        shape=shape,
        threads=threads,
        baseline="fp32 ONNX",
        baseline_ms=spread[0][0],
        ms=spread[1][0],
        ratio=spread[0][0] / spread[1][0],
        baseline_p90_ms=spread[0][1],
        baseline_p99_ms=spread[0][2],
        p90_ms=spread[1][1],
        p99_ms=spread[1][2],
        baseline_samples_ms=before.tolist(),
        samples_ms=after.tolist(),
        provider="CPUExecutionProvider",
        baseline_memory_bytes=131_000_000,
        memory_bytes=61_000_000,
    )


def parity_rows():
    pairs = (("torch ternary -> onnx function", 2e-3, 3e-4), ("onnx function -> ort", 0.05, 0.012))
    shapes = ("batch=1,sequence=16", "batch=3,sequence=9", "batch=8,sequence=64")
    return [
        ParityRow(
            pair=pair,
            shape=shape,
            output=output,
            max_abs=error * (1 + i) * scale,
            cosine=0.99998,
            tolerance=tolerance * scale,
            passed=True,
            output_scale=scale,
            relative_tolerance=tolerance,
            min_cosine=0.999,
            basis="the same float32 formula summed in another order",
        )
        for pair, tolerance, error in pairs
        for i, shape in enumerate(shapes)
        for output, scale in (("last_hidden_state", 3.2), ("pooler_output", 0.98))
    ]


def layer_rows():
    rng = np.random.default_rng(3)
    rows = [LayerRow(name="embeddings.word_embeddings", status="kept", reason="an embedding")]
    rows += [
        LayerRow(
            name=f"encoder.layer.{i}.{kind}",
            status="ternary",
            reason="nn.Linear",
            inputs=1536 if kind == "output.dense" else 384,
            outputs=1536 if kind == "intermediate.dense" else 384,
            sparsity=float(rng.uniform(0.38, 0.46)),
            kernel="MatMulIntegerToFloat",
            max_abs=0.01 * (i + 1),
            relative_error=float(rng.uniform(0.001, 0.003) * (i + 1)),
            cosine=0.9999,
        )
        for i in range(6)
        for kind in KINDS
    ]
    return [*rows, LayerRow(name="pooler.dense", status="kept", reason="the head (--exclude)")]


def size_block():
    return SizeBlock(
        baseline_dtype="fp32",
        baseline_bytes=90_600_000,
        bytes=14_800_000,
        ratio=90_600_000 / 14_800_000,
        by_part={
            "linear": part(42_500_000, 2_780_000, 10_600_000),
            "embeddings": part(47_700_000, 11_700_000, 11_900_000),
            "rest": part(250_000, 180_000, 62_500),
            "graph": part(150_000, 140_000, 0),
        },
    )


def part(before, after, weights):
    bits = 8 * after / weights if weights else None
    return SizePart(baseline_bytes=before, bytes=after, weights=weights, bits_per_weight=bits)


def quality_block():
    metric = "similarity Spearman"
    rows = [
        QualityRow(metric="cosine", output="last_hidden_state", baseline=1.0, value=0.913),
        QualityRow(metric=metric, output="last_hidden_state", baseline=1.0, value=0.862),
    ]
    return QualityBlock(
        metric=f"{metric} with full precision",
        baseline=1.0,
        value=0.862,
        loss=0.138,
        samples=256,
        rows=rows,
        source="reviews.npz",
    )


def finetune_block():
    rng = np.random.default_rng(5)
    history = [
        FinetunePoint(step=s, loss=float(1.9 * np.exp(-s / 60) + 0.09 + 0.03 * rng.random()))
        for s in range(1, 221, 2)
    ]
    return FinetuneBlock(
        steps=220,
        seconds=191.0,
        batch_size=32,
        metric="held-out loss",
        best_step=200,
        best_value=0.104,
        history=history,
    )


def environment():
    return Environment(
        bitnet_export="0.1.0",
        python="3.11.2",
        platform="Linux x86_64",
        cpu="AMD EPYC 9R14",
        cores=2,
        memory_bytes=8_200_000_000,
        providers=["CPUExecutionProvider"],
        packages={"torch": "2.13.0", "onnx": "1.23.2", "onnxruntime": "1.32.0"},
    )


def unjudged():
    return Report(
        created="2026-11-22T21:40:03Z",
        command="bitnet-export ./all-MiniLM-L6-v2 --target ort --min-speedup 1.5 --per-layer",
        model=ModelBlock(
            name="all-MiniLM-L6-v2",
            kind="huggingface",
            target="ort",
            source="./all-MiniLM-L6-v2",
            weights=22_700_000,
            config={"quantizer": "twn", "granularity": "channel", "activation_bits": 8},
        ),
        environment=environment(),
        size=size_block(),
        speed=[
            speed_row(),
            speed_row("batch=1,sequence=64", 5.3, 11.0, seed=1),
            speed_row("batch=8,sequence=128", 70.3, 151.0, seed=2),
        ],
        parity=parity_rows(),
        quality=quality_block(),
        layers=layer_rows(),
        passes=[
            PassRow(name="fold-constants", rewritten=41, seconds=0.8),
            PassRow(name="merge-siblings", rewritten=6, notes=["18 layers into 6"], seconds=0.2),
            PassRow(
                name="lower-ort",
                rewritten=24,
                skipped=[SkipRow(name="pooler.dense", reason="weights are not ternary")],
                seconds=1.1,
            ),
        ],
        finetune=finetune_block(),
        decisions=[
            Decision(name="ort_kernel", choice="int8", reason="16 rows a run, and 8 are enough")
        ],
        stages=[StageRow(name="export", seconds=21.3), StageRow(name="verify", seconds=33.0)],
        warnings=["no --data given: speed and parity ran on resized example inputs"],
    )


def passing():
    return judge(unjudged(), LIMITS)


def failing():
    """One pair is off, the speed gate is missed, and a layer has no finite error."""
    report = unjudged()
    rows = report.parity
    rows[7] = replace(
        rows[7], max_abs=0.3, cosine=0.91, passed=False, reason="max_abs 0.3 exceeds 0.049"
    )
    rows[8] = replace(
        rows[8],
        max_abs=None,
        cosine=None,
        passed=False,
        reason="3 of 98304 values of the other side are NaN or infinite",
    )
    layers = [
        replace(row, relative_error=None, max_abs=None)
        if row.name.startswith("encoder.layer.5.output")
        else row
        for row in report.layers
    ]
    return judge(replace(report, layers=layers), replace(LIMITS, min_speedup=2.2))


def minimal():
    """A report of a run that measured nothing but one comparison."""
    model = ModelBlock(name="mlp <b>&</b>", kind="onnx", target="onnx")
    return judge(Report(model=model, environment=environment(), parity=parity_rows()[:1]))
