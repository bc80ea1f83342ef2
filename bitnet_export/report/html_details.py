"""The sections of report.html for whoever looks into a result: layers, parity, passes, machine."""

from __future__ import annotations

from collections import Counter
from html import escape

from bitnet_export.report.html_parts import breakable, folded, mark, section, table
from bitnet_export.report.schema import ParityRow, PassRow, Report
from bitnet_export.report.svg import layer_columns, sensitivity_columns
from bitnet_export.report.text import DASH, megabytes, number, percent, plural, scientific


def layers_section(report: Report) -> str:
    """What became of every layer; pictures of error and sparsity where they were measured."""
    if not report.layers:
        return ""
    counts = Counter(row.status for row in report.layers)
    note = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    figures = []
    measured = [row for row in report.layers if row.sensitivity is not None]
    if measured:
        figures.append(
            "<div><h3>Change of the output if this layer alone is ternary, and what it saves</h3>"
            f"{sensitivity_columns(measured)}</div>"
        )
    calibrated = [row for row in report.layers if row.output_error is not None]
    if calibrated:
        picture = layer_columns(calibrated, "output_error", "Error of its output", "fill-error")
        figures.append(f"<div><h3>Error of the layer's output, calibrated</h3>{picture}</div>")
    sparse = [row for row in report.layers if row.sparsity is not None]
    if sparse:
        picture = layer_columns(sparse, "sparsity", "Weights that are zero", "fill-sparsity")
        figures.append(f"<div><h3>Weights that are zero, by layer</h3>{picture}</div>")
    compared = [row for row in report.layers if row.cosine is not None or row.max_abs is not None]
    if compared:
        picture = layer_columns(compared, "relative_error", "Relative error", "fill-error")
        figures.append(f"<div><h3>Error against the function model, by layer</h3>{picture}</div>")
    pictures = f'<div class="columns">{"".join(figures)}</div>'
    title = f"All {plural(len(report.layers), 'layer')}"
    return section("Layers", f"{note}.", pictures + folded(title, _layer_table(report)))


def _layer_table(report: Report) -> str:
    head = ("layer", "+became", "#K, N", "kernel", "#zeros", "#alone", "#error", "#cosine")
    rows = []
    for r in report.layers:
        shape = f"{r.inputs}, {r.outputs}" if r.inputs and r.outputs else DASH
        error = percent(r.relative_error, 2)
        became = ": ".join(filter(None, (r.status, r.reason)))
        texts = (breakable(r.name), escape(became), shape, escape(r.kernel) or DASH)
        alone = percent(r.sensitivity, 2)
        rows.append((*texts, percent(r.sparsity), alone, error, number(r.cosine)))
    return table(head, rows)


def parity_section(report: Report) -> str:
    """Every comparison, failures first and in sight."""
    if not report.parity:
        return ""
    note = (
        "Implementations of the same ternary model must agree; the tolerance is relative to the "
        "largest value of the reference output."
    )
    failed = [row for row in report.parity if not row.passed]
    body = _pair_table(report)
    if failed:
        body += f"<h3>Failed</h3>{_parity_table(failed)}"
    body += folded(f"All {plural(len(report.parity), 'comparison')}", _parity_table(report.parity))
    return section("Parity", note, body)


def _pair_table(report: Report) -> str:
    """One row a pair: its worst comparison and the reason for its tolerance."""
    rows = []
    for pair in dict.fromkeys(row.pair for row in report.parity):
        mine = [row for row in report.parity if row.pair == pair]
        worst = max(mine, key=_use_of_tolerance)
        share = _use_of_tolerance(worst)
        used = DASH if share == float("inf") else percent(share, 0)
        passed = all(row.passed for row in mine)
        checks = f"{sum(row.passed for row in mine)}/{len(mine)}"
        rows.append((_arrow(pair), mark(passed), checks, used, escape(worst.basis)))
    head = ("pair", "", "#checks", "#tolerance used", "+why this tolerance")
    return table(head, rows)


def _arrow(pair: str) -> str:
    return escape(pair.replace("->", "\N{RIGHTWARDS ARROW}"))


def _use_of_tolerance(row: ParityRow) -> float:
    if row.max_abs is None or row.tolerance is None:
        return float("inf")
    if row.tolerance == 0:
        return 0.0 if row.max_abs == 0 else float("inf")
    return row.max_abs / row.tolerance


def _parity_table(rows: list[ParityRow]) -> str:
    head = ("pair", "", "shape", "output", "#max abs", "#tolerance", "#cosine", "+")
    cells = []
    for r in rows:
        names = (_arrow(r.pair), mark(r.passed), escape(r.shape), escape(r.output) or DASH)
        numbers = (scientific(r.max_abs), scientific(r.tolerance), number(r.cosine))
        cells.append((*names, *numbers, escape(r.reason)))
    return table(head, cells)


def passes_section(report: Report) -> str:
    """What each pass rewrote, and what it left alone and why; choices the tool made."""
    body = ""
    if report.decisions:
        rows = [(escape(d.name), escape(d.choice), escape(d.reason)) for d in report.decisions]
        body += f"<h3>Choices made</h3>{table(('option', 'choice', '+why'), rows)}"
    if report.passes:
        cells = [
            (escape(p.name), str(p.rewritten), str(len(p.skipped)), escape("; ".join(p.notes)))
            for p in report.passes
        ]
        body += f"<h3>Passes</h3>{table(('pass', '#rewritten', '#left alone', '+'), cells)}"
        body += "".join(_skips(p) for p in report.passes if p.skipped)
    return section("Graph passes", "", body) if body else ""


def _skips(row: PassRow) -> str:
    cells = [(escape(s.name), escape(s.reason)) for s in row.skipped]
    title = f"{row.name}: {plural(len(cells), 'place')} left alone"
    return folded(title, table(("place", "+why"), cells))


def environment_section(report: Report) -> str:
    """The machine, the versions, the options, and the command that does it all again."""
    e = report.environment
    cores = plural(e.cores, "core") if e.cores else ""
    memory = megabytes(e.memory_bytes) if e.memory_bytes else ""
    facts = {
        "machine": ", ".join(filter(None, (e.cpu, cores, memory))),
        "GPU": e.gpu or "none",
        "system": f"{e.platform}, Python {e.python}",
        "bitnet-export": e.bitnet_export,
        "packages": ", ".join(f"{name} {version}" for name, version in e.packages.items()),
        "providers": ", ".join(e.providers),
        "ternary": ", ".join(f"{k} {v}" for k, v in report.model.config.items()),
        "source": report.model.source,
        "time by stage": ", ".join(f"{s.name} {s.seconds:.1f} s" for s in report.stages),
    }
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items() if value
    )
    command = ""
    if report.command:
        command = f"<p class='note'>To repeat:</p><pre>{escape(report.command)}</pre>"
    return section("How this was made", "", f"{command}<dl>{items}</dl>")
