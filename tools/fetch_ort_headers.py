"""Fetch the ONNX Runtime headers that the CPU operator library is compiled with.

Debian's package ``libonnxruntime-dev`` carries them (MIT licence). This tool takes exactly the
1.21.0 package of Debian 13 (version and sha256 pinned below), through apt with lists of its own
so that the system's stay as they are, and unpacks the headers alone into
``plugins/.headers/onnxruntime/include``, which git ignores. Nothing is installed. Old headers are
wanted: the library runs on the ONNX Runtime of its headers and on every later one. Other systems
pass the folder of any ONNX Runtime 1.21 or 1.22 release to CMake as ONNXRUNTIME_INCLUDE_DIR.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# This checkout's package, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitnet_export.errors import BitnetExportError, MissingRequirement, StageError

REPOSITORY = Path(__file__).resolve().parents[1]
HEADERS = REPOSITORY / "plugins" / ".headers" / "onnxruntime"

PACKAGE = "libonnxruntime-dev"
VERSION = "1.21.0+dfsg-1"
SUITE = "trixie"
ARCHITECTURE = "amd64"  # headers are the same for all; one pin is enough
SHA256 = "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08"
INSIDE = Path("usr/include/onnxruntime")
NEEDED = ("onnxruntime_c_api.h", "onnxruntime_cxx_api.h", "onnxruntime_cxx_inline.h")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
STAMP = "SOURCE"
WHERE = "ONNX Runtime headers"
OTHERWISE = (
    f"pass --deb FILE with a copy of {PACKAGE}_{VERSION}_{ARCHITECTURE}.deb, or unpack an ONNX "
    "Runtime 1.21 release and build with cmake -DONNXRUNTIME_INCLUDE_DIR=DIR"
)


def stamp() -> str:
    """What the unpacked folder was made from; a changed pin makes it stale."""
    return f"{PACKAGE}={VERSION} sha256:{SHA256}\n"


def is_current(headers: Path = HEADERS) -> bool:
    """Whether the headers of the pinned package are already unpacked there."""
    marker = headers / STAMP
    return marker.is_file() and marker.read_text() == stamp()


def _run(command: list[str], folder: Path | None = None) -> str:
    """A command's output. Raises MissingRequirement where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    except FileNotFoundError:
        raise MissingRequirement(f"no {command[0]} here", where=WHERE, fix=OTHERWISE) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MissingRequirement(f"{command[0]} failed: {reason}", where=WHERE, fix=OTHERWISE)
    return done.stdout


def mirror() -> str:
    """The address of the Debian archive this system installs from."""
    listed = _run(["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian"])
    addresses = [line for line in dict.fromkeys(listed.split()) if "security" not in line]
    if not addresses:
        raise MissingRequirement("apt knows no Debian archive", where=WHERE, fix=OTHERWISE)
    return addresses[0]


def download(folder: Path) -> Path:
    """The package, fetched by apt into folder. Raises MissingRequirement where apt cannot."""
    source = folder / "sources.list"
    source.write_text(f"deb [signed-by={KEYRING}] {mirror()} {SUITE} main\n")
    for name in ("lists/partial", "archives/partial", "deb"):
        (folder / name).mkdir(parents=True)
    settings = {
        "Dir::Etc::SourceList": source,
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": folder / "lists",
        "Dir::Cache": folder,
        "APT::Architecture": ARCHITECTURE,
        "APT::Architectures": ARCHITECTURE,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    _run([*apt, "update"])
    _run([*apt, "download", f"{PACKAGE}={VERSION}"], folder / "deb")
    return next((folder / "deb").glob("*.deb"))


def check(package: Path) -> None:
    """Raise StageError unless package is, byte for byte, the one this tool was written for."""
    found = hashlib.sha256(package.read_bytes()).hexdigest()
    if found != SHA256:
        raise StageError(
            f"{package.name} has sha256 {found}, expected {SHA256}",
            where=WHERE,
            fix="do not use this file; fetch the package again",
        )


def unpack(package: Path, headers: Path, folder: Path) -> None:
    """Unpack the headers of a checked package into headers/include, whole or not at all."""
    _run(["dpkg-deb", "--extract", str(package), str(folder / "files")])
    fresh = headers.with_name(headers.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folder / "files" / INSIDE, fresh / "include")
    missing = [name for name in NEEDED if not (fresh / "include" / name).is_file()]
    if missing:
        raise StageError(f"the package has no {', '.join(missing)}", where=package.name)
    (fresh / STAMP).write_text(stamp())
    shutil.rmtree(headers, ignore_errors=True)
    fresh.rename(headers)


def fetch(*, package: Path | None = None, headers: Path = HEADERS, force: bool = False) -> Path:
    """The include folder of the pinned headers, fetched if need be.

    package: a local copy to use instead of the archive. Raises MissingRequirement (no apt, no
    network) or StageError (not the pinned file).
    """
    if is_current(headers) and not force:
        return headers / "include"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = package or download(folder)
        if not source.is_file():
            raise MissingRequirement("no such file", where=str(source), fix=OTHERWISE)
        check(source)
        unpack(source, headers, folder)
    return headers / "include"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deb", type=Path, help=f"a local copy of {PACKAGE} {VERSION}")
    parser.add_argument("--force", action="store_true", help="fetch again even if up to date")
    options = parser.parse_args(argv)
    try:
        include = fetch(package=options.deb, force=options.force)
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"ONNX Runtime headers ({PACKAGE} {VERSION}): {include}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
