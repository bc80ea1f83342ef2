"""Target trt: the ONNX file with plugin nodes, for TensorRT on Turing and newer.

The graph is complete: domain trt.plugins, int32 weights, plugin attributes, and a function body
so that other runtimes can check it. Building the engine needs TensorRT and a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bitnet_export.errors import MissingRequirement
from bitnet_export.passes import FoldConstants, MergeSiblings, Pass, RetargetTensorRT
from bitnet_export.targets.base import Decision, Lowered, Target

if TYPE_CHECKING:
    import onnx

    from bitnet_export.options import ExportOptions


class TrtTarget(Target):
    """Plugin nodes."""

    name = "trt"
    runs_on_cpu = False

    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """Merge siblings and retarget; embeddings keep floating point."""
        lowered = Lowered(model, [], parity_kinds=("function",))
        if options.embeddings != "keep":
            why = "TensorRT has no operator that gathers quantized rows"
            lowered.decisions.append(Decision("embeddings", "keep", why))
        if options.dtype == "fp16":
            from bitnet_export.passes.to_fp16 import to_fp16

            lowered.model, result = to_fp16(model)
            lowered.passes.append(result)
            lowered.parity_kinds += ("fp16",)
        return [FoldConstants(), MergeSiblings(), RetargetTensorRT()], lowered

    def build(self, directory: Path, options: ExportOptions) -> None:
        """Raise MissingRequirement saying what this machine lacks: engines are not built yet."""
        missing = _missing()
        raise MissingRequirement(
            f"model.onnx with its plugin nodes is written; no engine was built: {missing}",
            where="--target trt",
            fix="build the engine on the machine that runs it, with this version's plugin; "
            "--no-engine makes the ONNX file alone a success",
        )


def _missing() -> str:
    """What stands between this machine and an engine."""
    from importlib.util import find_spec

    gaps = []
    if find_spec("tensorrt") is None:
        gaps.append("TensorRT is not installed (pip install 'bitnet-export[trt]')")
    if not Path("/dev/nvidia0").exists():
        gaps.append("there is no NVIDIA GPU")
    return "; ".join(gaps) or "this version does not build engines yet"
