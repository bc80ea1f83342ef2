"""Seeds torch before every test module, fixture and test, so that none depends on which ran before.

BITNET_TEST_SEED=N shifts all of them: a tolerance that holds by luck shows itself under another N.
"""

from __future__ import annotations

import os
import zlib

import pytest

SHIFT = int(os.environ.get("BITNET_TEST_SEED", "0"))


def _seed(name: str) -> None:
    import torch

    torch.manual_seed(zlib.crc32(name.encode()) + SHIFT)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Inputs made when a module is imported."""
    if isinstance(collector, pytest.Module):
        _seed(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    """Models and inputs made in fixtures of any scope."""
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """What the test itself draws."""
    _seed(item.nodeid)
