"""Finding native libraries: the order of places, what is refused, what the messages say."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from bitnet_export import native
from bitnet_export.errors import EXIT_MISSING_REQUIREMENT, MissingRequirement, UsageError

INFO = b"@(#)bitnet-export library=%s version=%s kernels=1 cuda=13.0/75-real,75-virtual;"


def _library(path: Path, name: str = "tensorrt_plugin", version: str = "1.2.3") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF\0" * 3 + INFO % (name.encode(), version.encode()) + b"\0rest")
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Empty places: package folder and build tree of a made-up checkout."""
    for spec in native.LIBRARIES.values():
        monkeypatch.delenv(spec.variable, raising=False)
    monkeypatch.setattr(native, "NATIVE_DIR", tmp_path / "package")
    monkeypatch.setattr(native, "BUILD_DIR", tmp_path / "plugins" / "build")
    file = native.LIBRARIES["tensorrt_plugin"].file
    return {
        "package": tmp_path / "package" / file,
        "build": tmp_path / "plugins" / "build" / "cuda" / "tensorrt" / file,
        "variable": tmp_path / "elsewhere" / "mine.so",
    }


def test_build_tree_is_the_last_resort(places: dict[str, Path]) -> None:
    path = _library(places["build"])
    found = native.find_library("tensorrt_plugin")
    assert (found.path, found.source, found.version) == (path, "build tree", "1.2.3")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.details == {"kernels": "1", "cuda": "13.0/75-real,75-virtual"}


def test_package_comes_before_build_tree(places: dict[str, Path]) -> None:
    _library(places["build"])
    path = _library(places["package"])
    assert native.find_library("tensorrt_plugin").path == path


def test_variable_comes_first(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _library(places["package"])
    path = _library(places["variable"])
    monkeypatch.setenv("BITNET_EXPORT_TENSORRT_PLUGIN", str(path))
    found = native.find_library("tensorrt_plugin")
    assert found.path == path
    assert found.source == "variable BITNET_EXPORT_TENSORRT_PLUGIN"


def test_a_wrong_variable_does_not_fall_back(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _library(places["package"])
    monkeypatch.setenv("BITNET_EXPORT_TENSORRT_PLUGIN", str(places["variable"]))
    with pytest.raises(MissingRequirement, match="correct or unset BITNET_EXPORT_TENSORRT_PLUGIN"):
        native.find_library("tensorrt_plugin")


def test_the_newest_build_counts(places: dict[str, Path]) -> None:
    import os

    _library(places["build"], version="1.0.0")
    newer = places["build"].parents[1].parent / "other" / "tensorrt" / places["build"].name
    _library(newer, version="1.1.0")
    os.utime(places["build"], (1, 1))
    assert native.find_library("tensorrt_plugin").version == "1.1.0"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x7fELF nothing of ours", "is no bitnet-export library"),
        (INFO % (b"ort_cpu", b"1.2.3"), "is ort_cpu, not tensorrt_plugin"),
    ],
)
def test_foreign_files_are_passed_over(places: dict[str, Path], content: bytes, said: str) -> None:
    places["package"].parent.mkdir(parents=True)
    places["package"].write_bytes(content)
    path = _library(places["build"])
    search = native.search_library("tensorrt_plugin")
    assert search.chosen is not None
    assert search.chosen.path == path
    assert said in search.explain()


def test_a_missing_one_says_where_it_was_looked_for(places: dict[str, Path]) -> None:
    places["build"].parents[2].mkdir(parents=True)
    with pytest.raises(MissingRequirement) as caught:
        native.find_library("tensorrt_plugin")
    message = str(caught.value)
    assert str(places["package"]) in message
    assert "TernaryMatMul in TensorRT" in message
    assert "python tools/build_native.py" in message
    assert caught.value.exit_code == EXIT_MISSING_REQUIREMENT


def test_outside_a_checkout_the_remedy_is_a_wheel(places: dict[str, Path]) -> None:
    with pytest.raises(MissingRequirement, match="install a wheel that has it"):
        native.find_library("ort_cpu")
    assert len(native.search_library("ort_cpu").candidates) == 2  # no build tree to look at


def test_explain_names_the_choice_and_every_place(places: dict[str, Path]) -> None:
    path = _library(places["package"])
    lines = native.search_library("tensorrt_plugin").explain().splitlines()
    assert lines[0] == f"tensorrt_plugin: {path} (version 1.2.3, package)"
    assert lines[1] == "  variable BITNET_EXPORT_TENSORRT_PLUGIN: not set"
    assert lines[2].startswith("  package: version 1.2.3, sha256 ")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"there are tensorrt_plugin, .*ort_cpu"):
        native.find_library("cuda")
