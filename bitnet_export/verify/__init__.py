"""Measuring a finished export: parity, quality, speed, size and single layers.

Every module here returns the rows of results.py and judges nothing beyond its own tolerance;
gates and rendering are report/'s. Nothing is imported here, so that the command line, which
reads results.py through the report schema, starts without torch or ONNX Runtime.
"""
