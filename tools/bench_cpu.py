"""Time TernaryMatMul's CPU library against what ONNX Runtime has, one matrix product at a time.

    python tools/bench_cpu.py --quick             # MiniLM's layers, a minute or two
    python tools/bench_cpu.py --out bench-cpu     # every shape, hot and cold; writes .json and .md

Each cell is one ONNX model per contender with the same product several times over, quantization
of the activations included. All contenders of a cell take turns in rounds of random order, so
that other load on the machine hits them alike; a cell's figure is the median of its rounds, and
ratios of medians say more than the microseconds do. With one thread the clock is that thread's
own processor time, which does not count what other programs take. "cold" rotates through so many
copies of the weights that none is in a cache. The limits (multiply-accumulates, memory) are
measured by cpu_limits, which the native build makes. Raw samples are kept in the JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import op, packing
from bitnet_export.errors import BitnetExportError, MissingRequirement
from bitnet_export.native import BUILD_DIR, find_library

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

# (K, N): MiniLM's layers (query-key-value in one, attention output, both of the MLP), and a
# decoder's.
MINILM = ((384, 1152), (384, 384), (384, 1536), (1536, 384))
LARGE = ((768, 3072), (2560, 6912), (4096, 14336))
QUICK_ROWS, ALL_ROWS = (1, 16, 64), (1, 2, 4, 8, 16, 32, 64, 128, 512)
COLD_BYTES = 96 << 20  # of weights a contender rotates through: more than the L3 cache holds
SMALL = 1 << 20  # weights
NBITS_BLOCK = 128
OURS, BASELINE = "ternary", "fp32"


@dataclass(frozen=True)
class Contender:
    """make(w [N, K] trits) -> the node's operator, domain, attributes and constants; X is free."""

    name: str
    what: str
    make: Callable[[Array], tuple[str, str, dict[str, int], Tensors]]


@dataclass
class Cell:
    """One product and all its samples, in microseconds, by contender."""

    K: int
    N: int
    M: int
    threads: int
    cold: bool
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str) -> float:
        return statistics.median(self.samples[name])


def ternary(w: Array) -> tuple[str, str, dict[str, int], Tensors]:
    n, k = w.shape
    attributes = op.TernaryAttributes(k, n).as_dict()
    ones, zeros = np.ones(n, np.float32), np.zeros(n, np.float32)
    return op.OP_TYPE, op.DOMAIN, attributes, {"w": packing.pack(w), "scale": ones, "bias": zeros}


def fp32(w: Array) -> tuple[str, str, dict[str, int], Tensors]:
    return "MatMul", "", {}, {"w": np.ascontiguousarray(w.T.astype(np.float32))}


