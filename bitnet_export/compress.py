"""model.onnx at rest: zstd over its tensors, one frame each, decoded when it is loaded.

The bytes of packed ternary codes are not evenly frequent; zstd's entropy coding brings them from
2 bits a weight to the entropy of the trits, with no codec of our own. A frame for each tensor
keeps one tensor's statistics out of the next, and says what each part of the file costs. Frames
one after the other are an ordinary .zst file: ``zstd -d`` gives the ONNX file as well.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from bitnet_export.errors import InputError, MissingRequirement, StageError, first_line
from bitnet_export.onnx_io import EXTERNAL_SUFFIX

if TYPE_CHECKING:
    import onnx

SUFFIX = ".zst"
MAGIC = b"\x28\xb5\x2f\xfd"
# Higher levels search longer for repetitions, of which trits have none (1.568 bits a weight at
# levels 1 to 12 alike, docs/formats.md).
LEVEL = 3
# Smaller tensors share a frame with the graph around them.
MIN_FRAME = 1024
_RLE_BLOCK = 1


@dataclass(frozen=True)
class Section:
    """Bytes [start, end) of a file; tensor: whose they are, or "" for the graph and what is
    small."""

    start: int
    end: int
    tensor: str = ""


def compressed_path(path: Path) -> Path:
    """model.onnx -> model.onnx.zst."""
    return path.with_name(path.name + SUFFIX)


def compress_model(path: Path) -> list[Path]:
    """Replace an ONNX file, and its external data, by compressed ones; -> the new files.

    Raises StageError where they cannot be written; the plain files are then still there.
    """
    made = []
    parts = [(file, sections) for file, sections in model_sections(path).items()]
    for file, sections in parts:
        made.append(_compress(file, sections))
    for file, _ in parts:
        file.unlink()
    return made


def model_sections(path: Path) -> dict[Path, list[Section]]:
    """The ONNX file, and its external data file if it has one, cut at its large tensors."""
    import onnx

    model = onnx.load(os.fspath(path), load_external_data=False)
    inline, outside = _spans(model, path.read_bytes())
    found = {path: _cut(path.stat().st_size, inline)}
    data = path.with_name(path.name + EXTERNAL_SUFFIX)
    if outside:
        found[data] = _cut(data.stat().st_size, outside)
    return found


def _spans(model: onnx.ModelProto, content: bytes) -> tuple[list[Section], list[Section]]:
    """Where the large initializers lie: in the file itself, and in the external data."""
    inline, outside, position = [], [], 0
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            start = int(place.get("offset", 0))
            outside.append(Section(start, start + int(place["length"]), tensor.name))
        elif len(tensor.raw_data) >= MIN_FRAME:
            # Protobuf keeps the bytes as they are and the tensors in order.
            start = content.find(tensor.raw_data, position)
            if start >= 0:
                position = start + len(tensor.raw_data)
                inline.append(Section(start, position, tensor.name))
    return inline, sorted(outside, key=lambda s: s.start)


def _cut(size: int, tensors: list[Section]) -> list[Section]:
    """The tensors' sections and what lies between them, from 0 to size."""
    sections, position = [], 0
    for tensor in tensors:
        if tensor.start > position:
            sections.append(Section(position, tensor.start))
        sections.append(tensor)
        position = tensor.end
    if position < size:
        sections.append(Section(position, size))
    return sections


def _compress(file: Path, sections: list[Section]) -> Path:
    """Write file.zst, whole or not at all."""
    compressor = _zstandard().ZstdCompressor(level=LEVEL, write_checksum=True)
    path = compressed_path(file)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with file.open("rb") as source, temporary.open("wb") as target:
            for section in sections:
                target.write(compressor.compress(source.read(section.end - section.start)))
        os.replace(temporary, path)
    except OSError as error:
        raise StageError(
            f"cannot be written: {error.strerror or error}",
            where=str(path),
            fix="free some space or choose another directory",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def frames(path: Path) -> Iterator[tuple[bytes, int]]:
    """(content, compressed bytes) of each frame of a .zst file.

    Raises InputError for a file that is truncated, damaged or no zstd at all.
    """
    zstandard = _zstandard()
    data = memoryview(path.read_bytes())
    if not data:
        raise _damaged(path, "it is empty")
    decoder, start = zstandard.ZstdDecompressor(), 0
    while start < len(data):
        try:
            end = start + _frame_size(zstandard, data[start:])
            content = decoder.decompress(data[start:end])
        except (zstandard.ZstdError, ValueError) as error:
            raise _damaged(path, first_line(error)) from error
        yield content, end - start
        start = end


def _frame_size(zstandard: Any, data: memoryview) -> int:
    """Compressed bytes of the frame that data begins with (RFC 8878, 3.1.1). Raises ValueError
    where it is not whole: decoding alone would have to copy what follows each frame."""
    position = zstandard.frame_header_size(data)
    last = False
    while not last:
        header = int.from_bytes(data[position : position + 3], "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == _RLE_BLOCK else size)
        if position > len(data):
            raise ValueError("its last frame is not whole")
    position += 4 if zstandard.get_frame_parameters(data).has_checksum else 0
    if position > len(data):
        raise ValueError("its last frame is not whole")
    return position


def decompress(path: Path) -> bytes:
    """The content of a .zst file. Raises InputError where it is damaged."""
    return b"".join(content for content, _ in frames(path))


def is_compressed(path: Path) -> bool:
    """Whether only the compressed form of ``path`` is there."""
    return not path.exists() and compressed_path(path).is_file()


class PlainModel:
    """The ONNX file at ``path``, decompressed to a temporary directory where it is at rest.

    The directory goes when this object does.
    """

    def __init__(self, path: Path) -> None:
        self.at_rest = path
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        """A plain ONNX file. Raises InputError where the compressed one is damaged."""
        if not is_compressed(self.at_rest):
            return self.at_rest
        if self._folder is None:
            folder = tempfile.TemporaryDirectory(prefix="bitnet-export-")
            _decompress_all(self.at_rest, Path(folder.name))
            self._folder = folder
        return Path(self._folder.name) / self.at_rest.name

    @property
    def stored_bytes(self) -> int | None:
        """Bytes of the compressed files, None where the model is plain."""
        if not is_compressed(self.at_rest):
            return None
        return sum(file.stat().st_size for file in stored_files(self.at_rest))


def stored_files(path: Path) -> list[Path]:
    """The compressed files of a model that are there."""
    both = (path, path.with_name(path.name + EXTERNAL_SUFFIX))
    return [compressed_path(p) for p in both if compressed_path(p).is_file()]


def _decompress_all(path: Path, folder: Path) -> None:
    for file in stored_files(path):
        with (folder / file.name.removesuffix(SUFFIX)).open("wb") as target:
            for content, _ in frames(file):
                target.write(content)


@contextmanager
def loadable(path: Path) -> Iterator[Path | bytes]:
    """``path`` as a runtime takes it while the block lasts: the file itself; its bytes in memory,
    where it is compressed; or a temporary file, where tensors lie outside of it."""
    if not is_compressed(path):
        yield path
    elif len(stored_files(path)) == 1:
        yield decompress(compressed_path(path))
    else:
        plain = PlainModel(path)  # its directory goes with it
        yield plain.path


def _damaged(path: Path, what: str) -> InputError:
    return InputError(
        f"the compressed file is truncated or damaged ({what})",
        where=str(path),
        fix="copy it again, or export the model again",
    )


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise MissingRequirement(
            "a compressed model needs the zstandard package", fix="pip install zstandard"
        ) from error
    return zstandard
