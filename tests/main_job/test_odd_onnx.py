"""The main job on ONNX files as others write them: float16, functions, baked-in sizes, ORT's own
operators. The weights are ternary, so that the result must be the original's."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitnet_export.errors import InputError
from bitnet_export.options import ExportOptions, TernaryOptions, VerifyOptions
from bitnet_export.pipeline import run_export, run_verify
from bitnet_export.targets import load_session
from bitnet_export.targets.session import open_session
from tests.main_job.checks import check_report

pytestmark = pytest.mark.slow


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs, outputs, **attributes)


def trits(k, n, dtype=np.float32):
    rng = np.random.default_rng(k)
    scale = rng.uniform(0.05, 0.2, n)
    return (rng.integers(-1, 2, (k, n)) * scale).astype(dtype)


def write(path, nodes, constants, *, x=("batch", 64), dtype=np.float32, outputs=(), **more):
    """x -> nodes -> y. more: functions, domains."""
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("x", element, x)],
        [helper.make_tensor_value_info("y", element, [x[0], 64]), *outputs],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    imports = [("", 17), *more.get("domains", ())]
    made = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid(*d) for d in imports],
        ir_version=8,
        functions=more.get("functions", ()),
    )
    onnx.save(made, path)
    return path


def two_products(dtype=np.float32):
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"])]
    return [*nodes, node("MatMul", ["r", "v"], ["y"])], {
        "w": trits(64, 48, dtype),
        "v": trits(48, 64, dtype),
    }


def exported(path, out, target="onnx", bits=0, **options):
    directory = out / f"{path.stem}-{target}"
    options = {"bench": False, "threads": 1, **options}
    options["ternary"] = TernaryOptions(activation_bits=bits)
    report = run_export(ExportOptions(model=path, target=target, output=directory, **options))
    check_report(report, directory, speed=False)
    return report, directory


def check_same(path, directory, dtype=np.float32, rows=3, tolerance=1e-5):
    x = np.random.default_rng(0).standard_normal((rows, 64)).astype(dtype)
    (want,) = open_session(path, threads=1).run(["y"], {"x": x})
    (got,) = load_session(directory, threads=1).run(["y"], {"x": x})
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("target", ["onnx", "ort"])
def test_float16(tmp_path, target):
    nodes, constants = two_products(np.float16)
    path = write(tmp_path / "half.onnx", nodes, constants, dtype=np.float16)
    report, directory = exported(path, tmp_path, target, bits=8)
    assert report.model.dtype == "fp16"
    check_same(path, directory, np.float16, tolerance=0.05)


def test_layers_in_functions(tmp_path):
    body = [node("MatMul", ["a", "b"], ["c"]), node("Neg", ["c"], ["d"])]
    function = helper.make_function(
        "mine", "MatMul", ["a", "b"], ["d"], body, [helper.make_opsetid("", 13)]
    )
    nodes, constants = two_products()
    nodes[0].domain = "mine"
    path = write(tmp_path / "f.onnx", nodes, constants, functions=[function], domains=[("mine", 1)])
    report, directory = exported(path, tmp_path)
    assert [row.status for row in report.layers] == ["ternary", "ternary"]
    check_same(path, directory)


def test_operators_that_onnx_does_not_know(tmp_path):
    nodes = [
        node("FusedMatMul", ["x", "w"], ["h"], domain="com.microsoft", alpha=0.5),
        node("MatMul", ["h", "v"], ["y"]),
    ]
    path = write(tmp_path / "fused.onnx", nodes, two_products()[1], domains=[("com.microsoft", 1)])
    _, directory = exported(path, tmp_path)
    check_same(path, directory)


def test_text_as_output(tmp_path):
    nodes, constants = two_products()
    nodes += [
        node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        node("Gather", ["names", "best"], ["label"]),
    ]
    constants["names"] = np.array([f"class {i}" for i in range(64)], object)
    label = helper.make_tensor_value_info("label", TensorProto.STRING, ["batch"])
    path = write(tmp_path / "label.onnx", nodes, constants, outputs=[label])
    report, directory = exported(path, tmp_path)
    assert {row.output for row in report.quality.rows} == {"y", "label"}
    check_same(path, directory)


def test_activations_that_the_model_rounds_itself(tmp_path):
    constants = two_products()[1] | {"s": np.float32(0.05), "z": np.uint8(128)}
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("QuantizeLinear", ["h", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["r"]),
        node("MatMul", ["r", "v"], ["y"]),
    ]
    path = write(tmp_path / "qdq.onnx", nodes, {k: np.asarray(v) for k, v in constants.items()})
    report, directory = exported(path, tmp_path)
    assert any("rounds activations" in row.basis for row in report.parity)
    check_same(path, directory, tolerance=0.05)


def test_convolutions_alone(tmp_path):
    weight = np.ascontiguousarray(trits(144, 64).T.reshape(64, 16, 3, 3))
    nodes = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("GlobalAveragePool", ["c"], ["p"]),
        node("Flatten", ["p"], ["y"]),
    ]
    path = write(tmp_path / "conv.onnx", nodes, {"w": weight}, x=("batch", 16, 6, 6))
    report, _ = exported(path, tmp_path, "ort")
    assert [(row.status, row.reason) for row in report.layers] == [
        ("ternary", "ternary weights, runs as floating point Conv: kernel 3x3")
    ]
    assert report.size.ratio > 4


@pytest.fixture
def baked(tmp_path):
    """A reshape to the 2 rows that its exporter saw, under an axis that it calls dynamic."""
    nodes, constants = two_products()
    nodes.insert(0, node("Reshape", ["x0", "shape"], ["x"]))
    constants["shape"] = np.array([2, 64])
    path = write(tmp_path / "baked.onnx", nodes, constants)
    made = onnx.load(path)
    made.graph.input[0].name = "x0"
    onnx.save(made, path)
    return path


def test_a_model_that_does_not_run_as_it_is(baked, tmp_path):
    with pytest.raises(InputError, match=r"does not run on x0 \[1, 64\]") as error:
        exported(baked, tmp_path)
    assert "--input x0:batchx64:float32" in error.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["baked.onnx"]


def test_a_size_that_the_user_fixes(baked, tmp_path):
    report, directory = exported(baked, tmp_path, input_specs=("x0:2x64",))
    assert {row.shape for row in report.parity} == {"static"}
    assert run_verify(VerifyOptions(directory=directory, threads=1)).verdict == "pass"


def test_shapes_that_the_original_refuses_are_left_out(baked, tmp_path):
    report, _ = exported(baked, tmp_path, opt_shapes=("x0:2x64",))
    assert {row.shape for row in report.parity} == {"batch=2"}
    assert [w.partition(":")[0] for w in report.warnings if "not compared" in w] == [
        "not compared at batch=1",
        "not compared at batch=3",
    ]


def test_a_quantized_model_is_named_as_such(tmp_path):
    nodes = [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    nodes += [node("MatMulInteger", ["q", "w", "z"], ["i"]), node("Cast", ["i"], ["y"], to=1)]
    path = write(tmp_path / "int8.onnx", nodes, {"w": np.ones((64, 64), np.int8)})
    with pytest.raises(InputError, match="no layer became ternary") as error:
        exported(path, tmp_path)
    assert "quantized already (DynamicQuantizeLinear, MatMulInteger)" in error.value.fix
