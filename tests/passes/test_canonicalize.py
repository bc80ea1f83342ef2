"""canonicalize: every form of Gemm gives the same numbers as a MatMul and an Add."""

import numpy as np
import pytest

from bitnet_export.passes import Canonicalize
from tests.passes.graphs import apply, layers, model, node, ops, reasons, run, value, x_of


def gemm(c=None, w=None, **attributes):
    constants = {"w": x_of(8, 5) if w is None else w}
    if c is not None:
        constants["c"] = c
    return model(
        [node("Gemm", ["x", *constants], ["y"], "fc", **attributes)],
        [value("x", ["batch", 8])],
        [value("y", ["batch", 5])],
        constants,
    )


@pytest.mark.parametrize(
    "c",
    [None, np.float32(0.5), x_of(1), x_of(5), x_of(1, 5), x_of(3, 1), x_of(3, 5)],
    ids=lambda c: "none" if c is None else f"{c.ndim}-D {list(c.shape)}",
)
@pytest.mark.parametrize("scaled", [{}, dict(alpha=0.5, beta=2.0)], ids=["plain", "scaled"])
def test_gemm_becomes_matmul_and_add(c, scaled):
    made = gemm(c, **scaled)
    after, (result,) = apply(made, Canonicalize())
    assert result.rewritten == 1
    assert "Gemm" not in ops(after)
    assert set(layers(after)) == {"fc"}
    x = x_of(3, 8, seed=1)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-5, atol=1e-6)


def test_a_transposed_weight():
    made = gemm(x_of(5), w=x_of(5, 8), transB=1)
    after, _ = apply(made, Canonicalize())
    x = x_of(3, 8, seed=1)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-5, atol=1e-6)


def test_a_weight_two_gemms_share_is_stored_once():
    made = model(
        [node("Gemm", ["x", "w"], ["h"], "a"), node("Gemm", ["h", "w"], ["y"], "b")],
        [value("x", ["batch", 8])],
        [value("y", ["batch", 8])],
        {"w": x_of(8, 8)},
    )
    after, _ = apply(made, Canonicalize())
    assert len(after.graph.initializer) == 1
    assert ops(after) == ["MatMul", "MatMul"]


def test_reasons_for_what_it_leaves():
    made = model(
        [
            node("Gemm", ["a", "b"], ["p"], "computed"),
            node("Gemm", ["a", "w"], ["q"], "turned", transA=1),
        ],
        [value("a", [6, 6]), value("b", [6, 6])],
        [value("p", [6, 6]), value("q", [6, 4])],
        {"w": x_of(6, 4)},
    )
    after, (result,) = apply(made, Canonicalize())
    assert ops(after) == ["Gemm", "Gemm"]
    assert reasons(result) == {
        "computed": "B is computed, not a weight",
        "turned": "A is transposed",
    }


def test_two_products_of_one_module_get_names_of_their_own():
    made = model(
        [node("MatMul", ["x", "w"], ["h"], "shared"), node("MatMul", ["h", "w"], ["y"], "shared")],
        [value("x", ["batch", 8])],
        [value("y", ["batch", 8])],
        {"w": x_of(8, 8)},
    )
    after, _ = apply(made, Canonicalize())
    assert layers(after) == ["shared", "shared#2"]
