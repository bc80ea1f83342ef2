"""What the native tests share: how a missing tool or library is treated.

Without them a test skips and says what would run it; with BITNET_REQUIRE_NATIVE=1, as in CI, it
fails instead, so that nothing goes untested unnoticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from bitnet_export.native import find_library, search_library

REPOSITORY = Path(__file__).resolve().parents[2]
Unavailable = Callable[[str], NoReturn]


@pytest.fixture(scope="session")
def unavailable() -> Unavailable:
    """Call it with the reason: skips, or fails where native parts are required."""

    def give_up(reason: str) -> NoReturn:
        if os.environ.get("BITNET_REQUIRE_NATIVE") == "1":
            pytest.fail(f"BITNET_REQUIRE_NATIVE=1, but {reason}", pytrace=False)
        pytest.skip(reason)

    return give_up


@pytest.fixture(scope="session")
def plugin_library(unavailable: Unavailable) -> Path:
    """The TensorRT plugin that would be shipped, compiled by nvcc."""
    if search_library("tensorrt_plugin").chosen is None:
        unavailable("the TensorRT plugin is not built: run make native")
    library = find_library("tensorrt_plugin")
    assert library.details["cuda"] != "emulated"
    return library.path


@pytest.fixture(scope="session")
def register_library(unavailable: Unavailable) -> Path:
    """The library that registers the plugin where a program only opens libraries."""
    if search_library("tensorrt_register").chosen is None:
        unavailable("tensorrt_register is not built: run make native")
    return find_library("tensorrt_register").path
