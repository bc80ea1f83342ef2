"""manifest.json: what an output directory holds, checked before anything in it is loaded.

It names every file with its hash, the versions it was made with and for, and the inputs, so that
a truncated copy, a mixed-up directory or a runtime that is too old is refused with a message
that says which, instead of failing somewhere inside a runtime.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitnet_export import op
from bitnet_export.errors import InputError, MissingRequirement, first_line

MANIFEST = "manifest.json"
MODEL = "model.onnx"
ENGINE = "model.engine"
INTERMEDIATE = "intermediate"
BASELINE = f"{INTERMEDIATE}/baseline.onnx"
TERNARY = f"{INTERMEDIATE}/ternary.onnx"
SCHEMA_VERSION = 1


@dataclass
class Manifest:
    """The record of one output directory.

    files: relative path -> {"sha256", "bytes"}. inputs: name -> {"dtype", "shape"}, named axes as
    strings. opt_sizes: the axis sizes the kernels were chosen for. runtime: the versions that
    made it. requires: package -> the oldest version that runs it. environment: GPU and profile of
    an engine, which must match exactly.
    """

    name: str
    target: str
    dtype: str = "fp32"
    op_version: int = op.OP_VERSION
    schema_version: int = SCHEMA_VERSION
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    axis_limits: dict[str, int] = field(default_factory=dict)
    opt_sizes: dict[str, int] = field(default_factory=dict)
    parity_kinds: list[str] = field(default_factory=list)
    runtime: dict[str, str] = field(default_factory=dict)
    requires: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """{"ids": {0: "batch"}} as the rest of the package takes it."""
        return {
            name: {i: d for i, d in enumerate(entry["shape"]) if isinstance(d, str)}
            for name, entry in self.inputs.items()
        }


def sha256_of(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record_files(directory: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The ``files`` entry for those of ``names`` that exist."""
    return {
        name: {"sha256": sha256_of(directory / name), "bytes": (directory / name).stat().st_size}
        for name in names
        if (directory / name).is_file()
    }


def write_manifest(manifest: Manifest, directory: Path) -> Path:
    """Write manifest.json whole or not at all."""
    path = directory / MANIFEST
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(asdict(manifest), indent=2) + "\n")
    os.replace(temporary, path)
    return path


def read_manifest(directory: Path) -> Manifest:
    """Read and check the form of manifest.json. Raises InputError where it is not ours."""
    path = Path(directory) / MANIFEST
    try:
        data = json.loads(path.read_text())
        _check_versions(data, path)
        manifest = Manifest(**data)
        _check_form(manifest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"holds no {MANIFEST}: not a directory bitnet-export wrote",
            where=str(directory),
            fix="give the output directory of an export",
        ) from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"is damaged: {first_line(error)}", where=str(path), fix="export the model again"
        ) from error
    return manifest


def _check_versions(data: dict[str, Any], path: Path) -> None:
    """First of all: a manifest of another version has other fields."""
    known = {"schema_version": SCHEMA_VERSION, "op_version": op.OP_VERSION}
    for name, version in known.items():
        if data[name] != version:
            raise InputError(
                f"has {name.replace('_', ' ')} {data[name]}, this bitnet-export knows {version}",
                where=str(path),
                fix="export the model again, or install the version that wrote it",
            )


def _check_form(manifest: Manifest) -> None:
    """Raise ValueError or an error of the lookups where a field has not the form it should."""
    for name, entry in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name!r} lies outside the directory")
        if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
            raise ValueError(f"the entry of {name!r} has no size or no hash")
    for name, entry in manifest.inputs.items():
        if not isinstance(entry["shape"], list) or not isinstance(entry["dtype"], str):
            raise ValueError(f"the input {name!r} has no shape or no dtype")
    if any(not isinstance(oldest, str) for oldest in manifest.requires.values()):
        raise ValueError("a requirement has no version")


def check_manifest(directory: Path, *, hashes: bool = True) -> Manifest:
    """Read the manifest and check that its main files are there, whole and unchanged, and that the
    installed packages are new enough. Raises InputError or MissingRequirement saying which differs.

    hashes: False compares sizes only, for a quick look at a large model.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    for name, entry in manifest.files.items():
        path = directory / name
        if not path.is_file():
            if name.startswith(f"{INTERMEDIATE}/"):
                continue  # may be deleted for deployment
            raise InputError(f"{name} is missing", where=str(directory), fix="copy it again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise InputError(
                f"has {size} bytes, the manifest says {entry['bytes']}: truncated or replaced",
                where=str(path),
                fix="copy the directory again",
            )
        if (
            hashes
            and not name.startswith(f"{INTERMEDIATE}/")
            and sha256_of(path) != entry["sha256"]
        ):
            raise InputError(
                "differs from the file the manifest was written for",
                where=str(path),
                fix="copy the directory again, or export anew",
            )
    for package, oldest in manifest.requires.items():
        _check_package(package, oldest, directory)
    return manifest


def _check_package(package: str, oldest: str, directory: Path) -> None:
    from importlib.metadata import PackageNotFoundError, version

    candidates = [package, f"{package}-gpu"] if package == "onnxruntime" else [package]
    installed = None
    for candidate in candidates:
        try:
            installed = version(candidate)
            break
        except PackageNotFoundError:
            continue
    if installed is None:
        raise MissingRequirement(
            f"needs {package} {oldest} or newer, which is not installed",
            where=str(directory),
            fix=f"pip install '{package}>={oldest}'",
        )
    if version_tuple(installed) < version_tuple(oldest):
        raise MissingRequirement(
            f"needs {package} {oldest} or newer, {installed} is installed",
            where=str(directory),
            fix=f"pip install -U '{package}>={oldest}'",
        )


def version_tuple(text: str) -> tuple[int, ...]:
    """ "1.28.0rc1" -> (1, 28, 0)."""
    parts = []
    for part in text.split("+")[0].split("."):
        digits = ""
        for character in part:
            if not character.isdigit():
                break
            digits += character
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)
