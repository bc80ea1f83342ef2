"""Report what the compiler made of the CUDA kernels, and predict their times on Turing cards.

    python tools/kernel_report.py              resources, instruction mix, predictions
    python tools/kernel_report.py --check      exit 1 on a spill, on more than 64 registers in a
                                               GEMV, on a tile that reads its scales anew for
                                               every output, or on a main loop that lost its
                                               shape (CI); exit 3 where nvdisasm is missing
    python tools/kernel_report.py --markdown   write the tables into docs/performance.md

Needs nvcc. The instruction mix needs nvdisasm: it comes with the CUDA toolkit, or with
`pip install nvidia-cuda-nvdisasm`. Nothing runs on a GPU; times are predictions by
kernel_model.py and are marked so.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gpu_tools.bench import ROWS, SHAPES
from kernel_model import CARDS, TILINGS, Card, Prediction, candidates, predict

REPOSITORY = Path(__file__).resolve().parents[1]
KERNELS = REPOSITORY / "plugins" / "kernels"
DOCUMENT = REPOSITORY / "docs" / "performance.md"
MARKS = ("<!-- kernel_report: begin -->", "<!-- kernel_report: end -->")
EXIT_OK, EXIT_FAILED, EXIT_MISSING = 0, 1, 3
MAX_GEMV_REGISTERS = 64
# 4-byte loads in a tile kernel: scales, biases and sums of rows and columns. One for each output
# would be 64 and more.
MAX_TILE_FACTORS, FACTOR_LOAD = 48, re.compile(r"\sLDG\.E\.SYS\s")
FACTOR_KERNELS = ("TileDp4a", "TileHmma", "TileImma")  # others read activations so, too
GOOD = f"no spills, GEMVs within {MAX_GEMV_REGISTERS} registers, main loops as designed"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
MATH = re.compile(r"IDP\.|IMMA|HMMA|FFMA|LDG\.E\.NA")
# The instruction that multiplies in each fast kernel's main loop.
PRODUCTS = {"GemvDp4a": "IDP.4A.U8.S8", "TileDp4a": "IDP.4A.U8.S8", "TileHmma": "HMMA.1688",
            "TileImma": "IMMA.8816.U8.S8", "GemvFloat": "FFMA", "TileFloat": "FFMA"}  # fmt: skip

NVDISASM_HINT = (
    "nvdisasm not found: no instruction mix, no predictions and no check of main loops. It comes "
    "with the CUDA toolkit, or with: pip install nvidia-cuda-nvdisasm"
)


@dataclass
class Kernel:
    """One compiled kernel. loop: instruction counts of its main loop, empty without nvdisasm;
    factor_loads: its 4-byte loads, 0 without."""

    name: str
    file: str
    registers: int = 0
    spill_bytes: int = 0
    loop: Counter[str] = field(default_factory=Counter)
    factor_loads: int = 0


def readable(symbol: str) -> str:
    """A mangled kernel name -> e.g. GemvDp4aKernel<fp16,1,0>; other symbols stay as they are."""
    match = re.search(r"\d+([A-Z]\w*?Kernel)I(.*)EEv", symbol)
    if not match:
        return symbol
    arguments = match.group(2).replace("6__half", "h,").replace("NS0_6ConfigI", "")
    tokens = re.findall(r"L[ib](\d+)E|(h,)|(f)(?=[fhiLENI]|$)|(i)(?=[EL]|$)", arguments)
    words = ["fp16" if h else "fp32" if f else "int32" if i else n for n, h, f, i in tokens]
    return f"{match.group(1)}<{','.join(words)}>"


def parse_ptxas(log: str, file: str) -> Iterator[Kernel]:
    """The output of nvcc -Xptxas -v -> kernels with registers and spilled bytes."""
    kernel = None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = Kernel(readable(entry.group(1)), file)
        elif kernel and (spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill", line)):
            kernel.spill_bytes = int(spill.group(1)) + int(spill.group(2))
        elif kernel and (used := re.search(r"Used (\d+) registers", line)):
            kernel.registers = int(used.group(1))
            yield kernel
            kernel = None


def parse_sass(sass: str) -> Iterator[tuple[str, Counter[str], int]]:
    """nvdisasm -c output -> (kernel name, instruction counts of its main loop, 4-byte loads)."""
    for section in re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]:
        labels: dict[str, int] = {}
        code: list[tuple[str, str]] = []
        for line in section.splitlines():
            if label := re.match(r"(\.L_\w+):", line):
                labels[label.group(1)] = len(code)
            elif found := INSTRUCTION.search(line):
                code.append((found.group(1), found.group(2)))
        name = readable(section.split(":", 1)[0].strip())
        yield name, main_loop(code, labels), len(FACTOR_LOAD.findall(section))


def main_loop(code: list[tuple[str, str]], labels: dict[str, int]) -> Counter[str]:
    """The innermost loop with the most multiplications: the one that walks the weights."""
    loops = []
    for end, (mnemonic, operands) in enumerate(code):
        target = re.search(r"`\((\.L_\w+)\)", operands)
        if mnemonic.startswith("BRA") and target and labels.get(target.group(1), end) < end:
            loops.append((labels[target.group(1)], end))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    mixes = [Counter(m for m, _ in code[a : b + 1]) for a, b in inner]

    def weight(mix: Counter[str]) -> tuple[bool, int]:
        # A division's Newton steps are multiplications too, but touch no weights.
        divides = any(name.startswith("MUFU") for name in mix)
        return (not divides, sum(count for name, count in mix.items() if MATH.match(name)))

    return max(mixes, key=weight, default=Counter())


def find_nvdisasm() -> str | None:
    """On PATH, beside nvcc, or in the PyPI package."""
    if found := shutil.which("nvdisasm"):
        return found
    site = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [*site.glob("cu*/bin/nvdisasm"), *site.glob("cuda_nvdisasm/bin/nvdisasm")]
    places.append(Path("/usr/local/cuda/bin/nvdisasm"))
    return next((str(p) for p in places if p.is_file()), None)


def compile_kernels(nvcc: str, nvdisasm: str | None) -> list[Kernel]:
    """Compile every kernel file for sm_75. Raises CalledProcessError where nvcc fails."""
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted(KERNELS.glob("*.cu")):
            cubin = Path(folder) / f"{source.stem}.cubin"
            command = [nvcc, "-std=c++17", "-O3", "-arch=sm_75", "-Xptxas", "-v", "-cubin"]
            made = subprocess.run(
                [*command, f"-I{KERNELS}", "-o", str(cubin), str(source)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = list(parse_ptxas(made.stderr + made.stdout, source.name))
            if nvdisasm and found:
                listing = [nvdisasm, "-c", str(cubin)]
                sass = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
                read = {name: (loop, loads) for name, loop, loads in parse_sass(sass)}
                for kernel in found:
                    kernel.loop, kernel.factor_loads = read.get(kernel.name, (Counter(), 0))
            kernels += found
    return sorted(kernels, key=lambda kernel: kernel.name)


def count(mix: Counter[str], *prefixes: str) -> int:
    """Instructions whose mnemonic starts with one of the prefixes."""
    return sum(number for name, number in mix.items() if name.startswith(prefixes))


def problems(kernels: Iterable[Kernel]) -> list[str]:
    """What --check refuses, one line each. kernels: with their main loops."""
    found = []
    seen = set()
    for kernel in kernels:
        seen.add(kernel.name.partition("Kernel<")[0])
        if kernel.spill_bytes:
            found.append(f"{kernel.name}: spills {kernel.spill_bytes} bytes of registers")
        if kernel.name.startswith("Gemv") and kernel.registers > MAX_GEMV_REGISTERS:
            found.append(
                f"{kernel.name}: {kernel.registers} registers, more than {MAX_GEMV_REGISTERS}"
            )
        if kernel.name.startswith(FACTOR_KERNELS) and kernel.factor_loads > MAX_TILE_FACTORS:
            found.append(
                f"{kernel.name}: {kernel.factor_loads} loads of scales and sums, more than "
                f"{MAX_TILE_FACTORS}: read for every output anew"
            )
        found += [f"{kernel.name}: main loop {text}" for text in loop_problems(kernel)]
    absent = [name for name in PRODUCTS if name not in seen]
    return found + [f"no {name} kernel was found in what nvcc said" for name in absent]


def loop_problems(kernel: Kernel) -> list[str]:
    """How the main loop strays from its design: wide weight loads, the right product, no junk."""
    wanted = PRODUCTS.get(kernel.name.partition("Kernel<")[0])
    if not wanted:
        return []
    if not kernel.loop:
        return ["was not found by nvdisasm"]
    found = [] if count(kernel.loop, wanted) else [f"has no {wanted}"]
    if kernel.name.startswith("Gemv") and not count(kernel.loop, "LDG.E.NA.128"):
        found.append("reads weights by no 16-byte load")
    # Weights in fp16, sums in fp32: decoding must not fall back onto the pipe that multiplies.
    if wanted == "FFMA":
        if not count(kernel.loop, "HFMA2"):
            found.append("decodes no weights to fp16")
        if count(kernel.loop, "FADD"):
            found.append("has FADD")
    # Only group scales turn integers into floats inside the loop.
    if kernel.name.startswith("GemvDp4a") and kernel.name.endswith(",0>"):
        found += [f"has {junk}" for junk in ("I2F", "PRMT", "LDL") if count(kernel.loop, junk)]
    return found


def resource_table(kernels: Iterable[Kernel]) -> list[str]:
    """Markdown: one row a kernel."""
    lines = [
        "| kernel | registers | spilled bytes | main loop | dp4a | tensor | FFMA | logic and "
        "shifts | 16-byte weight loads | 16-byte shared loads |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        mix = k.loop
        cells = (
            sum(mix.values()), count(mix, "IDP"), count(mix, "IMMA", "HMMA"),
            count(mix, "FFMA"), count(mix, "LOP3", "SHF"), count(mix, "LDG.E.NA.128"),
            count(mix, "LDS.U.128", "LDS.128"),
        )  # fmt: skip
        row = " | ".join(str(c) if mix else "?" for c in cells)
        lines.append(f"| `{k.name}` | {k.registers} | {k.spill_bytes} | {row} |")
    return lines


def best(
    mixes: dict[str, Counter[str]], m: int, k: int, n: int, card: Card, bits: int
) -> Prediction:
    """The fastest kernel for a shape, by prediction."""
    names = [name for name in candidates(m, card, bits) if mixes.get(name)]
    return min((predict(x, mixes[x], m, k, n, card) for x in names), key=lambda p: p.microseconds)


def prediction_table(kernels: Iterable[Kernel], bits: int) -> list[str]:
    """Markdown: predicted microseconds, best kernel's family and what limits it, by shape."""
    mixes = {k.name: k.loop for k in kernels}
    lines = ["| card | (K, N) | " + " | ".join(f"M={m}" for m in ROWS) + " |"]
    lines.append("|---" * (len(ROWS) + 2) + "|")
    for card in CARDS:
        for k, n in SHAPES:
            cells = []
            for m in ROWS:
                p = best(mixes, m, k, n, card, bits)
                cells.append(f"{p.microseconds:.1f} {TILINGS[p.kernel].family}, {p.limit}")
            lines.append(f"| {card.name} | ({k}, {n}) | " + " | ".join(cells) + " |")
    return lines


