"""Shares the loaders' foreign ONNX file."""

from tests.load.conftest import dense_onnx

__all__ = ["dense_onnx"]
