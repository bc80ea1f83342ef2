"""lower-rtx: int4 weights that are exactly the trits, float16 products, any shape."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitnet_export import onnx_io, op, packing
from bitnet_export.errors import StageError
from bitnet_export.passes.lower_rtx import (
    at_rtx_opset,
    dense_weights,
    int4_weights,
    lower_rtx,
    pack_int4,
)
from tests.passes.graphs import (
    initializers,
    layers,
    ops,
    run,
    ternary_case,
    ternary_model,
    x_of,
)

# float16 keeps 11 bits: the scale and y are each rounded to 2^-11 = 4.9e-4 of their size. The
# size is that of the K products together, sqrt(K) times one of them: a y that came out small by
# cancellation is no more exact. ONNX Runtime's fused CPU kernel also sums in float16.
PLAIN, FUSED = 4e-3, 4e-2


def lowered(case, dtype="float16", **kwargs):
    made, result = lower_rtx(at_rtx_opset(ternary_model(case, dtype=dtype, **kwargs)))
    onnx_io.check_model(made, "after the pass")
    return made, result


def want(x, case):
    """The reference without int8 activations: those stay floating point here."""
    at, trits, scale, bias = case
    float_at = op.TernaryAttributes(at.K, at.N, at.group_size, 0)
    x32 = x.astype(np.float32)
    return op.reference_ternary_matmul(x32, packing.pack(trits), scale, bias, attributes=float_at)


def assert_close(y, x, case, relative=FUSED):
    at, trits, scale, bias = case
    expected = want(x, case)
    weights = trits * np.repeat(scale.reshape(-1, at.groups), at.K // at.groups, axis=1)
    size = np.sqrt(np.square(x.astype(np.float32)) @ np.square(weights).T)
    size = size + (0 if bias is None else np.abs(bias))
    assert (np.abs(y.astype(np.float32) - expected) <= relative * size + 1e-6).all()


@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "plain"])
@pytest.mark.parametrize("k", [1, 5, 128, 200, 384])
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
def test_agrees_with_the_float_reference(k, n, scale, optimize):
    case = ternary_case(k, n, scale=scale, seed=k + n)
    made, _ = lowered(case)
    x = x_of(3, k, dtype=np.float16)
    y = run(made, optimize=optimize, x=x)["y"]
    assert_close(y, x, case, FUSED if optimize else PLAIN)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 0])
def test_group_scales_become_the_blocks(group, bits):
    case = ternary_case(256, 8, scale="group", group_size=group, bits=bits)
    made, result = lowered(case)
    (node,) = [n for n in made.graph.node if n.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in node.attribute} == {"axis": 0, "block_size": group}
    x = x_of(5, 256, dtype=np.float16)
    assert_close(run(made, x=x)["y"], x, case)
    assert bool(result.notes) == (bits == 8)  # said where int8 activations are given up


def test_weights_are_the_trits_exactly():
    case = ternary_case(200, 3)
    made, result = lowered(case)
    stored = initializers(made)["y.int4"]
    assert np.array_equal(stored.astype(np.int8), case[1].T)
    assert initializers(made)["y.scale16"].shape == (2, 3)  # K=200: one whole block, one part
    assert int4_weights(made) == 600
    assert result.rewritten == 1
    assert not result.warnings


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_only_standard_operators_are_left(bias):
    made, _ = lowered(ternary_case(64, 4, bias=bias))
    assert ops(made) == ["DequantizeLinear", "MatMul", *(["Add"] if bias else [])]
    assert set(layers(made)) == {"layer"}
    assert [(i.domain, i.version) for i in made.opset_import] == [("", 21)]
    assert not made.functions
    assert set(initializers(made)) == {"y.int4", "y.scale16", *(["y.bias16"] if bias else [])}


def test_float32_tensors_get_casts():
    case = ternary_case(64, 4)
    made, _ = lowered(case, dtype="float32", x_shape=("batch", 2, None))
    assert ops(made) == ["Cast", "DequantizeLinear", "MatMul", "Add", "Cast"]
    x = x_of(3, 2, 64)
    y = run(made, x=x)["y"]
    assert y.dtype == np.float32
    assert_close(y, x, case)


@pytest.mark.parametrize(("k", "n"), [(1, 1), (200, 3), (384, 64)])
def test_dense_weights_do_not_change_a_bit(k, n):
    case = ternary_case(k, n)
    made, _ = lowered(case)
    dense, count = dense_weights(made)
    onnx_io.check_model(dense, "dense")
    assert count == 1
    assert "DequantizeLinear" not in ops(dense)
    x = x_of(17, k, dtype=np.float16)
    plain = run(made, optimize=False, x=x)["y"]
    assert np.array_equal(run(dense, optimize=False, x=x)["y"], plain)


def test_scales_too_small_for_float16_are_told():
    at, trits, scale, bias = ternary_case(64, 4)
    _, result = lowered((at, trits, scale * 1e-5, bias))
    assert "lose precision in float16" in result.warnings[0]
    assert "layer" in result.warnings[0]


def test_a_scale_of_zero_is_exact_and_not_told():
    at, trits, scale, bias = ternary_case(64, 4)
    _, result = lowered((at, trits, scale * 0, bias))
    assert not result.warnings


def test_computed_weights_are_refused():
    made = at_rtx_opset(ternary_model(ternary_case(64, 4), dtype="float16"))
    scale = next(t for t in made.graph.initializer if t.name == "layer.scale")
    made.graph.node.insert(0, helper.make_node("Identity", ["given"], ["layer.scale"]))
    scale.name = "given"
    with pytest.raises(StageError, match=r"layer: .*computed layer\.scale"):
        lower_rtx(made)


def test_raising_the_opset_keeps_module_paths_and_the_function():
    made = ternary_model(ternary_case(64, 4))
    raised = at_rtx_opset(made)
    assert onnx_io.model_opset(raised) == 21
    assert layers(raised) == ["layer"]
    x = x_of(2, 64)
    assert np.array_equal(run(raised, x=x)["y"], run(made, x=x)["y"])
    assert at_rtx_opset(raised) is raised


@pytest.mark.parametrize("shape", [(1,), (3, 5), (4, 4), (0,)])
def test_pack_int4_is_what_onnx_reads(shape):
    values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
    tensor = helper.make_tensor("t", onnx.TensorProto.INT4, shape, pack_int4(values), raw=True)
    assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)
