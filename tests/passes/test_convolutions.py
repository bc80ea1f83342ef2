"""Convolutions in graphs: 1x1 ones become TernaryMatMul, norms fold, ternary kernels are packed."""

import numpy as np
import pytest

from bitnet_export import op
from bitnet_export.passes import (
    Canonicalize,
    FoldBatchNorm,
    MergeSiblings,
    PackConvolutions,
    RecogniseTernary,
    TernarizeDense,
)
from bitnet_export.ternary import TernaryConfig
from bitnet_export.verify.size import measure_size
from tests.passes.graphs import (
    apply,
    initializers,
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

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def ternary_weight(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.05, 0.2, (shape[0], *[1] * (len(shape) - 1)))
    trits = rng.integers(-1, 2, shape)
    return (trits * scale.astype(dtype)).astype(dtype)


def conv_model(weight, bias=True, dtype="float32", size=(6, 7), **attributes):
    """x -> Conv "layer" -> y."""
    constants = {"w": weight}
    if bias:
        constants["b"] = x_of(weight.shape[0], seed=9, dtype=np.dtype(dtype))
    groups = attributes.get("group", 1)
    x = value("x", ["batch", weight.shape[1] * groups, *size], dtype)
    spatial = [None] * (weight.ndim - 2)
    y = value("y", ["batch", weight.shape[0], *spatial], dtype)
    return model(
        [node("Conv", ["x", *constants], ["y"], "layer", **attributes)], [x], [y], constants
    )


# --- 1x1 in foreign graphs ------------------------------------------------------------------


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 3]},
        {"pads": [0, 0, 0, 0], "kernel_shape": [1, 1]},
        {"auto_pad": "VALID"},
    ],
    ids=["plain", "strided", "explicit", "auto_pad"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_ternary_1x1_convolution_becomes_a_product_with_the_same_numbers(attributes, bias):
    made = conv_model(ternary_weight(5, 20, 1, 1), bias, **attributes)
    after, (result,) = apply(made, RecogniseTernary(activation_bits=0))
    assert ops(after)[-3:] == ["Transpose", op.OP_TYPE, "Transpose"]
    assert set(layers(after)) == {"layer"}
    assert result.ternarized == {"layer": "already ternary (channel scale), kept exactly"}
    x = x_of(2, 20, 6, 7)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-5, atol=1e-5)


def test_one_dimension_and_a_tensor_scale():
    weight = np.sign(x_of(4, 20, 1)) * np.float32(0.5)
    made = conv_model(weight, size=(9,), strides=[2])
    after, _ = apply(made, RecogniseTernary(activation_bits=0))
    assert ops(after) == ["Slice", "Transpose", op.OP_TYPE, "Transpose"]
    x = x_of(2, 20, 9)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-5, atol=1e-5)


def test_dense_1x1_convolutions_follow_the_rules_of_linear_layers():
    made = conv_model(x_of(24, 32, 1, 1))
    after, (_, result) = apply(made, Canonicalize(), TernarizeDense(TernaryConfig()))
    assert ops(after).count(op.OP_TYPE) == 1
    assert result.ternarized == {"layer": "twn, channel scale"}
    for config, words in {
        TernaryConfig(convolutions="none"): "convolutions",
        TernaryConfig(min_k=33): "K=32 is below",
        TernaryConfig(exclude=("lay*",)): "'lay*'",
    }.items():
        after, (_, result) = apply(made, Canonicalize(), TernarizeDense(config))
        assert ops(after) == ["Conv"]
        assert words in reasons(result)["layer"]


@pytest.mark.parametrize(
    ("weight", "attributes", "words"),
    [
        (x_of(4, 20, 3, 3), {}, "runs as floating point Conv: kernel 3x3"),
        (ternary_weight(8, 20, 3, 3), {}, "ternary weights, runs as floating point Conv"),
        (ternary_weight(4, 20, 3, 3), {}, "runs as floating point Conv: kernel 3x3"),
        (x_of(4, 20, 1, 1), {"pads": [1, 0, 1, 0]}, "with padding"),
        (x_of(20, 1, 1, 1), {"group": 20}, "group=20"),
    ],
    ids=["3x3", "ternary 3x3", "too small to pack", "padded", "depthwise"],
)
def test_every_other_convolution_stays_with_a_reason(weight, attributes, words):
    made = conv_model(weight, **attributes)
    after, (_, result) = apply(made, Canonicalize(), TernarizeDense(TernaryConfig()))
    assert ops(after) == ["Conv"]
    assert words in reasons(result)["layer"]


# --- batch norm -----------------------------------------------------------------------------


def norm_after(case, kind="conv", readers=1):
    """x -> (Transpose) TernaryMatMul "layer" (Transpose) -> BatchNormalization -> y."""
    at = case[0]
    constants = {
        "gamma": x_of(at.N, seed=1),  # some negative
        "beta": x_of(at.N, seed=2),
        "mean": x_of(at.N, seed=3),
        "variance": np.abs(x_of(at.N, seed=4)),
    }
    conv = kind == "conv"
    nodes = [node("Transpose", ["x"], ["last"], "layer", perm=TO_LAST)] if conv else []
    nodes.append(ternary_layer("layer", "last" if conv else "x", "p", case, constants))
    if conv:
        nodes.append(node("Transpose", ["p"], ["first"], "layer", perm=TO_FIRST))
    before = "first" if conv else "p"
    statistics = ["gamma", "beta", "mean", "variance"]
    nodes.append(node("BatchNormalization", [before, *statistics], ["y"], "bn", epsilon=1e-3))
    size = [4, 5] if conv else []
    outputs = [value("y", ["batch", at.N, *size])]
    if readers > 1:
        nodes.append(node("Relu", [before], ["z"]))
        outputs.append(value("z", ["batch", at.N, *size]))
    return model(nodes, [value("x", ["batch", at.K, *size])], outputs, constants)


