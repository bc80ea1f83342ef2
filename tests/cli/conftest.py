"""Runs the command line as a user does: as a process. Exports are made once and shared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One thread keeps the tiny models fast and other tests undisturbed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "BITNET_EXPORT_DEBUG": "", "PYTHONPATH": str(ROOT)}


def run(*arguments, cwd=None, code=None, env=None, **kwargs):
    """One process of the command line; code: Python that runs before main()."""
    command = [sys.executable, "-m", "bitnet_export.cli"]
    if code is not None:
        command = [sys.executable, "-c", f"{code}\nfrom bitnet_export.cli import main\nmain()"]
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        check=False,
        **kwargs,
    )


@pytest.fixture(scope="session")
def mlp_file(tmp_path_factory):
    """input [batch, 64] -> [batch, 10], as bitnet_export.save writes it."""
    import torch
    from torch import nn

    from bitnet_export.load import save

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    path = tmp_path_factory.mktemp("model") / "mlp.pt"
    return save(model, path, {"input": torch.randn(4, 64)}, {"input": {0: "batch"}})


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    import numpy as np

    path = tmp_path_factory.mktemp("data") / "calibration.npz"
    np.savez(path, input=np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def exported(mlp_file, tmp_path_factory):
    """(finished process, directory) of the common case."""
    directory = tmp_path_factory.mktemp("exports") / "mlp-ort"
    done = run(mlp_file, "--target", "ort", "-o", directory)
    assert done.returncode == 0, done.stderr
    return done, directory
