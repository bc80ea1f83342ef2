"""docs/cli.md is what the commands say."""

import subprocess
import sys

from bitnet_export.cli import COMMANDS
from tests.cli.conftest import ROOT


def test_cli_page_is_current():
    tool = ROOT / "tools" / "make_cli_docs.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_cli_page_has_every_command():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"\n## {name}\n" in page
    assert "--max-quality-loss" in page
