"""Ternary models back into checkpoints that others read: PyTorch weights, Hugging Face directories.

Stands after ternary: it only writes down the trits a loaded model already has. Nothing here makes
a layer ternary, and nothing trains.
"""
