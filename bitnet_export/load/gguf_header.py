"""Reads the header of a GGUF file before any library does, within the bounds of the file.

The reader of the gguf package maps the file and trusts its counts and offsets: a file cut short
ends in an IndexError, a damaged count in minutes of looping. Here every length is checked against
the bytes that are left, and every tensor against the end of the file. No tensor is read.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from bitnet_export.errors import InputError, MissingRequirement

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TERNARY_TYPES = ("TQ1_0", "TQ2_0")
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# Value type -> its struct format; strings and arrays have lengths of their own.
_SCALARS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?"},
    **{10: "Q", 11: "q", 12: "d"},
}


@dataclass(frozen=True)
class GgufTensor:
    """type: gguf's name, ``TQ2_0``. shape: as stored, the fastest axis first."""

    type: str
    shape: tuple[int, ...]


@dataclass
class GgufHeader:
    """values: the scalar and string metadata. tensors: by their GGUF names."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """``llama``, ``qwen2``, ...; "" where the file does not say."""
        return str(self.values.get("general.architecture", ""))


def read_header(path: Path) -> GgufHeader:
    """The metadata and tensor list of a GGUF file whose tensors all lie inside it.

    Raises InputError: truncated, damaged, of an unknown version or tensor type, or one part of
    several. MissingRequirement without the gguf package.
    """
    sizes = _block_sizes()
    with path.open("rb") as file, _map(file, path) as data:
        cursor = _Cursor(data, str(path))
        try:
            return _read(cursor, sizes)
        except (ValueError, OverflowError) as error:
            raise cursor.damaged(f"its header makes no sense ({error})") from error


def _read(cursor: _Cursor, sizes: dict[int, tuple[str, int, int]]) -> GgufHeader:
    header = GgufHeader()
    tensors, pairs = _counts(cursor)
    for _ in range(pairs):
        key = cursor.string()
        value = _value(cursor, cursor.scalar("I"))
        if value is not None:
            header.values[key] = value
    if int(header.values.get("split.count", 1)) > 1:
        raise InputError(
            f"it is one of the {header.values['split.count']} parts of a split GGUF file",
            where=cursor.where,
            fix="join them with llama-gguf-split --merge and pass the result",
        )
    ends = [_tensor(cursor, header, sizes) for _ in range(tensors)]
    alignment = header.values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"its alignment is {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    for name, end in ends:
        if start + end > cursor.size:
            raise cursor.damaged(f"tensor {name} ends {start + end - cursor.size} bytes past it")
    return header


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, metadata pairs)."""
    if cursor.take(4) != MAGIC:
        raise cursor.damaged("it does not start with GGUF")
    version = cursor.scalar("I")
    if version not in VERSIONS:
        raise InputError(
            f"it is GGUF version {version}; versions {VERSIONS[0]} and {VERSIONS[1]}, "
            "little-endian, are read",
            where=cursor.where,
            fix="convert the model again with a current llama.cpp",
        )
    tensors, pairs = cursor.scalar("Q"), cursor.scalar("Q")
    # The shortest entries take 24 and 13 bytes: more than fit is damage, not patience.
    if tensors * 24 + pairs * 13 > cursor.size:
        raise cursor.damaged(f"it promises {tensors} tensors and {pairs} values")
    return tensors, pairs


def _value(cursor: _Cursor, kind: int, depth: int = 0) -> Any:
    """A metadata value; None for an array, which is only walked over."""
    if kind == _STRING:
        return cursor.string()
    if kind in _SCALARS:
        return cursor.scalar(_SCALARS[kind])
    if kind != _ARRAY or depth > 4:
        raise cursor.damaged(f"a metadata value has the unknown type {kind}")
    inner, count = cursor.scalar("I"), cursor.scalar("Q")
    if inner in _SCALARS:
        cursor.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        return None
    for _ in range(count):  # ends with the file at the latest
        if inner == _STRING:
            cursor.skip(cursor.scalar("Q"))
        else:
            _value(cursor, inner, depth + 1)
    return None


def _tensor(
    cursor: _Cursor, header: GgufHeader, sizes: dict[int, tuple[str, int, int]]
) -> tuple[str, int]:
    """Reads one entry into header; -> (name, where its bytes end in the data section)."""
    name, rank = cursor.string(), cursor.scalar("I")
    if not 1 <= rank <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"tensor {name} has {rank} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(rank))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    if kind not in sizes:
        raise InputError(
            f"tensor {name} has type {kind}, which the gguf package does not know",
            where=cursor.where,
            fix="convert the model with llama.cpp itself, to TQ1_0, TQ2_0 or a common type "
            "(bitnet.cpp's i2_s is its own); or pip install -U gguf",
        )
    if name in header.tensors or prod(shape) == 0:
        raise cursor.damaged(f"tensor {name} is listed twice or empty")
    type_name, block, block_bytes = sizes[kind]
    if shape[0] % block:
        raise cursor.damaged(f"tensor {name} has rows of {shape[0]}, no whole blocks of {block}")
    header.tensors[name] = GgufTensor(type_name, shape)
    return name, offset + prod(shape) // block * block_bytes


def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """Type number -> (name, elements a block, bytes a block), from the gguf package."""
    try:
        from gguf.constants import GGML_QUANT_SIZES
    except ImportError as error:
        raise MissingRequirement(
            "a GGUF file needs the gguf package", fix="pip install 'bitnet-export[hf]'"
        ) from error
    return {int(kind): (kind.name, *size) for kind, size in GGML_QUANT_SIZES.items()}


def _map(file: Any, path: Path) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from error


class _Cursor:
    """Reads little-endian values one after the other, never past the end."""

    def __init__(self, data: mmap.mmap, where: str) -> None:
        self.data, self.where = data, where
        self.position, self.size = 0, len(data)

    def take(self, count: int) -> bytes:
        """The next count bytes."""
        start = self.position
        self.skip(count)
        return self.data[start : self.position]

    def skip(self, count: int) -> None:
        """Go on by count bytes. Raises InputError where they are not there."""
        if count > self.size - self.position:
            raise self.damaged("its header ends early")
        self.position += count

    def scalar(self, kind: str) -> Any:
        """The next value of a struct format."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        """The next length and that many bytes of UTF-8."""
        return self.take(self.scalar("Q")).decode()

    def damaged(self, what: str) -> InputError:
        """The error for a file that is not whole."""
        return InputError(
            f"the GGUF file is truncated or damaged: {what}",
            where=self.where,
            fix="copy or download it again",
        )
