"""Sizes of compressed models: bytes on disk, exactly; bits a weight of the codes alone."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from bitnet_export import compress
from bitnet_export.errors import InputError
from bitnet_export.packing import pack
from bitnet_export.verify.at_rest import code_tensors
from bitnet_export.verify.size import measure_size, size_block
from tests.verify import models
from tests.verify.models import K, N

WEIGHTS = K * N + N * N


@pytest.mark.parametrize("external", [False, True])
def test_parts_sum_to_the_compressed_bytes(tmp_path, external):
    baseline = models.write(tmp_path / "float.onnx", "float", embedding=True)
    path = tmp_path / "model.onnx"
    arguments = {"save_as_external_data": True, "location": "model.onnx.data"} if external else {}
    onnx.save(models.make_model("unpacked", embedding=True), path, **arguments)
    plain = size_block(baseline, path)
    assert (plain.compression, plain.unpacked_bytes) == ("", None)
    files = compress.compress_model(path)
    unpacked = compress.PlainModel(path)
    block = size_block(baseline, unpacked.path, path)
    stored = sum(f.stat().st_size for f in files)
    assert block.bytes == stored == sum(p.bytes for p in block.by_part.values())
    assert all(p.bytes > 0 for p in block.by_part.values())
    assert block.ratio == block.baseline_bytes / stored
    assert block.unpacked_bytes == plain.bytes > stored
    assert block.compression == "zstd"
    assert block.code_bits_per_weight < plain.code_bits_per_weight


def test_both_baselines(tmp_path):
    paths = [models.write(tmp_path / f"{f}.onnx", f, embedding=True) for f in ("float", "ternary")]
    block = size_block(*paths)
    floats = measure_size(paths[0]).float_elements
    assert block.fp32_bytes == block.baseline_bytes
    assert block.fp16_bytes == block.baseline_bytes - 2 * floats
    assert block.ratio_fp32 == block.ratio
    assert block.ratio_fp16 == block.fp16_bytes / block.bytes


@pytest.mark.parametrize("form", ["ternary", "nbits", "unpacked"])
def test_codes_are_found_in_every_form(tmp_path, form):
    model = models.make_model(form, embedding=True)
    counted = dict(code_tensors(model))
    assert sum(counted.values()) == WEIGHTS
    path = models.write(tmp_path / "m.onnx", form, embedding=True)
    block = size_block(models.write(tmp_path / "f.onnx", "float", embedding=True), path)
    assert block.code_bits_per_weight == pytest.approx(2.0, abs=0.15)  # rows are padded


def test_codes_of_a_dense_model(tmp_path):
    path = models.write(tmp_path / "m.onnx", "float")
    assert size_block(path, path).code_bits_per_weight is None


def test_another_models_file_is_refused(tmp_path):
    paths = [models.write(tmp_path / f"{f}.onnx", f) for f in ("float", "unpacked")]
    other = tmp_path / "other" / "unpacked.onnx"
    other.parent.mkdir()
    models.write(other, "float")
    compress.compress_model(other)
    with pytest.raises(InputError, match="not the compressed form of this model"):
        size_block(*paths, other)


def _dominated(path, form, rng, layers=8, width=1024, vocabulary=1000):
    """A stack of linear layers on a small int4 embedding, or the same in float32."""
    tensors, nodes, x = [], [], "x0"
    table = rng.standard_normal((vocabulary, width)).astype(np.float32) * 0.02
    if form == "float":
        tensors.append(numpy_helper.from_array(table, "table"))
        nodes.append(helper.make_node("Gather", ["table", "ids"], ["x0"]))
    else:
        from bitnet_export.passes.quantize_embeddings import quantize_blocks

        codes, scale = quantize_blocks(table, 4, 32)
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
        tensors += [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "s")]
        attributes = {"bits": 4, "block_size": 32, "gather_axis": 0, "quantize_axis": 1}
        node = helper.make_node(
            "GatherBlockQuantized",
            ["codes", "ids", "s"],
            ["x0"],
            domain="com.microsoft",
            **attributes,
        )
        nodes.append(node)
    for i in range(layers):
        weight = rng.standard_normal((width, width)).astype(np.float32)
        if form == "float":
            tensors.append(numpy_helper.from_array(weight.T.copy(), f"w{i}"))
            nodes.append(helper.make_node("MatMul", [x, f"w{i}"], [f"x{i + 1}"]))
        else:
            trits = np.sign(weight) * (np.abs(weight) > 0.7 * np.abs(weight).mean(1, keepdims=True))
            tensors.append(numpy_helper.from_array(pack(trits), f"w{i}"))
            scale = np.abs(weight).mean(1).astype(np.float32)
            tensors.append(numpy_helper.from_array(scale, f"scale{i}"))
            inputs = [x, f"w{i}", f"scale{i}"]
            attributes = {"K": width, "N": width, "group_size": 0, "activation_bits": 8}
            nodes.append(
                helper.make_node(
                    "TernaryMatMul", inputs, [f"x{i + 1}"], domain="bitnet", **attributes
                )
            )
        x = f"x{i + 1}"
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    out = helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, ["n", width])
    opsets = [helper.make_opsetid(d, v) for d, v in (("", 20), ("bitnet", 1), ("com.microsoft", 1))]
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "g", [ids], [out], tensors), opset_imports=opsets
        ),
        path,
    )
    return path


def test_8_2_times_smaller_than_fp16_where_the_linears_dominate(tmp_path):
    """Eight million linear weights beside a million of an embedding in int4."""
    rng = np.random.default_rng(0)
    baseline = _dominated(tmp_path / "float.onnx", "float", rng)
    path = _dominated(tmp_path / "model.onnx", "ternary", rng)
    compress.compress_model(path)
    plain = compress.PlainModel(path)  # its directory goes with it
    block = size_block(baseline, plain.path, path)
    assert block.ratio_fp16 >= 8.2
    assert block.code_bits_per_weight <= 1.6
    assert block.by_part["embeddings"].bits_per_weight < 5
