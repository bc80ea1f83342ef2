"""The kernels on a real card, through gpu_check without its benchmarks. Skipped where there is
no GPU, or no nvcc to build for it; `make gpu-check` runs the whole of it."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import gpu_check  # noqa: E402


def test_kernels_match_the_reference_on_this_card(tmp_path):
    try:
        gpu_check.find_nvcc()
        gpu_check.find_gpu()
    except gpu_check.Missing as error:
        pytest.skip(f"needs a GPU machine: {error}")
    out = tmp_path / "gpu-check.json"
    assert gpu_check.main(["--skip-bench", "--out", str(out)]) == gpu_check.EXIT_OK
    results = json.loads(out.read_text())
    assert results["numbers"]["passed"]
