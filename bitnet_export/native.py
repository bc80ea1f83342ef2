"""Find the native libraries: which file would be loaded, from where, and why.

There are three: the TensorRT plugin, a small library that registers it where a program only opens
libraries, and ONNX Runtime's CPU operators. Each is looked for in the environment variable named
after it, in the package (a wheel has them there), and in the build tree of a source checkout, in
that order. A library is recognised by the build information compiled into it, so that a wrong or
foreign file is named before anything loads it. Loading is the targets' business, building that
of tools/build_native.py.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

from bitnet_export.errors import MissingRequirement, UsageError

PACKAGE = Path(__file__).resolve().parent
NATIVE_DIR = PACKAGE / "_native"
# Only a source checkout has it.
BUILD_DIR = PACKAGE.parent / "plugins" / "build"

# Compiled into every library: @(#)bitnet-export library=NAME version=1.2.3 key=value ...;
_BUILD_INFO = re.compile(rb"@\(#\)bitnet-export ([ -:<-~]*);")


@dataclass(frozen=True)
class LibrarySpec:
    """One library: its file name, its environment variable, and what it is for."""

    name: str
    file: str
    purpose: str

    @property
    def variable(self) -> str:
        """The environment variable that overrides every other place."""
        return f"BITNET_EXPORT_{self.name.upper()}"


LIBRARIES = {
    spec.name: spec
    for spec in (
        LibrarySpec("tensorrt_plugin", "libbitnet_tensorrt_plugin.so", "TernaryMatMul in TensorRT"),
        LibrarySpec(
            "tensorrt_register",
            "libbitnet_tensorrt_register.so",
            "registers the plugin in programs that only open libraries",
        ),
        LibrarySpec("ort_cpu", "libbitnet_ort_cpu.so", "TernaryMatMul in ONNX Runtime on a CPU"),
    )
}


@dataclass(frozen=True)
class NativeLibrary:
    """A library that can be loaded.

    path: absolute. source: where it was found, in words. version: of bitnet-export it was built
    from. sha256: of the file, hex. details: the rest of its build information.
    """

    path: Path
    source: str
    version: str
    sha256: str
    details: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A place that was looked at. library: what is usable there; else reason says why not."""

    source: str
    path: Path | None
    library: NativeLibrary | None
    reason: str


@dataclass(frozen=True)
class Search:
    """All places for one library, in order; the first usable one counts.

    Where the environment variable is set it is the only place: a wrong value is an error rather
    than a reason to load something else.
    """

    spec: LibrarySpec
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> NativeLibrary | None:
        """The library that would be loaded, None if there is none."""
        return next((c.library for c in self.candidates if c.library), None)

    def explain(self) -> str:
        """What would be loaded and why, one line a place; for people."""
        chosen = self.chosen
        if chosen:
            head = f"{self.spec.name}: {chosen.path} (version {chosen.version}, {chosen.source})"
        else:
            head = f"{self.spec.name}: not found"
        return "\n".join([head, *(f"  {c.source}: {c.reason}" for c in self.candidates)])


def find_library(name: str) -> NativeLibrary:
    """The library that would be loaded for name, one of LIBRARIES ("tensorrt_plugin", "ort_cpu").

    Raises UsageError for another name and MissingRequirement, saying where it was looked for and
    what to run, where there is none.
    """
    search = search_library(name)
    if search.chosen:
        return search.chosen
    raise MissingRequirement(
        f"the native library {name} ({search.spec.purpose}) was not found: "
        + "; ".join(f"{c.source}: {c.reason}" for c in search.candidates),
        fix=remedy(search),
    )


def search_library(name: str) -> Search:
    """Every place where name is looked for, with what is there. Raises UsageError."""
    if name not in LIBRARIES:
        raise UsageError(f"no native library {name!r}; there are {', '.join(LIBRARIES)}")
    spec = LIBRARIES[name]
    override = os.environ.get(spec.variable)
    if override:
        return Search(spec, (_inspect(spec, Path(override), f"variable {spec.variable}"),))
    candidates = [
        Candidate(f"variable {spec.variable}", None, None, "not set"),
        _inspect(spec, NATIVE_DIR / spec.file, "package"),
    ]
    if BUILD_DIR.parent.is_dir():
        candidates.append(_inspect(spec, _newest_build(spec), "build tree"))
    return Search(spec, tuple(candidates))


def read_build_info(path: Path) -> dict[str, str] | None:
    """The build information in a library, {"library": ..., "version": ...}; None without one."""
    match = _BUILD_INFO.search(path.read_bytes())
    if match is None:
        return None
    return dict(item.split("=", 1) for item in match[1].decode().split() if "=" in item)


def _newest_build(spec: LibrarySpec) -> Path:
    """The library built last; a path that does not exist where none was."""
    built = sorted(BUILD_DIR.glob(f"*/*/{spec.file}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else BUILD_DIR / "*" / "*" / spec.file


def _inspect(spec: LibrarySpec, path: Path, source: str) -> Candidate:
    """Look at one file without loading it."""
    if not path.is_file():
        return Candidate(source, path, None, f"no file {path}")
    try:
        info = read_build_info(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return Candidate(source, path, None, f"{path} cannot be read: {error.strerror}")
    if info is None:
        return Candidate(source, path, None, f"{path} is no bitnet-export library")
    if info.get("library") != spec.name:
        return Candidate(source, path, None, f"{path} is {info.get('library')}, not {spec.name}")
    details = {key: value for key, value in info.items() if key not in ("library", "version")}
    version = info.get("version", "unknown")
    library = NativeLibrary(path.resolve(), source, version, digest, details)
    return Candidate(source, path, library, f"version {version}, sha256 {digest[:12]}")


def remedy(search: Search) -> str:
    """What to do about a library that was not found, on this machine."""
    spec = search.spec
    if os.environ.get(spec.variable):
        return f"correct or unset {spec.variable}"
    if platform.system() != "Linux":
        return f"use Linux: there is no {spec.name} for {platform.system()}"
    if BUILD_DIR.parent.is_dir():
        return "build it with: python tools/build_native.py"
    return (
        "install a wheel that has it (pip install --force-reinstall bitnet-export), or set "
        f"{spec.variable} to its path"
    )
