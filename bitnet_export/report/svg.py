"""The report's pictures as inline SVG, drawn by hand: crisp, without assets, light or dark.

Horizontal positions are percentages, so that a picture fills its column and its text keeps its
size on a telephone. Colours are classes of page_style.py. Which numbers are drawn, and the text
around the pictures, is html.py's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from bitnet_export.report.schema import FinetuneBlock, LayerRow, SizeBlock, SpeedRow
from bitnet_export.report.text import megabytes, milliseconds, percent, plural

PARTS = ("linear", "embeddings", "rest", "graph")
MAX_DOTS = 120


def picture(body: str, height: int, label: str) -> str:
    """An accessible <svg> of full width and ``height`` pixels."""
    return (
        f'<svg width="100%" height="{height}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body}</svg>"
    )


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    """x and width in percent, y and height in pixels."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.3f}%" y="{y:g}" width="{width:.3f}%" height="{height:g}" class="{css}">'
        f"{inner}</rect>"
    )


def text(x: float, y: float, content: str, css: str = "label", anchor: str = "start") -> str:
    """x in percent, y in pixels at the baseline of the text."""
    return (
        f'<text x="{x:.3f}%" y="{y:g}" class="{css}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """x in percent, y in pixels."""
    return f'<line x1="{x1:.3f}%" y1="{y1:g}" x2="{x2:.3f}%" y2="{y2:g}" class="{css}"/>'


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """About ``count`` round values from 0 up to ``top``."""
    if not top > 0:
        return [0.0]
    raw = top / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    return [i * step for i in range(int(top / step + 1e-9) + 1)]


def size_bars(size: SizeBlock) -> str:
    """Two stacked bars on one scale: the baseline file and the output file, by part."""
    top = max(size.baseline_bytes, size.bytes, 1)
    rows = (
        (f"full precision, {size.baseline_dtype}", "baseline_bytes", size.baseline_bytes),
        ("ternary", "bytes", size.bytes),
    )
    body = []
    for i, (label, attribute, total) in enumerate(rows):
        y, x = i * 58, 0.0
        body.append(text(0, y + 14, label))
        body.append(text(100, y + 14, megabytes(total), "label strong", "end"))
        body.append(rect(0, y + 22, 100, 24, "track"))
        for part in PARTS:
            count = getattr(size.by_part[part], attribute) if part in size.by_part else 0
            width = 100 * count / top
            body.append(rect(x, y + 22, width, 24, f"part-{part}", f"{part}: {megabytes(count)}"))
            x += width
    label = (
        f"File size by part: {megabytes(size.baseline_bytes)} before, {megabytes(size.bytes)} after"
    )
    return picture("".join(body), 108, label)


def latency_strips(row: SpeedRow) -> str:
    """Every sample as a dot, the middle half as a box, the median as a line; both models."""
    series = (
        ("full precision", row.baseline_samples_ms, "baseline"),
        ("ternary", row.samples_ms, "ternary"),
    )
    top = max(row.baseline_p99_ms, row.p99_ms) * 1.05
    body = []
    for tick in nice_ticks(top):
        x = 100 * tick / top
        body.append(line(x, 4, x, 88, "grid"))
        anchor = "start" if x < 4 else "end" if x > 96 else "middle"
        body.append(text(x, 104, f"{tick:g} ms" if tick == 0 else f"{tick:g}", "tick", anchor))
    for i, (_, samples, css) in enumerate(series):
        body.append(_strip(samples, top, 24 + 42 * i, css))
    label = (
        f"Latency at {row.shape}: median {milliseconds(row.baseline_ms)} ms full precision, "
        f"{milliseconds(row.ms)} ms ternary"
    )
    return picture("".join(body), 110, label)


def _strip(samples: Sequence[float], top: float, middle: float, css: str) -> str:
    low, median, high = np.percentile(samples, (25, 50, 75)).tolist()
    drawn = [s for s in samples if s <= top]
    drawn = drawn[:: max(1, math.ceil(len(drawn) / MAX_DOTS))]
    body = []
    for i, sample in enumerate(drawn):
        # Golden-ratio jitter: even, and the same on every run.
        y = middle + 26 * (((i + 1) * 0.618034) % 1 - 0.5)
        body.append(
            f'<circle cx="{100 * sample / top:.2f}%" cy="{y:.1f}" r="2" class="dot-{css}"/>'
        )
    spread = f"{plural(len(samples), 'sample')}, middle half {low:.3g} to {high:.3g} ms"
    x, width = 100 * low / top, 100 * (high - low) / top
    body.append(rect(x, middle - 15, max(width, 0.2), 30, f"box-{css}", spread))
    x = 100 * median / top
    body.append(line(x, middle - 18, x, middle + 18, f"median-{css}"))
    return "".join(body)


def layer_columns(layers: Sequence[LayerRow], key: str, label: str, css: str) -> str:
    """One column a layer, in network order. key: the LayerRow field, a fraction."""
    values = [getattr(row, key) for row in layers]
    known = [v for v in values if v is not None]
    top = max(known, default=0) * 1.1 or 1.0
    height, body = 120, []
    for tick in nice_ticks(top, 3):
        y = 10 + height * (1 - tick / top)
        body.append(line(0, y, 100, y, "grid"))
        body.append(text(0, y - 3, percent(tick, 0 if top > 0.2 else 2), "tick"))
    left, step = 9.0, 91.0 / max(len(values), 1)
    gap = 0.15 * step
    for i, (row, value) in enumerate(zip(layers, values, strict=True)):
        x = left + i * step + gap
        if value is None:
            body.append(rect(x, 10, step - 2 * gap, height, "unknown", f"{row.name}: no value"))
            continue
        tall = height * value / top
        title = f"{row.name}: {percent(value, 2)}"
        body.append(rect(x, 10 + height - tall, step - 2 * gap, tall, css, title))
    return picture("".join(body), height + 16, f"{label}, {plural(len(layers), 'layer')}")


def sensitivity_columns(layers: Sequence[LayerRow]) -> str:
    """One column a layer: upwards the error it causes alone, downwards the bytes it saves. Layers
    that were kept out of the ternary form stand out, and save nothing."""
    errors = [row.sensitivity or 0.0 for row in layers]
    saved = [row.saved_bytes or 0 for row in layers]
    top, deep = max(errors, default=0) * 1.1 or 1.0, max(saved, default=0) or 1
    up, down, body = 110, 70, []
    for tick in nice_ticks(top, 3):
        y = 10 + up * (1 - tick / top)
        body.append(line(0, y, 100, y, "grid"))
        body.append(text(0, y - 3, percent(tick, 0 if top > 0.2 else 2), "tick"))
    body.append(text(0, 10 + up + down, f"{megabytes(deep)} saved", "tick"))
    left, step = 9.0, 91.0 / max(len(layers), 1)
    gap = 0.15 * step
    for i, (row, error, size) in enumerate(zip(layers, errors, saved, strict=True)):
        x, width = left + i * step + gap, step - 2 * gap
        tall, title = up * error / top, f"{row.name}: {percent(error, 2)}, saves {megabytes(size)}"
        css = "fill-error" if row.status == "ternary" else "fill-kept"
        body.append(rect(x, 10 + up - tall, width, tall, css, f"{title} ({row.status})"))
        body.append(rect(x, 12 + up, width, down * size / deep, "fill-saved", title))
    label = f"Error and bytes saved by each layer alone, {plural(len(layers), 'layer')}"
    return picture("".join(body), up + down + 18, label)


def loss_curve(finetune: FinetuneBlock) -> str:
    """Training loss over steps; logarithmic where it spans more than a decade."""
    points = [(p.step, p.loss) for p in finetune.history if p.loss is not None]
    if len(points) < 2:
        return ""
    losses = [loss for _, loss in points]
    logarithmic = min(losses) > 0 and max(losses) / min(losses) > 10
    scale = math.log10 if logarithmic else float
    low, high = scale(min(losses)), scale(max(losses))
    first, last = points[0][0], points[-1][0]

    def place(step: int, loss: float) -> tuple[float, float]:
        x = 9 + 91 * (step - first) / max(last - first, 1)
        return x, 12 + 150 * (high - scale(loss)) / (high - low or 1)

    body = []
    for i in range(4):
        value = high - (high - low) * i / 3
        y = 12 + 150 * i / 3
        body.append(line(0, y, 100, y, "grid"))
        body.append(text(0, y - 3, f"{10**value if logarithmic else value:.3g}", "tick"))
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in (place(*p) for p in points))
    body.append(
        '<svg width="100%" height="180" viewBox="0 0 100 180" preserveAspectRatio="none">'
        f'<polyline points="{path}" class="curve"/></svg>'
    )
    body.append(text(9, 184, f"step {first}", "tick"))
    body.append(text(100, 184, str(last), "tick", "end"))
    label = f"Training loss from {losses[0]:.3g} to {losses[-1]:.3g} over {last} steps"
    return picture("".join(body), 190, f"{label}{', logarithmic' if logarithmic else ''}")
