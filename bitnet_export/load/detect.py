"""Which kind of model a path holds, told from its bytes, never from its name.

Nothing is loaded or executed here: a file's first bytes, a zip's table of contents, a protobuf's
top-level fields. What a damaged or foreign file is, where that can be told, goes into the error.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from bitnet_export.errors import InputError

ACCEPTED = (
    "a torch.export program (bitnet_export.save writes one), a state_dict or safetensors file, "
    "a Hugging Face directory, a GGUF file, an ONNX file"
)

# First bytes of files people pass by mistake, and what to do instead.
_FOREIGN = (
    (b"\x89HDF", "an HDF5 (Keras) file", "export it to ONNX first and pass the .onnx file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file", "run git lfs pull"),
    (b"<!DOCTYPE", "an HTML page, not a model", "download the file again"),
    (b"<html", "an HTML page, not a model", "download the file again"),
    (b"\x1f\x8b", "gzip-compressed", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "unpack it first: bitnet-export unpack, or zstd -d"),
)
_WIRE_VARINT, _WIRE_64, _WIRE_BYTES, _WIRE_32 = 0, 1, 2, 5
_ONNX_FIELDS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26})
_ONNX_GRAPH = 7


def detect(path: Path) -> str:
    """path -> "exported_program", "torch_save", "safetensors", "huggingface", "gguf" or "onnx".

    "torch_save" covers every pickle of torch.save, new and old; what is in it, a state_dict or
    a whole module, shows only when it is read without running code (torch_save.py).
    Raises InputError: nothing there, unreadable, empty, truncated or of no accepted kind.
    """
    if not path.exists():
        raise InputError("there is no such file or directory", where=str(path))
    if path.is_dir():
        return _detect_directory(path)
    if not path.is_file():
        raise InputError("it is neither a file nor a directory", where=str(path))
    try:
        with path.open("rb") as file:
            return _detect_file(path, file)
    except PermissionError as e:
        raise InputError(
            "it cannot be read: permission denied", where=str(path), fix="check its permissions"
        ) from e


def _detect_directory(path: Path) -> str:
    if (path / "config.json").is_file():
        return "huggingface"
    if (path / "manifest.json").is_file():
        raise InputError(
            "it is an output directory of bitnet-export, not a model",
            where=str(path),
            fix=f"check it with: bitnet-export verify {path}",
        )
    if (path / "adapter_config.json").is_file():
        raise InputError(
            "it holds a PEFT adapter, not a whole model",
            where=str(path),
            fix="merge it into its base model (merge_and_unload), save_pretrained, pass that",
        )
    raise InputError(
        "the directory has no config.json, so it is no Hugging Face model",
        where=str(path),
        fix=f"pass {ACCEPTED}",
    )


def _detect_file(path: Path, file: BinaryIO) -> str:
    size = os.fstat(file.fileno()).st_size
    head = file.read(32)
    if not head:
        raise InputError("the file is empty", where=str(path), fix="write it again")
    if head.startswith(b"PK"):
        return _detect_zip(path)
    if head.startswith(b"GGUF"):
        return "gguf"
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            raise InputError(f"it is {what}", where=str(path), fix=fix)
    if head[0] == 0x80 and 2 <= head[1] <= 5:  # pickle's PROTO opcode
        return "torch_save"
    header_size = int.from_bytes(head[:8], "little")
    if len(head) > 8 and head[8:9] == b"{" and header_size < 100 * 2**20:
        if 8 + header_size > size:
            raise _truncated(path, "safetensors")
        return "safetensors"
    if _is_onnx(path, file, size):
        return "onnx"
    raise InputError(
        f"it is of no known kind (it starts with {head[:8]!r})",
        where=str(path),
        fix=f"pass {ACCEPTED}",
    )


def _detect_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            # The first component is the file's stem, or "archive".
            names = {n.split("/", 1)[-1] for n in archive.namelist()}
            files = set(archive.namelist())
    except zipfile.BadZipFile as e:
        raise _truncated(path, "zip (.pt, .pt2, .npz)") from e
    if "models/model.json" in names or "serialized_exported_program.json" in files:
        return "exported_program"
    if "data.pkl" in names:
        if "constants.pkl" in names:
            raise InputError(
                "it is a TorchScript archive, which carries no module to make ternary",
                where=str(path),
                fix="save the original module with bitnet_export.save(model, path, example_inputs)",
            )
        return "torch_save"
    if any(n.endswith(".npy") for n in files):
        raise InputError("it holds arrays, not a model", where=str(path), fix="pass it as --data")
    raise InputError(
        "it is a zip archive without a model in it", where=str(path), fix=f"pass {ACCEPTED}"
    )


def _is_onnx(path: Path, file: BinaryIO, size: int) -> bool:
    """True if the whole file is a sequence of ModelProto's fields with a graph among them."""
    file.seek(0)
    fields: set[int] = set()
    while file.tell() < size:
        tag = _varint(file)
        number, wire = (tag >> 3, tag & 7) if tag is not None else (0, 0)
        if number not in _ONNX_FIELDS or (not fields and number not in (1, 2, 7, 8)):
            return False
        length = {_WIRE_64: 8, _WIRE_32: 4}.get(wire, 0)
        if wire in (_WIRE_VARINT, _WIRE_BYTES):
            value = _varint(file)
            if value is None:
                raise _truncated(path, "ONNX")
            length = value if wire == _WIRE_BYTES else 0
        elif not length:
            return False
        if file.tell() + length > size:
            # A field that overruns the file: cut off, if what came before looked like ONNX.
            if fields or number == _ONNX_GRAPH:
                raise _truncated(path, "ONNX")
            return False
        file.seek(length, os.SEEK_CUR)
        fields.add(number)
    return _ONNX_GRAPH in fields


def _varint(file: BinaryIO) -> int | None:
    """The next protobuf varint, None at the end of the file or past 10 bytes."""
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return None
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    return None


def _truncated(path: Path, kind: str) -> InputError:
    return InputError(
        f"the {kind} file is truncated or damaged", where=str(path), fix="copy or write it again"
    )
