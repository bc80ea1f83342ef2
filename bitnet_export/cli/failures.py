"""Whatever went wrong -> one clear message on stderr and the right exit code.

Tracebacks appear only under BITNET_EXPORT_DEBUG=1.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import click

from bitnet_export.cli.interrupts import signals_raise
from bitnet_export.errors import EXIT_INTERRUPTED, EXIT_STAGE_FAILED, BitnetExportError

DEBUG_VARIABLE = "BITNET_EXPORT_DEBUG"
ISSUES = "please report it, with the command and what it printed"


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Run a command; SystemExit with its exit code, whatever happens."""
    try:
        with signals_raise():
            yield
    except click.ClickException as e:
        e.show()
        raise SystemExit(e.exit_code) from e
    except (click.Abort, KeyboardInterrupt) as e:
        _show("interrupted; no output was written")
        raise SystemExit(EXIT_INTERRUPTED) from e
    except BitnetExportError as e:
        _show(f"error: {e}")
        raise SystemExit(e.exit_code) from e
    except BrokenPipeError as e:  # ... | head: the reader has gone, nothing to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_STAGE_FAILED) from e
    except (OSError, MemoryError) as e:
        _show(f"error: {describe_system_error(e)}")
        raise SystemExit(EXIT_STAGE_FAILED) from e
    except Exception as e:
        first = next(iter(str(e).splitlines()), "")
        _show(
            f"error: unexpected {type(e).__name__}: {first}\n"
            f"  -> this is a bug: {ISSUES}; {DEBUG_VARIABLE}=1 shows the traceback"
        )
        raise SystemExit(EXIT_STAGE_FAILED) from e


def describe_system_error(error: OSError | MemoryError) -> str:
    """What the system refused, and what to do about it."""
    if isinstance(error, MemoryError):
        return (
            "out of memory\n"
            "  -> close other programs, or use a machine with about four times the model's size"
        )
    where = f"{error.filename}: " if error.filename else ""
    what = os.strerror(error.errno).lower() if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{where}{what}\n"
            "  -> free some space or write elsewhere with --output; nothing half-written was kept"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{what}\n  -> check its permissions, or write elsewhere with --output"
    return f"{where}{what}"


def _show(message: str) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exc()
    click.echo(message, err=True)
