"""Option types: values as people write them (5%, 0.05, 2x) and help with grouped options."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
_NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|x)?\Z")


class Fraction(click.ParamType):
    """ "5%" or "0.05" -> 0.05."""

    name = "fraction"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float | int):
            return float(value)
        match = _NUMBER.match(str(value).strip())
        if match is None or match[2] == "x":
            self.fail(f"{value!r} is not a fraction: write 5% or 0.05", param, ctx)
        fraction = float(match[1]) / (100 if match[2] else 1)
        if fraction > 1:
            self.fail(f"{value!r} is more than all of it: write 5% or 0.05", param, ctx)
        return fraction

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "5%"


class Ratio(click.ParamType):
    """ "2x", "2" or "150%" -> 2.0, 1.5."""

    name = "ratio"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        if isinstance(value, float | int):
            return float(value)
        match = _NUMBER.match(str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a ratio: write 2x or 2.0", param, ctx)
        return float(match[1]) / (100 if match[2] == "%" else 1)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "2x"


FRACTION, RATIO = Fraction(), Ratio()


class GroupedOption(click.Option):
    """An option that belongs under a heading in --help."""

    def __init__(self, *args: Any, group: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


class GroupedCommand(click.Command):
    """Prints options under the headings of their groups, in the order they first appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, GroupedOption):
                groups.setdefault(parameter.group, []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def option(*names: str, group: str, **attributes: Any) -> Callable[[F], F]:
    """click.option under a heading; defaults that say something are shown."""
    default = attributes.get("default")
    attributes.setdefault("show_default", default not in (None, False, (), 0, ""))
    return click.option(*names, cls=GroupedOption, group=group, **attributes)
