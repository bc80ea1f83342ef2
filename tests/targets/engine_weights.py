"""Where an engine keeps its int4 weights: found by building it twice with other weights in them.

The builder is deterministic and its code does not depend on the values of weights, so two engines
of one graph differ in exactly the bytes that hold the weights that were changed. That needs no
knowledge of the engine's format and counts whatever the builder stores: copies, padding, scales.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitnet_export.passes.lower_rtx import is_int4_weight, pack_int4

if TYPE_CHECKING:
    import onnx

# Equal bytes between two differing ones that still count as weights: padding between layers, and
# codes that happen to be equal.
GAP = 512


def with_other_weights(model: onnx.ModelProto, seed: int = 0) -> onnx.ModelProto:
    """lower_rtx's model with random trits and scales in every int4 layer, all else as it was."""
    changed = type(model)()
    changed.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in changed.graph.initializer}
    rng = np.random.default_rng(seed)
    for node in changed.graph.node:
        if is_int4_weight(node, constants):
            codes, scale = (constants[name] for name in node.input[:2])
            codes.raw_data = pack_int4(rng.integers(-1, 2, list(codes.dims)).astype(np.int8))
            scale.raw_data = rng.uniform(0.01, 0.1, list(scale.dims)).astype(np.float16).tobytes()
    return changed


def differing_bytes(first: bytes, second: bytes) -> int:
    """Bytes of the stretches in which two engines of one graph differ, small gaps included."""
    assert len(first) == len(second), "weights changed the engine's layout"
    a, b = (np.frombuffer(data, np.uint8) for data in (first, second))
    at = np.flatnonzero(a != b)
    breaks = np.flatnonzero(np.diff(at) > GAP)
    begins, ends = at[[0, *(breaks + 1)]], at[[*breaks, -1]] + 1
    return int((ends - begins).sum())
