"""Prove and time the CUDA kernels on this machine's GPU: ``make gpu-check``.

    python tools/gpu_check.py [--out gpu-check.json] [--skip-sanitizer] [--skip-bench] [--seed N]

Steps: build for the card found; run every kernel family against the NumPy reference on fresh
random data, outputs poisoned; compute-sanitizer's memcheck and racecheck on small shapes, where
it is installed; benchmarks against cuBLAS; with TensorRT installed, an engine end to end. Needs
nvcc, and torch with CUDA (numpy comes with it). Exit code 0: all steps passed; 1: a step failed;
3: this machine lacks something, with a message that says what. Results go to a JSON file, which
docs/benchmarks says how to contribute, and to a table on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_tools import bench
from gpu_tools.library import BuildError, LaunchError, Library, build

REPOSITORY = Path(__file__).resolve().parents[1]
EXIT_OK, EXIT_FAILED, EXIT_MISSING = 0, 1, 3
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZER_ERROR = 9


class Missing(Exception):
    """Something this machine would need; the message says what to install."""


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the table."""
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
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_golden(path: Path, seed: int, *options: str) -> None:
    """Fresh data and the NumPy reference's answers."""
    tool = str(REPOSITORY / "tools" / "make_golden.py")
    subprocess.run([sys.executable, tool, *options, "--fresh", str(seed), str(path)], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def run_step(command: list[str], timeout: float) -> dict[str, Any]:
    """Run a program -> {passed, seconds, output}; a timeout is a failure."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, cwd=REPOSITORY
        )
        passed, output = done.returncode == 0, done.stdout + done.stderr
    except subprocess.TimeoutExpired:
        passed, output = False, f"not finished after {timeout:.0f} s"
    seconds = round(time.monotonic() - start, 1)
    return {"passed": passed, "seconds": seconds, "output": output[-4000:]}


def check_numbers(program: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Every family on every awkward shape against the reference."""
    golden = folder / "golden.bin"
    write_golden(golden, seed)
    return run_step([str(program), str(golden)], timeout=120)


def sanitize(program: Path, folder: Path, seed: int) -> dict[str, Any]:
    """compute-sanitizer on the small cases; {"skipped": reason} where it is not installed."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not sanitizer:
        return {"skipped": "compute-sanitizer is not installed (it comes with the CUDA toolkit)"}
    golden = folder / "small.bin"
    write_golden(golden, seed, "--small")
    results: dict[str, Any] = {}
    for tool in SANITIZER_TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(SANITIZER_ERROR)]
        results[tool] = run_step([*command, str(program), str(golden)], timeout=120)
        say(f"{tool}: {'clean' if results[tool]['passed'] else 'FAILED'}")
    return results


def check_tensorrt(torch: Any, folder: Path) -> dict[str, Any]:
    """With TensorRT installed: export a small model, build, compare and time its engine.

    The export refuses an engine in which a TernaryMatMul is no plugin layer, and compares it with
    ONNX Runtime; bench times it against the full-precision engine.
    """
    try:
        import tensorrt
    except ImportError:
        return {"skipped": "TensorRT is not installed"}
    sys.path.insert(0, str(REPOSITORY))  # need not be installed here
    import bitnet_export

    model = torch.nn.Sequential(torch.nn.Linear(2560, 6912), torch.nn.ReLU(),
                                torch.nn.Linear(6912, 2560))  # fmt: skip
    saved, out = folder / "model.pt", folder / "trt"
    bitnet_export.save(model, saved, (torch.randn(4, 2560),))
    cli = [sys.executable, "-m", "bitnet_export.cli"]
    export = [*cli, "export", str(saved), "--target", "trt", "--ternary-head", "-o", str(out)]
    # Random weights lose their quality by becoming ternary; what counts here is the engine.
    results: dict[str, Any] = {"version": tensorrt.__version__}
    results["export"] = run_step([*export, "--max-quality-loss", "100%"], timeout=240)
    if results["export"]["passed"]:
        results["bench"] = run_step([*cli, "bench", str(out), "--json"], timeout=120)
    return results


def table(rows: list[dict[str, Any]], copy_gb: float) -> list[str]:
    """One line a shape: the fastest family, its bandwidth, and the baselines' times as ratios."""
    lines = [
        f"{'(K, N)':>14} {'M':>4} {'bits':>4} {'fastest':>10} {'us':>9} {'GB/s':>6} {'% copy':>6}"
        "  cuBLAS time / ours: fp16, pedantic, fp32, int8"
    ]
    for row in rows:
        name, best = fastest(row)
        ratios = [f"{b['us'] / best['us']:.2f}" if b else "-" for b in row["baselines"].values()]
        layer = f"({row['k']}, {row['n']})"
        lines.append(
            f"{layer:>14} {row['m']:>4} {row['activation_bits']:>4} "
            f"{name:>10} {best['us']:>9.1f} {best['gb_per_s']:>6.0f} "
            f"{100 * best['gb_per_s'] / copy_gb:>6.0f}  {', '.join(ratios)}"
        )
    return lines


def fastest(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The family with the smallest median."""
    name = min(row["families"], key=lambda family: row["families"][family]["us"])
    return name, row["families"][name]


def wrong(rows: list[dict[str, Any]]) -> list[str]:
    """Problems bench found in outputs, one line each."""
    return [
        f"{name} M={row['m']} K={row['k']} N={row['n']}: {family['problem']}"
        for row in rows
        for name, family in row["families"].items()
        if family["problem"]
    ]


def passed(result: Any) -> bool:
    """Whether nothing in a nest of step results failed; skipped steps did not."""
    if isinstance(result, dict):
        return result.get("passed", True) and all(passed(value) for value in result.values())
    return True


def check(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All steps. Raises Missing, BuildError or LaunchError where there is no going on."""
    nvcc, (torch, card) = find_nvcc(), find_gpu()
    say(f"building for {card['name']} (sm_{card['sm']})")
    library_path, program = build(nvcc, folder, card["sm"])
    results: dict[str, Any] = {"card": card, "seed": options.seed, "command": sys.argv}
    results["numbers"] = check_numbers(program, folder, options.seed)
    say(results["numbers"]["output"].strip())
    if not options.skip_sanitizer:
        results["sanitizer"] = sanitize(program, folder, options.seed)
    if not options.skip_bench:
        library = Library(library_path)
        results["copy_gb_per_s"] = bench.copy_bandwidth(torch)
        results["rows"] = bench.bench_all(torch, library, say)
        results["wrong"] = wrong(results["rows"])
        print("\n".join(table(results["rows"], results["copy_gb_per_s"])))
    results["tensorrt"] = check_tensorrt(torch, folder)
    return results


def guarded(action: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Run all steps -> (exit code, results), with a message for what stops them."""
    try:
        results = action()
    except Missing as error:
        say(f"gpu-check cannot run here: {error}")
        return EXIT_MISSING, {}
    except (BuildError, LaunchError) as error:
        say(f"gpu-check failed: {error}")
        return EXIT_FAILED, {}
    for line in results.get("wrong", []):
        say(f"WRONG: {line}")
    good = passed(results) and not results.get("wrong")
    return (EXIT_OK if good else EXIT_FAILED), results


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="JSON to write")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "little"))
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--skip-bench", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        code, results = guarded(lambda: check(options, Path(folder)))
    if results:
        options.out.write_text(json.dumps(results, indent=1, default=str) + "\n")
        say(f"{'passed' if code == EXIT_OK else 'FAILED'}; results in {options.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
