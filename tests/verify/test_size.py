"""Size by part: exact totals, and every tensor in the part a reader would put it in."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bitnet_export.errors import InputError
from bitnet_export.verify.size import measure_size, size_block
from tests.verify import models
from tests.verify.models import VOCABULARY, K, N

WEIGHTS = K * N + N * N
BIASES = 2 * N * 4


def total(size):
    return sum(size.part_bytes.values())


@pytest.mark.parametrize("form", models.FORMS)
@pytest.mark.parametrize("embedding", [False, True], ids=["plain", "embedding"])
def test_parts_sum_to_the_file(tmp_path, form, embedding):
    path = models.write(tmp_path / "m.onnx", form, embedding=embedding)
    size = measure_size(path)
    assert size.total == path.stat().st_size == total(size)
    assert all(count >= 0 for count in size.part_bytes.values())
    assert size.part_bytes["embeddings"] == (VOCABULARY * K * 4 if embedding else 0)
    assert size.part_bytes["rest"] == BIASES


@pytest.mark.parametrize(
    ("form", "linear"),
    [
        ("float", WEIGHTS * 4),
        ("ternary", WEIGHTS // 4 + 2 * N * 4),
        ("nbits", WEIGHTS // 4 + (K + N) // 128 * N * 4),
        # packed bytes and scales, and per layer 4 shifts, a mask, a zero point, three int64
        ("unpacked", WEIGHTS // 4 + 2 * (N * 4 + 4 + 1 + 1 + 24)),
    ],
)
def test_linear_part_is_what_was_put_in(tmp_path, form, linear):
    size = measure_size(models.write(tmp_path / "m.onnx", form))
    assert size.part_bytes["linear"] == linear


def test_block_against_the_baseline(tmp_path):
    paths = [models.write(tmp_path / f"{f}.onnx", f, embedding=True) for f in ("float", "unpacked")]
    block = size_block(*paths)
    assert block.baseline_dtype == "fp32"
    assert block.baseline_bytes == paths[0].stat().st_size
    assert block.bytes == paths[1].stat().st_size
    assert block.ratio == block.baseline_bytes / block.bytes
    assert sum(p.bytes for p in block.by_part.values()) == block.bytes
    assert sum(p.baseline_bytes for p in block.by_part.values()) == block.baseline_bytes
    linear = block.by_part["linear"]
    assert linear.weights == WEIGHTS
    assert 2.0 < linear.bits_per_weight < 2.4
    assert block.by_part["embeddings"].bits_per_weight == 32
    assert block.by_part["graph"].bits_per_weight is None


def test_external_data_counts(tmp_path):
    model = models.make_model("float", embedding=True)
    inline = tmp_path / "inline.onnx"
    onnx.save(model, inline)
    path = tmp_path / "external.onnx"
    onnx.save(
        model, path, save_as_external_data=True, location="external.data", size_threshold=1024
    )
    size, inside = measure_size(path), measure_size(inline)
    files = path.stat().st_size + (tmp_path / "external.data").stat().st_size
    assert size.total == files == total(size)
    for part in ("linear", "embeddings", "rest"):
        assert size.part_bytes[part] == inside.part_bytes[part]
    (tmp_path / "external.data").unlink()
    with pytest.raises(InputError, match="cannot be measured"):
        measure_size(path)


def save_graph(path, nodes, constants, inputs, outputs=("y",)):
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph(nodes, "g", inputs, values, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def test_embeddings_quantized_tied_or_tables_of_positions(tmp_path):
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
    constants = {
        "codes": np.zeros((10, 32), np.uint8),
        "scales": np.ones((10, 1), np.float32),
        "zeros": np.full((10, 1), 128, np.uint8),
        "tied": np.zeros((10, 32), np.float32),
        "positions": np.arange(64)[None],
        "kept": np.zeros((32, 5), np.float16),
        "table16": np.zeros((9, 3), np.float16),
    }
    quantized = ["codes", "ids", "scales", "zeros"]
    nodes = [
        helper.make_node(
            "GatherBlockQuantized", quantized, ["a"], domain="com.microsoft", bits=8, block_size=32
        ),
        helper.make_node("Gather", ["tied", "ids"], ["b"]),
        helper.make_node("Transpose", ["tied"], ["tied.t"]),
        helper.make_node("MatMul", ["b", "tied.t"], ["y"]),
        helper.make_node("Gather", ["positions", "ids"], ["p"], axis=1),
        helper.make_node("Cast", ["kept"], ["kept.32"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["b", "kept.32"], ["z"]),
        helper.make_node("MatMul", ["b", "b"], ["attention"]),
        helper.make_node(
            "Constant", [], ["t"], value=numpy_helper.from_array(constants.pop("table16"))
        ),
        helper.make_node("Gather", ["t", "ids"], ["c"]),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    size = measure_size(save_graph(tmp_path / "m.onnx", nodes, stored, [ids]))
    assert size.part_bytes["embeddings"] == 320 + 40 + 10 + 1280 + 54
    assert size.part_bytes["linear"] == 320
    assert size.part_bytes["rest"] == 64 * 8
    assert size.part_elements["linear"] == 160
    assert size.dtype == "fp32"
    assert total(size) == size.total


def test_typed_fields_and_subgraphs(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    typed = helper.make_tensor("w", TensorProto.FLOAT, [4, 3], [0.5] * 12)  # float_data
    out = helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 3])
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["r"])],
        "then",
        [],
        [out],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "inner")],
    )
    other = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["r"])], "else", [], [out])
    nodes = [helper.make_node("If", ["flag"], ["y"], then_branch=body, else_branch=other)]
    size = measure_size(save_graph(tmp_path / "m.onnx", nodes, [typed], [x, flag]))
    assert size.part_elements["linear"] == 24
    assert 96 <= size.part_bytes["linear"] <= 104  # a typed field has a small header
    assert total(size) == size.total


@pytest.mark.parametrize("content", [b"", b"no model"], ids=["empty", "text"])
def test_broken_files(tmp_path, content):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"m\.onnx"):
        measure_size(path)
