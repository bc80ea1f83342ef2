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
        ratios = [
            f"{b['us'] / best['us']:.2f}" if b and "us" in b else "-"
            for b in row["baselines"].values()
        ]
        lines.append(
            f"{head}{name:>10} {best['us']:>9.1f} {best['gb_per_s']:>6.0f} "
            f"{100 * best['gb_per_s'] / copy_gb:>6.0f}  {', '.join(ratios)}"
        )
    return lines


def goals(rows: list[dict[str, Any]], copy_gb: float, l2_bytes: int) -> list[str]:
    """What the kernels aim at, each met or missed, with the numbers; left out where not measured.
    int8 activations."""
    measured = [r for r in rows if r["activation_bits"] == 8 and timed(r)]
    lines = []
    for row in measured:
        if (row["m"], row["k"], row["n"]) == (1, 4096, 14336):
            share = fastest(row)[1]["gb_per_s"] / copy_gb
            goal = "80 % of the copy bandwidth at M = 1 on (4096, 14336)"
            lines.append(_goal(goal, share >= 0.8, f"{100 * share:.0f} %"))
    fp16 = {}
    for row in measured:
        blas = row["baselines"].get("cublas_fp16")
        if blas and "us" in blas:
            fp16[row["m"], row["k"], row["n"]] = blas["us"] / fastest(row)[1]["us"]
    for goal, limit, chosen in (
        ("5x cuBLAS fp16 at M = 1 where fp16 weights exceed the L2 cache", 5.0,
         {c: r for c, r in fp16.items() if c[0] == 1 and 2 * c[1] * c[2] > l2_bytes}),
        ("no slower than cuBLAS fp16 up to M = 64", 1.0,
         {c: r for c, r in fp16.items() if c[0] <= 64}),
    ):  # fmt: skip
        if chosen:
            worst = min(chosen, key=lambda cell: chosen[cell])
            found = f"least {chosen[worst]:.2f}x, at M, K, N = {', '.join(map(str, worst))}"
            lines.append(_goal(goal, chosen[worst] >= limit, found))
    return lines


def _goal(goal: str, met: bool, found: str) -> str:
    return f"goal {'met' if met else 'MISSED'}: {goal}: {found}"


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
