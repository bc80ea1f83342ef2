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
    code = gpu_check.main(["--skip-bench", "--out", str(out)])
    steps = json.loads(out.read_text())["steps"]
    assert code in (gpu_check.EXIT_OK, gpu_check.EXIT_MISSING), steps
    assert steps["build"]["status"] == steps["numbers"]["status"] == "passed"
    for tool in ("memcheck", "racecheck"):  # where compute-sanitizer is installed
        assert steps[tool]["status"] != "failed", steps[tool]
