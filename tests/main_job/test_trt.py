"""The main job for TensorRT on a machine without it: the plugin ONNX, checked by its function."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from bitnet_export import op, packing
from bitnet_export.errors import MissingRequirement
from bitnet_export.load import save
from bitnet_export.options import ExportOptions
from bitnet_export.pipeline import run_export
from bitnet_export.targets import load_session
from tests.main_job import models
from tests.main_job.checks import check_report, operators

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    return save(
        models.Encoder().eval(),
        tmp_path_factory.mktemp("trt") / "encoder.pt",
        {"x": torch.randn(2, 6, 32)},
        {"x": {0: "batch", 1: "sequence"}},
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_plugin_nodes(export, encoder, dtype):
    report, directory = export(encoder, "trt", engine=False, dtype=dtype)
    check_report(report, directory, speed=False)
    assert operators(directory)[op.TRT_DOMAIN, op.OP_TYPE] == 8  # q k v are one
    assert (op.DOMAIN, op.OP_TYPE) not in operators(directory)
    model = onnx.load(directory / "model.onnx")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == op.OP_TYPE:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            assert attributes["plugin_namespace"] == b""
            assert attributes["plugin_version"] == b"1"
            words = constants[node.input[1]]
            assert words.dtype == np.int32
            packing.unpack(packing.from_int32(words), attributes["K"])


def test_without_tensorrt_the_files_stay_and_the_error_says_what_is_missing(encoder, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(MissingRequirement) as caught:
        run_export(ExportOptions(model=encoder, target="trt", output=out, threads=1))
    assert caught.value.exit_code == 3
    assert "no engine was built" in caught.value.what
    assert (out / "model.onnx").is_file()
    assert (out / "report.json").is_file()
    with pytest.raises(MissingRequirement):
        load_session(out)
