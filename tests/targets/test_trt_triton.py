"""Triton model repositories: the text of config.pbtxt, the files, and what is refused.

Triton itself does not run here; the tokens are checked against its documented text format.
"""

from __future__ import annotations

import re

import pytest

from bitnet_export import manifest
from bitnet_export.errors import UsageError
from bitnet_export.targets.trt_triton import (
    ONNX,
    PLAN,
    Tensor,
    check_repository,
    config,
    max_batch,
    model_name_of,
    write_repository,
)
from tests.passes.graphs import ternary_case, ternary_model
from tests.targets.trt_support import job_for

IDS = Tensor("ids", "int64", ("batch", "sequence"))
LOGITS = Tensor("logits", "float32", ("batch", "sequence", 512))


def test_batched_config():
    text = config("m", PLAN, [IDS], [LOGITS], 8)
    assert 'platform: "tensorrt_plan"' in text
    assert "max_batch_size: 8" in text
    assert '{ name: "ids", data_type: TYPE_INT64, dims: [ -1 ] }' in text
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ -1, 512 ] }' in text
    assert "dynamic_batching" in text
    assert "kind: KIND_GPU" in text
    assert text.count("{") == text.count("}")
    assert text.count("[") == text.count("]")


def test_config_without_batching_keeps_the_first_axis():
    text = config("m", ONNX, [Tensor("x", "float16", (4, 8))], [Tensor("y", "bool", ())], 0)
    assert "max_batch_size: 0" in text
    assert "dims: [ 4, 8 ]" in text
    assert "dims: [ 1 ], reshape { shape: [ ] } }" in text  # rank 0 is not known to Triton
    assert "dynamic_batching" not in text
    assert "KIND_CPU" in text


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ([IDS], [LOGITS], 8),
        ([IDS, Tensor("scale", "float32", (1,))], [LOGITS], 0),
        ([IDS], [LOGITS, Tensor("loss", "float32", ())], 0),
        ([Tensor("x", "float32", (4, 8))], [Tensor("y", "float32", (4, 8))], 0),
        ([Tensor("x", "float32", ())], [LOGITS], 0),
    ],
    ids=["shared axis", "input without", "output without", "static", "scalar"],
)
def test_batching_needs_one_first_axis_everywhere(inputs, outputs, expected):
    profile = {t.name: {"max": [8, 64]} for t in inputs}
    assert max_batch(inputs, outputs, profile, {}) == expected


def job(folder, **changes):
    model = ternary_model(ternary_case(128, 64))
    made = job_for(folder / "out", model, target="trt", triton=folder / "repository", **changes)
    made.environment["profile"] = {"x": {"min": [1, 128], "opt": [1, 128], "max": [4, 128]}}
    (made.directory / "p.so").write_bytes(b"plugin")
    (made.directory / "r.so").write_bytes(b"register")
    made.environment["plugin"] = {"file": "p.so", "register": "r.so"}
    return made


def test_plan_plugin_and_how_to_start(tmp_path):
    made = job(tmp_path)
    (made.directory / manifest.ENGINE).write_bytes(b"engine")
    home = write_repository(made, "my model")
    assert home.name == "my-model"
    assert (home / "1" / "model.plan").read_bytes() == b"engine"
    assert (home / "p.so").read_bytes() == b"plugin"
    assert "max_batch_size: 4" in (home / "config.pbtxt").read_text()
    text = (tmp_path / "repository" / "README.md").read_text()
    assert (home / "r.so").read_bytes() == b"register"  # it looks for the plugin beside itself
    assert "--backend-config=tensorrt,plugins=$PWD/my-model/r.so" in text
    # Triton takes every directory of the repository for a model.
    assert [p.name for p in (tmp_path / "repository").iterdir() if p.is_dir()] == ["my-model"]


def test_without_an_engine_the_readme_says_what_to_copy(tmp_path):
    home = write_repository(job(tmp_path), "m")
    assert not (home / "1" / "model.plan").exists()
    text = (tmp_path / "repository" / "README.md").read_text()
    assert re.search(r"copy `model\.engine` to `m/1/model\.plan`", text)


def test_onnx_targets_get_the_onnx_file(tmp_path):
    model = ternary_model(ternary_case(128, 64))
    made = job_for(tmp_path / "out", model, target="ort", triton=tmp_path / "repository")
    home = write_repository(made, "m")
    assert (home / "1" / "model.onnx").is_file()
    assert 'platform: "onnxruntime_onnx"' in (home / "config.pbtxt").read_text()


def test_a_model_that_is_there_is_not_replaced(tmp_path):
    write_repository(job(tmp_path), "m")
    with pytest.raises(UsageError, match="exists"):
        check_repository(tmp_path / "repository", "m", overwrite=False)
    check_repository(tmp_path / "repository", "m", overwrite=True)
    (tmp_path / "repository" / "m" / "config.pbtxt").unlink()
    with pytest.raises(UsageError, match="exists"):  # then it is not one of ours
        check_repository(tmp_path / "repository", "m", overwrite=True)


@pytest.mark.parametrize(("name", "expected"), [("a b/c", "a-b-c"), ("..", "model"), ("m1", "m1")])
def test_names_become_directories(name, expected):
    assert model_name_of(name) == expected
