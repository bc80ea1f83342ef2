"""Target onnx: TernaryMatMul with its function body; runs in any ONNX runtime.

Standard operators only, so it is portable and exact, but as fast as full precision at best:
runtimes unpack the weights to float. With the package's native library ONNX Runtime runs the same
file on a kernel of its own (targets/session.py registers it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bitnet_export.passes import FoldConstants, MergeSiblings, PackConvolutions, Pass
from bitnet_export.passes.heads import attach_nbits_body
from bitnet_export.targets.base import (
    Lowered,
    Target,
    embedding_passes,
    embeddings_kind,
)

if TYPE_CHECKING:
    import onnx

    from bitnet_export.options import ExportOptions


class OnnxTarget(Target):
    """The portable form."""

    name = "onnx"

    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """Merge siblings, quantize embeddings with standard operators, perhaps to fp16."""
        lowered = Lowered(model, [], parity_kinds=("function", *embeddings_kind(options)))
        if options.dtype == "fp16":
            from bitnet_export.passes.to_fp16 import to_fp16

            lowered.model, result = to_fp16(model)
            lowered.passes.append(result)
            lowered.parity_kinds += ("fp16",)
        passes: list[Pass] = [FoldConstants(), MergeSiblings(), PackConvolutions()]
        return [*passes, *embedding_passes(options, contrib=False)], lowered

    def lower(
        self,
        model: onnx.ModelProto,
        options: ExportOptions,
        opt_sizes: Mapping[str, int],
        on_pass: Callable[[str], None] = lambda name: None,
    ) -> Lowered:
        """As any target; a quantized output head gets a function body, too."""
        lowered = super().lower(model, options, opt_sizes, on_pass)
        attach_nbits_body(lowered.model)
        return lowered
