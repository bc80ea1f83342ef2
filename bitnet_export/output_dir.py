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
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise UsageError("is a file", where=where, fix="name a directory that is to be made")
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
    directory = directory.absolute()
    temporary = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}.partial")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise StageError(
            f"cannot be written: {error.strerror or error}", where=str(directory)
        ) from error
    try:
        yield temporary
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.{uuid4().hex[:8]}.old")
    replaced = directory.exists()
    if replaced:
        os.replace(directory, old)
    try:
        os.replace(temporary, directory)
    except OSError:
        if replaced:
            os.replace(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
