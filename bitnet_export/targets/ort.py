"""Target ort: operators of stock ONNX Runtime only, nothing to compile.

Two kernels: MatMulNBits with 2-bit weights, which reads the fewest bytes and wins where a
run sees a few rows (decoding), and int8 products, which win from a few rows on and are exact.
The threshold was measured on AVX2 only; docs/decisions.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median_high
from typing import TYPE_CHECKING

from bitnet_export import onnx_io, op
from bitnet_export.errors import MissingRequirement, UsageError
from bitnet_export.manifest import version_tuple
from bitnet_export.passes import (
    FoldConstants,
    LowerInt8,
    LowerTwoBit,
    MergeSiblings,
    PackConvolutions,
    Pass,
)
from bitnet_export.targets.base import (
    Decision,
    Lowered,
    Target,
    embedding_passes,
    embeddings_kind,
)

if TYPE_CHECKING:
    import onnx

    from bitnet_export.options import ExportOptions

# 2-bit MatMulNBits: refused below 1.24, only a slow fallback below 1.28.
OLDEST_ORT = "1.28"
# Rows up to which the 2-bit kernel is the faster one; the int8 one grows slower from there.
TWO_BIT_ROWS = 4


class OrtTarget(Target):
    """The default on a CPU."""

    name = "ort"
    own_options = ("ort_kernel", "activation_scale", "triton")

    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """Choose the kernel, then merge, quantize embeddings and lower."""
        if options.dtype == "fp16":
            raise UsageError(
                "ONNX Runtime's CPU kernels compute in float32",
                where="--dtype fp16",
                fix="leave --dtype out, or use --target onnx or trt",
            )
        check_onnxruntime()
        int8_layers = [can_be_int8(at) for at in attributes_of(model)]
        decision = choose_kernel(model, options.ort_kernel, opt_sizes)
        if decision.choice == "int8" and not any(int8_layers):
            why = "no layer has an int8 form: group scales and float activations run as 2-bit"
            decision = Decision("ort_kernel", "2bit", f"{why} ({decision.reason})")
        passes: list[Pass] = [FoldConstants(), MergeSiblings(), PackConvolutions()]
        passes += embedding_passes(options, contrib=True)
        kinds = ["function"] if decision.choice == "none" else []
        if decision.choice == "int8":
            passes.append(LowerInt8(options.activation_scale))
            kinds.append("int8" if options.activation_scale == "row" else "int8-tensor")
        if decision.choice == "2bit" or not all(int8_layers):
            kinds.append("2bit")
        passes.append(LowerTwoBit())
        lowered = Lowered(
            model,
            [],
            [decision],
            parity_kinds=(*kinds, *embeddings_kind(options)),
            requires={"onnxruntime": OLDEST_ORT},
        )
        return passes, lowered


def check_onnxruntime() -> None:
    """Raise MissingRequirement unless an ONNX Runtime with the 2-bit kernels is installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingRequirement(
            "--target ort needs ONNX Runtime, which is not installed",
            fix="pip install 'bitnet-export[ort]'",
        ) from error
    if version_tuple(onnxruntime.__version__) < version_tuple(OLDEST_ORT):
        raise MissingRequirement(
            f"--target ort needs ONNX Runtime {OLDEST_ORT} or newer for fast 2-bit kernels, "
            f"{onnxruntime.__version__} is installed",
            fix=f"pip install -U 'onnxruntime>={OLDEST_ORT}'",
        )


def choose_kernel(model: onnx.ModelProto, asked: str, opt_sizes: Mapping[str, int]) -> Decision:
    """auto | 2bit | int8 -> the kernel and why; "none" for a model without TernaryMatMul."""
    if not attributes_of(model):
        why = "no layer is a matrix product: what is ternary runs as floating point Conv"
        return Decision("ort_kernel", "none", why)
    if asked != "auto":
        return Decision("ort_kernel", asked, f"asked for with --ort-kernel {asked}")
    rows = rows_per_run(model, opt_sizes)
    shape = ", ".join(f"{k}={v}" for k, v in opt_sizes.items()) or "the static shape"
    if rows is None:
        return Decision("ort_kernel", "int8", "the rows a run will see could not be inferred")
    if rows <= TWO_BIT_ROWS:
        why = f"{rows} row(s) a run at {shape}: reading weights decides, 2 bits are the fewest"
        return Decision("ort_kernel", "2bit", why)
    why = f"{rows} rows a run at {shape}: arithmetic decides, int8 products do the most of it"
    return Decision("ort_kernel", "int8", why)


def rows_per_run(model: onnx.ModelProto, opt_sizes: Mapping[str, int]) -> int | None:
    """The rows M most TernaryMatMuls see at the opt shape, or None where shapes are unknown."""
    bound = onnx_io.skeleton(model)
    del bound.graph.value_info[:]
    for value in bound.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in opt_sizes:
                dim.dim_value = opt_sizes[dim.dim_param]
    known = onnx_io.infer_shapes(bound)
    shapes = {
        name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for name, v in known.items()
        if v.type.tensor_type.HasField("shape")
    }
    nodes = [n for n in model.graph.node if n.op_type == op.OP_TYPE]
    rows = [math.prod(shapes[n.input[0]][:-1]) for n in nodes if n.input[0] in shapes]
    rows = [r for r in rows if r > 0]
    return median_high(rows) if rows else None


def attributes_of(model: onnx.ModelProto) -> list[op.TernaryAttributes]:
    """The attributes of every TernaryMatMul in the model."""
    fields = ("K", "N", "group_size", "activation_bits")
    return [
        op.TernaryAttributes(**{a.name: a.i for a in node.attribute if a.name in fields})
        for node in model.graph.node
        if node.op_type == op.OP_TYPE
    ]


def can_be_int8(attributes: op.TernaryAttributes) -> bool:
    """Whether LowerInt8 takes a layer of these attributes."""
    return attributes.activation_bits == 8 and not attributes.group_size
