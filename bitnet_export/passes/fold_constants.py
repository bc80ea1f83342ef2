"""Compute what depends on constants only, so that weights stand as initializers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_export.passes.base import Pass, PassResult

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class FoldConstants(Pass):
    """Exporters leave transposes, casts and dequantization on weights; fold them first."""

    name = "fold-constants"
    requires = "onnxruntime, which evaluates the constants"
    ensures = "no node has only constant inputs"

    def run(self, graph: gs.Graph) -> PassResult:
        """Fold, with onnx-graphsurgeon's own folding."""
        before = len(graph.nodes)
        graph.fold_constants(size_threshold=None)
        graph.cleanup()
        return PassResult(rewritten=before - len(graph.nodes))