def report(kernels: list[Kernel]) -> list[str]:
    """The generated part of docs/performance.md."""
    lines = ["### Resources and main loops, compiled for sm_75", "", *resource_table(kernels)]
    if any(k.loop for k in kernels):
        for bits, title in ((8, "int8 activations"), (0, "float activations, fp16")):
            lines += ["", f"### *Predicted* microseconds, {title}", ""]
            lines += prediction_table(kernels, bits)
    return lines


def write_markdown(lines: list[str], document: Path) -> None:
    """Replace what lies between MARKS. Raises ValueError where the marks are missing."""
    text = document.read_text()
    before, _, rest = text.partition(MARKS[0])
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ValueError(f"{document}: the lines {MARKS[0]} and {MARKS[1]} are missing")
    document.write_text(before + "\n".join([MARKS[0], "", *lines, "", MARKS[1]]) + after)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail on spills and register use")
    parser.add_argument("--markdown", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args(arguments)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not nvcc:
        print("nvcc not found: install the CUDA toolkit and put its bin on PATH", file=sys.stderr)
        return EXIT_MISSING
    nvdisasm = find_nvdisasm()
    if not nvdisasm:
        print(NVDISASM_HINT, file=sys.stderr)
        if options.check:
            return EXIT_MISSING
    try:
        kernels = compile_kernels(nvcc, nvdisasm)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return EXIT_FAILED
    if options.markdown:
        write_markdown(report(kernels), DOCUMENT)
    elif not options.check:
        print("\n".join(report(kernels)))
    if options.check:
        found = problems(kernels)
        print("\n".join(found) or f"{len(kernels)} kernels: {GOOD}")
        return EXIT_FAILED if found else EXIT_OK
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
