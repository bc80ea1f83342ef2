"""Turn bitnet::TernaryMatMul into the node TensorRT's ONNX parser hands to the plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitnet_export import op, packing
from bitnet_export.passes.base import Builder, Pass, PassResult, ternary_nodes

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


class RetargetTensorRT(Pass):
    """Domain trt.plugins, the plugin attributes, and the packed bytes viewed as int32.

    The parser would turn uint8 initializers into int32 values, four times larger; it leaves
    int32 alone. plugin_namespace makes it prefer the plugin over the function body.
    """

    name = "retarget-trt"
    requires = "TernaryMatMul nodes"
    ensures = "every TernaryMatMul is in domain trt.plugins with int32 weights"
    optional = False

    def run(self, graph: gs.Graph) -> PassResult:
        """Retarget every TernaryMatMul."""
        result = PassResult()
        builder = Builder(graph)
        for t in ternary_nodes(graph):
            words = packing.as_int32(t.packed_weight)
            t.node.domain = op.TRT_DOMAIN
            t.node.attrs.update(op.TRT_ATTRIBUTES)
            t.node.inputs[1] = builder.constant(words, f"{t.layer}.packed_weight_int32")
            result.rewritten += 1
        return result
