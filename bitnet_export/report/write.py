"""The four report files, written into a directory whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

from bitnet_export.errors import StageError
from bitnet_export.report.html import render_html
from bitnet_export.report.json_io import to_json
from bitnet_export.report.junit import render_junit
from bitnet_export.report.markdown import render_markdown
from bitnet_export.report.schema import Report


def render_all(report: Report) -> dict[str, str]:
    """File name -> text, for report.json, report.html, report.md and junit.xml."""
    return {
        "report.html": render_html(report),
        "report.md": render_markdown(report),
        "junit.xml": render_junit(report),
        "report.json": to_json(report),
    }


def write_report(report: Report, directory: Path | str) -> list[Path]:
    """Write the four files; existing ones are replaced. Raises StageError where that fails.

    All are written beside their places first and then renamed, report.json last: where it is new,
    the others are, too.
    """
    directory = Path(directory)
    texts = render_all(report)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return _replace_all(directory, texts)
    except OSError as error:
        raise StageError(
            f"cannot write the report ({error.strerror or error})",
            where=str(directory),
            fix="free some space or choose another directory with -o",
        ) from error


def _replace_all(directory: Path, texts: Mapping[str, str]) -> list[Path]:
    suffix = uuid4().hex[:8]
    temporary = {name: directory / f".{name}.{suffix}" for name in texts}
    try:
        for name, text in texts.items():
            temporary[name].write_text(text, encoding="utf-8")
        for name, path in temporary.items():
            os.replace(path, directory / name)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    return [directory / name for name in texts]
