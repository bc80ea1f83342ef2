"""report.html: one self-contained page of a report, for a reader who was not there.

Only renders: every number and every verdict comes from the Report. Pictures are svg.py's, the
style sheet is page_style.py's, the less read sections are html_details.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from bitnet_export.report.html_details import (
    environment_section,
    layers_section,
    parity_section,
    passes_section,
)
from bitnet_export.report.html_parts import breakable, mark, section, table, tile
from bitnet_export.report.html_sizes import embedding_table, size_facts
from bitnet_export.report.page_style import CSS
from bitnet_export.report.schema import Report, SizeBlock, SpeedRow
from bitnet_export.report.svg import PARTS, latency_strips, loss_curve, size_bars
from bitnet_export.report.text import (
    DASH,
    headline,
    megabytes,
    milliseconds,
    number,
    percent,
    plural,
    times,
)


def render_html(report: Report) -> str:
    """Report -> a page without any outside asset or script."""
    sections: Sequence[Callable[[Report], str]] = (
        _header,
        _tiles,
        _warnings,
        _gates,
        _size,
        _speed,
        _quality,
        _finetune,
        layers_section,
        parity_section,
        passes_section,
        environment_section,
    )
    title = f"{report.model.name} → {report.model.target}: {report.verdict}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, (make(report) for make in sections)))
        + "\n</main></body></html>\n"
    )


def _header(report: Report) -> str:
    failed = sum(not gate.passed for gate in report.gates)
    if report.passed:
        verdict = f"PASS · all {plural(len(report.gates), 'gate')} passed"
    else:
        verdict = f"FAIL · {failed} of {plural(len(report.gates), 'gate')} failed"
    facts = [report.model.kind.replace("_", " "), report.model.dtype, report.created]
    return (
        f'<header><span class="verdict {"pass" if report.passed else "fail"}">{verdict}</span>'
        f"<h1>{escape(report.model.name)} → {escape(report.model.target)}</h1>"
        f"<p>{escape(_sentence(headline(report)))}</p>"
        f'<p class="note">{escape(" · ".join(filter(None, facts)))}</p></header>'
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _tiles(report: Report) -> str:
    """The four numbers a reader came for."""
    failed_gates = {gate.name for gate in report.gates if not gate.passed}
    tiles = []
    if report.size:
        s = report.size
        detail = f"{megabytes(s.baseline_bytes)} {s.baseline_dtype} → {megabytes(s.bytes)}"
        bad = "min_compression" in failed_gates
        tiles.append(tile("smaller on disk", times(s.ratio), detail, bad))
    if report.speed:
        row = report.speed[0]
        detail = f"{milliseconds(row.baseline_ms)} → {milliseconds(row.ms)} ms at {row.shape}"
        bad = "min_speedup" in failed_gates
        tiles.append(tile("speedup", times(row.ratio), detail, bad))
    if report.quality:
        q = report.quality
        detail = f"full precision {number(q.baseline)}, {percent(q.loss)} lost"
        bad = "max_quality_loss" in failed_gates or q.value is None
        tiles.append(tile(q.metric, number(q.value), detail, bad))
    if report.parity:
        good = sum(row.passed for row in report.parity)
        pairs = len({row.pair for row in report.parity})
        detail = f"{plural(pairs, 'pair')} of implementations"
        value = f"{good}/{len(report.parity)}"
        tiles.append(tile("parity checks passed", value, detail, good < len(report.parity)))
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _warnings(report: Report) -> str:
    if not report.warnings:
        return ""
    items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
    return f'<section class="warnings"><h2>Worth knowing</h2><ul>{items}</ul></section>'


def _gates(report: Report) -> str:
    rows = [
        (breakable(g.name), mark(g.passed), escape(g.detail), number(g.value), number(g.limit))
        for g in report.gates
    ]
    return section("Gates", "", table(("gate", "", "+", "#measured", "#limit"), rows))


def _size(report: Report) -> str:
    if report.size is None:
        return ""
    note = (
        "The whole ONNX file, external data included. Bits per weight count scales and "
        "whatever else a part needs; weights are counted in the full-precision file."
    )
    body = size_bars(report.size) + _size_table(report.size) + size_facts(report.size)
    body += embedding_table(report.embeddings) + _engine_table(report.size)
    return section("Size", note, body)


def _size_table(size: SizeBlock) -> str:
    rows: list[tuple[str, ...]] = []
    for name in PARTS:
        part = size.by_part.get(name)
        if part is None:
            continue
        bits = DASH if part.bits_per_weight is None else f"{part.bits_per_weight:.2f}"
        label = f'<span class="mark"><span class="key part-{name}"></span>{name}</span>'
        rows.append((label, megabytes(part.baseline_bytes), megabytes(part.bytes), bits))
    totals = (megabytes(size.baseline_bytes), megabytes(size.bytes))
    rows.append(("<b>total</b>", *(f"<b>{total}</b>" for total in totals), ""))
    return table(("part", f"#{size.baseline_dtype}", "#ternary", "#bits/weight"), rows)


def _engine_table(size: SizeBlock) -> str:
    """The engines, which are deployed in place of the ONNX file measured above."""
    if not size.engines:
        return ""
    rows = [
        (
            breakable(e.file),
            megabytes(e.bytes),
            times(e.ratio),
            escape(e.weights),
            escape(e.built_for),
            escape(e.runtime),
        )
        for e in size.engines
    ]
    heads = ("engine", "#bytes", f"#smaller than {size.baseline_dtype} ONNX", "ternary weights")
    return "<h3>Engines built</h3>" + table((*heads, "for", "runs in"), rows)


def _speed(report: Report) -> str:
    if not report.speed:
        return ""
    first = report.speed[0]
    note = (
        f"{first.baseline} against ternary in one ONNX Runtime ({first.provider}), runs taking "
        "turns in shuffled order. A dot is one run, the box the middle half, the bar the median."
    )
    legend = (
        '<div class="legend"><span><span class="key baseline"></span>full precision</span>'
        '<span><span class="key ternary"></span>ternary</span></div>'
    )
    strips = "".join(_speed_figure(row) for row in report.speed)
    body = f'{legend}<div class="columns">{strips}</div>{_speed_table(report.speed)}'
    return section("Latency", note, body)


def _speed_figure(row: SpeedRow) -> str:
    title = f"{row.shape} · {plural(row.threads, 'thread')} · {times(row.ratio)}"
    return f"<div><h3>{escape(title)}</h3>{latency_strips(row)}</div>"


def _speed_table(rows: Sequence[SpeedRow]) -> str:
    head = ("shape", "#threads", "#median ms", "#p90", "#p99", "#speedup", "#memory")
    cells = []
    for r in rows:
        pairs = (
            (r.baseline_ms, r.ms),
            (r.baseline_p90_ms, r.p90_ms),
            (r.baseline_p99_ms, r.p99_ms),
        )
        shown = [f"{milliseconds(a)} → {milliseconds(b)}" for a, b in pairs]
        used = (r.baseline_memory_bytes, r.memory_bytes)
        memory = DASH if None in used else " → ".join(megabytes(u or 0) for u in used)
        cells.append((escape(r.shape), str(r.threads), *shown, times(r.ratio), memory))
    return table(head, cells)


def _quality(report: Report) -> str:
    q = report.quality
    if q is None:
        return ""
    note = f"{plural(q.samples, 'sample')}{f' from {q.source}' if q.source else ''}; float against "
    note += "ternary, on purpose different models."
    rows = [(escape(q.metric), "", number(q.baseline), number(q.value), percent(q.loss))]
    rows += [
        (escape(r.metric), escape(r.output), number(r.baseline), number(r.value), "")
        for r in q.rows
    ]
    head = ("metric", "output", "#full precision", "#ternary", "#lost")
    return section("Quality", note, table(head, rows))


def _finetune(report: Report) -> str:
    f = report.finetune
    if f is None:
        return ""
    facts = [plural(f.steps, "step")]
    if f.seconds is not None:
        facts.append(f"{f.seconds:.0f} s")
    if f.batch_size is not None:
        facts.append(f"batches of {f.batch_size}")
    if f.best_value is not None:
        facts.append(f"best {f.metric} {number(f.best_value)} at step {f.best_step}")
    return section("Fine-tuning", f"Training loss. {', '.join(facts)}.", loss_curve(f))
