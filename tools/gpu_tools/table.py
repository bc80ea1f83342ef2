"""What gpu_check prints of its measurements: one line a shape."""

from __future__ import annotations

from typing import Any


def timed(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The families of a row that have a time."""
    return {name: entry for name, entry in row["families"].items() if "us" in entry}


def fastest(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family with the smallest median, of those with a time."""
    families = timed(row)
    name = min(families, key=lambda family: families[family]["us"])
    return name, families[name]


def bench_table(rows: list[dict[str, Any]], copy_gb: float) -> list[str]:
    """The fastest family, its bandwidth, and the baselines' times as ratios."""
    lines = [
        f"{'(K, N)':>14} {'M':>4} {'bits':>4} {'fastest':>10} {'us':>9} {'GB/s':>6} {'% copy':>6}"
        "  cuBLAS time / ours: fp16, pedantic, fp32, int8"
    ]
    for row in rows:
        layer = f"({row['k']}, {row['n']})"
        head = f"{layer:>14} {row['m']:>4} {row['activation_bits']:>4} "
        if not timed(row):
            lines.append(f"{head}{'none ran':>10}")
            continue
        name, best = fastest(row)
        ratios = [f"{b['us'] / best['us']:.2f}" if b else "-" for b in row["baselines"].values()]
        lines.append(
            f"{head}{name:>10} {best['us']:>9.1f} {best['gb_per_s']:>6.0f} "
            f"{100 * best['gb_per_s'] / copy_gb:>6.0f}  {', '.join(ratios)}"
        )
    return lines


def peer_table(rows: list[dict[str, Any]]) -> list[str]:
    """microsoft/BitNet's kernel beside ours, M = 1."""
    lines = [
        f"{'(K, N)':>14} {'BitNet us':>10} {'ours us':>10} {'ratio':>6}  M = 1; BitNet's results "
        "are not checked, and it is given int8 activations where ours quantizes fp16 ones"
    ]
    for row in rows:
        layer = f"({row['k']}, {row['n']})"
        us = [f"{row[side]['us']:.1f}" if "us" in row[side] else "-" for side in ("peer", "ours")]
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        lines.append(
            f"{layer:>14} {us[0]:>10} {us[1]:>10} {ratio:>6}  {row['peer']['problem'] or ''}"
        )
    return lines


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """Problems bench found in outputs, one line each."""
    return [
        f"{name} M={row['m']} K={row['k']} N={row['n']}: {entry['problem']}"
        for row in rows
        for name, entry in (*row["families"].items(), *row["baselines"].items())
        if entry and entry["problem"]
    ]
