"""The axis sizes of a run: read from options, and chosen where they are not given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitnet_export.axes import is_sum
from bitnet_export.errors import UsageError

if TYPE_CHECKING:
    from bitnet_export.load import LoadedModel
    from bitnet_export.options import ExportOptions
    from bitnet_export.verify.feeds import Sizes


def parse_shapes(
    specs: Sequence[str], dynamic_axes: dict[str, dict[int, str]], option: str
) -> Sizes:
    """["ids:1x16"] -> {"batch": 1, "sequence": 16}. Raises UsageError naming the option."""
    sizes: dict[str, int] = {}
    for spec in specs:
        name, _, dims = spec.rpartition(":")  # a name may hold colons
        if not name:
            raise UsageError(
                "it has no sizes", where=f"{option} {spec}", fix=f"add :1x16 to {spec}"
            )
        if name not in dynamic_axes:
            raise UsageError(
                f"{name!r} is no input with dynamic axes",
                where=f"{option} {spec}",
                fix=f"the model has {', '.join(dynamic_axes) or 'none'}",
            )
        parts = dims.split("x")
        for axis, symbol in dynamic_axes[name].items():
            if axis >= len(parts) or not parts[axis].isdigit() or not int(parts[axis]):
                raise UsageError(
                    f"axis {axis} ({symbol}) needs a size of at least 1",
                    where=f"{option} {spec}",
                    fix=f"write it like {name}:1x16",
                )
            if is_sum(symbol):
                continue  # follows from the others
            if sizes.setdefault(symbol, int(parts[axis])) != int(parts[axis]):
                raise UsageError(f"two sizes for axis {symbol}", where=f"{option} {spec}")
    return sizes


def opt_sizes(loaded: LoadedModel, options: ExportOptions) -> Sizes:
    """Axis sizes the kernels are chosen for: --opt-shapes, else the model's usual ones, else the
    example's with batch 1. Raises UsageError where the shapes asked for cannot be."""
    from bitnet_export.verify.feeds import as_arrays, axis_sizes

    axes = loaded.dynamic_axes
    low = parse_shapes(options.min_shapes, axes, "--min-shape")
    high = parse_shapes(options.max_shapes, axes, "--max-shape")
    crossed = [name for name in low if low[name] > high.get(name, low[name])]
    if crossed:
        raise UsageError(
            f"axis {crossed[0]} is at least {low[crossed[0]]} and at most {high[crossed[0]]}",
            where="--min-shape, --max-shape",
            fix="exchange the two",
        )
    sizes = axis_sizes(as_arrays(loaded.example_inputs), axes)
    sizes |= {a[0]: 1 for a in axes.values() if 0 in a} | loaded.usual_sizes
    sizes |= parse_shapes(options.opt_shapes, axes, "--opt-shape")
    for option, specs in (
        ("--min-shape", options.min_shapes),
        ("--opt-shape", options.opt_shapes),
        ("--max-shape", options.max_shapes),
    ):
        _check_fixed(specs, loaded, option)
    return sizes


def _check_fixed(specs: Sequence[str], loaded: LoadedModel, option: str) -> None:
    """Raise UsageError for another size than the model's own of an axis that is not dynamic."""
    for spec in specs:
        name, _, dims = spec.rpartition(":")
        axes, given = loaded.dynamic_axes.get(name, {}), dims.split("x")
        fixed = list(loaded.example_inputs[name].shape)
        wrong = [i for i, n in enumerate(fixed) if i not in axes and given[i : i + 1] != [str(n)]]
        if wrong or len(given) != len(fixed):
            sizes = "x".join(str(axes.get(i, n)) for i, n in enumerate(fixed))
            raise UsageError(
                f"the model takes {sizes}", where=f"{option} {spec}", fix=f"write it as {sizes}"
            )


def verify_shapes(loaded: LoadedModel, options: ExportOptions) -> list[Sizes]:
    """The axis sizes to compare at: opt, batch 1, odd ones, and the profile's ends if given."""
    from bitnet_export.verify.feeds import derive_shapes

    axes = loaded.dynamic_axes
    low, high = (
        parse_shapes(given, axes, option)
        for given, option in (
            (options.min_shapes, "--min-shape"),
            (options.max_shapes, "--max-shape"),
        )
    )
    opt = opt_sizes(loaded, options)
    high = dict(loaded.axis_limits) | high if high else high
    return derive_shapes(loaded.example_inputs, axes, low or None, opt, high or None)


def check_profile(loaded: LoadedModel, options: ExportOptions, opt: Sizes) -> None:
    """Raise UsageError for --min-shape, --opt-shape and --max-shape that make no profile."""
    from bitnet_export.targets.trt_profile import make_profile

    axes = loaded.dynamic_axes
    inputs = {
        name: {"shape": [axes.get(name, {}).get(i, size) for i, size in enumerate(value.shape)]}
        for name, value in loaded.example_inputs.items()
    }
    asked = [
        parse_shapes(given, axes, option)
        for given, option in (
            (options.min_shapes, "--min-shape"),
            (options.opt_shapes, "--opt-shape"),
            (options.max_shapes, "--max-shape"),
        )
    ]
    make_profile(inputs, asked[0], opt, asked[2], loaded.axis_limits, asked[1])


def parse_case_label(label: str, known: Sizes) -> Sizes:
    """ "batch=1,sequence=16" -> sizes; axes left out keep the known ones. Raises UsageError."""
    sizes = dict(known)
    for part in label.split(","):
        name, equals, size = part.partition("=")
        if equals and name not in known:
            raise UsageError(
                f"the model has no dynamic axis {name}",
                where=f"--shape {label}",
                fix=f"it has {', '.join(known) or 'none: leave --shape out'}",
            )
        if not size.isdigit() or not int(size):
            raise UsageError(
                f"{part!r} is no axis with a size",
                where=f"--shape {label}",
                fix=f"write {','.join(f'{k}={v}' for k, v in known.items()) or 'no --shape'}",
            )
        sizes[name] = int(size)
    return sizes
