"""What an ONNX file weighs, by part: linear layers, embeddings, the rest, the graph itself.

Tensors are sorted by who reads them, through any constant subgraph in between (a
DequantizeLinear, or the nodes that unpack 2-bit codes). External data counts; the parts sum to
the bytes on disk exactly. Nothing is run and no tensor data is read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitnet_export import onnx_io, op
from bitnet_export.errors import InputError
from bitnet_export.targets.trt_build import TITLES
from bitnet_export.targets.trt_engine import cards_text
from bitnet_export.verify.results import EngineSize, SizeBlock, SizePart

LINEAR, EMBEDDINGS, REST, GRAPH = "linear", "embeddings", "rest", "graph"
PARTS = (LINEAR, EMBEDDINGS, REST, GRAPH)

# Inputs that hold a linear layer's weights, scales and zero points. Biases count as rest: in the
# baseline they sit in an Add of their own.
_LINEAR_INPUTS = {
    "MatMul": (0, 1),
    "Gemm": (0, 1),
    "FusedMatMul": (0, 1),
    "FusedGemm": (0, 1),
    "MatMulInteger": (1, 3),
    "MatMulIntegerToFloat": (1, 3, 5),
    "DynamicQuantizeMatMul": (1, 2, 3),
    "QLinearMatMul": (3, 4, 5),
    "MatMulNBits": (1, 2, 3, 4),
    op.OP_TYPE: (1, 2),
    # A convolution of kernel 1 becomes a TernaryMatMul: all of them count alike.
    "Conv": (1,),
}
_EMBEDDING_INPUTS = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3)}


@dataclass
class FileSize:
    """One ONNX file: bytes and tensor elements by part, bytes by element type of the weights;
    bytes and elements of all floating-point tensors; part and bytes of each tensor."""

    total: int
    part_bytes: Counter[str] = field(default_factory=Counter)
    part_elements: Counter[str] = field(default_factory=Counter)
    weight_bytes_by_dtype: Counter[str] = field(default_factory=Counter)
    float_bytes: int = 0
    float_elements: int = 0
    tensors: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Element type of most of the weights: fp32, fp16, int8 and so on."""
        common = self.weight_bytes_by_dtype.most_common(1)
        return common[0][0] if common else "none"

    def with_floats_of(self, itemsize: int) -> int:
        """What the file would weigh with floating-point elements of so many bytes."""
        return self.total - self.float_bytes + itemsize * self.float_elements


@dataclass
class _Tensor:
    bytes: int
    elements: int
    dtype: str
    rank: int


def measure_size(path: Path | str) -> FileSize:
    """Measure one ONNX file. Raises InputError where it, or its external data, cannot be read."""
    import onnx

    path = Path(path)
    try:
        model = onnx.load(os.fspath(path), load_external_data=False)
        total = path.stat().st_size
        total += sum((path.parent / name).stat().st_size for name in _external_files(model))
    except Exception as error:
        raise InputError(f"cannot be measured ({error})", where=str(path)) from error
    if not model.graph.node:
        raise InputError("holds no graph: empty or truncated", where=str(path))
    size = FileSize(total)
    graph = _Graph(model)
    for name, tensor in graph.tensors.items():
        part = graph.part_of(name)
        size.part_bytes[part] += tensor.bytes
        size.part_elements[part] += tensor.elements
        size.tensors[name] = (part, tensor.bytes)
        if tensor.dtype in _NAMES.values():
            size.float_bytes += tensor.bytes
            size.float_elements += tensor.elements
        if part in (LINEAR, EMBEDDINGS):
            size.weight_bytes_by_dtype[tensor.dtype] += tensor.bytes
    size.part_bytes[GRAPH] = total - sum(size.part_bytes.values())
    return size


def size_block(
    baseline: Path | str, path: Path | str, at_rest: Path | str | None = None
) -> SizeBlock:
    """The output file against its full-precision baseline, which must be the same model.

    Weights are counted in the baseline, where one element is one weight. at_rest: where ``path``
    was decompressed from, if it was: bytes and ratios are then those of the compressed file.
    """
    from bitnet_export.compress import is_compressed
    from bitnet_export.verify.at_rest import code_bits, stored_size

    before, after = measure_size(baseline), measure_size(path)
    compressed = at_rest is not None and is_compressed(Path(at_rest))
    plain_bytes = after.total
    if compressed and at_rest is not None:
        after = stored_size(after, Path(path), Path(at_rest))
    fp32, fp16 = before.with_floats_of(4), before.with_floats_of(2)
    parts = {}
    for name in PARTS:
        weights = before.part_elements[name]
        parts[name] = SizePart(
            baseline_bytes=before.part_bytes[name],
            bytes=after.part_bytes[name],
            weights=weights,
            bits_per_weight=8 * after.part_bytes[name] / weights if weights else None,
        )
    return SizeBlock(
        baseline_dtype=before.dtype,
        baseline_bytes=before.total,
        bytes=after.total,
        ratio=before.total / after.total,
        by_part=parts,
        fp32_bytes=fp32,
        fp16_bytes=fp16,
        ratio_fp32=fp32 / after.total,
        ratio_fp16=fp16 / after.total,
        compression="zstd" if compressed else "",
        unpacked_bytes=plain_bytes if compressed else None,
        code_bits_per_weight=code_bits(after, Path(path)),
    )


