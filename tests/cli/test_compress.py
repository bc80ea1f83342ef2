"""--compress as processes: smaller, checked, loaded, verified, unpacked; damage is said so."""

import json
import shutil

import numpy as np
import pytest

from tests.cli.conftest import run
from tests.cli.test_bad_inputs import check


@pytest.fixture(scope="module")
def compressed(mlp_file, tmp_path_factory):
    directory = tmp_path_factory.mktemp("compressed") / "mlp"
    done = run(mlp_file, "--compress", "--no-bench", "-o", directory)
    assert done.returncode == 0, done.stderr
    return done, directory


@pytest.fixture
def copy(compressed, tmp_path):
    return shutil.copytree(compressed[1], tmp_path / "copy")


def test_only_the_compressed_file_is_written(compressed):
    done, directory = compressed
    assert not (directory / "model.onnx").exists()
    size = json.loads((directory / "report.json").read_text())["size"]
    assert size["bytes"] == (directory / "model.onnx.zst").stat().st_size < size["unpacked_bytes"]
    assert size["ratio_fp16"] < size["ratio_fp32"] == size["ratio"]
    files = json.loads((directory / "manifest.json").read_text())["files"]
    assert "model.onnx.zst" in files
    assert "model.onnx" not in files
    assert "zstd, unpacked" in done.stdout
    assert " fp16 " in done.stdout
    assert "Packed ternary codes alone" in (directory / "report.html").read_text()


def test_it_computes_what_the_plain_export_computes(compressed, exported):
    import bitnet_export

    x = {"input": np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)}
    plain, packed = (
        bitnet_export.load_session(d[1], threads=1).run(None, x)[0] for d in (exported, compressed)
    )
    np.testing.assert_array_equal(plain, packed)


def test_verify_bench_and_inspect(copy):
    done = run("verify", copy)
    assert done.returncode == 0, done.stderr
    done = run("bench", copy, "--samples", 11)
    assert done.returncode == 0, done.stderr
    assert "as fast" in done.stdout
    size = json.loads((copy / "report.json").read_text())["size"]
    assert size["compression"] == "zstd"
    done = run("inspect", copy)
    assert done.returncode == 0, done.stderr
    assert "compressed)" in done.stdout
    assert "2 ternary layers" in done.stdout
    assert sorted(p.name for p in copy.iterdir() if "model" in p.name) == ["model.onnx.zst"]


def test_unpack(compressed, tmp_path):
    import onnxruntime as ort

    done = run("unpack", compressed[1], "-o", "plain.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written to plain.onnx" in done.stdout
    session = ort.InferenceSession(tmp_path / "plain.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"input": np.zeros((2, 64), np.float32)})[0].shape == (2, 10)
    done = run("unpack", compressed[1], "-o", "plain.onnx", cwd=tmp_path)
    check(done, 2, "the file exists", "--force")


@pytest.mark.parametrize("command", ["verify", "unpack", "inspect"])
def test_a_truncated_file(copy, tmp_path, command):
    file = copy / "model.onnx.zst"
    file.write_bytes(file.read_bytes()[:-40])
    check(run(command, copy, cwd=tmp_path), 2, "model.onnx.zst", "truncated")


def test_a_changed_byte(copy):
    import bitnet_export
    from bitnet_export.errors import InputError

    file = copy / "model.onnx.zst"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="differs from the file the manifest was written for"):
        bitnet_export.load_session(copy)


def test_where_it_does_not_apply(mlp_file, tmp_path):
    done = run(mlp_file, "--compress", "--target", "trt", cwd=tmp_path)
    check(done, 2, "--compress --target trt", "plain files")
    assert list(tmp_path.iterdir()) == []


def test_a_compressed_file_is_no_model(compressed):
    done = run(compressed[1] / "model.onnx.zst")
    check(done, 2, "zstd-compressed", "bitnet-export unpack")
