"""Numbers as a reader wants them, and the headline of a report: shared by every renderer."""

from __future__ import annotations

from bitnet_export.report.schema import Report

DASH = "\N{EN DASH}"


def megabytes(count: float) -> str:
    """Bytes -> ``14.2 MB`` (decimal units), ``830 B``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            scaled = count / size
            return f"{scaled:.3g} {unit}" if scaled < 999.5 else f"{scaled:.0f} {unit}"
    return f"{count:.0f} B"


def milliseconds(value: float) -> str:
    """``0.123``, ``4.51``, ``123``: three digits."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def times(value: float) -> str:
    """``2.35x``, ``12.1x``."""
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def smaller(ratio: float) -> str:
    """``5.90x smaller``; a ratio below 1 is turned round: ``1.30x larger``."""
    return f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"


def percent(value: float | None, digits: int = 1) -> str:
    """0.0123 -> ``1.2 %``; None -> a dash."""
    return DASH if value is None else f"{value * 100:.{digits}f} %"


def scientific(value: float | None) -> str:
    """Small errors: ``3.1e-05``; None -> ``not finite``."""
    return "not finite" if value is None else f"{value:.2g}"


def number(value: float | None) -> str:
    """Four digits; None -> a dash."""
    return DASH if value is None else f"{value:.4g}"


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def headline(report: Report) -> str:
    """One sentence for the subject of a mail: smaller, faster, quality kept."""
    facts = []
    if report.size:
        facts.append(f"{smaller(report.size.ratio)} than {report.size.baseline_dtype}")
    if report.speed:
        ratios = sorted(row.ratio for row in report.speed)
        low, high = times(ratios[0]), times(ratios[-1])
        facts.append(f"{low} as fast" if low == high else f"{low} to {high} as fast")
    if report.quality and report.quality.value is not None:
        facts.append(f"{report.quality.metric} {number(report.quality.value)}")
    failed = [row for row in report.parity if not row.passed]
    if failed:
        facts.append(f"{len(failed)} of {len(report.parity)} parity checks failed")
    return ", ".join(facts) or "nothing was measured"
