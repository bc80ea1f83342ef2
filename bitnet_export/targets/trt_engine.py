"""Engines of one output directory: planned in its manifest, built here or where it is copied to.

``make_engines`` serves an export on a machine that can build; ``python -m
bitnet_export.targets.trt_engine DIR``, which build_engine.sh calls, does the same later and
brings the manifest up to date.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_export import env, manifest, onnx_io, op
from bitnet_export.errors import BitnetExportError, InputError, MissingRequirement, StageError
from bitnet_export.options import Progress, SilentProgress
from bitnet_export.targets import trt_profile
from bitnet_export.targets.base import BuildJob
from bitnet_export.targets.trt_build import (
    TENSORRT,
    TENSORRT_RTX,
    TITLES,
    Built,
    Request,
    build_engine,
    missing_for,
    timing_cache,
)


@dataclass(frozen=True)
class EnginePlan:
    """An engine to build. compute_capabilities: of TensorRT-RTX, () for its default; dense: with
    float16 weights in place of int4."""

    file: str
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    dense: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As the manifest keeps it, under the file's name."""
        return {
            "compute_capabilities": [list(one) for one in self.compute_capabilities],
            "dense": self.dense,
        }


def plan_profile(job: BuildJob) -> None:
    """Record the optimization profile, and say it where it was derived."""
    profile = trt_profile.make_profile(
        job.inputs, job.low, job.opt, job.high, job.limits, job.asked_opt
    )
    job.environment["profile"] = profile
    if trt_profile.is_static(profile):
        why = "the model's inputs have fixed shapes"
    elif job.low and job.asked_opt and job.high:
        why = "as asked for"
    else:
        why = "what --min-shape, --opt-shape and --max-shape leave open is derived"
    job.decide("profile", trt_profile.describe(profile), why)


def make_engines(
    directory: Path, environment: dict[str, Any], progress: Progress | None = None
) -> None:
    """Build every planned engine; environment["engines"] gets their facts.

    Raises MissingRequirement or StageError; engines of earlier plans are removed then.
    """
    progress = progress or SilentProgress()
    engines: dict[str, Any] = {}
    try:
        for file, plan in environment["plans"].items():
            progress.note(f"building {file}")
            engines[file] = _make(directory, file, plan, environment, progress)
            progress.note(_summary(file, engines[file]))
    except BitnetExportError:
        for file in environment["plans"]:
            (directory / file).unlink(missing_ok=True)
        raise
    environment["engines"] = engines


def _make(
    directory: Path,
    file: str,
    plan: dict[str, Any],
    environment: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Build one engine -> what has to be the same where it is loaded."""
    build = environment["build"]
    runtime = build["runtime"]
    model = onnx_io.read_model(directory / manifest.MODEL)
    gpu = env.gpus()[0] if runtime == TENSORRT else None
    plugin = environment.get("plugin")
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source = directory / manifest.MODEL
        if plan["dense"]:
            from bitnet_export.passes.lower_rtx import dense_weights

            source = onnx_io.write_model(dense_weights(model)[0], Path(folder) / manifest.MODEL)
        built = build_engine(
            Request(
                runtime=runtime,
                onnx=source.absolute(),
                engine=(directory / file).absolute(),
                profile=environment["profile"],
                compute_capabilities=tuple((a, b) for a, b in plan["compute_capabilities"]),
                plugin=(directory / plugin["file"]).absolute() if plugin else None,
                embed_plugin=bool(build.get("embed_plugin")),
                timing_cache=_cache(gpu),
            ),
            progress,
        )
    if runtime == TENSORRT:
        check_plugin_layers(model, built)
    facts = {"runtime": runtime, "version": built.version, "bytes": built.bytes}
    if gpu is None:
        return facts | {
            "compute_capabilities": plan["compute_capabilities"],
            "weights": "float16" if plan["dense"] else "int4",
        }
    from bitnet_export.targets.trt_cuda import runtime_version

    return facts | {
        "cuda": runtime_version(),
        "gpu": gpu["name"],
        "compute_capability": gpu["compute_capability"],
        "plugin_layers": built.plugin_layers,
        "layers": built.layers,
        "embedded_plugin": bool(build.get("embed_plugin")),
    }


def _cache(gpu: dict[str, str] | None) -> Path | None:
    """The timing cache; TensorRT-RTX measures nothing when it builds, so it has none."""
    if gpu is None:
        return None
    return timing_cache(env.version("tensorrt") or "unknown", gpu["name"])


def check_plugin_layers(model: Any, built: Built) -> None:
    """Raise StageError unless every TernaryMatMul of the model is a plugin layer of the engine.

    A function body of the same name can take a plugin's place, and a layer computed from it is
    several times slower: silent otherwise.
    """
    nodes = sum(node.op_type == op.OP_TYPE for node in model.graph.node)
    for what, found in (
        ("the parsed network", built.parsed_plugin_layers),
        ("the engine", built.plugin_layers),
    ):
        if found != nodes:
            raise StageError(
                f"the model has {nodes} TernaryMatMul nodes, {what} has {found} plugin layers",
                where=manifest.MODEL,
                fix="check the plugin with bitnet-export doctor and build again",
            )


def cards_text(capabilities: Sequence[Sequence[int]]) -> str:
    """[[7, 5], [8, 6]] -> "compute capability 7.5, 8.6"; [], TensorRT-RTX's own choice."""
    return f"compute capability {', '.join(f'{a}.{b}' for a, b in capabilities) or '8.0 and newer'}"


def _summary(file: str, facts: dict[str, Any]) -> str:
    title = f"{TITLES[facts['runtime']]} {facts['version']}"
    if facts["runtime"] == TENSORRT_RTX:
        cards = cards_text(facts["compute_capabilities"])
        return f"{file}: {facts['bytes'] / 1e6:.1f} MB, {title}, for {cards}, {facts['weights']}"
    layers = f"{facts['plugin_layers']} plugin layers of {facts['layers']}"
    return f"{file}: {facts['bytes'] / 1e6:.1f} MB, {title}, {facts['gpu']}, {layers}"


def finish(
    directory: Path, *, embed_plugin: bool = False, progress: Progress | None = None
) -> manifest.Manifest:
    """Build the engines an exported directory still lacks, and record them in its manifest.

    Raises InputError for a directory without a plan, MissingRequirement, StageError.
    """
    record = manifest.check_manifest(directory)
    environment = record.environment
    if "plans" not in environment:
        raise InputError(
            f"is an export for --target {record.target}, which has no engine", where=str(directory)
        )
    gaps = missing_for(environment["build"]["runtime"])
    if environment["build"]["runtime"] == TENSORRT and "plugin" not in environment:
        gaps.append("the export found no plugin library; export again where it is installed")
    if gaps:
        raise MissingRequirement("; ".join(gaps), where=str(directory))
    if embed_plugin:
        environment["build"]["embed_plugin"] = True
    make_engines(directory, environment, progress)
    record.files |= manifest.record_files(directory, environment["engines"])
    manifest.write_manifest(record, directory)
    return record


def main(arguments: list[str] | None = None) -> int:
    """The command line of build_engine.sh."""
    parser = argparse.ArgumentParser(prog="build_engine.sh", description=finish.__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--embed-plugin", action="store_true", help="the engine carries the plugin")
    given = parser.parse_args(arguments)

    class Printed(SilentProgress):
        def note(self, text: str) -> None:
            print(text, flush=True)

    try:
        finish(given.directory, embed_plugin=given.embed_plugin, progress=Printed())
    except BitnetExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
