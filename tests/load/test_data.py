"""npz and safetensors files for --data."""

import numpy as np
import pytest

from bitnet_export.errors import InputError
from bitnet_export.load import load_data
from bitnet_export.load.data import as_dtype


def test_npz_samples_and_batches(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.arange(10).reshape(5, 2), y=np.arange(5))
    data = load_data(tmp_path / "d.npz")
    assert len(data) == 5
    assert data[1]["x"].tolist() == [2, 3]
    assert [len(b["y"]) for b in data.batches(2)] == [2, 2, 1]
    assert len(list(data)) == 5
    assert list(data.select(["y"])) == ["y"]
    with pytest.raises(InputError, match="no array z"):
        data.select(["z"])


def test_safetensors(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.ones((3, 2), np.float32)}, tmp_path / "d.bin")
    assert load_data(tmp_path / "d.bin").arrays["x"].shape == (3, 2)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 3)), "y": np.zeros(3)}, "same number of samples"),
        ({"x": np.float32(1)}, "scalar"),
        ({"x": np.zeros((0, 3))}, "at least 1"),
        ({"x": np.array([{}], dtype=object)}, "cannot be read"),
        ({}, "no arrays"),
    ],
)
def test_unusable_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_data(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0.1, 2.5]), "float32"),
        (np.arange(3, dtype=np.uint8), "float16"),
        (np.array([1.0, 7.0]), "int64"),
        (np.array([0, 1]), "bool"),
        (np.array([2, 3], np.int64), "int32"),
    ],
)
def test_numbers_are_given_in_the_dtype_a_model_takes(values, dtype):
    made = as_dtype(values, dtype, "x", "d.npz")
    assert made.dtype == dtype
    np.testing.assert_allclose(made, values, rtol=1e-3)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([0.5]), "int64"),
        (np.array([np.nan]), "int64"),
        (np.array([300]), "uint8"),
        (np.array([2]), "bool"),
        (np.array([1e6]), "float16"),
        (np.array(["a"]), "float32"),
        (np.array([1j]), "float32"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, dtype):
    with pytest.raises(
        InputError, match=f"array x holds {values.dtype} values that are no {dtype}"
    ):
        as_dtype(values, dtype, "x", "d.npz")


@pytest.mark.parametrize("content", [b"text", b"", b"PK\x03\x04cut"])
def test_other_files(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(InputError):
        load_data(tmp_path / "d.npz")


def test_truncated_npz(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((50, 50)))
    data = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError):
        load_data(tmp_path / "d.npz")
