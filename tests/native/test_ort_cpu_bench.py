"""The benchmark tool end to end on a tiny product: every contender runs, figures are written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_export.errors import StageError
from bitnet_export.native import BUILD_DIR

from .conftest import REPOSITORY, Unavailable
from .test_ort_cpu import library

__all__ = ["library"]

sys.path.insert(0, str(REPOSITORY / "tools"))

from cpu_tools import contenders, limits, timing


def test_a_wrong_product_is_not_timed(library: Path) -> None:
    wrong = contenders.Contender("upside down", "MatMul", lambda w: contenders.fp32(w[::-1]))
    group = timing.Group(64, 16, 1, False, (1,))
    with pytest.raises(StageError, match=r"upside down, K=64 N=16 M=1: its product is off by"):
        next(timing.measure_group(group, 1, 0.0001, [*contenders.CONTENDERS, wrong]))


def test_no_limit_is_made_up_where_none_was_measured() -> None:
    unknown = limits.Limits("portable", 1, 0.0, 0.0, 0.0)
    cell = timing.Cell(64, 16, 1, 1, False)
    assert unknown.microseconds(cell, contenders.CONTENDERS[0]) is None


def test_bench_cpu(library: Path, unavailable: Unavailable, tmp_path: Path) -> None:
    if not (BUILD_DIR / "cpu" / "tests" / "cpu" / "cpu_limits").is_file():
        unavailable("the native part cpu is not built: run make native")
    command = [sys.executable, str(REPOSITORY / "tools" / "bench_cpu.py"), "--shapes", "128x48"]
    command += ["--rows", "1", "3", "--rounds", "2", "--seconds", "0.0001", "--hot"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "bench")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [one["threads"] for one in report["limits"]] == [1, 2]
    assert all(one["int8_gmac"] > 0 or one["path"] == "portable" for one in report["limits"])
    assert [(cell["threads"], cell["M"]) for cell in report["cells"]] == [
        *((1, 1), (1, 3)),
        *((2, 1), (2, 3)),
    ]
    for cell in report["cells"]:
        assert set(cell["samples"]) == {"ternary", "fp32", "nbits2", "nbits4", "int8"}
        assert all(len(times) == 2 and min(times) > 0 for times in cell["samples"].values())
    table = (tmp_path / "bench.md").read_text()
    assert table == done.stdout.rstrip("\n") + "\n"
    assert table.count("| 128, 48 |") == 4
