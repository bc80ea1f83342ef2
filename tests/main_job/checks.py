"""What must hold for every directory the main job writes, whatever the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

import bitnet_export.manifest as manifests
from bitnet_export.options import BenchOptions, VerifyOptions
from bitnet_export.pipeline import run_bench, run_verify
from bitnet_export.report.json_io import load_report
from bitnet_export.targets import load_session, open_session
from bitnet_export.verify.feeds import make_cases

FILES = {"model.onnx", "manifest.json", "report.json", "report.html", "report.md", "junit.xml"}
STOCK = {"", "ai.onnx", "com.microsoft"}


def feeds_for(directory: Path, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Inputs of those axis sizes, from the examples the directory keeps."""
    record = manifests.read_manifest(directory)
    with np.load(directory / "intermediate" / "inputs.npz") as examples:
        (case,) = make_cases([sizes], dict(examples), record.dynamic_axes, seed=11)
    return case.feeds


def check_report(report, directory: Path, *, speed: bool = True) -> None:
    """Every parity row passes, the layers have reasons, the sizes add up, the files are there."""
    assert report.parity
    assert [row for row in report.parity if not row.passed] == []
    assert report.verdict == "pass", report.gates
    assert {row.pair.split(" -> ")[0] for row in report.parity} >= {"onnx function"}
    assert report.layers
    assert all(row.reason and row.status in ("ternary", "kept") for row in report.layers)
    assert any(row.status == "ternary" and row.sparsity is not None for row in report.layers)
    size, parts = report.size, report.size.by_part.values()
    assert sum(p.bytes for p in parts) == size.bytes == (directory / "model.onnx").stat().st_size
    assert sum(p.baseline_bytes for p in parts) == size.baseline_bytes
    assert bool(report.speed) == speed
    assert all(row.baseline_ms > 0 and row.ms > 0 for row in report.speed)
    assert report.passes
    assert load_report(directory / "report.json").verdict == "pass"
    assert {p.name for p in directory.iterdir()} >= FILES


def check_session(directory: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    """load_session answers as the model file itself, also from a copy without intermediates."""
    feeds = feeds_for(directory, sizes)
    want = open_session(directory / "model.onnx", threads=1).run(None, feeds)
    moved = tmp_path / "deployed"
    shutil.copytree(directory, moved, ignore=shutil.ignore_patterns("intermediate"))
    for place in (directory, moved):
        session = load_session(place, threads=1)
        names = [o.name for o in session.get_outputs()]
        got = session.run(None, feeds)
        assert names == session.manifest.outputs
        for one, other in zip(got, want, strict=True):
            # The native library, where it is installed, sums in another order.
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
        (first,) = session.run(names[:1], feeds)
        np.testing.assert_allclose(first, want[0], rtol=1e-4, atol=1e-4)


def check_again(directory: Path) -> None:
    """verify and bench on the written directory reach the verdict of the export."""
    verified = run_verify(VerifyOptions(directory=directory, threads=1))
    assert verified.verdict == "pass"
    assert verified.parity
    benched = run_bench(BenchOptions(directory=directory, threads=(1,), samples=3))
    assert benched.speed
    assert json.loads((directory / "report.json").read_text())["speed"]


def operators(directory: Path) -> dict[tuple[str, str], int]:
    """(domain, operator) -> how many of the deployed model's nodes."""
    import collections

    import onnx

    model = onnx.load(directory / "model.onnx")
    return collections.Counter((n.domain, n.op_type) for n in model.graph.node)


def only_stock_operators(directory: Path) -> bool:
    """Whether nothing but standard and com.microsoft operators is in the file."""
    import onnx

    model = onnx.load(directory / "model.onnx")
    return not model.functions and {n.domain for n in model.graph.node} <= STOCK
