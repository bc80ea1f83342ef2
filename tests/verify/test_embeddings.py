"""The error report of quantized tables: the numbers a reader would compute from the two files."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitnet_export.passes import run_passes
from bitnet_export.passes.quantize_embeddings import QuantizeEmbeddings, quantize_blocks
from bitnet_export.verify.embeddings import dequantize_blocks, embedding_errors

ROWS, DIM = 200, 96


def gather_model(table):
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", DIM])
    node = helper.make_node("Gather", ["words.weight", "ids"], ["y"])
    tensors = [numpy_helper.from_array(table, "words.weight")]
    graph = helper.make_graph([node], "g", [ids], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("contrib", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_errors_are_those_of_what_the_model_returns(tmp_path, bits, contrib):
    from bitnet_export.targets.session import open_session

    table = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)
    before, after = tmp_path / "before.onnx", tmp_path / "after.onnx"
    onnx.save(gather_model(table), before)
    lowered, _ = run_passes(onnx.load(before), [QuantizeEmbeddings(bits, contrib)])
    onnx.save(lowered, after)
    (row,) = embedding_errors(before, after)
    found = open_session(after, threads=1).run(None, {"ids": np.arange(ROWS)})[0]
    error = found - table
    assert (row.name, row.bits, row.rows, row.columns) == ("words.weight", bits, ROWS, DIM)
    assert row.block == 32
    assert row.relative_error == pytest.approx(
        np.sqrt((error**2).mean()) / np.sqrt((table**2).mean()), rel=1e-4
    )
    assert row.max_abs == pytest.approx(np.abs(error).max(), rel=1e-4)
    assert {8: 0.001, 4: 0.02}[bits] < row.relative_error < {8: 0.02, 4: 0.2}[bits]


def test_a_model_without_quantized_tables(tmp_path):
    onnx.save(gather_model(np.ones((ROWS, DIM), np.float32)), tmp_path / "m.onnx")
    assert embedding_errors(tmp_path / "m.onnx", tmp_path / "m.onnx") == []


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantize_undoes_quantize(bits):
    table = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    codes, scale = quantize_blocks(table, bits, 32)
    packed = codes if bits == 8 else codes[:, 0::2] | codes[:, 1::2] << 4
    found = dequantize_blocks(packed, scale, bits)
    half = np.repeat(scale, 32, axis=1) / 2
    assert (np.abs(found - table) <= half * 1.001).all()
