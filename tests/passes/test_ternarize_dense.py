"""ternarize-dense: the same rules and the same numbers as prepare and convert on a module."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_export import op
from bitnet_export.errors import InputError
from bitnet_export.passes import Canonicalize, TernarizeDense
from bitnet_export.ternary import TernaryConfig, convert, prepare
from tests.passes.graphs import apply, layers, model, node, ops, reasons, run, value, x_of

WIDTHS = (64, 48, 48, 10)


def mlp(after_head=(), widths=WIDTHS, names=None):
    """x -> Gemm, Relu, ... -> Gemm -> the operators of after_head."""
    nodes, constants, x = [], {}, "x"
    names = names or [f"fc{i}" for i in range(len(widths) - 1)]
    for i, (k, n) in enumerate(itertools.pairwise(widths)):
        constants |= {f"w{i}": x_of(n, k, seed=i) / 8, f"b{i}": x_of(n, seed=i + 50)}
        last = i == len(widths) - 2
        y = f"g{i}" if not last or after_head else "y"
        nodes.append(node("Gemm", [x, f"w{i}", f"b{i}"], [y], names[i], transB=1))
        x = y
        if not last:
            nodes.append(node("Relu", [x], [f"r{i}"]))
            x = f"r{i}"
    for j, kind in enumerate(after_head):
        y = "y" if j == len(after_head) - 1 else f"t{j}"
        nodes.append(node(kind, [x], [y]))
        x = y
    return model(
        nodes, [value("x", ["batch", widths[0]])], [value("y", ["batch", widths[-1]])], constants
    )


def ternarize(made, **config):
    after, results = apply(made, Canonicalize(), TernarizeDense(TernaryConfig(**config)))
    return after, results[-1]


@pytest.mark.parametrize("after_head", [(), ("Identity",), ("Softmax",), ("Identity", "Softmax")])
def test_the_head_is_kept_whatever_follows_it(after_head):
    after, result = ternarize(mlp(after_head))
    assert ops(after).count(op.OP_TYPE) == 2
    assert result.rewritten == 2
    assert reasons(result) == {"fc2": "output head: no other layer reads an input of its width"}


def test_a_last_layer_that_returns_to_the_residual_width_is_no_head():
    after, result = ternarize(mlp(widths=(64, 48, 64)))
    assert ops(after).count(op.OP_TYPE) == 2
    assert not result.skipped


def test_a_model_of_one_layer_has_no_head():
    after, _ = ternarize(mlp(widths=(64, 10)))
    assert ops(after) == [op.OP_TYPE]


def test_keep_head_false():
    after, _ = ternarize(mlp(), keep_head=False)
    assert ops(after).count(op.OP_TYPE) == 3


@pytest.mark.parametrize(
    ("config", "layer", "reason"),
    [
        (dict(exclude=("fc1",)), "fc1", "excluded by the pattern 'fc1'"),
        (dict(include=("fc0", "fc2"), keep_head=False), "fc1", "matches no include pattern"),
        (dict(min_k=60), "fc1", "K=48 is below min_k=60"),
        (dict(quantizer="threshold", threshold=9.0), "fc0", "no weight exceeds the threshold 9.0"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_reasons(config, layer, reason):
    _, result = ternarize(mlp(), **config)
    assert reasons(result)[layer] == reason


def test_default_patterns_apply_to_foreign_names():
    _, result = ternarize(mlp(names=["encoder.a", "encoder.b", "classifier"]), keep_head=False)
    assert list(reasons(result)) == ["classifier"]


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(quantizer="absmean", granularity="tensor"),
        dict(quantizer="threshold", threshold=0.1),
        dict(quantizer="lsq"),
        dict(granularity="group", group_size=32),
        dict(activation_bits=0),
    ],
    ids=str,
)
def test_the_same_numbers_as_the_module(config):
    made = mlp()
    parameters = {t.name: t for t in made.graph.initializer}
    module = nn.Sequential(
        nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 10)
    )
    from onnx import numpy_helper

    with torch.no_grad():
        for i, layer in enumerate(m for m in module if isinstance(m, nn.Linear)):
            layer.weight.copy_(torch.tensor(numpy_helper.to_array(parameters[f"w{i}"])))
            layer.bias.copy_(torch.tensor(numpy_helper.to_array(parameters[f"b{i}"])))
    settings = TernaryConfig(**config)
    prepare(module.eval(), settings)
    convert(module)
    after, _ = ternarize(made, **config)
    x = x_of(5, 64, seed=9)
    want = module(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(run(after, x=x)["y"], want, rtol=1e-4, atol=1e-4)


def test_nan_weights_name_the_layer():
    made = mlp()
    from onnx import numpy_helper

    broken = numpy_helper.to_array(made.graph.initializer[2]).copy()
    broken[0, 0] = np.inf
    made.graph.initializer[2].CopyFrom(numpy_helper.from_array(broken, "w1"))
    with pytest.raises(InputError, match=r"^fc1: the weights hold NaN or Inf"):
        ternarize(made)


def test_layer_paths_travel():
    after, _ = ternarize(mlp(), keep_head=False)
    assert [la for la in layers(after) if la] == ["fc0", "fc1", "fc2"]
