"""zstd at rest: any zstd reads it, every byte comes back, damage is an error with a name."""

import contextlib
from itertools import pairwise

import numpy as np
import onnx
import pytest
import zstandard
from onnx import numpy_helper

from bitnet_export import compress, onnx_io
from bitnet_export.errors import InputError, StageError
from bitnet_export.packing import pack
from bitnet_export.ternary import TernaryConfig, ternarize_weight
from tests.verify import models


def write(path, external=False):
    model = models.make_model("unpacked", embedding=True)
    arguments = {"save_as_external_data": True, "location": f"{path.name}.data"} if external else {}
    onnx.save(model, path, **arguments)
    return path


def compressed(path):
    """-> (content of the plain files by name, the compressed files)."""
    plain = {p.name: p.read_bytes() for p in path.parent.glob(f"{path.name}*")}
    return plain, compress.compress_model(path)


@pytest.mark.parametrize("external", [False, True])
def test_every_byte_comes_back(tmp_path, external):
    path = write(tmp_path / "model.onnx", external)
    plain, files = compressed(path)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.zst" for name in plain}
    assert len(files) == 1 + external
    for file in files:
        assert compress.decompress(file) == plain[file.name.removesuffix(".zst")]
        # An ordinary .zst file of several frames, as the zstd tool takes it.
        reader = zstandard.ZstdDecompressor().stream_reader(
            file.read_bytes(), read_across_frames=True
        )
        assert reader.read() == plain[file.name.removesuffix(".zst")]
    assert compress.is_compressed(path)
    found = compress.PlainModel(path)
    assert onnx_io.read_model(found.path).graph.node
    assert found.stored_bytes == sum(f.stat().st_size for f in files)


@pytest.mark.parametrize("external", [False, True])
def test_a_runtime_loads_it(tmp_path, external):
    from bitnet_export.targets.session import open_session

    path = write(tmp_path / "model.onnx", external)
    feeds = {"x": np.arange(6)}
    expected = open_session(path, threads=1).run(None, feeds)
    compressed(path)
    with compress.loadable(path) as model:
        session = open_session(model, threads=1)
    np.testing.assert_array_equal(session.run(None, feeds)[0], expected[0])


def test_the_temporary_directory_goes(tmp_path):
    path = write(tmp_path / "model.onnx")
    compressed(path)
    plain = compress.PlainModel(path)
    folder = plain.path.parent
    assert folder.is_dir()
    assert plain.path.parent == folder
    del plain
    assert not folder.exists()


def test_a_frame_for_each_large_tensor(tmp_path):
    path = write(tmp_path / "model.onnx")
    content = path.read_bytes()
    sections = compress.model_sections(path)[path]
    assert sections[0].start == 0
    assert sections[-1].end == len(content)
    assert all(a.end == b.start for a, b in pairwise(sections))
    model = onnx.load(path)
    large = {t.name: t for t in model.graph.initializer if len(t.raw_data) >= compress.MIN_FRAME}
    named = {s.tensor: content[s.start : s.end] for s in sections if s.tensor}
    assert large
    assert named == {name: tensor.raw_data for name, tensor in large.items()}
    _, (file,) = compressed(path)
    lengths = [len(data) for data, _ in compress.frames(file)]
    assert lengths == [s.end - s.start for s in sections]
    assert sum(stored for _, stored in compress.frames(file)) == file.stat().st_size


def test_equal_tensors_have_sections_of_their_own(tmp_path):
    values = np.zeros((64, 64), np.float32)
    tensors = [numpy_helper.from_array(values, name) for name in ("a", "b")]
    node = onnx.helper.make_node("Add", ["a", "b"], ["y"])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [64, 64])
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [out], tensors)),
        tmp_path / "m.onnx",
    )
    (sections,) = compress.model_sections(tmp_path / "m.onnx").values()
    spans = [(s.start, s.end) for s in sections if s.tensor]
    assert len(spans) == 2
    assert spans[0][1] <= spans[1][0]


@pytest.mark.parametrize("keep", [0, 3, 10, 0.4, 0.999])
def test_truncated(tmp_path, keep):
    path = write(tmp_path / "model.onnx")
    _, (file,) = compressed(path)
    data = file.read_bytes()
    file.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(InputError, match=r"model\.onnx\.zst: the compressed file is truncated"):
        compress.decompress(file)


def test_every_flipped_byte_is_found(tmp_path):
    """The checksum of each frame sees what the format itself does not."""
    path = write(tmp_path / "model.onnx")
    plain, (file,) = compressed(path)
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    for position in [*range(12), *rng.integers(0, len(data), 120)]:
        broken = bytearray(data)
        broken[position] ^= 0x55
        file.write_bytes(broken)
        with contextlib.suppress(InputError):
            assert compress.decompress(file) == plain["model.onnx"]  # a bit that means nothing


def test_nothing_half_written(tmp_path, monkeypatch):
    path = write(tmp_path / "model.onnx")

    class Full:
        def __init__(self, **_):
            pass

        def compress(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(zstandard, "ZstdCompressor", Full)
    with pytest.raises(StageError, match="No space left"):
        compress.compress_model(path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("quantizer", ["twn", "absmean"])
def test_trits_of_gaussian_weights_take_less_than_1_6_bits(quantizer):
    weights = np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)
    trits, _ = ternarize_weight(weights, TernaryConfig(quantizer=quantizer))
    packed = zstandard.ZstdCompressor(level=compress.LEVEL).compress(pack(trits).tobytes())
    assert 1.5 < 8 * len(packed) / weights.size < 1.6