def engine_sizes(environment: Mapping[str, Any], baseline_bytes: int) -> list[EngineSize]:
    """The engines that a manifest's environment records, against the full-precision ONNX."""
    return [
        EngineSize(
            file=file,
            bytes=facts["bytes"],
            ratio=baseline_bytes / facts["bytes"],
            runtime=f"{TITLES[facts['runtime']]} {facts['version']}",
            built_for=facts.get("gpu") or cards_text(facts["compute_capabilities"]),
            weights=facts.get("weights", "2-bit"),
        )
        for file, facts in environment.get("engines", {}).items()
    ]


class _Graph:
    """The tensors of a model and which part each belongs to. Subgraphs share its names."""

    def __init__(self, model: Any) -> None:
        self.tensors: dict[str, _Tensor] = {}
        self._producer: dict[str, Any] = {}
        self._leaves: dict[str, frozenset[str] | None] = {}
        self._nodes = []
        for prefix, graph in _graphs(model.graph):
            for tensor in graph.initializer:
                self.tensors[tensor.name] = _measure(tensor)
            for i, node in enumerate(graph.node):
                self._nodes.append(node)
                for name in node.output:
                    self._producer[name] = node
                for tensor in _constants(node):
                    name = node.output[0] if node.op_type == "Constant" else f"{prefix}{i}"
                    self.tensors[name] = _measure(tensor)
        self._parts = self._classify()

    def part_of(self, tensor: str) -> str:
        """linear, embeddings or rest."""
        return self._parts.get(tensor, REST)

    def _classify(self) -> dict[str, str]:
        parts: dict[str, str] = {}
        for node in self._nodes:
            for position in _linear_positions(node):
                for leaf in self._constant_leaves(node, position):
                    parts[leaf] = LINEAR
        for node in self._nodes:  # a table tied to the head is an embedding
            for position in _EMBEDDING_INPUTS.get(node.op_type, ()):
                for leaf in self._constant_leaves(node, position):
                    if not self._is_index_table(leaf):
                        parts[leaf] = EMBEDDINGS
        return parts

    def _is_index_table(self, leaf: str) -> bool:
        """Position ids and the like are gathered from, too, and are no embedding."""
        tensor = self.tensors[leaf]
        return tensor.dtype in ("int64", "int32", "bool") or tensor.rank < 2

    def _constant_leaves(self, node: Any, position: int) -> frozenset[str]:
        if position >= len(node.input) or not node.input[position]:
            return frozenset()
        return self._find_leaves(node.input[position]) or frozenset()

    def _find_leaves(self, tensor: str) -> frozenset[str] | None:
        """The tensors a constant value is computed from; None where an activation is among them.

        Iterative, for constant subgraphs may be deep.
        """
        stack = [tensor]
        while stack:
            name = stack[-1]
            if name in self._leaves:
                stack.pop()
            elif name in self.tensors:
                self._leaves[name] = frozenset((name,))
            elif name not in self._producer:
                self._leaves[name] = None
            else:
                inputs = [i for i in self._producer[name].input if i]
                waiting = [i for i in inputs if i not in self._leaves]
                stack += waiting
                if not waiting:
                    found = [self._leaves[i] for i in inputs]
                    self._leaves[name] = _union(found)
        return self._leaves[tensor]


def _union(sets: list[frozenset[str] | None]) -> frozenset[str] | None:
    if not sets or any(found is None for found in sets):
        return None
    return frozenset().union(*(found for found in sets if found))


def _linear_positions(node: Any) -> tuple[int, ...]:
    if node.op_type in _LINEAR_INPUTS:
        return _LINEAR_INPUTS[node.op_type]
    # The rescaling of a lowered layer: its Mul holds weight scales.
    ours = any(p.key == onnx_io.LAYER_KEY for p in node.metadata_props)
    return (0, 1) if ours and node.op_type == "Mul" else ()


def _graphs(graph: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A graph and the bodies of its If, Loop and Scan nodes."""
    yield prefix, graph
    for i, node in enumerate(graph.node):
        for attribute in node.attribute:
            bodies = [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
            for body in bodies:
                yield from _graphs(body, f"{prefix}{i}/")


def _constants(node: Any) -> list[Any]:
    """Tensors stored inside a node."""
    return [a.t for a in node.attribute if a.HasField("t")]


def _external_files(model: Any) -> set[str]:
    tensors = [t for _, g in _graphs(model.graph) for t in g.initializer]
    tensors += [t for _, g in _graphs(model.graph) for n in g.node for t in _constants(n)]
    return {e.value for t in tensors for e in t.external_data if e.key == "location"}


_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


def _measure(tensor: Any) -> _Tensor:
    """Payload bytes of a tensor: raw, external, or in the typed field it is stored in."""
    from math import prod

    from onnx import external_data_helper, helper

    elements = prod(tensor.dims)
    if tensor.data_type == 8:  # strings have no fixed size
        return _Tensor(sum(map(len, tensor.string_data)), elements, "string", len(tensor.dims))
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    name = _NAMES.get(dtype.name, dtype.name)
    if external_data_helper.uses_external_data(tensor):
        length = next((int(e.value) for e in tensor.external_data if e.key == "length"), None)
        stored = elements * dtype.itemsize if length is None else length
    elif tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
    else:
        # A typed field is written as varints: what the message weighs beyond an empty one.
        empty = type(tensor)(dims=tensor.dims, data_type=tensor.data_type, name=tensor.name)
        stored = tensor.ByteSize() - empty.ByteSize()
    return _Tensor(stored, elements, name, len(tensor.dims))
