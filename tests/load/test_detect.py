"""Kinds are told by content; damaged and foreign files get an error that says what they are."""

import shutil

import pytest

from bitnet_export.errors import InputError
from bitnet_export.load import detect, load


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mlp.pt2", "exported_program"),
        ("tied.pt", "exported_program"),
        ("sd.pt", "torch_save"),
        ("checkpoint.pt", "torch_save"),
        ("whole.pt", "torch_save"),
        ("old.pt", "torch_save"),
        ("mlp.safetensors", "safetensors"),
    ],
)
def test_kind_does_not_depend_on_the_name(files, tmp_path, name, kind):
    assert detect(files / name) == kind
    renamed = tmp_path / "model.onnx"
    shutil.copy(files / name, renamed)
    assert detect(renamed) == kind


def test_onnx_and_huggingface(dense_onnx, bert_directory, tmp_path):
    assert detect(dense_onnx) == "onnx"
    shutil.copy(dense_onnx, tmp_path / "model.pt")
    assert detect(tmp_path / "model.pt") == "onnx"
    assert detect(bert_directory) == "huggingface"


@pytest.mark.parametrize("name", ["mlp.pt2", "sd.pt", "mlp.safetensors", "onnx"])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.95])
def test_truncated_file(files, dense_onnx, tmp_path, name, keep):
    data = dense_onnx.read_bytes() if name == "onnx" else (files / name).read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * keep)])
    factory = None if name in ("mlp.pt2", "onnx") else "tests.load.models:mlp"
    with pytest.raises(InputError, match="truncated or damaged"):
        load(path, factory=factory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"no model at all, just text", "no known kind"),
        (b"\x00" * 64, "no known kind"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"PK\x03\x04 and then nothing", "truncated or damaged"),
    ],
)
def test_wrong_magic(tmp_path, content, message):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        detect(path)


def test_directories_that_are_no_model(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        detect(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="bitnet-export verify"):
        detect(tmp_path)


def test_adapter_directory(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge"):
        detect(tmp_path)


def test_missing_and_special_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        detect(tmp_path / "nothing.pt")


def test_arrays_are_data(tmp_path):
    import numpy as np

    np.savez(tmp_path / "data.npz", x=np.zeros(3))
    with pytest.raises(InputError, match="--data"):
        detect(tmp_path / "data.npz")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "secret.pt"
    path.write_bytes(b"x")

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", refuse)  # root may read anything, so chmod is no test
    with pytest.raises(InputError, match="permission denied"):
        detect(path)
