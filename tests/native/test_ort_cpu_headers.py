"""The fetcher of ONNX Runtime's headers: only the pinned package; errors say what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from bitnet_export.errors import MissingRequirement, StageError

from .conftest import REPOSITORY


@pytest.fixture
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "fetch_ort_headers.py"
    spec = importlib.util.spec_from_file_location("fetch_ort_headers", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def package(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the pinned layout, which the tool is made to expect."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("there is no dpkg-deb: not a Debian system")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (root / tool.INSIDE).mkdir(parents=True)
    for name in tool.NEEDED:
        (root / tool.INSIDE / name).write_text(f"// {name}\n")
    made = tmp_path / "x.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(made)]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setattr(tool, "SHA256", hashlib.sha256(made.read_bytes()).hexdigest())
    return made


def test_unpacks_the_headers(tool: ModuleType, package: Path, tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    include = tool.fetch(package=package, headers=headers)
    assert sorted(path.name for path in include.iterdir()) == sorted(tool.NEEDED)
    assert tool.is_current(headers)
    package.unlink()  # not looked at again
    assert tool.fetch(package=package, headers=headers) == include


def test_a_new_pin_makes_headers_stale(
    tool: ModuleType, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = tmp_path / "headers"
    tool.fetch(package=package, headers=headers)
    monkeypatch.setattr(tool, "SHA256", "0" * 64)
    assert not tool.is_current(headers)


def test_another_file_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    other = tmp_path / "other.deb"
    other.write_bytes(b"!<arch>\n")
    with pytest.raises(StageError, match="expected 14f7d959"):
        tool.fetch(package=other, headers=tmp_path / "headers")
    assert not (tmp_path / "headers").exists()


def test_without_apt_it_says_what_to_do(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirement, match=r"no apt-get here[\s\S]*ONNXRUNTIME_INCLUDE_DIR"):
        tool.fetch(headers=tmp_path / "headers")
