"""Resident memory an ONNX model costs: a fresh process loads it, runs it and says what it gained.

Run as ``python -m bitnet_export.verify.memory MODEL FEEDS.npz THREADS`` by measure_memory; a
process that has run another model would reuse its freed memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from bitnet_export.verify.feeds import write_arrays

TIMEOUT_SECONDS = 300


def measure_memory(path: Path | str, feeds: dict[str, np.ndarray], threads: int) -> int | None:
    """Bytes gained by loading and running ``path``; None where the system does not tell."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "feeds.npz"
        write_arrays(feeds, file)
        command = [sys.executable, "-m", __name__, os.fspath(path), str(file), str(threads)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
            )
            return int(done.stdout.split()[-1])
        except (subprocess.SubprocessError, OSError, ValueError, IndexError):
            return None


def resident_bytes() -> int | None:
    """Resident memory of this process; None where /proc is absent."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _main() -> None:
    from bitnet_export.targets.session import open_session
    from bitnet_export.verify.runners import run_session

    path, feeds_file, threads = sys.argv[1:4]
    with np.load(feeds_file) as archive:
        feeds = dict(archive)
    import onnxruntime  # noqa: F401 -- the library itself is not the model's cost

    before = resident_bytes()
    session = open_session(path, threads=int(threads))
    run_session(session, feeds)
    after = resident_bytes()
    if before is not None and after is not None:
        print(after - before)


if __name__ == "__main__":
    _main()
