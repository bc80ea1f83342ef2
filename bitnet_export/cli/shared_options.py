"""Options that several commands have, and the option dataclasses built from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, TypeVar

import click

from bitnet_export import options
from bitnet_export.cli.values import FRACTION, RATIO, option
from bitnet_export.ternary.recipes import RECIPES

FILE = click.Path(path_type=Path)
MODEL, TERNARY, GATES, RUN = "Model", "Ternary weights", "Gates", "Run"


F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


def _stack(*decorators: Decorator[Any]) -> Callable[[F], F]:
    """Decorators that read top to bottom, as their options appear in --help."""
    return lambda command: reduce(lambda c, d: d(c), reversed(decorators), command)


def model_options(data_help: str) -> Callable[[F], F]:
    return _stack(
        option(
            "--model",
            "factory",
            group=MODEL,
            metavar="PACKAGE.MODULE:FUNCTION",
            help="Function that builds the nn.Module for a state_dict or safetensors file.",
        ),
        option(
            "--input",
            "input_specs",
            group=MODEL,
            multiple=True,
            metavar="NAME:SHAPE[:DTYPE]",
            help="An input, as ids:1x128:int64, dynamic axes by name: x:batchx64. Repeatable.",
        ),
        option("--data", group=MODEL, type=FILE, metavar="FILE", help=data_help),
        option(
            "--trust-pickle",
            group=MODEL,
            is_flag=True,
            help="Load pickled Python objects. That runs code in the file: trust its author.",
        ),
    )


def ternary_options() -> Callable[[F], F]:
    return _stack(
        option(
            "--recipe",
            group=TERNARY,
            type=click.Choice(list(RECIPES)),
            default=None,
            help="A documented configuration; `bitnet-export recipes` lists them. Options given "
            "beside it win. [default: chosen by the model]",
        ),
        option(
            "--quantizer",
            group=TERNARY,
            type=click.Choice(options.QUANTIZERS),
            default=None,
            help="How weights become -1, 0, +1. [default: by the recipe]",
        ),
        option(
            "--threshold",
            group=TERNARY,
            type=float,
            default=None,
            help="|w| above it is kept, with --quantizer threshold. [default: 0.1]",
        ),
        option(
            "--granularity",
            group=TERNARY,
            type=click.Choice(options.GRANULARITIES),
            default=None,
            help="What shares a scale. [default: by the recipe; group with --group-size]",
        ),
        option(
            "--group-size",
            group=TERNARY,
            type=click.Choice([str(size) for size in options.GROUP_SIZES]),
            default=None,
            help="Weights that share a scale, with granularity group.",
        ),
        option(
            "--activation-bits",
            group=TERNARY,
            type=click.Choice(["8", "0"]),
            default=None,
            help="8: int8 activations, absmax per row. 0: floating point. [default: by the recipe]",
        ),
        _layer_options(),
    )


def _layer_options() -> Callable[[F], F]:
    """Which layers become ternary."""
    return _stack(
        option(
            "--convolutions",
            group=TERNARY,
            type=click.Choice(options.CONVOLUTIONS),
            default=None,
            help="Which become ternary. matmul: only those that run as TernaryMatMul (kernel 1, or "
            "as large as the stride); others save bytes but no time. [default: all]",
        ),
        option(
            "--exclude",
            group=TERNARY,
            multiple=True,
            metavar="PATTERN",
            help="Layers to keep in floating point, by module path (*.lm_head). Repeatable; "
            "added to the built-in list.",
        ),
        option(
            "--ternary-head",
            group=TERNARY,
            is_flag=True,
            help="Make the last layer ternary as well.",
        ),
        option(
            "--include",
            group=TERNARY,
            multiple=True,
            metavar="PATTERN",
            help="Only these layers become ternary. Repeatable.",
        ),
    )


def gate_options(*, parity: bool = True) -> Callable[[F], F]:
    """parity False: for a command that compares nothing."""
    tolerance = option(
        "--atol",
        group=GATES,
        type=click.FloatRange(min=0),
        help="Largest absolute difference between implementations, instead of the stated "
        "tolerances.",
    )
    return _stack(
        option("--min-speedup", group=GATES, type=RATIO, help="Fail below this speed over fp32."),
        option("--min-compression", group=GATES, type=RATIO, help="Fail below this size ratio."),
        option(
            "--max-quality-loss",
            group=GATES,
            type=FRACTION,
            help="Fail if the metric falls by more than this part.",
        ),
        *([tolerance] if parity else []),
    )


def metric_options(group: str) -> Callable[[F], F]:
    return _stack(
        option(
            "--metric",
            group=group,
            metavar="PACKAGE.MODULE:FUNCTION",
            help="Quality metric f(run, data) -> float. [default: agreement with full precision]",
        ),
        option(
            "--metric-data",
            group=group,
            type=FILE,
            metavar="FILE",
            help="What the metric reads. [default: --data]",
        ),
        option(
            "--per-layer",
            group=group,
            is_flag=True,
            help="Compare layer by layer, to find the one that broke.",
        ),
    )


def run_options(*, threads: bool = True) -> Callable[[F], F]:
    decorators = [
        option("--seed", group=RUN, type=int, default=0, help="Seed of everything random."),
        option("--json", "as_json", group=RUN, is_flag=True, help="Print the result as JSON."),
        option(
            "--quiet", "-q", group=RUN, is_flag=True, help="Only warnings on stderr, no progress."
        ),
    ]
    if threads:
        decorators.insert(
            0,
            option(
                "--threads",
                group=RUN,
                type=click.IntRange(min=1),
                metavar="N",
                help="Threads of the runtime. [default: its own choice]",
            ),
        )
    return _stack(*decorators)


def take_ternary(values: dict[str, Any]) -> options.TernaryOptions:
    """Remove the ternary options from parsed values and build their dataclass."""
    group_size = int(values.pop("group_size") or 0)
    granularity = values.pop("granularity") or ("group" if group_size else None)
    if granularity == "group" and not group_size:
        group_size = options.GROUP_SIZES[-1]
    elif granularity != "group" and group_size:
        raise click.UsageError(f"--group-size needs --granularity group, not {granularity}")
    if values["threshold"] is not None and values["quantizer"] != "threshold":
        raise click.UsageError("--threshold needs --quantizer threshold: no other one looks at it")
    exclude = tuple(values.pop("exclude"))
    activation_bits = values.pop("activation_bits")
    return options.TernaryOptions(
        recipe=values.pop("recipe"),
        quantizer=values.pop("quantizer"),
        threshold=values.pop("threshold"),
        granularity=granularity,
        group_size=group_size if granularity else None,
        activation_bits=int(activation_bits) if activation_bits else None,
        exclude=_with_default_excludes(exclude) if exclude else None,
        include=tuple(values.pop("include")) or None,
        keep_head=False if values.pop("ternary_head") else None,
        convolutions=values.pop("convolutions"),
    )


def _with_default_excludes(patterns: tuple[str, ...]) -> tuple[str, ...]:
    from bitnet_export.ternary.config import DEFAULT_EXCLUDE

    return (*DEFAULT_EXCLUDE, *patterns)


def take_gates(values: dict[str, Any]) -> options.GateOptions:
    """Remove the gate options from parsed values and build their dataclass."""
    names = ("min_speedup", "min_compression", "max_quality_loss", "atol")
    return options.GateOptions(**{name: values.pop(name, None) for name in names})
