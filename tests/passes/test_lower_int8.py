"""lower-int8: bit-exact integers, 2-bit bytes in the file, and an int8 matrix in memory."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from bitnet_export import onnx_io, op
from bitnet_export.passes import LowerInt8, LowerTwoBit
from tests.passes.graphs import (
    apply,
    initializers,
    model,
    ops,
    reasons,
    reference,
    run,
    ternary_case,
    ternary_layer,
    ternary_model,
    value,
    x_of,
)

# Integer sums are exact; the two orders of scaling differ by a rounding or two of float32.
ROUNDING = dict(rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("k", [1, 5, 64, 100, 384])
@pytest.mark.parametrize("n", [1, 3, 65])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_rows_are_exact(m, k, n, scale, bias):
    case = ternary_case(k, n, scale=scale, bias=bias, seed=m)
    after, (result,) = apply(ternary_model(case), LowerInt8())
    assert result.rewritten == 1
    assert op.OP_TYPE not in ops(after)
    x = x_of(m, k, seed=k) * np.float32(10.0) ** np.arange(-3, m - 3)[:, None]
    x = x.astype(np.float32)
    np.testing.assert_allclose(run(after, x=x)["y"], reference(x, case), **ROUNDING)


@pytest.mark.parametrize("shape", [(100,), (2, 3, 100), (2, 1, 3, 100)], ids=str)
def test_any_rank(shape):
    case = ternary_case(100, 7)
    dims = [f"d{i}" for i in range(len(shape) - 1)]
    after, _ = apply(ternary_model(case, (*dims, None)), LowerInt8())
    x = x_of(*shape)
    np.testing.assert_allclose(run(after, x=x)["y"], reference(x, case), **ROUNDING)


def test_zero_rows_and_nan_rows():
    case = ternary_case(64, 5)
    after, _ = apply(ternary_model(case), LowerInt8())
    x = x_of(3, 64)
    x[0], x[1, 7] = 0, np.nan
    y = run(after, x=x)["y"]
    assert np.array_equal(y[0], case[3])
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[2], reference(x[2], case), **ROUNDING)


@pytest.mark.parametrize("lowering", [LowerInt8(), LowerTwoBit()], ids=["int8", "2bit"])
def test_float16_activations_get_casts(lowering):
    case = ternary_case(128, 5)
    after, _ = apply(ternary_model(case, dtype="float16"), lowering)
    x = x_of(3, 128, dtype=np.float16)
    y = run(after, x=x)["y"]
    assert y.dtype == np.float16
    # float16 of sums of up to about 5; MatMulNBits quantizes the activations per block.
    np.testing.assert_allclose(y, reference(x, case), atol=5e-3 if "Mul" in ops(after) else 0.1)


def test_per_tensor_activations():
    case = ternary_case(128, 9)
    after, _ = apply(ternary_model(case), LowerInt8("tensor"))
    assert ops(after)[-1] == "DynamicQuantizeMatMul"
    x = x_of(6, 128)
    want = reference(x, case)
    # One asymmetric uint8 step for the tensor instead of 127 steps a row: 1 % of the range.
    np.testing.assert_allclose(run(after, x=x)["y"], want, atol=0.02 * np.abs(want).max())


def test_layers_that_share_input_and_weights_share_the_work():
    case = ternary_case(64, 64, bias=False)
    constants = {}
    nodes = [ternary_layer(n, "x", y, case, constants) for n, y in (("a", "p"), ("b", "q"))]
    made = model(
        nodes,
        [value("x", ["batch", 64])],
        [value("p", ["batch", 64]), value("q", ["batch", 64])],
        constants,
    )
    after, _ = apply(made, LowerInt8())
    count = ops(after).count
    assert count("QuantizeLinear") == 1
    assert count("BitShift") == 1
    assert count("MatMulIntegerToFloat") == 2
    assert len([v for v in initializers(after).values() if v.size == 64 * 16]) == 1


def test_the_file_keeps_two_bits_and_the_session_unpacks_them(tmp_path):
    k, n = 384, 512
    after, _ = apply(ternary_model(ternary_case(k, n)), LowerInt8())
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    onnx.save_model(after, path)
    assert k * n / 4 < path.stat().st_size < k * n / 4 + 4 * n * 2 + 6000
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    held = onnx.load(optimized)
    assert not {"BitShift", "BitwiseAnd"} & set(ops(held))
    weights = [t for t in held.graph.initializer if list(t.dims) == [k, n]]
    assert [t.data_type for t in weights] == [onnx.TensorProto.INT8]


def test_reasons():
    group, _ = apply(
        ternary_model(ternary_case(64, 4, scale="group", group_size=32)), LowerInt8(), LowerTwoBit()
    )
    assert ops(group) == ["MatMulNBits"]
    for case, why in (
        (ternary_case(64, 4, scale="group", group_size=32), "group scales"),
        (ternary_case(64, 4, bits=0), "float activations"),
    ):
        after, (result,) = apply(ternary_model(case), LowerInt8())
        assert ops(after) == [op.OP_TYPE]
        assert why in reasons(result)["layer"]


@pytest.mark.parametrize("k", [256, 250])
def test_unpacking_holds_few_bytes_a_weight(k):
    """ONNX Runtime keeps the output of every node that it folds for as long as a session lives."""
    n = 512
    after, _ = apply(ternary_model(ternary_case(k, n)), LowerInt8())
    onnx.checker.check_model(after, full_check=True)
    computed, shapes = set(initializers(after)), onnx_io.infer_shapes(after)
    held = 0
    for each in after.graph.node:
        if set(each.input) <= computed:
            computed |= set(each.output)
            tensor = shapes[each.output[0]].type.tensor_type
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
            held += item * np.prod([d.dim_value for d in tensor.shape.dim])
    padding = 256 / k
    assert 1 < held / (k * n) <= (4.75 if k == 256 else 5.75) * padding


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("k", [384, 16384, 300_000])
def test_the_largest_sums_do_not_overflow(sign, k):
    """Every activation at its end and every trit alike: AVX2 adds two products in 16 bits, and all
    of them make an int32."""
    at, _, scale, bias = ternary_case(k, 40)
    case = (at, np.full((40, k), sign, np.int8), scale, bias)
    after, _ = apply(ternary_model(case), LowerInt8())
    x = np.ones((3, k), np.float32) * np.float32([[1], [-1], [0.5]])
    np.testing.assert_allclose(run(after, x=x)["y"], reference(x, case), **ROUNDING)
