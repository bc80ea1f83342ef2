"""The steps of a check, each with a time budget of its own: what ran, how it ended, how long.

A step ends as passed, failed, or not run with the reason; not run never counts as passed. A
mistake in one step is that step's failure and does not take the others' results along. What the
steps do is gpu_check.py's business.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
EXIT_OK, EXIT_FAILED, EXIT_MISSING = 0, 1, 3
SHORTEST = 3.0  # seconds that are worth starting a step for


class NotRun(Exception):
    """A step could not be done here, for the reason given. kept: what else to record of it;
    optional: that it did not run is no shortcoming."""

    def __init__(
        self, why: str, kept: dict[str, Any] | None = None, *, optional: bool = False
    ) -> None:
        super().__init__(why)
        self.optional, self.kept = optional, kept or {}


class Failed(Exception):
    """A step was done and found something wrong. kept: what else to record of it."""

    def __init__(self, why: str, kept: dict[str, Any] | None = None) -> None:
        super().__init__(why)
        self.kept = kept or {}


class Budget:
    """Seconds for all steps together, counted from its making."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self.seconds = seconds

    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(0.0, self._end - self._clock())


@dataclass
class Steps:
    """The steps done so far. changed: called with ``about`` and all results after each step."""

    budget: Budget
    say: Callable[[str], None]
    changed: Callable[[dict[str, Any]], None]

    def __post_init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.results: dict[str, Any] = {}

    def do(self, name: str, seconds: float, action: Callable[[float], dict[str, Any]]) -> bool:
        """action(seconds it may take) -> what to record of the step; True where it passed.

        It raises NotRun or Failed to end otherwise; any other exception is a failure, too.
        """
        limit, started = min(seconds, self.budget.left()), time.monotonic()
        try:
            if limit < SHORTEST:
                raise NotRun(f"no time left of the {self.budget.seconds:.0f} s for all steps")
            entry = {"status": PASSED, **action(limit)}
        except NotRun as error:
            entry = {"status": NOT_RUN, "why": str(error), "optional": error.optional, **error.kept}
        except Failed as error:
            entry = {"status": FAILED, "why": str(error), **error.kept}
        except Exception as error:  # a mistake here must not lose what the other steps found
            why = f"{type(error).__name__}: {error}"
            entry = {"status": FAILED, "why": why, "traceback": traceback.format_exc()[-4000:]}
        entry["seconds"] = round(time.monotonic() - started, 1)
        self.results[name] = entry
        self.say(line(name, entry))
        self.changed({**self.about, "steps": self.results})
        return bool(entry["status"] == PASSED)

    def exit_code(self) -> int:
        """0: nothing failed and all that is asked for ran; 1: something failed; 3: something
        could not run here."""
        if any(entry["status"] == FAILED for entry in self.results.values()):
            return EXIT_FAILED
        missing = [e for e in self.results.values() if e["status"] == NOT_RUN]
        return EXIT_MISSING if any(not e["optional"] for e in missing) else EXIT_OK

    def summary(self) -> list[str]:
        """One line a step, and one that counts them."""
        statuses = [entry["status"] for entry in self.results.values()]
        counts = ", ".join(f"{statuses.count(s)} {s}" for s in (PASSED, FAILED, NOT_RUN))
        spent = sum(entry["seconds"] for entry in self.results.values())
        lines = [line(name, entry) for name, entry in self.results.items()]
        return [*lines, f"{counts}; {spent:.0f} s of {self.budget.seconds:.0f}"]


def line(name: str, entry: dict[str, Any]) -> str:
    """ "memcheck: not run: compute-sanitizer is not installed (0.0 s)"."""
    why = f": {entry['why']}" if entry.get("why") else ""
    return f"{name}: {entry['status']}{why} ({entry['seconds']:.1f} s)"


def run_program(
    command: list[str], seconds: float, folder: Path | None = None
) -> tuple[int | None, str]:
    """Run a program with all it starts -> (exit status, its output); status None: it took longer
    and was ended."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        start_new_session=True, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        # The whole session: compute-sanitizer's target would go on and keep the card busy.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return None, output
