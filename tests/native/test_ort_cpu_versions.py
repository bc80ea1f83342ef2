"""The CPU library on the oldest ONNX Runtime it is meant for; other tests run on the newest.

Opt in with BITNET_TEST_OLD_ORT=1: it installs that release into an environment of its own below
plugins/build, which takes a package index and half a minute.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bitnet_export import op
from bitnet_export.native import BUILD_DIR

from .test_ort_cpu import Layer, library

__all__ = ["library"]

OLDEST = "1.22.0"
# Only onnxruntime and numpy are there.
RUN = """
import sys
import numpy as np, onnxruntime as ort
assert ort.__version__ == sys.argv[3], ort.__version__
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[2])
for name in ("float", "half", "groups", "body"):
    case = np.load(f"{sys.argv[1]}/{name}.npz")
    session = ort.InferenceSession(case["model"].tobytes(), options)
    np.testing.assert_array_equal(session.run(None, {"X": case["x"]})[0], case["y"])
"""


@pytest.fixture(scope="session")
def old_python() -> Path:
    """A Python with the oldest ONNX Runtime, made once."""
    environment = BUILD_DIR / f"onnxruntime-{OLDEST}"
    python = environment / "bin" / "python"
    if not (environment / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        subprocess.run([*pip, f"onnxruntime=={OLDEST}", "numpy"], check=True, timeout=600)
        (environment / "ready").touch()
    return python


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("BITNET_TEST_OLD_ORT") != "1", reason="BITNET_TEST_OLD_ORT=1")
def test_oldest_onnx_runtime(library: Path, old_python: Path, tmp_path: Path) -> None:
    layers = {
        "float": Layer(op.TernaryAttributes(100, 65)),
        "half": Layer(op.TernaryAttributes(384, 33), half=True, bias=False),
        "groups": Layer(op.TernaryAttributes(384, 40, 128)),
        "body": Layer(op.TernaryAttributes(192, 70)),
    }
    for name, layer in layers.items():
        x = layer.activations(2, 5)
        model = np.frombuffer(layer.model(body=name == "body"), np.uint8)
        np.savez(tmp_path / name, model=model, x=x, y=layer.reference(x))
    command = [str(old_python), "-c", RUN, str(tmp_path), str(library), OLDEST]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
