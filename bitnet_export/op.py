"""TernaryMatMul: its attributes, ONNX schema, ONNX function body and NumPy reference.

Y[..., N] = X[..., K] . W[N, K]^T * scale + bias, with W ternary and packed (packing.py).
``reference_ternary_matmul`` is the oracle: the function body, BitLinear's forward in eval mode,
the CPU path and every kernel are tested against it. How the op is emitted is export.py's
business, how it is lowered the passes'.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitnet_export import packing
from bitnet_export.errors import InputError, UsageError

if TYPE_CHECKING:
    import onnx

OP_TYPE = "TernaryMatMul"
DOMAIN = "bitnet"
TRT_DOMAIN = "trt.plugins"
OP_VERSION = 1
# BitwiseAnd, and ReduceMax with its axes as an input, came with 18.
OLDEST_OPSET = 18
# Attributes by which TensorRT's parser prefers the plugin over a function body of the same name.
TRT_ATTRIBUTES = {"plugin_version": "1", "plugin_namespace": ""}

ABSMAX_FLOOR = 1e-5
INT8_MAX = 127
# float32 holds every integer up to 2^24: the largest K whose int8 sums the function body,
# which multiplies integer-valued floats, still gets exactly.
MAX_EXACT_K = 2**24 // 128

FloatArray = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class TernaryAttributes:
    """The op's attributes. group_size 0: one scale per row or tensor. activation_bits 8 or 0."""

    K: int
    N: int
    group_size: int = 0
    activation_bits: int = 8

    def __post_init__(self) -> None:
        if self.K < 1 or self.N < 1:
            raise InputError(f"TernaryMatMul needs K >= 1 and N >= 1, got K={self.K}, N={self.N}")
        if self.group_size < 0 or (self.group_size and self.K % self.group_size):
            raise InputError(f"K={self.K} is not a multiple of group_size={self.group_size}")
        if self.activation_bits not in (0, 8):
            raise InputError(f"activation_bits must be 8 or 0, got {self.activation_bits}")

    @property
    def groups(self) -> int:
        """Groups along K, 1 without group scales."""
        return self.K // self.group_size if self.group_size else 1

    def scale_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes a scale may have: [N, K/group_size], or [1] or [N]."""
        return ((self.N, self.groups),) if self.group_size else ((1,), (self.N,))

    def as_dict(self) -> dict[str, int]:
        """Attributes as ONNX node attributes."""
        return asdict(self)


def quantize_activations(x: FloatArray) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """x [..., K] float -> (xq [..., K] int8, a [..., 1] float32), x ~ xq * a; absmax per row.

    BitNet b1.58 (arXiv:2402.17764). The division by ``a`` rather than a multiplication by its
    reciprocal makes this ONNX QuantizeLinear bit for bit. Rows with NaN keep NaN in ``a``.
    """
    x32 = np.asarray(x, np.float32)
    s = np.maximum(np.abs(x32).max(axis=-1, keepdims=True), np.float32(ABSMAX_FLOOR))
    a = s / np.float32(INT8_MAX)
    with np.errstate(invalid="ignore"):
        xq = np.clip(np.rint(x32 / a), -INT8_MAX - 1, INT8_MAX)
    return np.nan_to_num(xq, nan=0.0).astype(np.int8), a


def reference_ternary_matmul(
    x: FloatArray,
    packed_weight: npt.NDArray[np.uint8],
    scale: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None = None,
    *,
    attributes: TernaryAttributes,
) -> FloatArray:
    """The oracle. x [..., K] float32/float16, packed_weight [N, K'/4] uint8, scale float32 [1],
    [N] or [N, K/group_size], bias [N] float32 or None -> y [..., N] in x's dtype.

    Raises InputError where a shape does not fit the attributes.
    """
    at = attributes
    check_operands(x.shape, packed_weight.shape, scale.shape, bias, at)
    w = packing.unpack(packed_weight, at.K).reshape(at.N, at.groups, -1)
    values: npt.NDArray[Any] = x
    a = np.ones((*x.shape[:-1], 1), np.float32)
    if at.activation_bits:
        values, a = quantize_activations(x)
    # float64 holds the integer sums exactly, and is multiplied many times faster than int64.
    left = values.astype(np.float64).reshape(-1, at.groups, at.K // at.groups)
    sums = left.transpose(1, 0, 2) @ w.astype(np.float64).transpose(1, 2, 0)  # [groups, M, N]
    sums = sums.transpose(1, 2, 0).reshape(*x.shape[:-1], at.N, at.groups)
    scale32 = np.asarray(scale, np.float32).reshape(-1, at.groups)
    y = (sums.astype(np.float32) * scale32).sum(axis=-1, dtype=np.float32) * a
    if bias is not None:
        y = y + np.asarray(bias, np.float32)
    return y.astype(x.dtype)


def check_operands(
    x_shape: tuple[int, ...],
    packed_shape: tuple[int, ...],
    scale_shape: tuple[int, ...],
    bias: npt.NDArray[np.float32] | None,
    attributes: TernaryAttributes,
) -> None:
    """Raise InputError where a shape does not fit the attributes."""
    at = attributes
    if not x_shape or x_shape[-1] != at.K:
        raise InputError(f"X must be [..., {at.K}], got {list(x_shape)}")
    expected = (at.N, packing.packed_row_bytes(at.K))
    if tuple(packed_shape) != expected:
        raise InputError(f"packed_weight must be {list(expected)}, got {list(packed_shape)}")
    if tuple(scale_shape) not in at.scale_shapes():
        wanted = " or ".join(str(list(s)) for s in at.scale_shapes())
        raise InputError(f"scale must be {wanted}, got {list(scale_shape)}")
    if bias is not None and bias.shape != (at.N,):
        raise InputError(f"bias must be [{at.N}], got {list(bias.shape)}")


@cache
def register_schema() -> None:
    """Make onnx's checker and shape inference know bitnet::TernaryMatMul. Idempotent.

    The TensorRT form has no schema: its function body serves there, and onnx.reference refuses
    to be imported once two domains have an operator of one name.
    """
    from onnx import defs

    schema_type = defs.OpSchema
    attribute, parameter = schema_type.Attribute, schema_type.FormalParameter
    integer = schema_type.AttrType.INT
    schema = schema_type(
        OP_TYPE,
        DOMAIN,
        OP_VERSION,
        doc="Y = X . W^T * scale + bias with packed ternary W; see docs/concepts.md.",
        inputs=[
            parameter("X", "T"),
            parameter("packed_weight", "tensor(uint8)"),
            parameter("scale", "tensor(float)"),
            parameter(
                "bias", "tensor(float)", param_option=schema_type.FormalParameterOption.Optional
            ),
        ],
        outputs=[parameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "activations")],
        attributes=[
            attribute("K", integer),
            attribute("N", integer),
            attribute("group_size", integer, required=False),
            attribute("activation_bits", integer, required=False),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer_shape)
    defs.register_schema(schema)


def _infer_shape(context: Any) -> None:
    """Y has X's element type and shape, its last dimension replaced by N."""
    import onnx

    x = context.get_input_type(0)
    if x is None:  # made by an operator that onnx does not know, of ONNX Runtime for instance
        return
    y = onnx.TypeProto()
    y.CopyFrom(x)
    n = context.get_attribute("N")
    if n is not None and x.tensor_type.HasField("shape") and x.tensor_type.shape.dim:
        last = y.tensor_type.shape.dim[-1]
        last.Clear()
        last.dim_value = n.i
    context.set_output_type(0, y)


# Codes per element of packed_weight, and the cast that makes its elements shiftable.
_UNPACK = {
    DOMAIN: """
        elements = Unsqueeze (packed_weight, two_1d)
        shifts = Constant <value = uint8[4] {0, 2, 4, 6}> ()
        mask = Constant <value = uint8[1] {3}> ()""",
    TRT_DOMAIN: """
        words = Cast <to = 12> (packed_weight)
        elements = Unsqueeze (words, two_1d)
        shifts = Constant <value = uint32[16]
            {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}> ()
        mask = Constant <value = uint32[1] {3}> ()""",
}

# Integer-valued floats go through MatMul: exact up to MAX_EXACT_K. One path serves every scale:
# tensor and channel scales are the case of a single group.
_BODY = """
<domain: "{domain}", opset_import: ["" : {opset}]>
TernaryMatMul <K, N, group_size, activation_bits> (X, packed_weight, scale, bias) => (Y)
{{
    zero = Constant <value = int64 {{0}}> ()
    zero_1d = Constant <value = int64[1] {{0}}> ()
    one_1d = Constant <value = int64[1] {{1}}> ()
    two_1d = Constant <value = int64[1] {{2}}> ()
    minus_one = Constant <value = int64[1] {{-1}}> ()
    k = Constant <value_int: int = @K> ()
    n = Constant <value_int: int = @N> ()
    group_attribute = Constant <value_int: int = @group_size> ()
    bits = Constant <value_int: int = @activation_bits> ()
    k_1d = Reshape (k, one_1d)
    n_1d = Reshape (n, one_1d)
    no_groups = Equal (group_attribute, zero)
    group = Where (no_groups, k, group_attribute)
    groups = Div (k, group)
    group_1d = Reshape (group, one_1d)
    groups_1d = Reshape (groups, one_1d)

    x_float = Cast <to = 1> (X)
    rows_shape = Concat <axis = 0> (minus_one, k_1d)
    x = Reshape (x_float, rows_shape)
    quantized = Greater (bits, zero)
    magnitude = Abs (x)
    row_max = ReduceMax <keepdims = 1> (magnitude, minus_one)
    floor = Constant <value = float {{1e-5}}> ()
    s = Max (row_max, floor)
    int8_max = Constant <value = float {{127}}> ()
    absmax_scale = Div (s, int8_max)
    float_one = Constant <value = float {{1}}> ()
    a = Where (quantized, absmax_scale, float_one)
    x_scaled = Div (x, a)
    x_int8 = Round (x_scaled)
    left = Where (quantized, x_int8, x)
    left_shape = Concat <axis = 0> (minus_one, groups_1d, group_1d)
    left_3d = Reshape (left, left_shape)
    left_by_group = Transpose <perm = [1, 0, 2]> (left_3d)

    {unpack}
    shifted = BitShift <direction = "RIGHT"> (elements, shifts)
    codes_3d = BitwiseAnd (shifted, mask)
    codes_shape = Concat <axis = 0> (n_1d, minus_one)
    codes_padded = Reshape (codes_3d, codes_shape)
    codes = Slice (codes_padded, zero_1d, k_1d, one_1d)
    codes_float = Cast <to = 1> (codes)
    zero_code = Constant <value = float {{2}}> ()
    trits = Sub (codes_float, zero_code)
    trits_shape = Concat <axis = 0> (n_1d, groups_1d, group_1d)
    trits_3d = Reshape (trits, trits_shape)
    right_by_group = Transpose <perm = [1, 2, 0]> (trits_3d)

    scale_shape = Concat <axis = 0> (minus_one, groups_1d)
    scale_2d = Reshape (scale, scale_shape)
    scale_t = Transpose <perm = [1, 0]> (scale_2d)
    scale_by_group = Unsqueeze (scale_t, one_1d)

    sums = MatMul (left_by_group, right_by_group)
    scaled = Mul (sums, scale_by_group)
    y_sum = ReduceSum <keepdims = 0> (scaled, zero_1d)
    y_scaled = Mul (y_sum, a)
    y_rows = Add (y_scaled, bias)
    x_shape = Shape (X)
    leading = Slice (x_shape, zero_1d, minus_one)
    y_shape = Concat <axis = 0> (leading, n_1d)
    y = Reshape <allowzero = 1> (y_rows, y_shape)
    Y = CastLike (y, X)
}}
"""


def check_opset(opset: int) -> None:
    """Raise UsageError for a default-domain opset the function body cannot be written in, or that
    the installed onnx does not know: torch's exporter would quietly write another one."""
    from onnx import defs

    newest = defs.onnx_opset_version()
    if opset > newest:
        raise UsageError(
            f"the installed onnx knows opsets up to {newest}",
            where=f"--opset {opset}",
            fix=f"leave --opset out, or pass {OLDEST_OPSET} to {newest}",
        )
    if opset < OLDEST_OPSET:
        raise UsageError(
            f"TernaryMatMul's function body needs opset {OLDEST_OPSET}, not {opset}",
            where=f"--opset {opset}",
            fix=f"leave --opset out, or pass {OLDEST_OPSET} or more",
        )


def function_body(opset: int, domain: str = DOMAIN) -> onnx.FunctionProto:
    """TernaryMatMul written in standard ONNX operators, for runtimes without a native one.

    opset: the default-domain version of the model it goes into, at least 18 (BitwiseAnd). The
    node must have a bias: an ONNX function cannot test for an absent input. It is there for
    correctness and portability, not speed: ONNX Runtime folds it to float weights.
    """
    import onnx.parser

    check_opset(opset)
    text = _BODY.format(domain=domain, opset=opset, unpack=_UNPACK[domain].strip())
    return onnx.parser.parse_function(text)
