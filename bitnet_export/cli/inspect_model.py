"""What ``inspect`` found in an ONNX file: its rows, read off the graph without running it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_export import onnx_io, onnx_tensors, op, packing
from bitnet_export.compress import PlainModel
from bitnet_export.errors import InputError, UsageError

# Products of int8 activations and 2-bit weights unpacked in the graph -> position of their scale.
_INT8_PRODUCTS = {"MatMulIntegerToFloat": 3, "DynamicQuantizeMatMul": 2}


@dataclass(frozen=True)
class TernaryLayer:
    """One ternary product. bytes: packed weights and scales; sparsity: part of zeros."""

    name: str
    K: int
    N: int
    scale: str
    sparsity: float
    bytes: int
    bits_per_weight: float
    operator: str


@dataclass(frozen=True)
class Candidate:
    """A dense product with constant weights and what an export would do with it."""

    name: str
    K: int | str
    N: int | str
    verdict: str


@dataclass
class Inspection:
    """Everything inspect shows, by the keys of its --json."""

    path: str
    bytes: int
    ir_version: int
    opsets: dict[str, int]
    inputs: list[str]
    outputs: list[str]
    operators: dict[str, int]
    bytes_by_part: dict[str, int]
    compressed_bytes: int | None = None
    layers: list[TernaryLayer] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    refusal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def inspect_model(path: Path) -> Inspection:
    """path: an ONNX file or a directory with model.onnx. Raises InputError for anything else."""
    from bitnet_export.verify.size import measure_size

    plain = PlainModel(path / "model.onnx" if path.is_dir() else path)
    file = _onnx_file(plain.path)
    model = onnx_io.read_model(file)
    size = measure_size(file)
    names = Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node)
    layers = list(_ternary_layers(model))
    candidates, refusal = ([], "") if layers else _what_an_export_would_do(file)
    return Inspection(
        path=str(plain.at_rest),
        bytes=size.total,
        compressed_bytes=plain.stored_bytes,
        ir_version=model.ir_version,
        opsets={i.domain: i.version for i in model.opset_import},
        inputs=[_describe(v) for v in model.graph.input],
        outputs=[_describe(v) for v in model.graph.output],
        operators=dict(names.most_common()),
        bytes_by_part=dict(size.part_bytes),
        layers=layers,
        candidates=candidates,
        refusal=refusal,
    )


def _onnx_file(path: Path) -> Path:
    if not path.exists():
        raise InputError("there is no such file", where=str(path), fix="pass an .onnx file")
    from bitnet_export.load.detect import detect

    kind = detect(path)
    if kind != "onnx":
        raise InputError(
            f"inspect reads ONNX files, and this is something else ({kind.replace('_', ' ')})",
            where=str(path),
            fix=f"export it first: bitnet-export {path} --target onnx",
        )
    return path


def _describe(value: Any) -> str:
    """ "ids int64 [batch, sequence]"."""
    import onnx

    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type"):
        return f"{value.name} ({value.type.WhichOneof('value')})"
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dims = (d.dim_param or str(d.dim_value or "?") for d in tensor.shape.dim)
    return f"{value.name} {dtype} [{', '.join(dims)}]"


def _ternary_layers(model: Any) -> Iterator[TernaryLayer]:
    """TernaryMatMul, 2-bit MatMulNBits and int8 products fed by packed weights."""
    constants = {t.name: t for t in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        attributes = {a.name: a for a in node.attribute}
        k = attributes["K"].i if "K" in attributes else 0
        ours = node.op_type == op.OP_TYPE and node.domain in (op.DOMAIN, op.TRT_DOMAIN)
        if len(node.input) > 2 and (ours or _is_2bit(node, attributes)):
            weight, scale = node.input[1], node.input[2]
        elif node.op_type in _INT8_PRODUCTS:
            weight, k = _packed_source(node.input[1], producers, constants)
            scale = node.input[_INT8_PRODUCTS[node.op_type]]
        else:
            continue
        if weight in constants and scale in constants and k:
            layer = _layer(node, k, constants[weight], constants[scale])
            if layer is not None:
                yield layer


def _is_2bit(node: Any, attributes: dict[str, Any]) -> bool:
    return node.op_type == "MatMulNBits" and "bits" in attributes and attributes["bits"].i == 2


def _packed_source(tensor: str, producers: Any, constants: Any) -> tuple[str, int]:
    """The packed weights that a chain of unpacking nodes starts from, and its K: where it cuts
    the padding off, if there is any. ("", 0) if it starts from something else."""
    k = 0
    while tensor in producers:
        node = producers[tensor]
        if node.op_type == "Slice" and node.input[2] in constants:
            k = int(onnx_tensors.values(constants[node.input[2]]).ravel()[0])
        tensor = node.input[0] if node.input else ""
    if tensor not in constants:
        return "", 0
    return tensor, k or packing.CODES_PER_BYTE * math.prod(constants[tensor].dims[1:])


def _layer(node: Any, k: int, weight: Any, scale: Any) -> TernaryLayer | None:
    """The row for one product; None if the 2-bit weights are not ternary."""
    packed, scales = onnx_tensors.values(weight), onnx_tensors.values(scale)
    if packed.dtype == np.int32:
        packed = packing.from_int32(packed)
    n = packed.shape[0]
    try:
        trits = packing.unpack(np.ascontiguousarray(packed.reshape(n, -1)), k)
    except InputError:
        return None
    size = packed.nbytes + scales.nbytes
    return TernaryLayer(
        name=onnx_io.node_layer(node) or node.name or node.output[0],
        K=k,
        N=n,
        scale=_scale_kind(scales, n),
        sparsity=float((trits == 0).mean()),
        bytes=size,
        bits_per_weight=8 * size / (k * n),
        operator=f"{node.domain}::{node.op_type}" if node.domain else node.op_type,
    )


def _scale_kind(scales: Any, n: int) -> str:
    if scales.size == 1:
        return "tensor"
    if scales.size == n or (scales.ndim == 2 and (scales == scales[:, :1]).all()):
        return "channel"
    return f"group ({scales.size // n} a row)"


def _what_an_export_would_do(file: Path) -> tuple[list[Candidate], str]:
    """Its candidates, or why it would refuse the file."""
    from bitnet_export.load.onnx_file import load_onnx, read_onnx

    try:
        load_onnx(file)
        return list(_candidates(read_onnx(file))), ""
    except UsageError as error:
        return [], error.what


def _candidates(model: Any) -> Iterator[Candidate]:
    """The passes that an export runs, on a copy: what they rewrite and what they leave, why."""
    from bitnet_export.passes.base import run_passes, ternary_nodes
    from bitnet_export.passes.canonicalize import Canonicalize
    from bitnet_export.passes.fold_constants import FoldConstants
    from bitnet_export.passes.opset import raise_opset
    from bitnet_export.passes.recognise import RecogniseTernary
    from bitnet_export.passes.ternarize_dense import TernarizeDense
    from bitnet_export.ternary import TernaryConfig

    model = raise_opset(model)
    first = [FoldConstants(), Canonicalize(), RecogniseTernary()]
    model, _ = run_passes(model, first)
    known = {n.layer for n in ternary_nodes(onnx_io.to_graph(model))}
    model, results = run_passes(model, [TernarizeDense(TernaryConfig())])
    for node in ternary_nodes(onnx_io.to_graph(model)):
        verdict = "already ternary, kept exactly" if node.layer in known else "would become ternary"
        yield Candidate(node.layer, node.attributes.K, node.attributes.N, verdict)
    for skip in results[0].skipped:
        yield Candidate(skip.where, "", "", f"kept: {skip.reason}")
