"""What the processor can do at most, and how close a cell comes to it.

The program cpu_limits of the native build measures: multiply-accumulates in int8 (the inner step
of the best instruction path) and in float32, and reading from memory, on a number of threads.
"""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bitnet_export.errors import MissingRequirement
from bitnet_export.native import BUILD_DIR
from cpu_tools.contenders import Contender
from cpu_tools.timing import Cell, random_trits


@dataclass(frozen=True)
class Limits:
    """Of `threads` threads together: 10^9 multiply-accumulates and bytes a second."""

    path: str
    threads: int
    int8_gmac: float
    fp32_gmac: float
    read_gb: float

    def microseconds(self, cell: Cell, contender: Contender) -> float | None:
        """The least time the cell could take: its products or, cold, reading its weights. None
        where cpu_limits measures nothing: on the portable path."""
        peak = self.fp32_gmac if contender.peak == "fp32" else self.int8_gmac
        if not peak:
            return None
        products = cell.M * cell.K * cell.N / (peak * 1e3)
        if not cell.cold:
            return products
        read = contender.weight_bytes(random_trits(cell.K, cell.N)) / (self.read_gb * 1e3)
        return max(products, read)


def measure_limits(threads: int) -> Limits:
    """What cpu_limits prints. Raises MissingRequirement without it."""
    program = BUILD_DIR / "cpu" / "tests" / "cpu" / "cpu_limits"
    if not program.is_file():
        raise MissingRequirement(
            f"no {program.name} in the build tree", fix="run: python tools/build_native.py"
        )
    done = subprocess.run([str(program), str(threads)], capture_output=True, text=True, check=True)
    return Limits(**json.loads(done.stdout))


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
