"""What went wrong, where, how to mend it, and the exit code that says which kind it was.

Every error a user can cause is one of these classes; the command line prints it without a
traceback and exits with its code. Anything else that escapes is a bug and keeps its traceback.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_GATE_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING_REQUIREMENT = 3
EXIT_STAGE_FAILED = 4
EXIT_INTERRUPTED = 130


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line: their own texts run to pages.

    The innermost cause speaks; a wrapper around it only says that something failed.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class BitnetExportError(Exception):
    """A failure with its place and its remedy.

    what: the fact, one sentence ("K=300 is not a multiple of 4").
    where: the layer, file or option it concerns (printed in front), or "".
    fix: what to do about it, as an imperative, or "".
    """

    exit_code = EXIT_STAGE_FAILED

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  -> {self.fix}" if self.fix else text


class UsageError(BitnetExportError):
    """The command or call itself is wrong: an unknown value, a missing option."""

    exit_code = EXIT_USAGE


class InputError(UsageError):
    """The user's model, data or option value cannot be used as it is."""


class MissingRequirement(BitnetExportError):
    """The target needs something this machine lacks (a library, a GPU, a compiler)."""

    exit_code = EXIT_MISSING_REQUIREMENT


class StageError(BitnetExportError):
    """A stage of the pipeline failed on input that was accepted."""

    exit_code = EXIT_STAGE_FAILED


class GateFailed(BitnetExportError):
    """Everything ran; a parity, quality, size or speed gate said no."""

    exit_code = EXIT_GATE_FAILED
