"""The C++ suites: kernels in emulation, the plugin driver, the plugin's decisions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from bitnet_export.native import BUILD_DIR

from .conftest import REPOSITORY, Unavailable

BUILD_SECONDS, TEST_SECONDS = 600, 900


@pytest.mark.parametrize("part", ["emulation", "cpu"])
def test_ctest(part: str, unavailable: Unavailable) -> None:
    tree = BUILD_DIR / part
    if not (tree / "CMakeCache.txt").is_file():
        unavailable(f"the native part {part} is not built: run make native")
    # Brought up to date first: a stale build would test code that is gone.
    tool = REPOSITORY / "tools" / "build_native.py"
    command = [sys.executable, str(tool), "--parts", part, "--require"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert built.returncode == 0, built.stdout + built.stderr
    ctest = shutil.which("ctest") or str(tree)
    command = [ctest, "--test-dir", str(tree), "--output-on-failure", "--no-tests=error", "-j2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TEST_SECONDS)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    assert re.search(r"100% tests passed, 0 tests failed out of [1-9]", done.stdout)
