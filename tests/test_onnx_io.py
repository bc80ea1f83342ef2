"""ONNX files: whole or not at all, external data past the limit, errors that say what is wrong."""

import errno
import os

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from bitnet_export import onnx_io, onnx_tensors, op
from bitnet_export.errors import InputError, StageError
from bitnet_export.passes import FoldConstants, run_passes
from tests.passes.graphs import model, node, run, ternary_case, ternary_model, value, x_of


@pytest.fixture
def made():
    return ternary_model(ternary_case(256, 128))


def stored(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(made, tmp_path):
    path = onnx_io.write_model(made, tmp_path / "deep" / "model.onnx")
    assert onnx_io.read_model(path) == made
    assert stored(path.parent) == ["model.onnx"]


def test_large_models_keep_their_tensors_beside_the_file(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", 1000)
    before = made.SerializeToString()
    path = onnx_io.write_model(made, tmp_path / "model.onnx")
    assert stored(tmp_path) == ["model.onnx", "model.onnx.data"]
    assert made.SerializeToString() == before  # the model in memory keeps its tensors
    assert path.stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    x = x_of(3, 256)
    again = onnx_tensors.with_data_inside(onnx_io.read_model(path))
    assert np.array_equal(run(again, x=x)["y"], run(made, x=x)["y"])
    onnx_io.write_model(made, path)  # again, over the old ones: not appended to
    assert (tmp_path / "model.onnx.data").stat().st_size < 10_000
    monkeypatch.undo()
    onnx_io.write_model(made, path)
    assert stored(tmp_path) == ["model.onnx"]


def test_external_data_that_is_missing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", 1000)
    path = onnx_io.write_model(made, tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx: ") as caught:
        onnx_io.read_model(path)
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_the_old_file(made, tmp_path, monkeypatch, external):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")

    def full(*args, **kwargs):
        (tmp_path / "written").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if external:
        monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr(onnx, "save_model", full)
    with pytest.raises(StageError, match="cannot be written: No space left on device") as caught:
        onnx_io.write_model(made, path)
    assert caught.value.where == str(path)
    (tmp_path / "written").unlink()
    assert stored(tmp_path) == ["model.onnx"]
    assert path.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing(made, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        onnx_io.write_model(made, tmp_path / "model.onnx")
    assert stored(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no graph"),
        (b"PK\x03\x04 not onnx", "is no ONNX model"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_model(tmp_path, content, message):
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        onnx_io.read_model(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file(made, tmp_path):
    path = onnx_io.write_model(made, tmp_path / "model.onnx")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="truncated"):
        onnx_io.read_model(path)


@pytest.mark.parametrize("limit", [10, 10**9], ids=["skeleton", "whole"])
def test_the_checker_names_the_file_in_one_line(made, monkeypatch, limit):
    monkeypatch.setattr(onnx_io, "EXTERNAL_DATA_BYTES", limit)
    onnx_io.check_model(made, "model.onnx")
    made.graph.node[0].input[0] = "nowhere"
    with pytest.raises(StageError, match=r"model\.onnx: a model was made that onnx") as caught:
        onnx_io.check_model(made, "model.onnx")
    assert "\n" not in caught.value.what


def test_the_skeleton_has_no_large_tensor(made):
    bare = onnx_io.skeleton(made)
    assert bare.ByteSize() < made.ByteSize() - 8192 + 100
    assert {v.name for v in bare.graph.input} == {"x", "layer.packed_weight"}
    y = onnx_io.infer_shapes(made)["y"].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in y] == ["batch", 128]


def test_graphs_keep_layers_functions_metadata_and_domains(made):
    entry = made.metadata_props.add()
    entry.key, entry.value = "author", "someone"
    made.opset_import.append(onnx.helper.make_opsetid("unused", 1))
    after = onnx_io.from_graph(onnx_io.to_graph(made), made)
    assert [onnx_io.node_layer(n) for n in after.graph.node] == ["layer"]
    assert [(f.name, f.domain) for f in after.functions] == [(op.OP_TYPE, op.DOMAIN)]
    assert {i.domain for i in after.opset_import} == {"", op.DOMAIN}
    assert (after.metadata_props[0].key, after.ir_version) == ("author", 10)
    assert not after.graph.node[0].attribute[0].name.startswith("_")


def test_functions_of_others_survive():
    function = onnx.parser.parse_function(
        '<domain: "mine", opset_import: ["" : 20]> Twice (a) => (b) { b = Add (a, a) }'
    )
    made = model(
        [node("Relu", ["x"], ["r"]), node("Twice", ["r"], ["y"], domain="mine")],
        [value("x", ["n"])],
        [value("y", ["n"])],
    )
    made.functions.append(function)
    after, _ = run_passes(made, [FoldConstants()])
    assert [f.name for f in after.functions] == ["Twice"]
    x = np.array([-1, 2], np.float32)
    assert np.array_equal(run(after, x=x)["y"], [0, 4])


def test_float16_tensors_in_typed_fields_are_counted():
    tensor = onnx.helper.make_tensor("t", onnx.TensorProto.FLOAT, [1000], np.ones(1000))
    raw = numpy_helper.from_array(np.ones(1000, np.float32), "t")
    for one in (tensor, raw):
        graph = onnx.helper.make_graph([], "g", [], [], [one])
        assert onnx_io.initializer_bytes(onnx.helper.make_model(graph)) >= 4000
