"""merge-siblings: one wide product and a Split, with the numbers and names of before."""

import numpy as np
import pytest

from bitnet_export import op
from bitnet_export.passes import MergeSiblings
from bitnet_export.passes.merge_siblings import merged_name
from tests.passes.graphs import (
    apply,
    layers,
    model,
    node,
    ops,
    reasons,
    run,
    ternary_case,
    ternary_layer,
    value,
    x_of,
)


def siblings(*cases, extra_output=False):
    """x -> one TernaryMatMul a case, named block.q, block.k ...; each an output of the model."""
    constants, nodes, outputs = {}, [], []
    for name, case in zip("qkv", cases, strict=False):
        nodes.append(ternary_layer(f"block.{name}", "x", name, case, constants))
        outputs.append(value(name, ["batch", "sequence", case[0].N]))
    k = cases[0][0].K
    return model(nodes, [value("x", ["batch", "sequence", k])], outputs, constants)


@pytest.mark.parametrize(
    "cases",
    [
        [dict(n=8), dict(n=3, bias=False), dict(n=1)],
        [dict(n=8, scale="tensor"), dict(n=3)],
        [dict(n=8, bias=False), dict(n=3, bias=False)],
        [dict(n=8, scale="group", group_size=32), dict(n=3, scale="group", group_size=32)],
        [dict(n=8, bits=0), dict(n=3, bits=0)],
    ],
    ids=["biases", "mixed scales", "no biases", "groups", "float activations"],
)
def test_merged_layers_give_the_same_numbers(cases):
    made = siblings(*(ternary_case(k=96, seed=i, **c) for i, c in enumerate(cases)))
    after, (result,) = apply(made, MergeSiblings())
    assert ops(after) == [op.OP_TYPE, "Split"]
    assert result.rewritten == len(cases)
    assert layers(after)[0] == "block.{" + ",".join("qkv"[: len(cases)]) + "}"
    x = x_of(2, 3, 96)
    before, now = run(made, x=x), run(after, x=x)
    assert list(before) == list(now)
    for name in before:
        np.testing.assert_allclose(now[name], before[name], rtol=1e-6, atol=1e-6)


def test_what_differs_is_not_merged():
    made = siblings(
        ternary_case(96, 8),
        ternary_case(96, 8, scale="group", group_size=32),
        ternary_case(96, 8, bits=0),
    )
    after, (result,) = apply(made, MergeSiblings())
    assert ops(after) == [op.OP_TYPE] * 3
    assert set(reasons(result).values()) == {"no other TernaryMatMul reads its input"}


def test_outputs_with_several_readers():
    constants = {}
    nodes = [
        ternary_layer("gate", "x", "g", ternary_case(64, 8), constants),
        ternary_layer("up", "x", "u", ternary_case(64, 8, seed=1), constants),
        node("Relu", ["g"], ["r"]),
        node("Mul", ["g", "u"], ["m"]),
        node("Add", ["r", "m"], ["y"]),
    ]
    made = model(
        nodes,
        [value("x", ["batch", 64])],
        [value("y", ["batch", 8]), value("u", ["batch", 8])],
        constants,
    )
    after, _ = apply(made, MergeSiblings())
    x = x_of(3, 64)
    before, now = run(made, x=x), run(after, x=x)
    np.testing.assert_allclose(now["y"], before["y"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(now["u"], before["u"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (["a.q", "a.k"], "a.{q,k}"),
        (["m.0.gate_proj", "m.0.up_proj"], "m.0.{gate_proj,up_proj}"),
        (["layer.1.q", "layer.10.q"], "layer.{1.q,10.q}"),
        (["q", "k"], "{q,k}"),
        (["a", "a.b"], "{a,a.b}"),
    ],
)
def test_merged_names(names, merged):
    assert merged_name(names) == merged
