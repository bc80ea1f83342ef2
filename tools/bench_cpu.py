"""Time TernaryMatMul's CPU library against what ONNX Runtime has, one matrix product at a time.

    python tools/bench_cpu.py --quick             # MiniLM's layers, a minute or two
    python tools/bench_cpu.py --out bench-cpu     # every shape, hot and cold; writes .json and .md

Each contender is one ONNX model with the same product several times over, quantization of the
activations included. A cell's figure is the median of its rounds, and ratios of medians say more
than the microseconds do. "cold" rotates through so many copies of the weights that none is in a
cache. Behind each time stands its share of what the processor can do at most, measured in the same
call. Raw samples are kept in the JSON. The parts are in cpu_tools/.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnxruntime as ort
from cpu_tools.contenders import CONTENDERS, OURS, Contender
from cpu_tools.limits import Limits, measure_limits, processor
from cpu_tools.timing import Cell, Group, measure_group

from bitnet_export.errors import BitnetExportError
from bitnet_export.native import find_library

# (K, N): MiniLM's layers (query-key-value in one, attention output, both of the MLP), and the
# sizes of small and large decoders.
MINILM = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
ALL_SHAPES = ((384, 1536), (768, 3072), (2560, 6912), (4096, 14336))
QUICK_ROWS, ALL_ROWS, COLD_ROWS = (1, 16, 64), (1, 2, 4, 8, 32, 128, 512), (1,)


def plan(options: argparse.Namespace) -> list[Group]:
    """The groups to measure. Products of many rows read their weights once for all of them: cold
    is timed for one row."""
    shapes = options.shapes or (MINILM if options.quick else ALL_SHAPES)
    rows = tuple(options.rows or (QUICK_ROWS if options.quick else ALL_ROWS))
    threads = options.threads or ((1,) if options.quick else (1, 2))
    groups = []
    for k, n in shapes:
        for count in threads:
            groups.append(Group(k, n, count, False, rows))
            if not options.quick and not options.hot:
                groups.append(Group(k, n, count, True, COLD_ROWS))
    return groups


def markdown(
    cells: Sequence[Cell],
    limits: dict[int, Limits],
    facts: dict[str, Any],
    contenders: Sequence[Contender] = CONTENDERS,
) -> str:
    """The cells as a table, one row each, under a paragraph on how they were measured."""
    peers = [c for c in contenders if c.name != OURS]
    peaks = "; ".join(
        f"{one.threads} thread(s): {one.int8_gmac:.0f} int8 and {one.fp32_gmac:.0f} float32 "
        f"GMAC/s, {one.read_gb:.0f} GB/s"
        for one in limits.values()
    )
    path = next(iter(limits.values())).path
    head = [
        *("K, N", "M", "threads", "weights"),
        *(f"{c.name} us (of limit)" for c in contenders),
        *(f"vs {c.name}" for c in peers),
    ]
    lines = [
        f"{facts['processor']}, {facts['date']}, ONNX Runtime {facts['onnxruntime']}, path {path}. "
        f"Limits, {peaks}. `{facts['command']}`",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    for cell in cells:
        row = [f"{cell.K}, {cell.N}", str(cell.M), str(cell.threads)]
        row.append("cold" if cell.cold else "hot")
        for one in contenders:
            time_us = cell.median(one.name)
            least = limits[cell.threads].microseconds(cell, one)
            row.append(f"{time_us:.1f} ({f'{least / time_us:.0%}' if least else '?'})")
        row += [f"{cell.median(c.name) / cell.median(OURS):.2f}" for c in peers]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _shape(text: str) -> tuple[int, int]:
    k, n = text.split("x")
    return int(k), int(n)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MiniLM's shapes, few rows, hot")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 2, quick: 1")
    parser.add_argument("--hot", action="store_true", help="leave out cold weights")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.003, help="of a sample")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    groups = plan(options)
    cells: list[Cell] = []
    try:
        limits = {n: measure_limits(n) for n in sorted({g.threads for g in groups})}
        facts = {
            "processor": processor(),
            "date": time.strftime("%Y-%m-%d"),
            "onnxruntime": ort.__version__,
            "library": find_library("ort_cpu").details,
            "command": " ".join(["python tools/bench_cpu.py", *(argv or sys.argv[1:])]),
        }
        for group in groups:
            for cell in measure_group(group, options.rounds, options.seconds, CONTENDERS):
                cells.append(cell)
                ratio = cell.median("nbits2") / cell.median(OURS)
                place = "cold" if cell.cold else "hot"
                text = f"K={cell.K} N={cell.N} M={cell.M} {place} threads={cell.threads}"
                print(f"{text}: {ratio:.2f}x MatMulNBits 2 bits", file=sys.stderr)
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table = markdown(cells, limits, facts)
    print(table)
    if options.out:
        content = facts | {
            "contenders": {c.name: c.what for c in CONTENDERS},
            "limits": [asdict(one) for one in limits.values()],
            "cells": [asdict(c) for c in cells],
        }
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1))
        options.out.with_suffix(".md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
