"""Foreign ONNX files that runtimes take and something on our way does not: mended, same results."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitnet_export.errors import InputError
from bitnet_export.load import load
from bitnet_export.load.onnx_file import read_onnx
from bitnet_export.load.onnx_repair import repair, set_input_shapes
from tests.passes.graphs import run

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs, outputs, **attributes)


def value(name, shape, element=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, element, shape)


def weights(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def model(nodes=None, opset=20, functions=(), domains=(), **constants):
    """x [batch, 8] -> h -> y; two products unless nodes are given."""
    nodes = nodes or [node("MatMul", ["x", "w"], ["h"]), node("Gemm", ["h", "v"], ["y"])]
    constants = constants or {"w": weights(8, 6), "v": weights(6, 4)}
    graph = helper.make_graph(
        nodes,
        "foreign",
        [value("x", ["batch", 8])],
        [value("y", ["batch", 4])],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    imports = [helper.make_opsetid(*d) for d in (("", opset), *domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def mended(made, expected=True):
    """A repaired copy, which onnx's checker and ONNX Runtime take."""
    copy = onnx.ModelProto()
    copy.CopyFrom(made)
    assert repair(copy) == expected
    onnx.checker.check_model(copy, full_check=True)
    return copy


def same(before, after):
    np.testing.assert_allclose(run(after, x=X)["y"], run(before, x=X)["y"], rtol=1e-6, atol=1e-6)


def test_a_sound_model_stays_as_it_is():
    made = model()
    assert mended(made, expected=False) == made


def test_the_other_name_of_the_default_domain():
    made = model()
    for one in made.graph.node:
        one.domain = "ai.onnx"
    made.opset_import.append(helper.make_opsetid("ai.onnx", 20))
    same(model(), mended(made))


def test_sparse_initializers():
    dense = weights(8, 6) * (weights(8, 6) > 0.5)
    for indices in (np.flatnonzero(dense), np.argwhere(dense)):
        made = model()
        made.graph.initializer[0].CopyFrom(made.graph.initializer[1])
        del made.graph.initializer[1]
        made.graph.sparse_initializer.append(
            helper.make_sparse_tensor(
                numpy_helper.from_array(dense[np.nonzero(dense)], "w"),
                numpy_helper.from_array(indices.astype(np.int64), "w_indices"),
                dense.shape,
            )
        )
        same(model(w=dense, v=weights(6, 4)), mended(made))


def test_constants_that_old_files_do_not_list_as_inputs():
    made = model(
        [node("MatMul", ["x", "w"], ["h"]), node("MatMul", ["h", "v"], ["y"])],
        opset=8,
        w=weights(8, 6),
        v=weights(6, 4),
    )
    made.ir_version = 3
    with pytest.raises(onnx.checker.ValidationError, match="not in graph input"):
        onnx.checker.check_model(made)
    same(made, mended(made))


@pytest.mark.parametrize("opset", [20, 13, 12])
def test_functions_are_inlined_at_the_opset_of_the_model(opset):
    body = [node("MatMul", ["a", "b"], ["c"]), node("Neg", ["c"], ["d"])]
    made = model(
        [node("Gemm", ["x", "w"], ["h"], domain="mine"), node("MatMul", ["h", "v"], ["y"])],
        functions=[
            helper.make_function(
                "mine", "Gemm", ["a", "b"], ["d"], body, [helper.make_opsetid("", opset)]
            )
        ],
        domains=[("mine", 1)],
        w=weights(8, 6),
        v=weights(6, 4),
    )
    after = mended(made)
    assert [n.op_type for n in after.graph.node] == ["MatMul", "Neg", "MatMul"]
    assert not after.functions
    same(made, after)


def test_repeated_node_names():
    made = model()
    for one in made.graph.node:
        one.name = "/layer/MatMul"
    after = mended(made)
    assert [n.name for n in after.graph.node] == ["/layer/MatMul", "/layer/MatMul_1"]
    same(model(), after)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m.graph.output[0].ClearField("type"),
        lambda m: m.graph.output[0].type.tensor_type.ClearField("shape"),
        lambda m: m.graph.output[0].CopyFrom(value("y", ["batch", 99])),
        lambda m: m.graph.output[0].CopyFrom(value("y", ["batch", 4, 1])),
        lambda m: m.graph.value_info.append(value("h", ["batch", 6], TensorProto.DOUBLE)),
    ],
    ids=["no type", "no shape", "size", "rank", "element"],
)
def test_types_that_are_missing_or_wrong(spoil):
    made = model()
    spoil(made)
    after = mended(made)
    shape = after.graph.output[0].type.tensor_type.shape
    assert [d.dim_param or d.dim_value for d in shape.dim] == ["batch", 4]
    same(model(), after)


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_that_mean_unknown(tmp_path, size):
    made = model()
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(made, tmp_path / "zero.onnx")
    assert load(tmp_path / "zero.onnx").dynamic_axes == {"x": {0: "batch"}}
    after = read_onnx(tmp_path / "zero.onnx", {"x": ["batch", 8]})
    assert after.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    same(model(), after)


def test_the_shapes_of_a_user_reach_the_outputs():
    made = model()
    set_input_shapes(made, {"x": [5, 8]})
    for one in (made.graph.input[0], made.graph.output[0]):
        assert one.type.tensor_type.shape.dim[0].dim_value == 5


def test_outputs_that_are_no_tensors_are_refused(tmp_path):
    made = model()
    made.graph.node.append(node("SequenceConstruct", ["y", "h"], ["all"]))
    made.graph.output.append(helper.make_tensor_sequence_value_info("all", TensorProto.FLOAT, None))
    onnx.save(made, tmp_path / "sequence.onnx")
    with pytest.raises(InputError, match="output all is of sequence type, not a tensor"):
        load(tmp_path / "sequence.onnx")


def test_what_is_no_weight_may_be_empty_or_nan(tmp_path):
    nodes = [
        node("Concat", ["x", "none"], ["x2"], axis=0),
        node("Where", ["never", "nan", "x2"], ["x3"]),
        node("MatMul", ["x3", "w"], ["y"]),
    ]
    made = model(
        nodes,
        none=np.zeros((0, 8), np.float32),
        never=np.array(False),
        nan=np.array(np.nan, np.float32),
        w=weights(8, 4),
    )
    onnx.save(made, tmp_path / "odd.onnx")
    assert load(tmp_path / "odd.onnx").output_names == ["y"]
