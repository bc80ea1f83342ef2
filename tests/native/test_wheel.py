"""The wheel: its libraries are in it, and a clean environment without a compiler finds them."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from bitnet_export.errors import MissingRequirement, StageError
from bitnet_export.native import LIBRARIES, NATIVE_DIR

from .conftest import REPOSITORY, Unavailable


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = REPOSITORY / "tools" / "build_wheel.py"
    spec = importlib.util.spec_from_file_location("build_wheel", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(tool: ModuleType, unavailable: Unavailable, tmp_path_factory: pytest.TempPathFactory):
    missing = [spec.name for spec in LIBRARIES.values() if not (NATIVE_DIR / spec.file).is_file()]
    if missing:
        unavailable(f"{', '.join(missing)} not built: run make native")
    paths = [tool.native_file(name) for name in LIBRARIES]
    made = tool.build(tmp_path_factory.mktemp("wheel"), tool.platform_tag(paths), isolated=False)
    tool.check(made, paths)
    return made


def test_wheel_names_the_platform(wheel: Path) -> None:
    assert "-py3-none-manylinux_2_" in wheel.name
    assert wheel.name.endswith(f"_{platform.machine()}.whl")


def test_clean_environment_finds_its_libraries(wheel: Path, tmp_path: Path) -> None:
    """No pip, no compiler, no checkout in reach: only what the wheel brings."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = (
        "from bitnet_export.native import LIBRARIES, find_library\n"
        "for name in LIBRARIES:\n"
        "    found = find_library(name)\n"
        "    print(found.source, found.path)\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("BITNET_", "PYTHON"))}
    done = subprocess.run(
        [str(tmp_path / "bin" / "python"), "-c", script],
        env=clean | {"PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [f"package {site}/bitnet_export/_native/{s.file}" for s in LIBRARIES.values()]
    assert done.stdout.splitlines() == expected


def test_check_refuses_a_wheel_with_other_contents(tool: ModuleType, tmp_path: Path) -> None:
    wheel = tmp_path / "bitnet_export-9.9.9-py3-none-any.whl"
    library = tmp_path / "libbitnet_ort_cpu.so"
    library.write_bytes(b"@(#)bitnet-export library=ort_cpu version=1.0.0;")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bitnet_export/__init__.py", "")
    with pytest.raises(StageError, match="expected"):
        tool.check(wheel, [library])
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(library, "bitnet_export/_native/libbitnet_ort_cpu.so")
    with pytest.raises(StageError, match=r"built from version 1\.0\.0, the wheel is 9\.9\.9"):
        tool.check(wheel, [library])


def test_platform_tag_is_the_newest_glibc_needed(tool: ModuleType, tmp_path: Path) -> None:
    for name, content in {"a": b"\0GLIBC_2.4\0GLIBC_2.34\0", "b": b"\0GLIBC_2.9\0"}.items():
        (tmp_path / name).write_bytes(content)
    machine = platform.machine()
    assert tool.platform_tag([tmp_path / "a"]) == f"manylinux_2_34_{machine}"
    assert tool.platform_tag([tmp_path / "b"]) == f"manylinux_2_17_{machine}"


def test_unbuilt_libraries_are_named(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "NATIVE_DIR", REPOSITORY / "nowhere")
    with pytest.raises(MissingRequirement, match="ort_cpu"):
        tool.native_file("ort_cpu")
