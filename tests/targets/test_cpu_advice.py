"""What bench says about the native CPU library, whether it is there or not."""

import pytest

from bitnet_export import native
from bitnet_export.targets.session import NATIVE_VARIABLE, cpu_advice


@pytest.fixture
def absent(monkeypatch, tmp_path):
    monkeypatch.setenv("BITNET_EXPORT_ORT_CPU", str(tmp_path / "none.so"))


@pytest.fixture
def present(monkeypatch, tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"@(#)bitnet-export library=ort_cpu version=1.0;")
    monkeypatch.setenv("BITNET_EXPORT_ORT_CPU", str(library))
    assert native.find_library("ort_cpu").path == library


def test_without_the_library(absent):
    assert "function body" in cpu_advice("onnx")
    assert "BITNET_EXPORT_ORT_CPU" in cpu_advice("onnx")
    assert cpu_advice("ort") == ""


def test_with_the_library(present):
    assert cpu_advice("onnx") == ""
    assert "--target onnx" in cpu_advice("ort")
    assert cpu_advice("trt") == ""


def test_switched_off_on_purpose(present, monkeypatch):
    monkeypatch.setenv(NATIVE_VARIABLE, "0")
    assert cpu_advice("ort") == cpu_advice("onnx") == ""