def nbits2(w: Array) -> tuple[str, str, dict[str, int], Tensors]:
    n, k = w.shape
    packed = packing.pack(w, NBITS_BLOCK).reshape(n, -1, NBITS_BLOCK // 4)
    attributes = {"K": k, "N": n, "bits": 2, "block_size": NBITS_BLOCK, "accuracy_level": 4}
    scales = np.ones(packed.shape[:2], np.float32)
    return "MatMulNBits", "com.microsoft", attributes, {"w": packed, "scale": scales}


def int8(w: Array) -> tuple[str, str, dict[str, int], Tensors]:
    constants: Tensors = {"w": np.ascontiguousarray(w.T.astype(np.int8))}
    constants["scale"] = np.ones(1, np.float32)
    return "DynamicQuantizeMatMul", "com.microsoft", {}, constants


CONTENDERS = (
    Contender(OURS, "bitnet::TernaryMatMul, int8 activations per row", ternary),
    Contender(BASELINE, "MatMul", fp32),
    Contender("nbits2", "MatMulNBits, 2 bits, block 128, accuracy_level 4", nbits2),
    Contender("int8", "DynamicQuantizeMatMul, int8 weights", int8),
)


def build_model(contender: Contender, w: Array, copies: int) -> onnx.ModelProto:
    """The contender's node `copies` times on one X [M, K], each with weights of its own."""
    n, k = w.shape
    operator, domain, attributes, constants = contender.make(w)
    nodes, initializers, outputs = [], [], []
    for i in range(copies):
        # A rotation of the rows: equal weights would be merged into one.
        own = {name: np.roll(v, i, 0) if name == "w" else v for name, v in constants.items()}
        initializers += [numpy_helper.from_array(v, f"{name}{i}") for name, v in own.items()]
        inputs = ["X", *(f"{name}{i}" for name in own)]
        nodes.append(helper.make_node(operator, inputs, [f"Y{i}"], domain=domain))
        nodes[-1].attribute.extend(helper.make_attribute(*item) for item in attributes.items())
        outputs.append(helper.make_tensor_value_info(f"Y{i}", TensorProto.FLOAT, ["M", n]))
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", k])
    graph = helper.make_graph(nodes, "bench", [x], outputs, initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    imports.append(helper.make_opsetid(op.DOMAIN, 1))
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def open_run(model: onnx.ModelProto, x: Array, threads: int) -> Callable[[], None]:
    """A function that runs the model once, with inputs and outputs bound in advance."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    settings.register_custom_ops_library(str(find_library("ort_cpu").path))
    session = ort.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_cpu_input("X", x)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    return lambda: session.run_with_iobinding(binding)


def copies_for(contender: Contender, w: Array, cold: bool) -> int:
    """Hot: 1, or 4 small ones to share a session's own overhead. Cold: past every cache."""
    if not cold:
        return 4 if w.size < SMALL else 1
    bytes_each = sum(value.nbytes for value in contender.make(w)[3].values())
    return max(2, -(-COLD_BYTES // bytes_each))


def measure(cell: Cell, rounds: int, seconds: float, contenders: Sequence[Contender]) -> None:
    """Fill a cell's samples: interleaved rounds, each contender for about `seconds` a round."""
    random_numbers = np.random.default_rng(0)
    w = random_numbers.integers(-1, 2, (cell.N, cell.K)).astype(np.int8)
    x = random_numbers.standard_normal((cell.M, cell.K)).astype(np.float32)
    runs: dict[str, tuple[Callable[[], None], int, int]] = {}
    for contender in contenders:
        copies = copies_for(contender, w, cell.cold)
        run = open_run(build_model(contender, w, copies), x, cell.threads)
        run()
        once = timed(run, 1, cell.threads)
        runs[contender.name] = run, copies, max(1, int(seconds / once))
        cell.samples[contender.name] = []
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            run, copies, loops = runs[name]
            cell.samples[name].append(timed(run, loops, cell.threads) / copies * 1e6)


def timed(run: Callable[[], None], loops: int, threads: int) -> float:
    """Seconds a run takes, the mean of `loops` in a row."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    start = clock()
    for _ in range(loops):
        run()
    return (clock() - start) / loops


def measure_limits() -> dict[str, Any]:
    """What cpu_limits of the native build prints. Raises MissingRequirement without it."""
    program = BUILD_DIR / "cpu" / "tests" / "cpu" / "cpu_limits"
    if not program.is_file():
        raise MissingRequirement(
            f"no {program.name} in the build tree", fix="run: python tools/build_native.py"
        )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    limits: dict[str, Any] = json.loads(done.stdout)
    return limits


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def share_of_limit(cell: Cell, limits: dict[str, Any]) -> float:
    """Ours against the larger of what its products and, cold, its weights must take."""
    products = cell.M * cell.K * cell.N / (limits["gmac_per_second"] * 1e3 * cell.threads)
    weights = cell.N * packing.packed_row_bytes(cell.K) / (limits["read_gb_per_second"] * 1e3)
    return max(products, weights if cell.cold else 0.0) / cell.median(OURS)


def markdown(cells: Sequence[Cell], facts: dict[str, Any]) -> str:
    """The cells as a table, one row each, under a paragraph on how they were measured."""
    limits, names = facts["limits"], [c.name for c in CONTENDERS]
    lines = [
        f"{facts['processor']}, {facts['date']}, ONNX Runtime {facts['onnxruntime']}, "
        f"path {limits['path']}; limits of one thread: {limits['gmac_per_second']:.0f} GMAC/s, "
        f"{limits['read_gb_per_second']:.0f} GB/s. `{facts['command']}`",
        "",
        "| K, N | M | threads | weights | "
        + " | ".join(f"{name} us" for name in names)
        + " | "
        + " | ".join(f"vs {name}" for name in names[1:])
        + " | of limit |",
        "|---" * (5 + 2 * len(names) - 1) + "|",
    ]
    for cell in cells:
        times = [f"{cell.median(name):.1f}" for name in names]
        ratios = [f"{cell.median(name) / cell.median(OURS):.2f}" for name in names[1:]]
        head = [f"{cell.K}, {cell.N}", str(cell.M), str(cell.threads)]
        head.append("cold" if cell.cold else "hot")
        share = f"{share_of_limit(cell, limits):.0%}"
        lines.append("| " + " | ".join([*head, *times, *ratios, share]) + " |")
    return "\n".join(lines) + "\n"


def plan(options: argparse.Namespace) -> list[Cell]:
    shapes = options.shapes or (MINILM if options.quick else MINILM + LARGE)
    rows = options.rows or (QUICK_ROWS if options.quick else ALL_ROWS)
    cells = []
    for k, n in shapes:
        for threads in options.threads:
            cells += [Cell(k, n, m, threads, False) for m in rows]
            if not options.quick and (k, n) in LARGE:
                cells.append(Cell(k, n, 1, threads, True))
    return cells


def _shape(text: str) -> tuple[int, int]:
    k, n = text.split("x")
    return int(k), int(n)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="MiniLM's shapes, few rows, hot")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="KxN")
    parser.add_argument("--rows", nargs="+", type=int, metavar="M")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=0.003, help="of a sample")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    options = parser.parse_args(argv)
    cells = plan(options)
    try:
        facts = {
            "processor": processor(),
            "date": time.strftime("%Y-%m-%d"),
            "onnxruntime": ort.__version__,
            "library": find_library("ort_cpu").details,
            "limits": measure_limits(),
            "command": " ".join(["python tools/bench_cpu.py", *(argv or sys.argv[1:])]),
        }
        for cell in cells:
            measure(cell, options.rounds, options.seconds, CONTENDERS)
            ratio = cell.median(BASELINE) / cell.median(OURS)
            print(f"K={cell.K} N={cell.N} M={cell.M}: {ratio:.2f}x fp32", file=sys.stderr)
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    table = markdown(cells, facts)
    print(table)
    if options.out:
        contenders = {c.name: c.what for c in CONTENDERS}
        content = facts | {"contenders": contenders, "cells": [asdict(c) for c in cells]}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1))
        options.out.with_suffix(".md").write_text(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
