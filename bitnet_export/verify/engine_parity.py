"""Agreement of a built engine with the ONNX model it was made from, where the engine runs here.

The counterpart of parity.py for the TensorRT targets; which tolerances apply is decided here,
what becomes of the rows in assess.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitnet_export.errors import MissingRequirement
from bitnet_export.manifest import Manifest
from bitnet_export.targets import trt_profile, trt_session
from bitnet_export.verify.feeds import Case
from bitnet_export.verify.parity import Pair, run_parity
from bitnet_export.verify.results import ParityRow

ENGINE = "engine"


def compare_engine(
    directory: Path,
    record: Manifest,
    lowered: Any,
    cases: Sequence[Case],
    *,
    name: str,
    atol: float | None = None,
    depth: int = 1,
) -> list[ParityRow]:
    """Parity rows of the engine against ``lowered``, the runner of its ONNX model, which is
    called ``name``; cases outside the engine's profile are left out.

    Raises MissingRequirement where the engine does not run on this machine, or on these cases.
    """
    from polygraphy.backend.onnxrt import OnnxrtRunner

    engine = trt_session.open_engine(directory, record)
    kinds = ("fp16",) if record.target == "trt-rtx" else tuple(record.parity_kinds)
    profile = record.environment["profile"]
    fitting = [
        case
        for case in cases
        if trt_profile.fits(profile, {n: array.shape for n, array in case.feeds.items()})
    ]
    if not fitting:
        raise MissingRequirement("none of the shapes compared lies in its profile")
    runners = {name: lowered, ENGINE: OnnxrtRunner(lambda: engine, name=ENGINE)}
    return run_parity(runners, [Pair(name, ENGINE, kinds, depth)], fitting, atol=atol)
