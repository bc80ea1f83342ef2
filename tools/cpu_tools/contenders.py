"""The ways to compute one product in ONNX Runtime that bench_cpu.py times against each other.

A contender makes a node and its constants from the same trits; a model repeats the node, each
time with weights of its own, so that a run can stream its weights from memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import op, packing

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
# operator, domain, attributes, constants in the order of inputs after X; "w" holds the weights.
Product = tuple[str, str, dict[str, int], Tensors]

CONTRIB = "com.microsoft"
TWO_BIT_BLOCK = 128  # the only block size that is fast (docs/decisions.md)
FOUR_BIT_BLOCK = 32  # what 4-bit models are published with


@dataclass(frozen=True)
class Contender:
    """make(w [N, K] trits) -> Product. peak: which of the processor's peaks bounds it."""

    name: str
    what: str
    make: Callable[[Array], Product]
    peak: str = "int8"

    def weight_bytes(self, w: Array) -> int:
        """Bytes of all constants, which a product with cold weights has to read."""
        return sum(value.nbytes for value in self.make(w)[3].values())


def ternary(w: Array) -> Product:
    n, k = w.shape
    attributes = op.TernaryAttributes(k, n).as_dict()
    ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
    return op.OP_TYPE, op.DOMAIN, attributes, {"w": packing.pack(w), "scale": ones, "bias": zeros}


def fp32(w: Array) -> Product:
    return "MatMul", "", {}, {"w": np.ascontiguousarray(w.T.astype(np.float32))}


def nbits2(w: Array) -> Product:
    n = len(w)
    packed = packing.pack(w, TWO_BIT_BLOCK).reshape(n, -1, TWO_BIT_BLOCK // 4)
    return _nbits(w, packed, 2, TWO_BIT_BLOCK)


def nbits4(w: Array) -> Product:
    n, k = w.shape
    blocks = -(-k // FOUR_BIT_BLOCK)
    codes = np.full((n, blocks * FOUR_BIT_BLOCK), 8, np.uint8)  # 8 is zero
    codes[:, :k] = w + 8
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return _nbits(w, packed.reshape(n, blocks, -1), 4, FOUR_BIT_BLOCK)


def _nbits(w: Array, packed: Array, bits: int, block: int) -> Product:
    n, k = w.shape
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
    scales = np.ones(packed.shape[:2], np.float32)
    return "MatMulNBits", CONTRIB, attributes, {"w": packed, "scale": scales}


def int8(w: Array) -> Product:
    constants: Tensors = {"w": np.ascontiguousarray(w.T.astype(np.int8))}
    constants["scale"] = np.ones(1, np.float32)
    return "DynamicQuantizeMatMul", CONTRIB, {}, constants


CONTENDERS = (
    Contender("ternary", "bitnet::TernaryMatMul, int8 activations per row", ternary),
    Contender("fp32", "MatMul", fp32, peak="fp32"),
    Contender("nbits2", f"MatMulNBits, 2 bits, block {TWO_BIT_BLOCK}, accuracy_level 4", nbits2),
    Contender("nbits4", f"MatMulNBits, 4 bits, block {FOUR_BIT_BLOCK}, accuracy_level 4", nbits4),
    Contender("int8", "DynamicQuantizeMatMul, int8 weights", int8),
)
OURS = CONTENDERS[0].name


def build_model(contender: Contender, w: Array, copies: int) -> onnx.ModelProto:
    """The contender's node `copies` times on one X [M, K], each with weights of its own."""
    n, k = w.shape
    operator, domain, attributes, constants = contender.make(w)
    nodes, initializers, outputs = [], [], []
    for i in range(copies):
        # A rotation of the rows: equal weights would be merged into one.
        own = {name: np.roll(v, i, 0) if name == "w" else v for name, v in constants.items()}
        initializers += [numpy_helper.from_array(v, f"{name}{i}") for name, v in own.items()]
        inputs = ["X", *(f"{name}{i}" for name in own)]
        nodes.append(helper.make_node(operator, inputs, [f"Y{i}"], domain=domain))
        nodes[-1].attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        outputs.append(helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", n]))
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", k])
    graph = helper.make_graph(nodes, "bench", [x], outputs, initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(CONTRIB, 1)]
    imports.append(helper.make_opsetid(op.DOMAIN, 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=10)