@pytest.mark.parametrize(
    "case",
    [
        dict(),
        dict(bias=False),
        dict(scale="tensor"),
        dict(scale="group", group_size=32),
        dict(bits=0),
    ],
    ids=["channel", "no bias", "tensor", "group", "float activations"],
)
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_a_norm_goes_into_scale_and_bias_and_the_weights_stay(case, kind):
    made = norm_after(ternary_case(64, 7, **case), kind)
    after, (result,) = apply(made, FoldBatchNorm())
    assert result.rewritten == 1
    assert "BatchNormalization" not in ops(after)
    np.testing.assert_array_equal(
        initializers(after)["layer.packed_weight"], initializers(made)["layer.packed_weight"]
    )
    x = x_of(3, 64, *([4, 5] if kind == "conv" else []))
    # Both sides round a few float32 operations differently.
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-4, atol=1e-4)


def test_a_norm_stays_where_something_else_reads_the_product():
    made = norm_after(ternary_case(64, 7), readers=2)
    after, (result,) = apply(made, FoldBatchNorm())
    assert ops(after) == ops(made)
    assert result.rewritten == 0


def test_a_norm_over_another_axis_stays():
    case = ternary_case(64, 7)
    made = norm_after(case)
    for n in made.graph.node:
        if list(n.output) == ["first"]:
            n.attribute[0].ints[:] = [0, 1, 3, 2]  # channels are axis 2 then
    made.graph.output[0].type.tensor_type.shape.dim[1].Clear()
    after, (result,) = apply_unchecked(made)
    assert "BatchNormalization" in ops(after)
    assert result.rewritten == 0


def apply_unchecked(made):
    from bitnet_export.passes import run_passes

    return run_passes(made, [FoldBatchNorm()])


def test_siblings_still_merge_behind_folded_norms():
    made = norm_after(ternary_case(64, 7))
    after, _ = apply(made, FoldBatchNorm(), MergeSiblings())
    x = x_of(1, 64, 4, 5)
    np.testing.assert_allclose(run(after, x=x)["y"], run(made, x=x)["y"], rtol=1e-4, atol=1e-4)


# --- packed kernels -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (5, 33, 7), (64, 17, 1, 1)])
@pytest.mark.parametrize("optimize", [True, False])
def test_packed_convolutions_give_the_same_bits(shape, dtype, optimize):
    weight = ternary_weight(*shape, dtype=np.dtype(dtype))
    made = conv_model(weight, dtype=dtype, size=(9,) * (len(shape) - 2))
    after, (result,) = apply(made, PackConvolutions())
    assert result.rewritten == 1
    assert ops(after).count("Conv") == 1
    assert initializers(after)["layer.packed_weight"].nbytes <= weight.size // 4 + 16 * shape[0]
    x = x_of(2, shape[1], *(9,) * (len(shape) - 2), dtype=np.dtype(dtype))
    np.testing.assert_array_equal(
        run(after, x=x, optimize=optimize)["y"], run(made, x=x, optimize=optimize)["y"]
    )


def test_onnxruntime_computes_the_weight_when_the_session_is_created(tmp_path):
    import onnx
    import onnxruntime as ort

    after, _ = apply(conv_model(ternary_weight(16, 8, 3, 3)), PackConvolutions())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(after.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = {n.op_type for n in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "BitShift" not in found
    assert "Conv" in found


def test_dense_and_small_kernels_stay():
    after, (result,) = apply(conv_model(x_of(16, 8, 3, 3)), PackConvolutions())
    assert ops(after) == ["Conv"]
    assert reasons(result) == {"layer": "weights are not ternary"}
    after, (result,) = apply(conv_model(ternary_weight(4, 8, 3, 3)), PackConvolutions())
    assert ops(after) == ["Conv"]
    nearly = ternary_weight(16, 8, 3, 3)
    nearly[3, 2, 1, 0] = np.nextafter(np.float32(0.2), np.float32(1))
    after, _ = apply(conv_model(nearly), PackConvolutions())
    assert ops(after) == ["Conv"]


def test_one_weight_of_two_convolutions_is_packed_once():
    constants = {"w": ternary_weight(16, 16, 3, 3)}
    nodes = [
        node("Conv", ["x", "w"], ["h"], "a", pads=[1] * 4),
        node("Conv", ["h", "w"], ["y"], "b", pads=[1] * 4),
    ]
    image = ["batch", 16, 5, 5]
    made = model(nodes, [value("x", image)], [value("y", image)], constants)
    after, (result,) = apply(made, PackConvolutions())
    assert result.rewritten == 2
    assert ops(after).count("BitShift") == 1
    x = x_of(2, 16, 5, 5)
    np.testing.assert_array_equal(run(after, x=x)["y"], run(made, x=x)["y"])


def test_their_bytes_count_as_weights_before_and_after(tmp_path):
    from bitnet_export import onnx_io

    made = conv_model(ternary_weight(64, 64, 3, 3))
    after, _ = apply(made, PackConvolutions())
    before = measure_size(onnx_io.write_model(made, tmp_path / "a.onnx"))
    now = measure_size(onnx_io.write_model(after, tmp_path / "b.onnx"))
    weights = 64 * 64 * 9
    assert before.part_bytes["linear"] == 4 * weights
    assert before.part_elements["linear"] == weights
    assert weights / 4 <= now.part_bytes["linear"] < weights / 4 + 1024
