"""The optimization profile: the smallest, the usual and the largest shape of every input.

An engine runs shapes inside its profile only, and is tuned for the usual one. Sizes come from
--min-shape, --opt-shape and --max-shape; what they leave open is derived here, and said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitnet_export.errors import InputError, UsageError

# One input: {"min": [1, 1], "opt": [1, 16], "max": [8, 128]}.
Shapes = dict[str, list[int]]
Profile = dict[str, Shapes]
KINDS = ("min", "opt", "max")
# How far a derived profile reaches: enough for a small server, little enough workspace.
BATCH, LENGTH = 8, 512


def make_profile(
    inputs: Mapping[str, Mapping[str, Any]],
    low: Mapping[str, int],
    opt: Mapping[str, int],
    high: Mapping[str, int],
    limits: Mapping[str, int],
    asked_opt: Mapping[str, int] | None = None,
) -> Profile:
    """inputs as in the manifest (name -> {"shape": [int or axis name]}) -> the profile.

    low, high: sizes the user gave, by axis. opt: the usual size of every axis. limits: the
    largest size the model itself takes. asked_opt: those of opt that the user gave. Raises
    UsageError where the sizes of an axis are not in order or the model cannot take them.
    """
    batch = {s["shape"][0] for s in inputs.values() if s["shape"]}
    asked = asked_opt or {}
    sizes: dict[str, tuple[int, int, int]] = {}
    for name, entry in inputs.items():
        for axis in entry["shape"]:
            if isinstance(axis, str) and axis not in sizes:
                if axis not in opt:
                    raise InputError(
                        f"the size of axis {axis!r} is not known",
                        where=f"input {name}",
                        fix=f"give it with --opt-shape {name}:...",
                    )
                reach = BATCH if axis in batch else LENGTH
                sizes[axis] = _axis_sizes(axis, low, opt, high, limits, asked, reach)
    return {
        name: {
            kind: [d if isinstance(d, int) else sizes[d][i] for d in entry["shape"]]
            for i, kind in enumerate(KINDS)
        }
        for name, entry in inputs.items()
    }


def _axis_sizes(
    axis: str,
    low: Mapping[str, int],
    opt: Mapping[str, int],
    high: Mapping[str, int],
    limits: Mapping[str, int],
    asked: Mapping[str, int],
    reach: int,
) -> tuple[int, int, int]:
    """(min, opt, max) of one axis, in order and within what the model takes."""
    limit = limits.get(axis)
    most = high.get(axis) or min(max(opt[axis], low.get(axis, 1), reach), limit or reach**4)
    least = low.get(axis, 1)
    usual = opt[axis] if axis in asked else min(max(opt[axis], least), most)
    if not least <= usual <= most:
        raise UsageError(
            f"axis {axis}: min {least}, opt {usual}, max {most} are not in order",
            where="--min-shape, --opt-shape, --max-shape",
            fix="give sizes with min <= opt <= max",
        )
    if limit is not None and most > limit:
        raise UsageError(
            f"axis {axis}: {most} is more than the {limit} the model takes",
            where="--max-shape",
            fix=f"give at most {limit}",
        )
    return least, usual, most


def is_static(profile: Profile) -> bool:
    """Whether every input has one shape only."""
    return all(s["min"] == s["max"] for s in profile.values())


def describe(profile: Profile) -> str:
    """ "ids 1x1..1x16..8x128"; for people."""
    parts = []
    for name, shapes in profile.items():
        texts = ["x".join(map(str, shapes[kind])) or "scalar" for kind in KINDS]
        one = len(set(texts)) == 1
        parts.append(f"{name} {texts[0] if one else '..'.join(texts)}")
    return ", ".join(parts)


def check_shapes(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError where an array does not fit the profile."""
    for name, shape in shapes.items():
        if not fits(profile, {name: shape}):
            low, high = profile[name]["min"], profile[name]["max"]
            raise InputError(
                f"input {name} has shape {list(shape)}, the engine takes {low} to {high}",
                fix="send shapes in that range, or export with another --max-shape",
            )


def fits(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether arrays of those shapes fit; names the profile does not have do not count."""
    for name, shape in shapes.items():
        if name not in profile:
            continue
        low, high = profile[name]["min"], profile[name]["max"]
        if len(shape) != len(low):
            return False
        if any(not a <= s <= b for a, s, b in zip(low, shape, high, strict=True)):
            return False
    return True


def trtexec_shapes(profile: Profile) -> list[str]:
    """The shape options of trtexec, none for a static model."""
    if is_static(profile):
        return []
    return [
        f"--{kind}Shapes="
        + ",".join(f"{name}:{'x'.join(map(str, s[kind]))}" for name, s in profile.items())
        for kind in KINDS
    ]
