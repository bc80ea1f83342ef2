"""External tensors: mapped where they lie, refused where they are cut off or elsewhere."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import onnx_io, onnx_tensors
from bitnet_export.errors import InputError

ARRAYS = {
    "float": np.arange(600, dtype=np.float32).reshape(20, 30),
    "half": np.arange(600, dtype=np.float16),
    "bfloat": np.arange(600).astype(ml_dtypes.bfloat16),
    "bytes": np.arange(1500, dtype=np.uint8).reshape(3, 500),
    "small": np.array([1, 2], np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A model whose tensors but the small ones are in model.onnx.data, or typed fields."""
    tensors = [numpy_helper.from_array(a, name) for name, a in ARRAYS.items()]
    tensors.append(helper.make_tensor("typed", TensorProto.FLOAT, [400], [0.5] * 400))
    node = helper.make_node("Identity", ["float"], ["y"])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [20, 30])
    model = helper.make_model(helper.make_graph([node], "g", [], [out], tensors))
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", 1000)
    return onnx_io.write_model(model, tmp_path / "model.onnx")


def test_values_come_back_whatever_their_type(path):
    model = onnx_io.read_model(path)
    found = {t.name: t for t in model.graph.initializer}
    for name, array in ARRAYS.items():
        value = onnx_tensors.values(found[name])
        assert value.dtype == array.dtype, name
        assert np.array_equal(value, array), name
    assert onnx_tensors.values(found["typed"]).tolist() == [0.5] * 400
    outside = {name for name, t in found.items() if onnx_tensors.is_outside(t)}
    assert outside == {"float", "half", "bfloat", "bytes", "typed"}
    assert isinstance(onnx_tensors.values(found["float"]), np.memmap)


def test_other_tools_read_the_file(path):
    onnx.checker.check_model(str(path))
    model = onnx.load(path)
    assert np.array_equal(numpy_helper.to_array(model.graph.initializer[0]), ARRAYS["float"])
    inside = onnx_tensors.with_data_inside(onnx_io.read_model(path))
    for mine, theirs in zip(inside.graph.initializer, model.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(mine), numpy_helper.to_array(theirs))


def test_a_folder_may_be_moved_before_it_is_read(path, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, onnx_io.data_file(path)):
        file.rename(moved / file.name)
    model = onnx_io.read_model(moved / path.name)
    assert np.array_equal(onnx_tensors.values(model.graph.initializer[0]), ARRAYS["float"])


def relocate(path, location):
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "gone"])
def test_data_elsewhere_is_refused(path, tmp_path, location):
    (tmp_path.parent / "secret").write_bytes(bytes(10_000))
    relocate(path, location)
    with pytest.raises(InputError, match="external data cannot be read") as caught:
        onnx_io.read_model(path)
    assert location in caught.value.what


def test_a_link_is_refused(path, tmp_path):
    data = onnx_io.data_file(path)
    data.rename(tmp_path / "other")
    data.symlink_to(tmp_path / "other")
    with pytest.raises(InputError, match="is a link"):
        onnx_io.read_model(path)


def test_truncated_data_is_refused(path):
    data = onnx_io.data_file(path)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"bytes, .* ends at"):
        onnx_io.read_model(path)
