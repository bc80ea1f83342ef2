"""lower-2bit: MatMulNBits with the only fast settings, right for every shape."""

import numpy as np
import onnx
import pytest

from bitnet_export.passes import LowerTwoBit
from tests.passes.graphs import (
    apply,
    model,
    ops,
    reference,
    run,
    ternary_case,
    ternary_layer,
    ternary_model,
    value,
    x_of,
)


def attributes(made):
    (node,) = [n for n in made.graph.node if n.op_type == "MatMulNBits"]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("k", [1, 5, 64, 100, 384])
@pytest.mark.parametrize("n", [1, 3, 65])
@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_close_to_the_reference(m, k, n, scale, bias):
    case = ternary_case(k, n, scale=scale, bias=bias, seed=m)
    after, _ = apply(ternary_model(case), LowerTwoBit())
    assert ops(after) == ["MatMulNBits"]
    assert attributes(after) == dict(K=k, N=n, bits=2, block_size=128, accuracy_level=4)
    x = x_of(m, k, seed=k)
    want = reference(x, case)
    # Both quantize activations to int8, by row here and by block there: a step is 1/127 of the
    # largest value, and the errors of K products add up like sqrt(K).
    step = np.abs(x).max() / 127 * case[2].max() * np.sqrt(k)
    np.testing.assert_allclose(run(after, x=x)["y"], want, atol=3 * step)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_group_scales_are_blocks(group):
    case = ternary_case(384, 9, scale="group", group_size=group)
    after, (result,) = apply(ternary_model(case), LowerTwoBit())
    assert attributes(after)["block_size"] == group
    assert attributes(after)["accuracy_level"] == 4
    assert bool(result.notes) == (group < 128)
    x = x_of(5, 384)
    want = reference(x, case)
    np.testing.assert_allclose(run(after, x=x)["y"], want, atol=0.02 * np.abs(want).max())


def test_exact_where_activations_are_integers():
    """With the largest value 127 in every block the activation scale is 1: nothing is rounded."""
    case = ternary_case(256, 33)
    x = np.random.default_rng(0).integers(-127, 128, (5, 256)).astype(np.float32)
    x[:, [0, 128]] = 127
    after, _ = apply(ternary_model(case), LowerTwoBit())
    np.testing.assert_allclose(run(after, x=x)["y"], reference(x, case), rtol=1e-5, atol=1e-4)


def test_float_activations_are_said_to_be_quantized():
    _, (result,) = apply(ternary_model(ternary_case(64, 4, bits=0)), LowerTwoBit())
    assert result.notes == ["layer: activations become int8 per block of 128"]


def test_equal_weights_are_stored_once():
    case = ternary_case(128, 128, bias=False)
    constants = {}
    nodes = [
        ternary_layer(n, x, y, case, constants) for n, x, y in (("a", "x", "h"), ("b", "h", "y"))
    ]
    made = model(nodes, [value("x", ["batch", 128])], [value("y", ["batch", 128])], constants)
    after, _ = apply(made, LowerTwoBit())
    assert ops(after) == ["MatMulNBits"] * 2
    assert len(after.graph.initializer) == 2  # packed weights and scales
