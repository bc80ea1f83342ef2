"""run_passes, the opset and the TensorRT form."""

import numpy as np
import onnx
import pytest

from bitnet_export import onnx_io, op, packing
from bitnet_export.errors import InputError, StageError, UsageError
from bitnet_export.passes import (
    ALL_PASSES,
    OPTIONAL_PASSES,
    Canonicalize,
    FoldConstants,
    LowerTwoBit,
    Pass,
    PassResult,
    RecogniseTernary,
    RetargetTensorRT,
    raise_opset,
    run_passes,
)
from bitnet_export.passes.base import check_skippable
from tests.passes.graphs import (
    apply,
    initializers,
    model,
    node,
    reasons,
    run,
    ternary_case,
    ternary_model,
    value,
    x_of,
)


def test_every_pass_says_what_it_needs_and_ensures():
    names = [p.name for p in ALL_PASSES]
    assert len(set(names)) == len(names)
    assert all(p.requires and p.ensures and p.__doc__ for p in ALL_PASSES)
    assert {"fold-constants", "merge-siblings", "quantize-embeddings"} <= set(OPTIONAL_PASSES)
    assert not {"canonicalize", "lower-int8", "lower-2bit"} & set(OPTIONAL_PASSES)


@pytest.mark.parametrize("name", ["nothing", "lower-int8"])
def test_only_optional_passes_can_be_skipped(name):
    with pytest.raises(UsageError, match=rf"--skip-pass: {name}: no optional pass") as caught:
        check_skippable([name])
    assert "merge-siblings" in caught.value.fix


class Breaks(Pass):
    """A pass that fails."""

    name, requires, ensures, optional = "breaks", "-", "-", True

    def run(self, graph):
        raise ZeroDivisionError("first line\nsecond line")


class MustBreak(Breaks):
    """A pass that fails and cannot be skipped."""

    optional = False


@pytest.mark.parametrize("kind", [Breaks, MustBreak])
def test_a_pass_that_breaks_is_named(kind):
    with pytest.raises(StageError) as caught:
        apply(ternary_model(ternary_case(64, 4)), kind())
    assert caught.value.what == "pass breaks failed: first line"
    assert ("--skip-pass breaks" in caught.value.fix) == kind.optional


def test_results_are_named_and_timed():
    _, results = apply(ternary_model(ternary_case(64, 4)), FoldConstants(), Canonicalize())
    assert [r.name for r in results] == ["fold-constants", "canonicalize"]
    assert all(isinstance(r, PassResult) and r.seconds > 0 for r in results)


def test_computed_weights_are_refused_with_a_remedy():
    at, trits, _scale, bias = ternary_case(64, 4)
    made = model(
        [
            node("Abs", ["s"], ["scale"]),
            node(
                "TernaryMatMul",
                ["x", "p", "scale", "b"],
                ["y"],
                "fc",
                domain=op.DOMAIN,
                **at.as_dict(),
            ),
        ],
        [value("x", ["batch", 64]), value("s", [4])],
        [value("y", ["batch", 4])],
        {"p": packing.pack(trits), "b": bias},
    )
    with pytest.raises(StageError, match="fc: a TernaryMatMul whose weights are computed"):
        run_passes(made, [LowerTwoBit()])


def test_retarget_gives_the_plugin_form():
    case = ternary_case(100, 7)
    made = ternary_model(case)
    after, (result,) = apply(made, RetargetTensorRT())
    (layer,) = after.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in layer.attribute}
    assert layer.domain == op.TRT_DOMAIN
    assert result.rewritten == 1
    assert attributes == {
        **case[0].as_dict(),
        "plugin_version": b"1",
        "plugin_namespace": b"",
    }
    words = initializers(after)[layer.input[1]]
    assert words.dtype == np.int32
    assert words.shape == (7, 8)
    assert np.array_equal(packing.unpack(packing.from_int32(words), 100), case[1])
    assert len(after.graph.initializer) == 3
    assert [f.domain for f in after.functions] == [op.TRT_DOMAIN]
    x = x_of(3, 100)
    assert np.array_equal(run(after, x=x)["y"], run(made, x=x)["y"])


def old_model(opset):
    return model(
        [node("Gemm", ["x", "w"], ["h"], "fc"), node("Relu", ["h"], ["y"])],
        [value("x", ["batch", 8])],
        [value("y", ["batch", 8])],
        {"w": x_of(8, 8)},
        opset=opset,
    )


@pytest.mark.parametrize(
    ("found", "asked", "result"),
    [(13, None, 18), (17, None, 18), (18, None, 18), (21, None, 21), (13, 20, 20), (20, 22, 22)],
)
def test_opsets_are_raised(found, asked, result):
    made = old_model(found)
    after = raise_opset(made, asked)
    assert onnx_io.model_opset(after) == result
    x = x_of(2, 8)
    assert np.array_equal(run(after, x=x)["y"], run(made, x=x)["y"])


@pytest.mark.parametrize(("found", "asked"), [(13, 17), (20, 18)])
def test_opsets_that_cannot_be_had(found, asked):
    with pytest.raises(UsageError, match=f"--opset {asked}"):
        raise_opset(old_model(found), asked)


def test_a_model_the_converter_refuses():
    made = old_model(13)
    made.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(InputError, match="is at opset 13 and cannot be converted to 18") as caught:
        raise_opset(made)
    assert "\n" not in caught.value.what


def test_raising_the_opset_keeps_module_paths_and_functions():
    made = model(
        [
            node("MatMul", ["x", "w"], ["h"], "encoder.fc"),
            node("Twice", ["h"], ["y"], domain="mine"),
        ],
        [value("x", ["batch", 8])],
        [value("y", ["batch", 8])],
        {"w": x_of(8, 8)},
        opset=17,
    )
    made.functions.append(
        onnx.parser.parse_function(
            '<domain: "mine", opset_import: ["" : 17]> Twice (a) => (b) { b = Add (a, a) }'
        )
    )
    after = raise_opset(made)
    assert onnx_io.node_layer(after.graph.node[0]) == "encoder.fc"
    assert [f.name for f in after.functions] == ["Twice"]
    x = x_of(2, 8)
    assert np.array_equal(run(after, x=x)["y"], run(made, x=x)["y"])


def test_bfloat16_weights_are_left_alone(capsys):
    made = model(
        [node("Gemm", ["x", "w"], ["y"], "fc", transB=1)],
        [value("x", ["batch", 64], "bfloat16"), value("w", [8, 64], "bfloat16")],
        [value("y", ["batch", 8], "bfloat16")],
    )
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.BFLOAT16, [8, 64], x_of(512))
    made.graph.initializer.append(weight)
    passes = (FoldConstants(), Canonicalize(), RecogniseTernary())
    after, results = apply(made, *passes)
    assert [n.op_type for n in after.graph.node] == ["MatMul"]
    assert after.graph.initializer[0].data_type == onnx.TensorProto.BFLOAT16
    assert reasons(results[-1]) == {"fc": "the weight is bfloat16, not float32 or float16"}
    assert capsys.readouterr().out == ""
