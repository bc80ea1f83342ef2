"""Build the wheel with its native libraries inside (``make wheel``).

The wheel is for one platform and any Python 3: the libraries are plain shared objects that no
Python API binds. Its tag is read off them, the newest glibc symbol version any of them needs, so
that pip refuses the wheel where they could not load. What is built and how is
tools/build_native.py's business; this tool only packs what lies in bitnet_export/_native.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

# This checkout's package, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitnet_export.errors import BitnetExportError, MissingRequirement, StageError
from bitnet_export.native import LIBRARIES, NATIVE_DIR, read_build_info

REPOSITORY = Path(__file__).resolve().parents[1]
_GLIBC = re.compile(rb"\bGLIBC_2\.(\d+)\b")
# The oldest glibc that a wheel tag of this form exists for (PEP 600).
OLDEST_GLIBC = 17


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / "dist", help="folder to write to")
    parser.add_argument(
        "--libraries",
        nargs="+",
        choices=list(LIBRARIES),
        default=list(LIBRARIES),
        help="the wheel must have these; default: all",
    )
    parser.add_argument(
        "--no-isolation", action="store_true", help="build with this environment's setuptools"
    )
    options = parser.parse_args(argv)
    try:
        paths = [native_file(name) for name in options.libraries]
        wheel = build(options.out, platform_tag(paths), isolated=not options.no_isolation)
        check(wheel, paths)
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB with {', '.join(options.libraries)}")
    return 0


def native_file(name: str) -> Path:
    """The library in the package folder. Raises MissingRequirement if it is not built."""
    path = NATIVE_DIR / LIBRARIES[name].file
    if not path.is_file():
        raise MissingRequirement(
            f"{path.relative_to(REPOSITORY)} is not built",
            where="wheel",
            fix="run python tools/build_native.py --release --require",
        )
    return path


def platform_tag(libraries: Iterable[Path]) -> str:
    """manylinux_2_X_ARCH for the newest glibc symbol version that any of the libraries needs."""
    newest = OLDEST_GLIBC
    for library in libraries:
        newest = max([newest, *(int(minor) for minor in _GLIBC.findall(library.read_bytes()))])
    return f"manylinux_2_{newest}_{platform.machine()}"


def build(out: Path, tag: str, *, isolated: bool) -> Path:
    """Build the wheel into out with that platform tag; its path. Raises StageError."""
    # setuptools packs whatever an earlier build left there, removed modules included.
    shutil.rmtree(REPOSITORY / "build" / "lib", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--wheel-dir", folder]
        command += [f"--config-settings=--build-option=--plat-name={tag}"]
        command += [] if isolated else ["--no-build-isolation"]
        done = subprocess.run(
            [*command, os.fspath(REPOSITORY)], capture_output=True, text=True, check=False
        )
        made = list(Path(folder).glob("*.whl"))
        if done.returncode or len(made) != 1:
            raise StageError(f"pip wheel failed:\n{done.stdout}{done.stderr}", where="wheel")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(made[0], out / made[0].name))


def check(wheel: Path, libraries: Iterable[Path]) -> None:
    """Raise StageError unless the wheel has exactly these libraries, byte for byte, of its own
    version, and no other compiled file."""
    wanted = {f"bitnet_export/_native/{path.name}": path for path in libraries}
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if "/_native/" in name or ".so" in name}
        if found != set(wanted):
            raise StageError(f"holds {sorted(found)}, expected {sorted(wanted)}", where=wheel.name)
        for name, path in wanted.items():
            if archive.read(name) != path.read_bytes():
                raise StageError(f"{name} is not the library that was built", where=wheel.name)
    version = wheel.name.split("-")[1]
    for path in wanted.values():
        info = read_build_info(path) or {}
        if info.get("version") != version:
            raise StageError(
                f"{path.name} was built from version {info.get('version')}, the wheel is {version}",
                where=wheel.name,
                fix="run python tools/build_native.py --release --require",
            )


if __name__ == "__main__":
    sys.exit(main())
