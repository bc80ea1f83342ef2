"""Make the dense weights of a foreign graph ternary, after training, without data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitnet_export.passes.base import Builder, Pass, PassResult, ternary_nodes
from bitnet_export.passes.conv_sites import find_conv_sites
from bitnet_export.passes.matmul_sites import MatMulSite, find_sites

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from bitnet_export.ternary import TernaryConfig


class TernarizeDense(Pass):
    """What prepare and convert do to a PyTorch model, done to an ONNX file by the same rules.

    Post-training ternarization costs accuracy, so the pipeline measures the agreement and warns.
    """

    name = "ternarize-dense"
    requires = "constants folded; canonical MatMuls"
    ensures = "every MatMul or Conv by a constant is ternary, or listed with a reason"

    def __init__(self, config: TernaryConfig) -> None:
        self.config = config

    def run(self, graph: gs.Graph) -> PassResult:
        """Ternarize with the configured quantizer."""
        from bitnet_export.ternary import ternarize_weight

        result = PassResult()
        builder = Builder(graph)
        sites = [*find_sites(graph, result), *find_conv_sites(graph, result)]
        widths = [s.weight.shape[0] for s in sites]
        widths += [t.attributes.K for t in ternary_nodes(graph)]
        for site in sites:
            reason = self._reason_to_keep(site, widths)
            if reason:
                result.skip(site.layer, reason)
                continue
            site.check_finite()
            trits, scale = ternarize_weight(site.weight.T, self.config)
            if not trits.any() and site.weight.any():
                result.skip(site.layer, f"no weight exceeds the threshold {self.config.threshold}")
                continue
            result.ternarized[site.layer] = self._how(scale)
            site.replace(builder, trits, scale, self.config.activation_bits)
            result.rewritten += 1
        return result

    def _how(self, scale: np.ndarray) -> str:
        """The reason column of a layer made ternary, as prepare words it."""
        kind = "group" if scale.ndim == 2 else "tensor" if scale.size == 1 else "channel"
        unit = f"group {self.config.group_size}" if kind == "group" else kind
        return f"{self.config.quantizer}, {unit} scale"

    def _reason_to_keep(self, site: MatMulSite, widths: list[int]) -> str:
        """widths: the input width of every layer; a head's output is none of them."""
        k, n = site.weight.shape
        reason = self.config.excluded_by(site.layer)
        if reason:
            return reason
        if site.is_conv and self.config.convolutions == "none":
            return 'convolutions="none"'
        if self.config.keep_head and len(widths) > 1 and n not in widths and site.is_last:
            return "output head: no other layer reads an input of its width"
        if k < self.config.min_k:
            return f"K={k} is below min_k={self.config.min_k}"
        return ""
