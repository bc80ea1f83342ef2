"""Find weights that are ternary already, trits times a scale, and keep them exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitnet_export.passes.base import Builder, Pass, PassResult
from bitnet_export.passes.conv_sites import find_conv_sites
from bitnet_export.passes.matmul_sites import find_sites

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class RecogniseTernary(Pass):
    """A foreign graph's ternary layers, trained elsewhere, become TernaryMatMuls untouched."""

    name = "recognise-ternary"
    requires = "constants folded; canonical MatMuls"
    ensures = "every weight that is exactly ternary times a scale is a TernaryMatMul"

    def __init__(self, activation_bits: int = 8) -> None:
        self.activation_bits = activation_bits

    def run(self, graph: gs.Graph) -> PassResult:
        """Rewrite the ternary ones, skip the dense ones."""
        import torch

        from bitnet_export.ternary import ternarize_weight
        from bitnet_export.ternary.quantizers import find_ternary

        result = PassResult()
        builder = Builder(graph)
        for site in [*find_sites(graph, result), *find_conv_sites(graph, result)]:
            site.check_finite()
            weight = site.weight.T.astype(np.float32)
            found = find_ternary(torch.from_numpy(weight))
            if found is None:
                result.skip(site.layer, "weights are not ternary")
                continue
            result.ternarized[site.layer] = f"already ternary ({found[0]} scale), kept exactly"
            site.replace(builder, *ternarize_weight(weight), activation_bits=self.activation_bits)
            result.rewritten += 1
        return result
