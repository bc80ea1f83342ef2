"""Write docs/cli.md from the commands themselves. ``--check`` only says whether it is current.

What a command and an option do is written once, in bitnet_export/cli; this renders it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from bitnet_export.cli import COMMANDS, main
from bitnet_export.cli.values import GroupedOption

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEADER = """# Command line

<!-- Written by tools/make_cli_docs.py from the commands' own help: edit that, not this. -->

`bitnet-export MODEL` is short for `bitnet-export export MODEL`. Results go to stdout, progress
and warnings to stderr; `--json` prints what a machine would read. Ratios may be written as `2x`,
`2.0` or `200%`, parts as `5%` or `0.05`.

| exit code | meaning |
|---|---|
| 0 | everything ran and all gates passed |
| 1 | a parity, quality, size or speed gate failed; the report is written |
| 2 | the command or its input is wrong |
| 3 | this machine lacks something the target needs; what could be made is kept |
| 4 | a stage failed; nothing half-written is kept |
| 130 | interrupted with Ctrl-C |

`BITNET_EXPORT_DEBUG=1` adds the traceback to an error message.
"""


def render() -> str:
    """docs/cli.md as it should be."""
    group = click.Context(main, info_name="bitnet-export")
    index = "\n".join(f"- [`{name}`](#{name}): {text}" for name, text in COMMANDS.items())
    sections = [render_command(name, group) for name in COMMANDS]
    return "\n".join([HEADER, index, "", *sections])


def render_command(name: str, group: click.Context) -> str:
    """One command: its usage, its help text, its options by group."""
    command = main.get_command(group, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=group)
    arguments = [p.make_metavar(context) for p in command.params if isinstance(p, click.Argument)]
    usage = " ".join(["bitnet-export", name, *arguments, "[OPTIONS]"])
    lines = [f"## {name}", "", f"    {usage}", "", *_paragraphs(command.help or ""), ""]
    groups: dict[str, list[click.Option]] = {}
    for parameter in command.params:
        if isinstance(parameter, GroupedOption):
            groups.setdefault(parameter.group, []).append(parameter)
    for heading, options in groups.items():
        lines += [f"**{heading}**", "", "| option | |", "|---|---|"]
        lines += [_row(option, context) for option in options]
        lines.append("")
    return "\n".join(lines)


def _paragraphs(text: str) -> list[str]:
    lines = [line.strip() for line in text.strip().splitlines()]
    return [line for line in lines if line != "\b"]


def _row(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    assert record is not None
    names, text = (part.replace("|", "\\|") for part in record)
    return f"| `{names}` | {' '.join(text.split())} |"


def run(arguments: list[str]) -> int:
    """Write the page, or with --check compare it; the exit code."""
    text = render()
    if "--check" not in arguments:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
        return 0
    current = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if current != text:
        print(f"{PAGE.name} is out of date: run python tools/make_cli_docs.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
