"""Files of each kind, written once for all loader tests."""

from __future__ import annotations

import pytest
import torch

import bitnet_export.load as loading
from tests.load.models import (
    BATCH_SEQUENCE,
    Mlp,
    NoSignature,
    TiedTransformer,
    save_huggingface,
)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Directory with mlp.pt2, tied.pt (programs), sd.pt, whole.pt, old.pt, mlp.safetensors."""
    from safetensors.torch import save_file

    directory = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    mlp = Mlp()
    loading.save(mlp, directory / "mlp.pt2", {"input": torch.randn(3, 12)}, {"input": {0: "batch"}})
    loading.save(
        TiedTransformer(),
        directory / "tied.pt",
        {"ids": torch.randint(0, 20, (2, 5))},
        {"ids": BATCH_SEQUENCE},
    )
    torch.save(mlp.state_dict(), directory / "sd.pt")
    torch.save({"epoch": 3, "state_dict": mlp.state_dict()}, directory / "checkpoint.pt")
    torch.save(NoSignature(), directory / "whole.pt")
    torch.save(NoSignature(), directory / "old.pt", _use_new_zipfile_serialization=False)
    save_file(mlp.state_dict(), directory / "mlp.safetensors")
    return directory


@pytest.fixture(scope="session")
def dense_onnx(tmp_path_factory):
    """A foreign ONNX file: ids -> Gather -> MatMul -> Add, dynamic batch and sequence."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    tensors = {"table": (30, 8), "weight": (8, 4), "bias": (4,)}
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["x"]),
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["logits"]),
        ],
        "foreign",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "sequence"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", 4])],
        [
            numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
            for name, shape in tensors.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("onnx") / "dense.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="session")
def bert_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hf") / "tiny-bert"
    save_huggingface(directory, "bert")
    return directory
