"""The header fetcher: only the pinned wheel is unpacked, and failures say what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from bitnet_export.errors import MissingRequirement, StageError

from .conftest import REPOSITORY

LICENSED = "/* SPDX-License-Identifier: Apache-2.0 */\n"


@pytest.fixture
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "fetch_tensorrt_headers.py"
    spec = importlib.util.spec_from_file_location("fetch_tensorrt_headers", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wheel(path: Path, tool: ModuleType, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> Path:
    """A wheel of the pinned layout, which the tool is made to expect."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(tool.INSIDE + name, LICENSED + f"// {name}\n")
        archive.writestr(tool.INSIDE + "NvInferPlugin.h", "// not NVIDIA's\n")
        archive.writestr("kernel_lens/__init__.py", "raise SystemExit")
    monkeypatch.setattr(tool, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_unpacks_licensed_headers_only(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "w.whl", tool, monkeypatch, list(tool.NEEDED))
    headers = tmp_path / "headers"
    include = tool.fetch(wheel=wheel, headers=headers)
    assert sorted(path.name for path in include.iterdir()) == sorted(tool.NEEDED)
    assert tool.is_current(headers)
    wheel.unlink()
    assert tool.fetch(headers=headers) == include  # nothing is fetched twice


def test_a_changed_pin_makes_the_folder_stale(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "w.whl", tool, monkeypatch, list(tool.NEEDED))
    tool.fetch(wheel=wheel, headers=tmp_path / "headers")
    monkeypatch.setattr(tool, "SHA256", "0" * 64)
    assert not tool.is_current(tmp_path / "headers")


def test_another_file_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "w.whl", tool, monkeypatch, list(tool.NEEDED))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(StageError, match="expected"):
        tool.fetch(wheel=wheel, headers=tmp_path / "headers")
    assert not (tmp_path / "headers").exists()


def test_a_wheel_without_headers_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = _wheel(tmp_path / "w.whl", tool, monkeypatch, ["NvInfer.h"])
    with pytest.raises(StageError, match=r"NvInferRuntime\.h, NvInferVersion\.h"):
        tool.fetch(wheel=wheel, headers=tmp_path / "headers")
    assert not tool.is_current(tmp_path / "headers")


def test_no_network_says_what_to_do(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution")
    monkeypatch.setattr(tool.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(MissingRequirement, match="no matching distribution") as caught:
        tool.fetch(headers=tmp_path / "headers")
    assert "--wheel FILE" in caught.value.fix
