"""Make the dense weights of a foreign graph ternary, after training, without data."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING

from bitnet_export.passes.base import Builder, Pass, PassResult
from bitnet_export.passes.matmul_sites import MatMulSite, find_sites

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from bitnet_export.ternary import TernaryConfig


class TernarizeDense(Pass):
    """What prepare and convert do to a PyTorch model, done to an ONNX file.

    Post-training ternarization costs accuracy, so the pipeline measures the agreement and warns.
    """

    name = "ternarize-dense"
    requires = "constants folded; canonical MatMuls"
    ensures = "every MatMul by a constant matrix is ternary, or listed with a reason"

    def __init__(self, config: TernaryConfig, keep_head: bool = True) -> None:
        self.config = config
        self.keep_head = keep_head

    def run(self, graph: gs.Graph) -> PassResult:
        """Ternarize with the configured quantizer."""
        from bitnet_export.ternary import ternarize_weight

        result = PassResult()
        builder = Builder(graph)
        for site in find_sites(graph, result):
            reason = self._reason_to_keep(site)
            if reason:
                result.skip(site.layer, reason)
                continue
            trits, scale = ternarize_weight(site.weight.T, self.config)
            site.replace(builder, trits, scale, self.config.activation_bits)
            result.rewritten += 1
        return result

    def _reason_to_keep(self, site: MatMulSite) -> str:
        name, config = site.layer, self.config
        pattern = next((p for p in config.exclude if fnmatch(name, p)), None)
        if pattern:
            return f"excluded by pattern {pattern}"
        if not any(fnmatch(name, p) for p in config.include):
            return "matches no --include pattern"
        if self.keep_head and site.is_head:
            return "the last layer (head) stays in floating point"
        k = site.weight.shape[0]
        if config.group_size and k % config.group_size:
            return f"K={k} is not a multiple of group size {config.group_size}"
        return ""
