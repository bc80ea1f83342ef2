"""Prove and time the CUDA kernels on this machine's GPU, in less than eight minutes: make gpu-check

    python tools/gpu_check.py [--out gpu-check.json] [--peer LIB] [--skip-sanitizer]
                              [--skip-bench] [--seed N]

Steps, each with a time budget: build for the card found; run every kernel family against the
NumPy reference on fresh random data, outputs poisoned; compute-sanitizer's memcheck and racecheck
on small shapes; benchmarks against cuBLAS; with --peer, microsoft/BitNet's kernel beside ours;
with TensorRT installed, an engine end to end. Needs nvcc, and torch with CUDA (numpy comes with
it). Exit code 0: every step asked for passed; 1: a step failed; 3: something could not run, with
the reason: it is never counted as passed. Results go to a JSON file, kept up to date after each
step, which docs/benchmarks says how to contribute, and to tables on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_tools import bench, peer, table
from gpu_tools.library import BuildError, LaunchError, Library, build, target_flag
from gpu_tools.steps import (
    EXIT_FAILED,
    EXIT_MISSING,
    EXIT_OK,
    Budget,
    Failed,
    NotRun,
    Steps,
    run_program,
)
from gpu_tools.timing import cache_size, copy_bandwidth

__all__ = ["EXIT_FAILED", "EXIT_MISSING", "EXIT_OK", "main"]

REPOSITORY = Path(__file__).resolve().parents[1]
TOTAL_SECONDS = 450.0
# What each step may take at most; less once the total is used up.
BUILD, NUMBERS, MEMCHECK, RACECHECK, BENCH, PEER, TENSORRT = (
    150.0,
    60.0,
    60.0,
    90.0,
    180.0,
    40.0,
    200.0,
)
# What compute-sanitizer's tools end with where they found nothing.
CLEAN = {
    "memcheck": r"ERROR SUMMARY: 0 errors",
    "racecheck": r"RACECHECK SUMMARY: 0 hazards displayed \(0 errors, 0 warnings\)",
}
SANITIZER_ERROR = 9
TENSORRT_NEEDS = ("tensorrt", "polygraphy", "onnx", "onnx_graphsurgeon", "onnxscript",
                  "onnxruntime", "click", "rich")  # fmt: skip


class Missing(Exception):
    """Something this machine would need; the message says what to install."""


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the tables."""
    print(text, file=sys.stderr, flush=True)


def find_nvcc() -> str:
    """nvcc on PATH or in the default place."""
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Missing("nvcc not found: install the CUDA toolkit and put its bin folder on PATH")
    return found


