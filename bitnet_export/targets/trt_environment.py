"""Whether an engine may be loaded here: what it was built for against what this machine is.

An engine that does not fit is refused by TensorRT with a serialization error at best; this says
which of version, CUDA, GPU and plugin differs, before anything is loaded. Imports no TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitnet_export import env, manifest
from bitnet_export.errors import MissingRequirement
from bitnet_export.targets.trt_build import PACKAGES, TENSORRT, TITLES

# What TensorRT-RTX builds for when it is not told: Ampere and newer.
OLDEST_PORTABLE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What counts of this machine: versions as text, None where there is none."""

    version: str | None
    cuda: str | None
    gpu: str | None
    compute_capability: str | None

    @property
    def capability(self) -> tuple[int, int]:
        """(7, 5)."""
        major, _, minor = (self.compute_capability or "0").partition(".")
        return int(major), int(minor or 0)


def this_machine(runtime: str) -> Machine:
    """Look at this machine, for "tensorrt" or "tensorrt_rtx"."""
    from bitnet_export.targets.trt_cuda import runtime_version

    gpu = env.gpus()[0] if env.gpus() else None
    return Machine(
        version=installed_version(runtime),
        cuda=runtime_version(),
        gpu=gpu["name"] if gpu else None,
        compute_capability=gpu["compute_capability"] if gpu else None,
    )


def installed_version(runtime: str) -> str | None:
    """The version of the library itself, which its module states."""
    import importlib

    try:
        return str(importlib.import_module(runtime).__version__)
    except ImportError:
        return None


def engine_runs_here(environment: Mapping[str, Any]) -> bool:
    """Whether an export just made an engine that this machine's GPU can run."""
    engines = environment.get("engines")
    if not engines or not env.gpus():
        return False
    machine = this_machine(next(iter(engines.values()))["runtime"])
    try:
        choose_engine(engines, machine, Path())
    except MissingRequirement:
        return False
    return True


def choose_engine(
    engines: Mapping[str, Mapping[str, Any]], machine: Machine, directory: Path
) -> str:
    """The engine file for this card. Raises MissingRequirement where none was built for it."""
    for file, facts in engines.items():
        if facts["runtime"] == TENSORRT or fits_card(facts, machine.capability):
            return file
    built = sorted({c for facts in engines.values() for c in map(tuple, _cards(facts))})
    raise MissingRequirement(
        f"its engines are for compute capability {', '.join(f'{a}.{b}' for a, b in built)}, this "
        f"GPU ({machine.gpu}) has {machine.compute_capability}",
        where=str(directory),
        fix=f"export again with --compute-capability {machine.compute_capability}",
    )


def fits_card(facts: Mapping[str, Any], capability: tuple[int, int]) -> bool:
    """Whether a TensorRT-RTX engine was built for a card of that capability."""
    cards = facts["compute_capabilities"]
    return list(capability) in [list(c) for c in cards] if cards else capability >= OLDEST_PORTABLE


def _cards(facts: Mapping[str, Any]) -> list[Any]:
    return facts["compute_capabilities"] or [OLDEST_PORTABLE]


def check_environment(
    record: manifest.Manifest, file: str, machine: Machine, directory: Path
) -> None:
    """Raise MissingRequirement naming everything that differs from what ``file`` was built for."""
    facts = record.environment["engines"][file]
    runtime = facts["runtime"]
    differences: list[tuple[str, str | None, str | None]] = []
    if machine.version is None:
        package = PACKAGES[runtime]
        raise MissingRequirement(
            f"{TITLES[runtime]} {facts['version']} is needed, none is installed",
            where=str(directory / file),
            fix=f"pip install '{package}'",
        )
    if machine.version != facts["version"]:
        differences.append((TITLES[runtime], facts["version"], machine.version))
    if runtime == TENSORRT:
        differences += [
            (name, wanted, found)
            for name, wanted, found in (
                ("CUDA", _major(facts["cuda"]), _major(machine.cuda)),
                ("GPU", facts["gpu"], machine.gpu),
                ("compute capability", facts["compute_capability"], machine.compute_capability),
            )
            if wanted != found
        ]
        differences += _plugin_difference(record, facts, directory)
    if differences:
        raise MissingRequirement(
            "the engine was built for another machine: "
            + "; ".join(f"{name} {wanted}, here {found}" for name, wanted, found in differences),
            where=str(directory / file),
            fix="run build_engine.sh in the directory on this machine",
        )


def _plugin_difference(
    record: manifest.Manifest, facts: Mapping[str, Any], directory: Path
) -> list[tuple[str, str | None, str | None]]:
    plugin = record.environment.get("plugin")
    if not plugin or facts.get("embedded_plugin"):
        return []
    path = directory / plugin["file"]
    found = manifest.sha256_of(path) if path.is_file() else "missing"
    if found == plugin["sha256"]:
        return []
    return [(f"plugin {plugin['file']}", plugin["sha256"][:12], found[:12])]


def _major(version: str | None) -> str | None:
    return version.split(".")[0] if version else None
