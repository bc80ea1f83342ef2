"""Starts the process that builds an engine and turns what it says into progress and errors.

What is built is a Request; the work itself is trt_worker.py's. Nothing here imports TensorRT.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

from bitnet_export import env
from bitnet_export.errors import MissingRequirement, StageError
from bitnet_export.options import Progress, SilentProgress
from bitnet_export.targets.trt_profile import Profile

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt_rtx"
TITLES = {TENSORRT: "TensorRT", TENSORRT_RTX: "TensorRT-RTX"}
PACKAGES = {TENSORRT: "bitnet-export[trt]", TENSORRT_RTX: "bitnet-export[trt-rtx]"}
# Where timing caches are kept between builds.
CACHE_VARIABLE = "BITNET_EXPORT_CACHE"
# What the worker has on its standard error, and how much of it an error repeats.
ERROR_MARKS, SHOWN_LINES = ("[E]", "[!]", "terminate called", "what():"), 4


@dataclass(frozen=True)
class Request:
    """One engine to build.

    runtime: "tensorrt" or "tensorrt_rtx". compute_capabilities: (major, minor) of the cards
    TensorRT-RTX builds for, empty for its default. plugin: absolute path of the plugin library.
    timing_cache: a file that is read where it exists and written.
    """

    runtime: str
    onnx: Path
    engine: Path
    profile: Profile
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    plugin: Path | None = None
    embed_plugin: bool = False
    timing_cache: Path | None = None


@dataclass
class Built:
    """An engine that was written. plugin_layers: None where the engine was not inspected."""

    version: str
    bytes: int
    parsed_plugin_layers: int = 0
    plugin_layers: int | None = None
    layers: int | None = None
    log: list[str] = field(default_factory=list)


def missing_for(runtime: str) -> list[str]:
    """What this machine lacks to build an engine, in words; [] where nothing is missing."""
    gaps = []
    if find_spec(runtime) is None:
        gaps.append(f"{TITLES[runtime]} is not installed (pip install '{PACKAGES[runtime]}')")
    if runtime == TENSORRT and not env.gpus():
        gaps.append("there is no NVIDIA GPU, or nvidia-smi does not list it")
    return gaps


def build_engine(request: Request, progress: Progress | None = None) -> Built:
    """Build one engine in a process of its own.

    Raises MissingRequirement where the library is not installed, StageError with what it said
    where it refuses the model or dies.
    """
    title = TITLES[request.runtime]
    if find_spec(request.runtime) is None:
        raise MissingRequirement(
            f"{title} is not installed", fix=f"pip install '{PACKAGES[request.runtime]}'"
        )
    if request.timing_cache is not None:
        request.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "request.json"
        written.write_text(json.dumps(asdict(request), default=str))
        command = [sys.executable, "-m", "bitnet_export.targets.trt_worker", str(written)]
        result, said, log, code = _run(command, Path(folder) / "log", progress or SilentProgress())
    if result is None or code:
        request.engine.unlink(missing_ok=True)
        raise _failure(title, request, said, log, code)
    return Built(bytes=request.engine.stat().st_size, log=log, **result)


def timing_cache(version: str, gpu: str) -> Path:
    """The timing cache for a TensorRT version and a card, shared by all exports of this user."""
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(root) if root else Path.home() / ".cache" / "bitnet-export"
    card = "".join(c if c.isalnum() else "-" for c in gpu)
    return base / f"timing-{version}-{card}.cache"


def _run(
    command: list[str], log: Path, progress: Progress
) -> tuple[dict[str, Any] | None, str, list[str], int]:
    """Run the worker -> (result event, error event's text, lines of its log, exit status)."""
    result, said = None, ""
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sink, text=True)
        try:
            for event in _events(cast("IO[str]", process.stdout)):
                kind = event.pop("event")
                if kind == "progress":
                    progress.update(event["done"], event["total"], event["detail"])
                elif kind == "result":
                    result = event
                else:
                    said = event["what"]
            code = process.wait()
        except BaseException:  # Ctrl-C among them: leave no builder behind
            process.kill()
            process.wait()
            raise
    return result, said, log.read_text(errors="replace").splitlines(), code


def _events(stream: IO[str]) -> Iterator[dict[str, Any]]:
    for line in stream:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line cut off by the process's end
        yield event


def _failure(title: str, request: Request, said: str, log: list[str], code: int) -> StageError:
    """What happened, from the library's own words."""
    lines = [line.strip() for line in log if " --- " not in line]
    marked = [line for line in lines if any(mark in line for mark in ERROR_MARKS)]
    shown = list(dict.fromkeys(marked))[:SHOWN_LINES] or [line.strip() for line in log[-2:]]
    words = "\n    ".join(["", *shown]) if shown else (f": {said}" if said else "")
    if code < 0:
        what = f"{title} ended its process with {signal.Signals(-code).name}{words}"
    else:
        what = f"{title} built no engine{words}"
    fix = _advice(" ".join([*shown, said]))
    return StageError(what, where=request.onnx.name, fix=fix)


def _advice(text: str) -> str:
    """What to do about the refusals that are known."""
    for mark, fix in (
        ("FP32 GEMM is not supported", "export with --dtype fp16"),
        ("HW-specific datatypes: int4", "use --compute-capability 8.6 or newer for int4 weights"),
        ("out of memory", "give a smaller --max-shape, or free memory"),
        ("OutOfMemory", "give a smaller --max-shape, or free memory"),
        ("profile", "check --min-shape, --opt-shape and --max-shape against the model's inputs"),
        ("Network must have at least one output", "check the model with onnx.checker"),
    ):
        if mark in text:
            return fix
    return "--no-engine keeps the ONNX file; --target onnx or ort runs the model without TensorRT"
