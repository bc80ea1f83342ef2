"""The command line: ``bitnet-export MODEL --target ort`` and its sister commands.

One file a command: it parses, calls the pipeline and prints; there are no maths here. Commands
are imported when they are called, so that ``--help`` needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import click

from bitnet_export.cli.failures import exit_with_message

# Command -> what --help says about it, so that help imports none of them.
COMMANDS = {
    "export": "Make a model ternary and deploy it (the default command).",
    "finetune": "Win quality back: distil from the full-precision model, no labels needed.",
    "verify": "Check an exported directory again, on this machine.",
    "bench": "Measure an exported directory against full precision.",
    "convert": "Write a ternary model as a PyTorch or Hugging Face checkpoint.",
    "inspect": "Show what is in an ONNX file or an exported directory.",
    "unpack": "Write the plain ONNX file of a compressed export.",
    "report": "Show a report, or compare it with an older one.",
    "recipes": "List the recipes: what each makes ternary, and how.",
    "doctor": "Show what this machine can do and what to install.",
}
DEFAULT = "export"


class MainGroup(click.Group):
    """Loads commands lazily, takes ``export`` for granted, and turns errors into exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # inspect would shadow the standard library's module of that name in tracebacks
        module = importlib.import_module(f"bitnet_export.cli.{cmd_name}_command")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for option in self.get_params(ctx) for name in option.opts}
        if args and args[0] not in COMMANDS and args[0] not in own:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        call = partial(super().main, args, prog_name, complete_var, standalone_mode=False, **extra)
        if not standalone_mode:
            return call()
        with exit_with_message():
            code: Any = call()
            raise SystemExit(code if isinstance(code, int) else 0)


@click.group(
    cls=MainGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
)
@click.version_option(package_name="bitnet-export", prog_name="bitnet-export")
def main() -> None:
    """Turn a trained PyTorch model ternary and run it under ONNX Runtime or TensorRT.

    \b
    bitnet-export model.pt --target ort     the common case: everything has a default
    bitnet-export export --help             every option of the default command

    MODEL is a file that bitnet_export.save wrote, a state_dict or safetensors file (with
    --model), a Hugging Face directory, a GGUF file or an ONNX file.

    \b
    Exit codes: 0 all gates passed, 1 a gate failed, 2 usage, 3 this machine lacks
    something the target needs, 4 a stage failed, 130 interrupted.
    """
