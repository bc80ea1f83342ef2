"""manifest.json: what it refuses, and that the message says which file or version differs."""

import json

import pytest

from bitnet_export import manifest
from bitnet_export.errors import InputError, MissingRequirement
from bitnet_export.manifest import (
    Manifest,
    check_manifest,
    read_manifest,
    record_files,
    sha256_of,
    version_tuple,
    write_manifest,
)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "intermediate").mkdir()
    for name in ("model.onnx", "model.onnx.data", "intermediate/baseline.onnx"):
        (tmp_path / name).write_bytes(name.encode() * 10)
    record = Manifest(
        name="m",
        target="ort",
        inputs={"ids": {"dtype": "int64", "shape": ["batch", "sequence"]}},
        outputs=["y"],
        requires={"onnxruntime": "1.0"},
    )
    names = ["model.onnx", "model.onnx.data", "intermediate/baseline.onnx", "absent"]
    record.files = record_files(tmp_path, names)
    write_manifest(record, tmp_path)
    return tmp_path


def edit(directory, **changes):
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_written_is_read(directory):
    record = check_manifest(directory)
    assert record.dynamic_axes == {"ids": {0: "batch", 1: "sequence"}}
    assert set(record.files) == {"model.onnx", "model.onnx.data", "intermediate/baseline.onnx"}
    assert record.files["model.onnx"] == {
        "sha256": sha256_of(directory / "model.onnx"),
        "bytes": 100,
    }
    assert not list(directory.glob("*.partial"))


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_missing_truncated_and_replaced_files(directory, name):
    path = directory / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match="truncated or replaced") as caught:
        check_manifest(directory)
    assert caught.value.where == str(path)
    path.write_bytes(b"X" + whole[1:])
    with pytest.raises(InputError, match="differs from the file"):
        check_manifest(directory)
    check_manifest(directory, hashes=False)  # sizes only
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        check_manifest(directory)


def test_intermediates_may_go_but_not_be_cut(directory):
    path = directory / "intermediate" / "baseline.onnx"
    path.write_bytes(b"x")
    with pytest.raises(InputError, match="truncated or replaced"):
        check_manifest(directory)
    path.unlink()
    check_manifest(directory)


def test_a_directory_without_one(tmp_path):
    with pytest.raises(InputError, match=r"holds no manifest\.json: not a directory"):
        check_manifest(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"schema_version": 1}', "\xff"])
def test_damaged_files(directory, text):
    (directory / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match="is damaged") as caught:
        read_manifest(directory)
    assert "\n" not in caught.value.what


@pytest.mark.parametrize(
    "changes",
    [
        dict(files=[1]),
        dict(files={"model.onnx": {}}),
        dict(files={"model.onnx": {"bytes": "7", "sha256": "x"}}),
        dict(files={"../other": {"bytes": 1, "sha256": "x"}}),
        dict(inputs={"x": {"dtype": "float32"}}),
        dict(requires={"onnxruntime": 1.28}),
        dict(unknown=1),
    ],
    ids=str,
)
def test_fields_of_the_wrong_form(directory, changes):
    edit(directory, **changes)
    with pytest.raises(InputError, match="is damaged"):
        read_manifest(directory)


@pytest.mark.parametrize("field", ["schema_version", "op_version"])
def test_other_versions_are_refused_before_anything_else(directory, field):
    edit(directory, **{field: 2, "a field of the future": 1})
    with pytest.raises(InputError, match=f"has {field.replace('_', ' ')} 2, .* knows 1"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("installed", "message"),
    [({}, "is not installed"), ({"onnxruntime": "1.27.1"}, "1.27.1 is installed")],
)
def test_packages_that_are_missing_or_too_old(directory, monkeypatch, installed, message):
    import importlib.metadata as metadata

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    edit(directory, requires={"onnxruntime": "1.28"})
    with pytest.raises(MissingRequirement, match=message) as caught:
        check_manifest(directory)
    assert "onnxruntime>=1.28" in caught.value.fix


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_either_onnxruntime_will_do(directory, monkeypatch, name):
    import importlib.metadata as metadata

    def version(asked):
        if asked != name:
            raise metadata.PackageNotFoundError(asked)
        return "1.31.0"

    monkeypatch.setattr(metadata, "version", version)
    edit(directory, requires={"onnxruntime": "1.28"})
    assert check_manifest(directory).name == "m"


@pytest.mark.parametrize(
    ("text", "parts"),
    [("1.28.0", (1, 28, 0)), ("1.28.0rc1", (1, 28, 0)), ("1.9", (1, 9)), ("2.0+cpu", (2, 0))],
)
def test_versions_compare_as_numbers(text, parts):
    assert version_tuple(text) == parts
    assert version_tuple("1.9") < version_tuple("1.28")
    assert manifest.SCHEMA_VERSION == 1


def test_a_file_is_no_directory(tmp_path):
    file = tmp_path / "model.pt"
    file.write_bytes(b"weights")
    with pytest.raises(InputError, match="not a directory bitnet-export wrote"):
        read_manifest(file)
