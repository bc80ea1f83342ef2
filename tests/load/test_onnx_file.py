"""ONNX files: inputs from the graph, and what makes one unusable."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitnet_export.errors import InputError
from bitnet_export.load import load


def changed(source, tmp_path, change):
    model = onnx.load(source)
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    return path


def test_inputs_and_axes(dense_onnx):
    loaded = load(dense_onnx)
    assert loaded.kind == "onnx"
    assert loaded.module is None
    assert loaded.onnx_path == dense_onnx
    assert loaded.dynamic_axes == {"ids": {0: "batch", 1: "sequence"}}
    assert loaded.output_names == ["logits"]
    assert 1 < loaded.example_inputs["ids"].max() < 30  # the table that it indexes has 30 rows


def test_override_and_unknown_dimension(dense_onnx, tmp_path):
    def forget(model):
        for dim in model.graph.input[0].type.tensor_type.shape.dim:
            dim.Clear()

    loaded = load(changed(dense_onnx, tmp_path, forget))
    assert loaded.dynamic_axes == {"ids": {0: "batch", 1: "ids_dim1"}}
    loaded = load(dense_onnx, input_specs=["ids:3x7:int64"])
    assert loaded.example_inputs["ids"].shape == (3, 7)


@pytest.mark.parametrize(
    ("op_type", "domain", "message"),
    [
        ("MatMull", "", "operator MatMull does not exist in opset 20"),
        ("Thing", "my.domain", "operator Thing of domain my.domain is not known"),
    ],
)
def test_unknown_operator(dense_onnx, tmp_path, op_type, domain, message):
    def change(model):
        model.graph.node[1].op_type, model.graph.node[1].domain = op_type, domain
        model.graph.node[1].name = "layer/product"
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))

    with pytest.raises(InputError, match=message) as error:
        load(changed(dense_onnx, tmp_path, change))
    assert "layer/product" in str(error.value)


def test_nan_weights(dense_onnx, tmp_path):
    def change(model):
        weight = numpy_helper.to_array(model.graph.initializer[1]).copy()
        weight[2, 1] = np.nan
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weight, "weight"))

    with pytest.raises(InputError, match="weight holds NaN"):
        load(changed(dense_onnx, tmp_path, change))


def test_k_zero(dense_onnx, tmp_path):
    def change(model):
        empty = np.zeros((8, 0), np.float32)
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(empty, "weight"))

    with pytest.raises(InputError, match=r"K = 0|not a valid"):
        load(changed(dense_onnx, tmp_path, change))


def test_invalid_graph(dense_onnx, tmp_path):
    def change(model):
        model.graph.node[1].input[0] = "nothing"

    with pytest.raises(InputError, match="not a valid ONNX model"):
        load(changed(dense_onnx, tmp_path, change))


def test_missing_external_data(dense_onnx, tmp_path):
    model = onnx.load(dense_onnx)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert load(path).example_inputs
    (tmp_path / "m.data").unlink()
    with pytest.raises(InputError):
        load(path)
