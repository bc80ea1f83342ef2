"""The build command where tools are missing or results are wrong; building itself is tested by
using what it built (the other files here)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bitnet_export.errors import EXIT_MISSING_REQUIREMENT, EXIT_STAGE_FAILED, StageError

from .conftest import REPOSITORY

TOOLS = REPOSITORY / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The tool as a module, building into a folder of the test's own."""
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("build_native", TOOLS / "build_native.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_native", module)  # dataclasses look it up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD_DIR", tmp_path / "build")
    return module


@pytest.fixture
def no_nvcc(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tool.Tools(cmake="cmake", ninja=None, compiler="g++", nvcc=None)
    monkeypatch.setattr(tool, "find_tools", lambda: tools)


@pytest.mark.usefixtures("no_nvcc")
def test_a_missing_compiler_skips_its_part(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--parts", "cuda"]) == 0
    assert "skipped cuda: no nvcc on the PATH or in CUDA_HOME" in capsys.readouterr().out


@pytest.mark.usefixtures("no_nvcc")
def test_require_turns_a_skip_into_an_error(
    tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--parts", "cuda", "--require"]) == EXIT_MISSING_REQUIREMENT
    assert "--require, but skipped cuda" in capsys.readouterr().err


def test_unknown_capabilities_are_named(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tool.Tools(cmake="cmake", ninja=None, compiler="g++", nvcc="/opt/nvcc")
    listed = subprocess.CompletedProcess([], 0, "compute_75\ncompute_90\n", "")
    monkeypatch.setattr(tool, "find_tools", lambda: tools)
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: listed)
    assert tool.main(["--parts", "cuda", "--cuda-archs", "75,120"]) == 0
    said = capsys.readouterr().out
    assert "/opt/nvcc cannot compile for 120; it knows 75, 90" in said
    assert "--cuda-archs" in said


def test_a_broken_build_is_an_error_even_without_require(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tool.Tools(cmake="/bin/false", ninja=None, compiler="g++", nvcc=None)
    monkeypatch.setattr(tool, "find_tools", lambda: tools)
    monkeypatch.setattr(tool.fetch_tensorrt_headers, "fetch", lambda: Path("/include"))
    assert tool.main(["--parts", "emulation"]) == EXIT_STAGE_FAILED
    assert "native part emulation: /bin/false" in capsys.readouterr().err


def test_what_does_not_say_its_name_is_not_shipped(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "NATIVE_DIR", tmp_path / "native")
    tree = tmp_path / "tree"
    with pytest.raises(StageError, match="made no libbitnet_tensorrt_plugin"):
        tool.ship("tensorrt_plugin", tree)
    built = tree / "tensorrt" / "libbitnet_tensorrt_plugin.so"
    built.parent.mkdir(parents=True)
    built.write_bytes(b"\x7fELF")
    with pytest.raises(StageError, match="does not say that it is tensorrt_plugin"):
        tool.ship("tensorrt_plugin", tree)
    assert not (tmp_path / "native").exists()
    built.write_bytes(b"\x7fELF@(#)bitnet-export library=tensorrt_plugin version=1;")
    assert tool.ship("tensorrt_plugin", tree).read_bytes() == built.read_bytes()


@pytest.mark.parametrize(
    ("home", "generator", "kept"),
    [
        ("{plugins}", "Ninja", True),
        ("/moved/plugins", "Ninja", False),
        ("{plugins}", "Make", False),
    ],
)
def test_trees_of_other_checkouts_are_discarded(
    tool: ModuleType, tmp_path: Path, home: str, generator: str, kept: bool
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "CMakeCache.txt").write_text(
        f"CMAKE_GENERATOR:INTERNAL={generator}\n"
        f"CMAKE_HOME_DIRECTORY:INTERNAL={home.format(plugins=tool.PLUGINS)}\n"
    )
    tool._discard_foreign_tree(tree, "Ninja")
    assert tree.exists() == kept
