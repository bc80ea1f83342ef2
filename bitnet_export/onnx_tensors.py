"""Tensors of ONNX models where they lie: read from their file when they are looked at, and written
in one pass, so that a model of many gigabytes is never in memory as a whole.

On disk an external tensor names a file beside the model. In memory (``anchor``) it names that
file's absolute path, so that a model can be changed, and written elsewhere, without its weights
being read. Which models have their tensors outside is onnx_io.py's matter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import onnx

# Smaller tensors stay in the model: shapes, axes, scalars.
SMALLEST_OUTSIDE = 1024
# Runtimes map large tensors: they begin at a page, others at any element.
_PAGE, _ELEMENT, _LARGE = 4096, 16, 1 << 20
_NARROW = ("int4", "uint4", "int2", "uint2", "float4_e2m1fn")


def is_outside(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes are in another file."""
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's data, about; none of it is read."""
    return _place(tensor)[2] if is_outside(tensor) else tensor.ByteSize()


def values(tensor: onnx.TensorProto) -> np.ndarray:
    """The array of a tensor; one outside of the model is mapped, not read, and cannot be written
    to. Raises OSError where its file is gone."""
    import numpy as np
    import onnx

    if not is_outside(tensor):
        array: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return array
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    path, offset, length = _place(tensor)
    if dtype.name in _NARROW or offset % dtype.itemsize or not length:
        return np.asarray(onnx.numpy_helper.to_array(inside(tensor)))
    return np.memmap(path, dtype, "r", offset, tuple(tensor.dims))


def inside(tensor: onnx.TensorProto) -> onnx.TensorProto:
    """A copy of an anchored tensor with its bytes in it."""
    import onnx

    return onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        raw_data=b"".join(_chunks(tensor)),
    )


def anchor(model: onnx.ModelProto, path: Path) -> None:
    """External tensors of the model at ``path`` get absolute paths, in place. Those that are no
    initializers of the graph itself are read, for no tool finds them otherwise.

    Raises InputError for data that is missing, too short, or not beside the model.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            _anchor(tensor, path)
    for tensor in _inner_tensors(model):
        if uses_external_data(tensor):
            _anchor(tensor, path)
            tensor.raw_data = inside(tensor).raw_data
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT


def _inner_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors in attributes of nodes, and those of subgraphs."""
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    for node in nodes:  # grows while it is walked
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from graph.initializer
                nodes += graph.node


def _anchor(tensor: onnx.TensorProto, model: Path) -> None:
    folder = model.parent
    location, offset, length = _place(tensor)
    path = folder / location
    reason = ""
    if Path(location).is_absolute() or not path.resolve().is_relative_to(folder.resolve()):
        reason = f"{location} is not beside the model"
    elif path.is_symlink() or not path.is_file():
        reason = f"{location} is {'a link' if path.is_symlink() else 'not there'}"
    else:
        size = path.stat().st_size
        if min(offset, length) < 0 or offset + length > size:
            reason = f"{location} has {size} bytes, {tensor.name} ends at {offset + length}"
        place(tensor, path.absolute(), offset, length)
    if reason:
        raise InputError(
            f"its external data cannot be read: {reason}",
            where=str(model),
            fix="copy the files beside the model, too",
        )


def _place(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """(location, offset, length) of an external tensor."""
    import onnx

    found = {entry.key: entry.value for entry in tensor.external_data}
    dtype: Any = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    length = int(found.get("length") or prod(tensor.dims) * dtype.itemsize)
    return found["location"], int(found.get("offset") or 0), length


def place(tensor: onnx.TensorProto, location: Path | str, offset: int, length: int) -> None:
    """Say that the tensor's bytes are in a file, in place."""
    import onnx

    entries = {"location": os.fspath(location), "offset": str(offset), "length": str(length)}
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))


def outside(tensor: onnx.TensorProto, path: Path | str, offset: int, length: int) -> Any:
    """A tensor of the same name and type whose bytes are in a file."""
    new = type(tensor)(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    place(new, path, offset, length)
    return new


def _chunks(tensor: onnx.TensorProto, size: int = 1 << 26) -> Iterator[bytes]:
    """The bytes of a tensor, little-endian."""
    if not is_outside(tensor):
        yield tensor.raw_data if tensor.HasField("raw_data") else values(tensor).tobytes()
        return
    path, offset, left = _place(tensor)
    with open(path, "rb") as file:
        file.seek(offset)
        while left > 0:
            chunk = file.read(min(left, size))
            if not chunk:
                raise OSError(f"{path} is too short for {tensor.name}")
            left -= len(chunk)
            yield chunk


def aligned(offset: int, size: int) -> int:
    """The next offset at which a tensor of that size may begin."""
    unit = _PAGE if size >= _LARGE else _ELEMENT
    return -(-offset // unit) * unit


def bare_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model without the initializers of its graph."""
    copy = type(model)()
    for field, value in model.ListFields():
        if field.name == "graph":
            for part, content in value.ListFields():
                if part.name == "initializer":
                    continue
                _copy_field(copy.graph, part, content)
        else:
            _copy_field(copy, field, value)
    return copy


def _copy_field(target: Any, field: Any, value: Any) -> None:
    if hasattr(value, "extend") or isinstance(value, list | tuple):
        getattr(target, field.name).extend(value)
    elif field.message_type is not None:
        getattr(target, field.name).CopyFrom(value)
    else:
        setattr(target, field.name, value)


def with_data_inside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself where all its tensors are in it, else a copy that has them."""
    if not any(is_outside(t) for t in model.graph.initializer):
        return model
    copy = bare_copy(model)
    for tensor in model.graph.initializer:
        copy.graph.initializer.append(inside(tensor) if is_outside(tensor) else tensor)
    return copy


def with_data_in(model: onnx.ModelProto, data: Path) -> onnx.ModelProto:
    """Write the large initializers to ``data`` -> a copy of the model that names that file by its
    name alone. Each tensor is read, written and forgotten."""
    import onnx

    copy = bare_copy(model)
    with data.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.STRING or (
                tensor_bytes(tensor) < SMALLEST_OUTSIDE
            ):
                copy.graph.initializer.append(inside(tensor) if is_outside(tensor) else tensor)
                continue
            offset = aligned(file.tell(), tensor_bytes(tensor))
            file.seek(offset)
            for chunk in _chunks(tensor):
                file.write(chunk)
            copy.graph.initializer.append(outside(tensor, data.name, offset, file.tell() - offset))
    return copy


def named_beside_each(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model whose external tensors are named as on disk: without their folder."""
    copy = bare_copy(model)
    for tensor in model.graph.initializer:
        if is_outside(tensor):
            location, offset, length = _place(tensor)
            tensor = outside(tensor, Path(location).name, offset, length)
        copy.graph.initializer.append(tensor)
    return copy


def named_beside(model: onnx.ModelProto, data: Path) -> onnx.ModelProto | None:
    """A copy of a model whose large tensors all lie in ``data`` already, which it names as a model
    beside that file does; None where one lies elsewhere."""
    own = os.fspath(data.absolute())
    copy = bare_copy(model)
    for tensor in model.graph.initializer:
        if is_outside(tensor):
            location, offset, length = _place(tensor)
            if location != own:
                return None
            copy.graph.initializer.append(outside(tensor, data.name, offset, length))
        elif tensor_bytes(tensor) >= SMALLEST_OUTSIDE:
            return None
        else:
            copy.graph.initializer.append(tensor)
    return copy
