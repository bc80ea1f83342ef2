"""TernaryMatMul: the function body in two runtimes against the NumPy reference."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from bitnet_export import op, packing
from bitnet_export.errors import InputError, UsageError


def make_case(m, k, n, group_size=0, scale="channel", bits=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    at = op.TernaryAttributes(K=k, N=n, group_size=group_size, activation_bits=bits)
    shape = {"tensor": (1,), "channel": (n,), "group": (n, at.groups)}[scale]
    return at, {
        "X": rng.standard_normal((*m, k)).astype(dtype),
        "packed_weight": packing.pack(rng.integers(-1, 2, (n, k))),
        "scale": rng.uniform(0.01, 0.1, shape).astype(np.float32),
        "bias": rng.standard_normal(n).astype(np.float32),
    }


def make_model(at, feeds, domain=op.DOMAIN, with_function=True):
    op.register_schema()
    feeds = dict(feeds)
    if domain == op.TRT_DOMAIN:
        feeds["packed_weight"] = packing.as_int32(feeds["packed_weight"])
    extra = op.TRT_ATTRIBUTES if domain == op.TRT_DOMAIN else {}
    node = helper.make_node(op.OP_TYPE, list(feeds), ["Y"], domain=domain, **at.as_dict(), **extra)
    element = helper.np_dtype_to_tensor_dtype(feeds["X"].dtype)
    dims = [f"d{i}" for i in range(feeds["X"].ndim - 1)]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("X", element, [*dims, at.K])],
        [helper.make_tensor_value_info("Y", element, [*dims, at.N])],
        [onnx.numpy_helper.from_array(v, k) for k, v in feeds.items() if k != "X"],
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(domain, 1)],
        functions=[op.function_body(20, domain)] if with_function else [],
        ir_version=10,
    )


CASES = [
    dict(m=(1,), k=64, n=3),
    dict(m=(3,), k=5, n=1, scale="tensor"),
    dict(m=(2, 17), k=65, n=7, bits=0),
    dict(m=(2, 3), k=96, n=4, group_size=32, scale="group"),
    dict(m=(17,), k=128, n=2, group_size=64, scale="group", bits=0),
    dict(m=(4,), k=70, n=5, dtype=np.float16),
    dict(m=(0,), k=64, n=3),  # an expert that no token chose
    dict(m=(2, 0), k=96, n=4, group_size=32, scale="group", bits=0),
]


@pytest.mark.parametrize("domain", [op.DOMAIN, op.TRT_DOMAIN])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_function_body_matches_reference(case, domain):
    at, feeds = make_case(**case)
    model = make_model(at, feeds, domain)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"X": feeds["X"]})
    want = op.reference_ternary_matmul(*feeds.values(), attributes=at)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    # Integer sums are exact; what is left is a few roundings of the scaling (float16: of the
    # final cast), or of the float sum where the activations are not quantized.
    tolerance = 1e-3 if got.dtype == np.float16 else 1e-5 if at.activation_bits == 0 else 1e-6
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_function_body_in_the_reference_evaluator():
    from onnx.reference import ReferenceEvaluator

    at, feeds = make_case(m=(2, 3), k=70, n=4)
    (got,) = ReferenceEvaluator(make_model(at, feeds)).run(None, {"X": feeds["X"]})
    want = op.reference_ternary_matmul(*feeds.values(), attributes=at)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_shape_inference_knows_the_op():
    at, feeds = make_case(m=(2, 3), k=70, n=4)
    model = make_model(at, feeds, with_function=False)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["d0", "d1", 4]


def test_quantized_activations_are_onnx_quantize_linear():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((64, 384)) * rng.uniform(1e-3, 50, (64, 1))).astype(np.float32)
    xq, a = op.quantize_activations(x)
    node = helper.make_node("QuantizeLinear", ["x", "a", "z"], ["q"], axis=0)
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [64]),
            helper.make_tensor_value_info("z", TensorProto.INT8, [64]),
        ],
        [helper.make_tensor_value_info("q", TensorProto.INT8, x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": x, "a": a[:, 0], "z": np.zeros(64, np.int8)})
    assert np.array_equal(got, xq)


def test_rows_of_zeros_and_of_nan():
    at, feeds = make_case(m=(3,), k=64, n=2)
    feeds["X"][0] = 0
    feeds["X"][1, 5] = np.nan
    y = op.reference_ternary_matmul(*feeds.values(), attributes=at)
    assert np.array_equal(y[0], feeds["bias"])
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[2]).all()
    session = ort.InferenceSession(
        make_model(at, feeds).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (got,) = session.run(None, {"X": feeds["X"]})
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()


@pytest.mark.parametrize(
    "change",
    [
        dict(X=np.zeros((2, 63), np.float32)),
        dict(packed_weight=np.full((3, 32), 170, np.uint8)),
        dict(scale=np.ones((2, 2), np.float32)),
        dict(bias=np.ones(4, np.float32)),
    ],
    ids=lambda c: next(iter(c)),
)
def test_reference_refuses_shapes_that_do_not_fit(change):
    at, feeds = make_case(m=(2,), k=64, n=3)
    with pytest.raises(InputError, match=r"must be \["):
        op.reference_ternary_matmul(*(feeds | change).values(), attributes=at)


@pytest.mark.parametrize(
    "bad", [dict(K=0), dict(N=0), dict(group_size=48), dict(activation_bits=4)], ids=str
)
def test_attributes_are_checked(bad):
    with pytest.raises(InputError):
        op.TernaryAttributes(**(dict(K=64, N=2) | bad))


@pytest.mark.parametrize("opset", [17, onnx.defs.onnx_opset_version() + 1])
def test_an_opset_that_cannot_be_written(opset):
    with pytest.raises(UsageError, match=rf"opset.*\n.*pass {op.OLDEST_OPSET}"):
        op.check_opset(opset)
