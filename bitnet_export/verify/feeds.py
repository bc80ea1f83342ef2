"""Which shapes a model is checked at, and plausible inputs of those shapes.

A case is one set of axis sizes and one feed for it. Inputs come from the user's data or the
example inputs, resized; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np

from bitnet_export.axes import is_sum, size_of
from bitnet_export.errors import InputError

if TYPE_CHECKING:
    import torch

Feed = dict[str, np.ndarray]
DynamicAxes = Mapping[str, Mapping[int, str]]
Sizes = dict[str, int]

ODD_BATCH = 3


@dataclass(frozen=True)
class Case:
    """One input shape (label ``batch=1,sequence=16``) and the inputs to run it with."""

    label: str
    feeds: Feed


def label_of(sizes: Sizes) -> str:
    """Axis sizes -> ``batch=1,sequence=16``, or ``static``."""
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "static"


def as_arrays(example_inputs: Mapping[str, torch.Tensor | np.ndarray]) -> Feed:
    """Torch tensors or arrays by name -> arrays by name."""
    return {
        name: np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)
        for name, value in example_inputs.items()
    }


def axis_sizes(feeds: Mapping[str, np.ndarray], dynamic_axes: DynamicAxes) -> Sizes:
    """The sizes the named axes have in ``feeds``, in order of first appearance.

    Raises InputError where one name stands for two sizes.
    """
    sizes: Sizes = {}
    for name, axes in dynamic_axes.items():
        for axis, symbol in axes.items():
            if name not in feeds or is_sum(symbol):
                continue
            size = feeds[name].shape[axis]
            if sizes.setdefault(symbol, size) != size:
                raise InputError(
                    f"axis {symbol!r} is {sizes[symbol]} in one input and {size} here", where=name
                )
    return sizes


def derive_shapes(
    example_inputs: Mapping[str, torch.Tensor | np.ndarray],
    dynamic_axes: DynamicAxes,
    min_sizes: Sizes | None = None,
    opt_sizes: Sizes | None = None,
    max_sizes: Sizes | None = None,
) -> list[Sizes]:
    """Axis sizes to check: opt (or the example's), batch 1, an odd one, and the given min, max.

    An axis that is dimension 0 of an input is a batch. Odd sizes stay within min and max and, on
    other axes than the batch, below the opt size, which the model is known to take.
    """
    feeds = as_arrays(example_inputs)
    opt = axis_sizes(feeds, dynamic_axes) | (opt_sizes or {})
    low = {name: (min_sizes or {}).get(name, 1) for name in opt}
    high = {name: (max_sizes or {}).get(name, 2**31) for name in opt}
    batches = {axes[0] for axes in dynamic_axes.values() if 0 in axes}

    def clamp(name: str, size: int) -> int:
        return max(low[name], min(high[name], size))

    def odd(name: str) -> int:
        return ODD_BATCH if name in batches else max(1, (opt[name] // 2) | 1)

    single = {name: clamp(name, 1) if name in batches else opt[name] for name in opt}
    candidates = [opt, single, {name: clamp(name, odd(name)) for name in opt}]
    candidates += [{**opt, **given} for given in (min_sizes, max_sizes) if given]
    unique = {label_of(sizes): sizes for sizes in candidates}
    return list(unique.values())


def make_case(
    sizes: Sizes,
    example_inputs: Mapping[str, torch.Tensor | np.ndarray],
    dynamic_axes: DynamicAxes,
    *,
    data: Sequence[Feed] | None = None,
    value_ranges: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> Case:
    """A case of the given axis sizes.

    data: samples with a leading batch dimension, whose rows are preferred over the example's.
    value_ranges: inputs to draw at random within [low, high] (Polygraphy's DataLoader) instead.
    """
    feeds = as_arrays(example_inputs)
    rng = np.random.default_rng(seed)
    if data:
        sample = data[int(rng.integers(len(data)))]
        feeds |= {name: np.asarray(value) for name, value in sample.items() if name in feeds}
    wanted = {
        name: {axis: size_of(symbol, sizes) for axis, symbol in axes.items()}
        for name, axes in dynamic_axes.items()
    }
    feeds = {name: resize(value, name, wanted.get(name, {})) for name, value in feeds.items()}
    if value_ranges:
        feeds |= _draw({name: feeds[name] for name in value_ranges}, value_ranges, seed)
    return Case(label_of(sizes), feeds)


def make_cases(
    shapes: Sequence[Sizes],
    example_inputs: Mapping[str, torch.Tensor | np.ndarray],
    dynamic_axes: DynamicAxes,
    **options: Any,
) -> list[Case]:
    """make_case for each of ``shapes``."""
    return [make_case(sizes, example_inputs, dynamic_axes, **options) for sizes in shapes]


def write_arrays(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Write arrays as numpy.savez does, which takes some names ("file") for its own arguments."""
    with ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)


def is_mask(name: str, value: np.ndarray) -> bool:
    """Whether an input is an attention mask: it says so and holds only 0 and 1."""
    return "mask" in name.lower() and bool(np.isin(value, (0, 1)).all())


def resize(value: np.ndarray, name: str, sizes: Mapping[int, int]) -> np.ndarray:
    """Crop or tile ``value`` to ``sizes`` (axis -> size), its values kept plausible.

    Masks become ones. Rows added to a batch are rolled along the last axis, so that no two rows
    are equal and a mix-up of rows shows. Raises InputError where there is nothing to tile.
    """
    source_rows = value.shape[0] if value.ndim else 0
    for axis, size in sizes.items():
        if size and not value.shape[axis]:
            raise InputError(f"the example has no element along axis {axis} to repeat", where=name)
        value = np.take(value, np.arange(size) % max(value.shape[axis], 1), axis=axis)
    if is_mask(name, value):
        return np.ones_like(value)
    if 0 in sizes and value.ndim > 1:
        for row in range(source_rows, value.shape[0]):
            value[row] = np.roll(value[row], row // source_rows, axis=-1)
    return value


def _draw(feeds: Feed, value_ranges: Mapping[str, tuple[float, float]], seed: int) -> Feed:
    """Random arrays of the feeds' shapes and dtypes within the ranges, both ends included."""
    from polygraphy.common import TensorMetadata
    from polygraphy.comparator import DataLoader

    metadata = TensorMetadata()
    for name, value in feeds.items():
        metadata.add(name, dtype=value.dtype, shape=value.shape)
    loader = DataLoader(seed=seed, input_metadata=metadata, val_range=dict(value_ranges))
    return dict(loader[0])
