"""The output directory: written beside its place and renamed when whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from bitnet_export.errors import StageError, UsageError
from bitnet_export.manifest import MANIFEST


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Raise UsageError if writing ``directory`` would destroy something.

    Only a directory that an export wrote (it has a manifest.json) is ever replaced.
    """
    where = f"--output {directory}"
    if not os.path.lexists(directory):
        return
    if not directory.is_dir():
        raise UsageError("is a file", where=where, fix="name a directory that is to be made")
    try:
        if not any(directory.iterdir()):
            return
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", where=where) from error
    if not (directory / MANIFEST).is_file():
        raise UsageError(
            f"the directory is not empty and has no {MANIFEST}, so no export wrote it; it is not "
            "replaced, even with --force",
            where=where,
            fix="choose another directory",
        )
    if not overwrite:
        raise UsageError(
            "holds an earlier export",
            where=where,
            fix="pass --force to replace it, or choose another directory",
        )


@contextlib.contextmanager
def staged(directory: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside ``directory`` that takes its place when the block ends well.

    When the block fails, also with Ctrl-C, it is removed and ``directory`` stays as it was.
    Raises UsageError where ``directory`` may not be replaced, StageError where it cannot be made.
    """
    check_replaceable(directory, overwrite)
    directory = directory.resolve()  # of a link, what it points to is replaced
    temporary = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}.partial")
    absent = [p for p in directory.parents if not p.exists()]  # innermost first
    try:
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise _cannot_write(directory, error) from error
        yield temporary
        try:
            _swap(temporary, directory)
        except OSError as error:
            raise _cannot_write(directory, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in absent:  # those made here and still empty
            with contextlib.suppress(OSError):
                parent.rmdir()


def _cannot_write(directory: Path, error: OSError) -> StageError:
    return StageError(
        f"cannot be written: {error.strerror or error}",
        where=str(directory),
        fix="choose another directory with -o",
    )


def _swap(temporary: Path, directory: Path) -> None:
    """Rename ``temporary`` to ``directory``; what stood there is removed once that has worked."""
    old = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}.old")
    replaced = directory.exists()
    if replaced:
        os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except BaseException:
        if replaced:
            os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