def find_gpu() -> tuple[Any, dict[str, Any]]:
    """-> (torch, description of the card)."""
    try:
        import torch
    except ImportError:
        raise Missing("torch not found: pip install torch (a CUDA build)") from None
    if not torch.cuda.is_available():
        raise Missing(
            f"no GPU that torch {torch.__version__} can use: run this on a machine with an NVIDIA "
            "card (compute capability 7.5 or newer), its driver, and a CUDA build of torch"
        )
    properties = torch.cuda.get_device_properties(0)
    sm = 10 * properties.major + properties.minor
    if sm < 75:
        raise Missing(f"{properties.name}: the kernels need compute capability 7.5, it has {sm}")
    return torch, {
        "name": properties.name,
        "sm": sm,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_golden(path: Path, seed: int, *options: str) -> None:
    """Fresh data and the NumPy reference's answers."""
    tool = str(REPOSITORY / "tools" / "make_golden.py")
    subprocess.run([sys.executable, tool, *options, "--fresh", str(seed), str(path)], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def check_numbers(program: Path, folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """Every family on every awkward shape against the reference."""
    golden = folder / "golden.bin"
    write_golden(golden, seed)
    status, output = run_program([str(program), str(golden)], seconds)
    kept = {"output": output[-4000:]}
    if status is None:
        raise Failed(f"not finished after {seconds:.0f} s", kept)
    if status:
        raise Failed(f"exit status {status}: {_last(output)}", kept)
    say(f"  {_last(output)}")
    return kept


def sanitize(tool: str, program: Path, folder: Path, seed: int, seconds: float) -> dict[str, Any]:
    """compute-sanitizer's ``tool`` on the small cases; passes by its own summary alone."""
    found = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not found:
        raise NotRun("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    golden = folder / "small.bin"
    write_golden(golden, seed, "--small")
    command = [found, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
    status, output = run_program([*command, str(program), str(golden)], seconds)
    kept = {"output": output[-4000:]}
    if status is None:
        raise NotRun(f"{tool} did not finish within {seconds:.0f} s", kept)
    if "SUMMARY" not in output:
        raise NotRun(f"{tool} came to no summary: {_last(output)}", kept)
    if status or not re.search(CLEAN[tool], output):
        raise Failed(_last(output), kept)
    return kept


def run_bench(torch: Any, library_path: Path, seconds: float) -> dict[str, Any]:
    """The benchmarks; their table goes to stdout."""
    budget, copy_gb = Budget(seconds), copy_bandwidth(torch)
    rows, grouped = list[dict[str, Any]](), list[dict[str, Any]]()
    kept: dict[str, Any] = {"copy_gb_per_s": copy_gb, "rows": rows, "grouped_rows": grouped}
    try:
        library = Library(library_path)
        left_out = bench.bench_all(torch, library, budget.left(), rows, say)
        left_out += bench.bench_grouped(torch, library, budget.left(), grouped)
        kept["left_out"] = left_out
        print("\n".join(table.bench_table(rows, copy_gb)))
        print(f"with a scale for each {bench.GROUP_SIZE} weights:")
        print("\n".join(table.bench_table(grouped, copy_gb)))
        kept["goals"] = table.goals(rows, copy_gb, cache_size(torch))
        print("\n".join(kept["goals"]), flush=True)
    except Exception as error:  # what was measured until then is kept
        why = f"stopped after {len(rows) + len(grouped)} rows: {type(error).__name__}: {error}"
        raise Failed(why, kept) from error
    if problems := table.wrong(rows + grouped):
        raise Failed("; ".join(problems), kept)
    if left_out:
        all_cells = len([*bench.cells(), *bench.grouped_cells()])
        raise NotRun(f"time was up before {len(left_out)} of {all_cells} shapes", kept)
    return kept


def run_peer(torch: Any, path: Path, library_path: Path, seconds: float) -> dict[str, Any]:
    """microsoft/BitNet's kernel beside ours; the table goes to stdout."""
    try:
        other = peer.Peer(path)
    except (OSError, AttributeError) as error:
        raise NotRun(f"--peer {path}: {error}") from None
    rows = peer.bench_all_shapes(torch, other, Library(library_path), seconds)
    print("\n".join(table.peer_table(rows)), flush=True)
    kept = {"rows": rows, "checked": False}
    if not any(row["ratio"] for row in rows):
        raise NotRun("no layer ran in both: see the table", kept)
    if len(rows) < len(peer.SHAPES):
        raise NotRun(f"time was up after {len(rows)} of {len(peer.SHAPES)} layers", kept)
    return kept


def check_tensorrt(torch: Any, folder: Path, seconds: float) -> dict[str, Any]:
    """With TensorRT installed: export a small model, build, compare and time its engine.

    The export refuses an engine in which a TernaryMatMul is no plugin layer, and compares it with
    ONNX Runtime; bench times it against the full-precision engine.
    """
    absent = [name for name in TENSORRT_NEEDS if find_spec(name) is None]
    if absent:
        raise NotRun(f"not installed: {', '.join(absent)}", optional=True)
    budget = Budget(seconds)
    sys.path.insert(0, str(REPOSITORY))  # need not be installed here
    import bitnet_export

    model = torch.nn.Sequential(torch.nn.Linear(2560, 6912), torch.nn.ReLU(),
                                torch.nn.Linear(6912, 2560))  # fmt: skip
    saved, out = folder / "model.pt", folder / "trt"
    bitnet_export.save(model, saved, (torch.randn(4, 2560),))
    cli = [sys.executable, "-m", "bitnet_export.cli"]
    export = [*cli, "export", str(saved), "--target", "trt", "--ternary-head", "-o", str(out)]
    # Random weights lose their quality by becoming ternary; what counts here is the engine.
    kept: dict[str, Any] = {}
    for name, command in (
        ("export", [*export, "--max-quality-loss", "100%"]),
        ("bench", [*cli, "bench", str(out), "--json"]),
    ):
        status, output = run_program(command, budget.left(), REPOSITORY)
        kept[name] = output[-4000:]
        if status == EXIT_MISSING or status is None:
            why = "did not finish in time" if status is None else _last(output)
            raise NotRun(f"{name}: {why}", kept)
        if status:
            raise Failed(f"{name}: exit status {status}: {_last(output)}", kept)
    return kept


def _last(output: str) -> str:
    """The last line that says something."""
    lines = [line.strip("= ") for line in output.splitlines() if line.strip("= ")]
    return lines[-1] if lines else "no output"


def run_steps(options: argparse.Namespace, steps: Steps, folder: Path) -> None:
    """All steps, in the order of what matters."""
    nvcc, (torch, card) = find_nvcc(), find_gpu()
    steps.about.update({"card": card, "seed": options.seed, "command": sys.argv})
    say(f"{card['name']} (sm_{card['sm']})")
    built: dict[str, Path] = {}

    def make(seconds: float) -> dict[str, Any]:
        target = target_flag(nvcc, card["sm"])
        try:
            built["library"], built["program"] = build(nvcc, folder, target, seconds)
            Library(built["library"])
        except BuildError as error:
            raise Failed(str(error)[-4000:]) from None
        except LaunchError as error:
            built.clear()
            hint = "is nvcc newer than the driver? nvidia-smi shows the CUDA version it supports"
            raise Failed(f"the kernels do not load on this card: {error}; {hint}") from None
        return {"target": target}

    def step(name: str, seconds: float, action: Any, skip: str = "") -> None:
        def guarded(limit: float) -> dict[str, Any]:
            if skip:
                raise NotRun(skip, optional=True)
            if not built:
                raise NotRun("the kernels were not built")
            found: dict[str, Any] = action(limit)
            return found

        steps.do(name, seconds, guarded)

    steps.do("build", BUILD, make)
    step("numbers", NUMBERS, lambda s: check_numbers(built["program"], folder, options.seed, s))
    skip = "--skip-sanitizer" if options.skip_sanitizer else ""
    for tool, limit in (("memcheck", MEMCHECK), ("racecheck", RACECHECK)):
        step(tool, limit, lambda s, t=tool: sanitize(t, built["program"], folder, options.seed, s),
             skip)  # fmt: skip
    skip = "--skip-bench" if options.skip_bench else ""
    step("bench", BENCH, lambda s: run_bench(torch, built["library"], s), skip)
    skip = "" if options.peer else "no --peer given"
    step("peer", PEER, lambda s: run_peer(torch, options.peer, built["library"], s), skip)
    steps.do("tensorrt", TENSORRT, lambda s: check_tensorrt(torch, folder, s))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="JSON to write")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    help_peer = "microsoft/BitNet's libbitnet.so, to be timed beside ours"
    parser.add_argument("--peer", type=Path, metavar="LIB", help=help_peer)
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    options = parser.parse_args(arguments)

    def write(results: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")

    steps = Steps(Budget(TOTAL_SECONDS), say, write)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run_steps(options, steps, Path(folder))
        except Missing as error:
            say(f"gpu-check cannot run here: {error}")
            return EXIT_MISSING
    say("\n".join(["", *steps.summary(), f"results in {options.out}"]))
    return steps.exit_code()


if __name__ == "__main__":
    sys.exit(main())
