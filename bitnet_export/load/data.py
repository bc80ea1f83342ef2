"""Arrays for --data: npz and safetensors files as named arrays with samples along axis 0.

Reading runs no code (npz without pickle). What the arrays mean, inputs or labels, is decided by
who uses them; text directories are the fine-tuning's business.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_export.errors import InputError

Array = npt.NDArray[Any]


class ArrayData:
    """Named arrays [samples, ...] of one length; indexable, and iterable in batches."""

    def __init__(self, arrays: dict[str, Array], source: str = "data") -> None:
        if not arrays:
            raise InputError("it holds no arrays", where=source)
        scalars = [name for name, a in arrays.items() if a.ndim == 0]
        if scalars:
            raise InputError(
                f"array {scalars[0]} is a scalar; every array needs samples along axis 0",
                where=source,
            )
        lengths = {name: len(a) for name, a in arrays.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise InputError(
                f"its arrays must have the same number of samples, at least 1: {lengths}",
                where=source,
            )
        self.arrays = arrays
        self.source = source

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Sample ``index`` without the batch dimension."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)  # ends plain iteration
        return {name: a[index] for name, a in self.arrays.items()}

    def batches(self, batch_size: int) -> Iterator[dict[str, Array]]:
        """Consecutive batches; the last may be smaller."""
        for start in range(0, len(self), batch_size):
            yield {name: a[start : start + batch_size] for name, a in self.arrays.items()}

    def select(self, names: list[str]) -> dict[str, Array]:
        """The arrays of these names, in that order. Raises InputError for one that is missing."""
        missing = [name for name in names if name not in self.arrays]
        if missing:
            raise InputError(
                f"it has no array {missing[0]}; it has {', '.join(self.arrays)}",
                where=self.source,
                fix=f"save it with the model's input names: {', '.join(names)}",
            )
        return {name: self.arrays[name] for name in names}


def as_dtype(array: Array, dtype: npt.DTypeLike, name: str, source: str) -> Array:
    """``array`` in the dtype that a model's input takes, as long as its values allow it.

    Any number becomes a float of that width if it is not beyond its range (numpy makes float64
    where nothing is said); floats become integers only where they are whole. Raises InputError for
    anything else.
    """
    wanted = np.dtype(dtype)
    if array.dtype == wanted:
        return array
    with np.errstate(invalid="ignore", over="ignore"):
        cast = array.astype(wanted) if array.dtype.kind in "biuf" else None
    if cast is None or not _keeps(array, cast):
        raise InputError(
            f"array {name} holds {array.dtype} values that are no {wanted}, which the model takes",
            where=source,
            fix=f"save it as {wanted}",
        )
    return cast


def _keeps(array: Array, cast: Array) -> bool:
    """Whether nothing was lost but digits: no number became infinite, no fraction an integer."""
    if cast.dtype.kind == "f":
        return np.array_equal(np.isfinite(cast), np.isfinite(array))
    return np.array_equal(cast, array)


def load_data(path: str | Path) -> ArrayData:
    """An npz or safetensors file -> its arrays. Raises InputError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise InputError("there is no such data file", where=str(path))
    with path.open("rb") as file:
        head = file.read(9)
    if head.startswith(b"PK"):
        return ArrayData(_read_npz(path), str(path))
    if head[8:9] == b"{":
        return ArrayData(_read_safetensors(path), str(path))
    raise InputError(
        "it is neither an npz nor a safetensors file",
        where=str(path),
        fix="write it with numpy.savez(path, ids=..., mask=...)",
    )


def _read_npz(path: Path) -> dict[str, Array]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise InputError(
            f"the npz file cannot be read ({e})",
            where=str(path),
            fix="write it again; arrays of Python objects are not accepted",
        ) from e


def _read_safetensors(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, KeyError) as e:
        raise InputError(f"the safetensors file cannot be read ({e})", where=str(path)) from e
