"""Every command on a page is one that can be typed: it parses, and what it names exists."""

import re
import tomllib

import click
import pytest

from bitnet_export.cli import COMMANDS, main
from tests.docs.pages import PAGES, ROOT, blocks, commands, inline_commands, tool_words

TYPED = [
    (str(block), words) for page in PAGES for block in blocks(page) for words in commands(block)
]
INLINE = [(str(page.relative_to(ROOT)), words) for page in PAGES for words in inline_commands(page)]
CLI_PAGE = "docs/cli.md"
# Options of other programs: torchrun, pip, ctest, nvcc, trtexec, tritonserver.
FOREIGN = {
    *("--nproc-per-node", "--no-deps", "--output-on-failure", "--test-dir", "--help", "--version"),
    *("--shared", "--diag_suppress", "--plugins", "--staticPlugins", "--dynamicPlugins"),
    *("--setPluginsToSerialize", "--backend-config"),
}


def named(cases):
    """Parameters with the place and the command as their name."""
    return [pytest.param(words, id=f"{where} {' '.join(words)[:60]}") for where, words in cases]


def parse(words):
    """Raise click.UsageError where the command line would; nothing is run."""
    words = list(words)
    group = click.Context(main, info_name="bitnet-export")
    if words[0] not in COMMANDS:
        words.insert(0, "export")
    main.get_command(group, words[0]).make_context(words[0], words[1:], parent=group)


def of_tool(cases):
    for where, words in cases:
        rest = tool_words(words)
        if rest is not None and not where.startswith(CLI_PAGE):  # that page is made from the CLI
            yield where, rest


def test_the_pages_are_read():
    """The other tests are only as good as what is found; a user sees at least these."""
    found = [words for _, words in of_tool(TYPED)]
    assert {words[0] for words in found} >= {"finetune", "convert", "bench", "verify", "report"}
    assert len(found) > 25
    assert len(INLINE) > 20
    assert ["report", "out/release", "--markdown"] in found  # a step of a CI job
    continued = next(words for where, words in TYPED if where.startswith("docs/tensorrt.md"))
    assert continued[-1] == "attention_mask:8x128"  # three lines of one command in a list item


@pytest.mark.parametrize("words", named(of_tool(TYPED)))
def test_a_command_of_the_tool_parses(words):
    parse(words)


@pytest.mark.parametrize("words", named(of_tool(INLINE)))
def test_a_command_in_the_text_parses_or_names_a_command(words):
    if words == words[:1]:
        assert words[0] in {*COMMANDS, "MODEL", "FILE", "DIRECTORY"}
    else:
        parse(words)


def test_a_wrong_option_would_be_noticed():
    for words in (["finetune", "m.pt", "--stepz", "3"], ["m.pt", "--target", "cpu"]):
        with pytest.raises(click.UsageError):
            parse(words)


@pytest.mark.parametrize("words", named(TYPED))
def test_what_other_commands_name_exists(words):
    if words[0] == "python":
        tool = ROOT / words[1]
        assert tool.is_file()
        source = tool.read_text(encoding="utf-8")
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        assert not [flag for flag in flags if flag not in source]
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = {name for word in words for name in re.findall(r"[\w-]+", _bracket(word))}
        assert extras <= project["optional-dependencies"].keys()
    elif words[0] == "pytest":
        assert all(list(ROOT.glob(word)) for word in words[1:])


def _bracket(word):
    match = re.search(r"\[(.*)\]", word)
    return match[1] if match else ""


def known_flags():
    """Every option of the tool and of the programs in tools/."""
    group = click.Context(main)
    found = set(FOREIGN)
    for name in COMMANDS:
        for option in main.get_command(group, name).params:
            found |= {*option.opts, *option.secondary_opts}
    for tool in (ROOT / "tools").rglob("*.py"):
        found |= set(re.findall(r"--[a-z][\w-]+", tool.read_text(encoding="utf-8")))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text))
    assert not sorted(flags - known_flags())
