"""--help: complete, fast, and without the heavy imports."""

import resource
import subprocess
import sys

import pytest

from bitnet_export.cli import COMMANDS, main
from tests.cli.conftest import run

HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "polygraphy", "numpy", "matplotlib"}


def test_help_lists_every_command():
    done = run("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"  {name} " in done.stdout


def test_help_is_fast():
    """In seconds of processor time: what the tool spends, whatever else the machine does."""

    def children() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = children()
        assert run("--help").returncode == 0
        times.append(children() - before)
    assert min(times) < 0.3


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_imports_nothing_heavy(command):
    arguments = [command] if command else []
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "bitnet_export.cli", *arguments, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "click" in imported  # the parsing works
    assert not {name.split(".")[0] for name in imported} & HEAVY


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    import click

    group = click.Context(main)
    for parameter in main.get_command(group, command).params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{command} {parameter.name}"
            assert parameter.group, f"{command} {parameter.name}"


def test_options_are_grouped():
    text = run("export", "--help").stdout
    headings = ["Target:", "Model:", "Ternary weights:", "Graph:", "Checks:", "Gates:", "Run:"]
    positions = [text.index(f"\n{heading}") for heading in headings]
    assert positions == sorted(positions)


def test_no_arguments_shows_help():
    done = run()
    assert done.returncode == 2
    assert "Commands" in done.stdout + done.stderr


def test_version():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("bitnet-export, version ")


@pytest.mark.parametrize("arguments", [["nothing.pt"], ["--target", "ort", "nothing.pt"]])
def test_export_is_the_default_command(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "there is no file, directory or command 'nothing.pt'" in done.stderr


def test_misspelt_command():
    done = run("verfy")
    assert done.returncode == 2
    assert "Did you mean the command verify?" in done.stderr
