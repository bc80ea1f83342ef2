"""Fetch the TensorRT headers that the plugin is compiled with, where no TensorRT SDK is installed.

NVIDIA publishes its headers under Apache-2.0, and the ``kernel-lens`` wheel on PyPI carries those
of TensorRT 10.14. This tool takes exactly that wheel (version and sha256 pinned below), checks it,
and unpacks the headers alone into ``plugins/.headers/tensorrt/include``, which git ignores.
Nothing of the wheel is installed or run. Headers are all the plugin needs: it links no TensorRT
library. Not here: finding an installed SDK (plugins/cmake/TensorRTHeaders.cmake).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# This checkout's package, whichever is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitnet_export.errors import BitnetExportError, MissingRequirement, StageError

REPOSITORY = Path(__file__).resolve().parents[1]
HEADERS = REPOSITORY / "plugins" / ".headers" / "tensorrt"

PACKAGE = "kernel-lens"
VERSION = "2.0.1"
SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"
INSIDE = "kernel_lens/include/tensorrt/"
NEEDED = ("NvInfer.h", "NvInferRuntime.h", "NvInferVersion.h")
LICENSE_LINE = "SPDX-License-Identifier: Apache-2.0"
STAMP = "SOURCE"


def stamp() -> str:
    """What the unpacked folder was made from; a changed pin makes it stale."""
    return f"{PACKAGE}=={VERSION} sha256:{SHA256}\n"


def is_current(headers: Path = HEADERS) -> bool:
    """Whether the headers of the pinned wheel are already unpacked there."""
    marker = headers / STAMP
    return marker.is_file() and marker.read_text() == stamp()


def download(folder: Path) -> Path:
    """The wheel, fetched by pip into folder. Raises MissingRequirement where pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    command.append(f"{PACKAGE}=={VERSION}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise MissingRequirement(
            f"pip could not download {PACKAGE}=={VERSION}: {reason}",
            where="TensorRT headers",
            fix="connect to a package index, pass --wheel FILE with a copy of it, or install a "
            "TensorRT SDK and build with TENSORRT_ROOT=DIR",
        )
    return wheels[0]


def check(wheel: Path) -> None:
    """Raise StageError unless wheel is, byte for byte, the one this tool was written for."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise StageError(
            f"{wheel.name} has sha256 {found}, expected {SHA256}",
            where="TensorRT headers",
            fix="do not use this file; fetch the wheel again from the package index",
        )


def unpack(wheel: Path, headers: Path) -> list[Path]:
    """Unpack the headers of a checked wheel into headers/include; what was written.

    The folder is made beside its place and renamed, so that it is whole or not there.
    """
    fresh = headers.with_name(headers.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    include = fresh / "include"
    include.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.startswith(INSIDE) and n.endswith(".h")]
        for name in names:
            text = archive.read(name)
            if LICENSE_LINE in text.decode()[:2000]:  # one header is not NVIDIA's: leave it
                (include / Path(name).name).write_bytes(text)
    missing = [name for name in NEEDED if not (include / name).is_file()]
    if missing:
        raise StageError(f"the wheel has no {', '.join(missing)} under {INSIDE}", where=wheel.name)
    (fresh / STAMP).write_text(stamp())
    shutil.rmtree(headers, ignore_errors=True)
    fresh.rename(headers)
    return sorted((headers / "include").glob("*.h"))


def fetch(*, wheel: Path | None = None, headers: Path = HEADERS, force: bool = False) -> Path:
    """The include folder of the pinned headers, fetched if need be.

    wheel: a local copy to use instead of the package index. Raises MissingRequirement (no
    network) or StageError (not the pinned file).
    """
    if is_current(headers) and not force:
        return headers / "include"
    with tempfile.TemporaryDirectory() as folder:
        source = wheel or download(Path(folder))
        if not source.is_file():
            raise MissingRequirement(
                "no such file", where=str(source), fix="pass the path of the wheel"
            )
        check(source)
        unpack(source, headers)
    return headers / "include"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help=f"a local copy of {PACKAGE} {VERSION}")
    parser.add_argument("--force", action="store_true", help="fetch again even if up to date")
    options = parser.parse_args(argv)
    try:
        include = fetch(wheel=options.wheel, force=options.force)
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"TensorRT headers ({PACKAGE} {VERSION}): {include}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
