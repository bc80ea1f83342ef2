"""Output heads in 8 and 4 bits: against NumPy, in ONNX Runtime and through the function body."""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from bitnet_export.passes import QuantizeEmbeddings
from bitnet_export.passes.heads import MIN_HEAD_WEIGHTS, attach_nbits_body
from bitnet_export.passes.quantize_embeddings import quantize_blocks, zero_point
from tests.passes.graphs import apply, initializers, model, node, ops, reasons, run, value, x_of

K, V = 128, MIN_HEAD_WEIGHTS // 128
BLOCK = {8: 128, 4: 32}


def untied(weight=None, tail=(), **constants):
    weight = x_of(K, V) if weight is None else weight
    last = "y" if not tail else "product"
    return model(
        [node("MatMul", ["x", "w"], [last], "lm_head"), *tail],
        [value("x", ["batch", "sequence", weight.shape[0]])],
        [value("y", ["batch", "sequence", weight.shape[1]])],
        {"w": weight, **constants},
    )


def tied(table=None, uses=1):
    table = x_of(V, K) if table is None else table
    heads = [node("MatMul", ["h", "w"], [f"y{i}"], f"head{i}") for i in range(uses)]
    return model(
        [
            node("Gather", ["table", "ids"], ["h"], "embed"),
            node("Transpose", ["table"], ["w"], "lm_head", perm=[1, 0]),
            *heads,
        ],
        [value("ids", ["batch", "sequence"], "int64")],
        [value(f"y{i}", ["batch", "sequence", V]) for i in range(uses)],
        {"table": table},
    )


def dequantized(rows, bits):
    codes, scale = quantize_blocks(rows, bits, BLOCK[bits])
    return (codes.astype(np.float32) - zero_point(bits)) * np.repeat(scale, BLOCK[bits], axis=1)


def assert_close_to(got, want):
    """Activations in int8 per block: each is off by at most 0.4 % of its block's largest."""
    assert np.abs(got - want).max() <= 0.02 * np.abs(want).max()


@pytest.mark.parametrize("bits", [8, 4])
def test_untied(bits):
    after, (result,) = apply(untied(), QuantizeEmbeddings(bits))
    assert ops(after) == ["Reshape", "MatMulNBits"]
    assert result.notes == [f"lm_head: the output head is in int{bits}"]
    x = x_of(2, 3, K, seed=1)
    assert_close_to(run(after, x=x)["y"], x @ dequantized(x_of(K, V).T, bits).T)


@pytest.mark.parametrize("contrib", [True, False], ids=["contrib", "standard"])
@pytest.mark.parametrize("bits", [8, 4])
def test_tied_weights_are_stored_once(bits, contrib):
    made = tied()
    after, (result,) = apply(made, QuantizeEmbeddings(bits, contrib=contrib))
    assert result.rewritten == 2
    assert "MatMul" not in ops(after)
    codes = [v for v in initializers(after).values() if v.dtype == np.uint8 and v.size > 99]
    assert [v.shape for v in codes] == [(V, K * bits // 8)]
    ids = np.array([[0, 5, V - 1]])
    weight = dequantized(x_of(V, K), bits)
    assert_close_to(run(after, ids=ids)["y0"], weight[ids] @ weight.T)


@pytest.mark.parametrize("bits", [8, 4])
def test_body_in_standard_operators(bits):
    after, _ = apply(untied(), QuantizeEmbeddings(bits))
    attach_nbits_body(after)
    attach_nbits_body(after)  # again: no second one
    assert [f.name for f in after.functions] == ["MatMulNBits"]
    onnx.checker.check_model(after, full_check=True)
    x = x_of(1, 2, K, seed=1)
    (got,) = ReferenceEvaluator(after).run(None, {"x": x})
    np.testing.assert_allclose(got, x @ dequantized(x_of(K, V).T, bits).T, rtol=1e-4, atol=1e-4)
    assert_close_to(run(after, x=x)["y"], got)


def test_a_bias_and_a_cast_may_follow():
    tail = [
        node("Add", ["product", "bias"], ["sum"]),
        node("Identity", ["sum"], ["y"]),
    ]
    after, _ = apply(untied(tail=tail, bias=x_of(V, seed=3)), QuantizeEmbeddings(8))
    assert ops(after) == ["Reshape", "MatMulNBits", "Add", "Identity"]
    x = x_of(1, 2, K, seed=1)
    want = x @ dequantized(x_of(K, V).T, 8).T + x_of(V, seed=3)
    assert_close_to(run(after, x=x)["y"], want)


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda: untied(x_of(K, V // 2)), id="small"),
        pytest.param(lambda: untied(x_of(V, K)), id="narrow"),
        pytest.param(lambda: untied(tail=[node("Tanh", ["product"], ["y"])]), id="not last"),
    ],
)
def test_what_is_no_head_stays(made):
    after, (result,) = apply(made(), QuantizeEmbeddings(8))
    assert result.rewritten == 0
    assert "MatMulNBits" not in ops(after)


def test_reasons():
    broken = x_of(K, V)
    broken[0, 0] = np.inf
    after, (result,) = apply(untied(broken), QuantizeEmbeddings(8))
    assert "MatMul" in ops(after)
    assert reasons(result) == {"lm_head": "holds NaN or Inf"}
    after, (result,) = apply(tied(uses=2), QuantizeEmbeddings(8))
    assert reasons(result) == {"table": "also read by Transpose Transpose_w"}
    assert ops(after).count("MatMul") == 2
