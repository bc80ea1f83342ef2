"""Progress on stderr: a bar with the time left on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from bitnet_export.cli import interrupts
from bitnet_export.options import Progress, SilentProgress

# A log gets a line at most this often within one stage.
LOG_SECONDS = 15.0


class BarProgress:
    """One bar on a terminal, redrawn in place; finished stages leave one line each."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""
        self._started = 0.0

    def stage(self, name: str, detail: str = "") -> None:
        interrupts.check()
        self._finish()
        self._stage, self._started = name, time.monotonic()
        click.echo(f"{name}{f': {detail}' if detail else ''} ...", err=True)

    def update(self, done: int, total: int, detail: str = "") -> None:
        interrupts.check()
        if not total:
            self._write(f"  {detail}")
            return
        from tqdm import tqdm

        if self._bar is None or self._bar.total != total:
            self._close_bar()
            self._bar = tqdm(total=total, desc=self._stage, file=sys.stderr, leave=False)
        self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.refresh()

    def note(self, text: str) -> None:
        self._write(f"  {text}")

    def warn(self, text: str) -> None:
        self._write(click.style(f"warning: {text}", fg="yellow"))

    def close(self) -> None:
        self._finish()

    def _write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        click.echo(text, err=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _finish(self) -> None:
        self._close_bar()
        elapsed = time.monotonic() - self._started
        if self._stage and elapsed >= 1:
            click.echo(f"  {self._stage} took {elapsed:.1f} s", err=True)
        self._stage = ""


class LogProgress:
    """Lines for a log file or a CI job."""

    def __init__(self) -> None:
        self._stage = ""
        self._started = self._last = 0.0

    def stage(self, name: str, detail: str = "") -> None:
        interrupts.check()
        self._stage = name
        self._started = self._last = time.monotonic()
        click.echo(f"{name}{f': {detail}' if detail else ''}", err=True)

    def update(self, done: int, total: int, detail: str = "") -> None:
        interrupts.check()
        now = time.monotonic()
        if not total or (now - self._last < LOG_SECONDS and done < total):
            return
        self._last = now
        left = (now - self._started) / max(done, 1) * (total - done)
        eta = f", {left:.0f} s left" if done < total else ""
        click.echo(f"  {self._stage} {done}/{total} {detail}{eta}", err=True)

    def note(self, text: str) -> None:
        click.echo(f"  {text}", err=True)

    def warn(self, text: str) -> None:
        click.echo(f"warning: {text}", err=True)

    def close(self) -> None:
        pass


class QuietProgress(SilentProgress):
    """Warnings only."""

    def stage(self, name: str, detail: str = "") -> None:
        interrupts.check()

    def update(self, done: int, total: int, detail: str = "") -> None:
        interrupts.check()

    def warn(self, text: str) -> None:
        click.echo(f"warning: {text}", err=True)


def make_progress(quiet: bool) -> Progress:
    """The Progress that fits stderr."""
    if quiet:
        return QuietProgress()
    return BarProgress() if sys.stderr.isatty() else LogProgress()
