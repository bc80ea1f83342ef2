"""--help: complete, fast, and without the heavy imports."""

import subprocess
import sys
import time

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
    times = []
    for _ in range(3):  # the best of three: another process may be using the core
        started = time.perf_counter()
        assert run("--help").returncode == 0
        times.append(time.perf_counter() - started)
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
