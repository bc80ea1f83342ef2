"""Example inputs: the --input syntax, plausible random values, and the names of dynamic axes.

An InputSpec is what the user (or a config) says about one input; ``make_inputs`` turns specs into
tensors. Where the specs come from (file, data, config) is each loader's business.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitnet_export.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int8", "uint8", "bool")
# Sizes that dynamic axes get in example inputs. torch.export specializes 0 and 1, so never those;
# different from each other, so that a confusion of axes shows.
DEFAULT_BATCH = 2
DEFAULT_LENGTH = 16
_NAME = re.compile(r"\S+\Z")  # exporters write "input:0", "onnx::Gemm_0", "x.1"
_AXIS = re.compile(r"[A-Za-z_]\w*\Z")


@dataclass(frozen=True)
class InputSpec:
    """One input: dims are sizes, or names for dynamic axes. low/high bound integer values
    (high exclusive, None: unknown)."""

    name: str
    dims: tuple[int | str, ...]
    dtype: str = "float32"
    high: int | None = None

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """{dimension: axis name}."""
        return {i: d for i, d in enumerate(self.dims) if isinstance(d, str)}

    def flag(self) -> str:
        """The command-line flag that says the same."""
        dims = "x".join(str(d) for d in self.dims)
        return f"--input {self.name}:{dims}" + ("" if self.dtype == "float32" else f":{self.dtype}")


def parse_input_spec(text: str) -> InputSpec:
    """ "name:1x128:int64", "ids:batchxseq:int64", "x:batchx64" (float32) -> InputSpec.

    Dimensions are separated by "x"; a name makes the axis dynamic. An axis name with an "x" in
    it needs commas as separators: "x:batch,x_axis". The name may hold colons. Raises InputError
    with the right form.
    """
    name, _, shape = text.rpartition(":")
    dtype = "float32"
    if ":" in name and not _is_shape(shape):
        dtype = shape
        name, _, shape = name.rpartition(":")
    if not (name and shape and dtype):
        raise _bad_spec(text, "it is not NAME:SHAPE or NAME:SHAPE:DTYPE")
    if not _NAME.match(name):
        raise _bad_spec(text, f"{name!r} is not a valid input name")
    if dtype not in DTYPES:
        raise _bad_spec(text, f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    tokens = shape.split(",") if "," in shape else shape.split("x")
    dims: list[int | str] = []
    for token in tokens:
        if token.isdigit() and int(token) > 0:
            dims.append(int(token))
        elif _AXIS.match(token):
            dims.append(token)
        else:
            raise _bad_spec(text, f"dimension {token!r} is neither a size >= 1 nor an axis name")
    return InputSpec(name, tuple(dims), dtype)


def _is_shape(text: str) -> bool:
    """Whether it is dimensions rather than a dtype, as far as that can be told."""
    return text not in DTYPES and (text[:1].isdigit() or "x" in text or "," in text)


def _bad_spec(text: str, why: str) -> InputError:
    return InputError(
        why, where=f"--input {text}", fix="write it like --input ids:1x128:int64 or x:batchx64"
    )


def parse_input_specs(texts: Iterable[str]) -> dict[str, InputSpec]:
    """Specs by input name, in order. Raises InputError for a name given twice."""
    specs: dict[str, InputSpec] = {}
    for text in texts:
        spec = parse_input_spec(text)
        if spec.name in specs:
            raise InputError("the input is given twice", where=f"--input {spec.name}")
        specs[spec.name] = spec
    return specs


def axis_sizes(specs: Iterable[InputSpec], limit: int | None = None) -> dict[str, int]:
    """Each axis name's size in example inputs: batch 2, others 16 (at most limit), all different
    from 1. One name has one size in every input."""
    sizes: dict[str, int] = {}
    for spec in specs:
        for position, axis in spec.dynamic_axes.items():
            is_batch = position == 0 or axis.lower().startswith("batch")
            length = min(DEFAULT_LENGTH, limit) if limit else DEFAULT_LENGTH
            sizes.setdefault(axis, DEFAULT_BATCH if is_batch else length)
    return sizes


def make_inputs(
    specs: Sequence[InputSpec],
    seed: int = 0,
    limit: int | None = None,
    note: Callable[[str], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Random tensors for specs, in their order.

    Floats are standard normal; names with "mask" are ones, "type_ids" and "position" zeros and
    0, 1, 2...; integers are uniform in [0, high), or in {0, 1} if high is unknown, which
    ``note`` is told. limit: the largest size of a dynamic axis other than the batch.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    sizes = axis_sizes(specs, limit)
    inputs: dict[str, torch.Tensor] = {}
    for spec in specs:
        shape = [sizes[d] if isinstance(d, str) else d for d in spec.dims]
        inputs[spec.name] = _random(spec, shape, generator, note)
    return inputs


def _random(
    spec: InputSpec,
    shape: list[int],
    generator: torch.Generator,
    note: Callable[[str], None] | None,
) -> torch.Tensor:
    import torch

    dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    name = spec.name.lower()
    if "mask" in name:
        return torch.ones(shape, dtype=dtype)
    if "type_ids" in name:
        return torch.zeros(shape, dtype=dtype)
    if "position" in name and shape:
        return torch.arange(shape[-1]).expand(shape).to(dtype).clone()
    if spec.high is None and dtype is not torch.bool and note is not None:
        note(
            f"input {spec.name}: the range of its integers is not known, so example values are "
            "0 and 1; pass real ones with --data"
        )
    return torch.randint(0, spec.high or 2, shape, generator=generator).to(dtype)


def without_size_one(
    inputs: Mapping[str, torch.Tensor], dynamic_axes: Mapping[str, Iterable[int]]
) -> dict[str, torch.Tensor]:
    """Repeat dynamic axes of size 1: torch.export takes a 1 for a constant."""
    result = {}
    for name, tensor in inputs.items():
        for axis in dynamic_axes.get(name, ()):
            if tensor.shape[axis] == 1:
                tensor = tensor.repeat_interleave(2, dim=axis)
        result[name] = tensor.contiguous()
    return result


def apply_overrides(
    known: Mapping[str, InputSpec], given: Mapping[str, InputSpec], where: str
) -> dict[str, InputSpec]:
    """The known specs with the user's put over them; value ranges of known ones are kept. An axis
    that is fixed or renamed in one input is so in those not given, too: ids with a fixed length
    want a mask of that length.

    Raises InputError for a name the model does not have.
    """
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InputError(
            f"the model has no input named {unknown[0]}; it has {', '.join(known)}",
            where=where,
            fix="correct the name in --input",
        )
    changed = {
        old: new
        for name, spec in given.items()
        for old, new in zip(known[name].dims, spec.dims, strict=False)
        if isinstance(old, str)
    }
    merged = {}
    for name, own in known.items():
        dims = tuple(changed.get(d, d) if isinstance(d, str) else d for d in own.dims)
        merged[name] = replace(given.get(name, replace(own, dims=dims)), high=own.high)
    return merged
