"""Report what the compiler made of the CPU kernels, and predict them on processors not at hand.

    python tools/cpu_report.py              a table: each path's main loops on each processor
    python tools/cpu_report.py --markdown   write it into docs/native-cpu.md

Needs objdump (binutils) and llvm-mca 16 or newer (Debian: llvm-19), and for the ARM rows
the cross-compiled tree that tests/native/test_ort_cpu_aarch64.py builds. llvm-mca simulates a
processor's ports and latencies, with every load in the L1 cache: a bound from above, not a
measurement, and only as good as LLVM's model of that processor.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cpu_tools.loops import Loop, disassemble, innermost_loops

from bitnet_export.errors import BitnetExportError, MissingRequirement, StageError
from bitnet_export.native import BUILD_DIR

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "native-cpu.md"
MARKS = ("<!-- cpu_report: begin -->", "<!-- cpu_report: end -->")
MCA = ("llvm-mca", "llvm-mca-19", "llvm-mca-18", "llvm-mca-17", "llvm-mca-16")
ITERATIONS = 500


@dataclass(frozen=True)
class Processor:
    """LLVM's name, and products a cycle at most: the ports that multiply."""

    name: str
    mcpu: str
    peak: int


@dataclass(frozen=True)
class CpuPath:
    """An instruction path: its object file, the instruction and register that multiply."""

    name: str
    object_file: Path
    product: str
    register: str
    processors: tuple[Processor, ...]
    objdump: str = "objdump"
    triple: str = "x86_64"


def object_file(tree: str, path: str) -> Path:
    folder = BUILD_DIR / tree / "cpu" / "CMakeFiles" / f"bitnet_cpu_{path}.dir"
    return folder / f"kernels_{path}.cpp.o"


PATHS = (
    CpuPath("avx512vnni", object_file("cpu", "avx512vnni"), "vpdpbusd", "%zmm",
          (Processor("Ice Lake", "icelake-server", 2),)),
    CpuPath("avxvnni", object_file("cpu", "avxvnni"), "vpdpbusd", "%ymm",
          (Processor("Alder Lake P", "alderlake", 2),)),
    CpuPath("avx2", object_file("cpu", "avx2"), "vpmaddubsw", "%ymm",
          (Processor("Zen 3", "znver3", 2), Processor("Skylake", "skylake", 2))),
    CpuPath("neon", object_file("aarch64", "neon"), "sdot", "v",
          (Processor("Neoverse N1", "neoverse-n1", 2), Processor("Neoverse V1", "neoverse-v1", 4)),
          "aarch64-linux-gnu-objdump", "aarch64"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    path: str
    loop: str
    products: int
    instructions: int
    processor: Processor
    cycles: float

    @property
    def per_cycle(self) -> float:
        return self.products / self.cycles


def find_mca() -> str:
    for name in MCA:
        if found := shutil.which(name):
            version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            number = re.search(r"LLVM version (\d+)", version)
            if number and int(number[1]) >= 16:
                return found
    raise MissingRequirement("there is no llvm-mca 16 or newer", fix="apt-get install llvm-19")


def cycles(mca: str, path: CpuPath, processor: Processor, loop: Loop) -> float:
    """Of one turn, in the steady state. Raises StageError where the model lacks something."""
    command = [
        mca,
        f"-mtriple={path.triple}",
        f"-mcpu={processor.mcpu}",
        f"-iterations={ITERATIONS}",
    ]
    done = subprocess.run(command, input=loop.assembly(), capture_output=True, text=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    if not total:
        raise StageError(f"llvm-mca failed on a loop of {path.name}: {done.stderr.strip()[:300]}")
    return int(total[1]) / ITERATIONS


def main_loops(path: CpuPath) -> dict[str, Loop]:
    """The loop with the most products of each kind there is: a tile of several rows, one that
    unpacks on its way (it masks codes and stores them), one row (it masks and does not store)."""
    product = path.product, path.register
    kinds: dict[str, Loop] = {}
    for loop in innermost_loops(disassemble(path.object_file, path.objdump)):
        if loop.count(*product) < 8:
            continue
        masks = any("and" in i.name for i in loop.body)
        stores = any(is_store(path, i.name, i.arguments) for i in loop.body)
        kind = "several rows" if not masks else "several rows, unpacking" if stores else "one row"
        best = kinds.get(kind)
        if best is None or loop.count(*product) > best.count(*product):
            kinds[kind] = loop
    return dict(sorted(kinds.items()))


def is_store(path: CpuPath, name: str, arguments: str) -> bool:
    if path.triple == "aarch64":
        return name.startswith("st")
    return name.startswith("vmov") and arguments.endswith(")")


def rows(mca: str) -> Iterator[Row]:
    for path in PATHS:
        if not path.object_file.is_file():
            print(f"{path.name}: not built ({path.object_file} is missing)", file=sys.stderr)
            continue
        for kind, loop in main_loops(path).items():
            for processor in path.processors:
                yield Row(
                    path.name,
                    kind,
                    loop.count(path.product, path.register),
                    len(loop.body),
                    processor,
                    cycles(mca, path, processor, loop),
                )


def table(found: list[Row]) -> str:
    lines = [
        "| path | loop | products | instructions | processor | cycles | products a cycle |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{r.path}` | {r.loop} | {r.products} | {r.instructions} | {r.processor.name} "
        f"| {r.cycles:.1f} | {r.per_cycle:.2f} of {r.processor.peak} |"
        for r in found
    ]
    return "\n".join(lines)


def write(text: str) -> None:
    document = DOCUMENT.read_text()
    begin, end = (document.index(mark) for mark in MARKS)
    DOCUMENT.write_text(document[: begin + len(MARKS[0])] + f"\n\n{text}\n\n" + document[end:])


def main() -> int:
    parser = argparse.ArgumentParser(description="What the CPU kernels' loops cost, predicted.")
    parser.add_argument("--markdown", action="store_true", help="write docs/native-cpu.md")
    arguments = parser.parse_args()
    try:
        text = table(list(rows(find_mca())))
    except BitnetExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if arguments.markdown:
        write(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
