"""build_engine.sh: the exact commands that build the engine on the machine that will run it.

Written into every TensorRT output directory, because an engine of TensorRT belongs to one GPU
model and one TensorRT version, and the machine that exports often has neither.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from bitnet_export import manifest
from bitnet_export.targets.trt_build import TENSORRT
from bitnet_export.targets.trt_profile import describe, trtexec_shapes

SCRIPT = "build_engine.sh"


def write_script(directory: Path, environment: dict[str, Any]) -> Path:
    """Write build_engine.sh, executable, for the plan in ``environment``."""
    path = directory / SCRIPT
    path.write_text(script(environment))
    path.chmod(0o755)
    return path


def script(environment: dict[str, Any]) -> str:
    """The text of build_engine.sh."""
    profile = describe(environment["profile"])
    lines = [
        "#!/bin/sh",
        "# Builds the engine of this directory. Shapes it takes (min..opt..max):",
        f"#   {profile}",
    ]
    python = 'exec python3 -m bitnet_export.targets.trt_engine . "$@"'
    if environment["build"]["runtime"] != TENSORRT:
        return "\n".join(
            [
                *lines,
                "# Needs TensorRT-RTX and no GPU: pip install 'bitnet-export[trt-rtx]'.",
                "set -eu",
                'cd "$(dirname "$0")"',
                python,
                "",
            ]
        )
    return "\n".join(
        [
            *lines,
            "#",
            "#   ./build_engine.sh                    Python: pip install 'bitnet-export[trt]'.",
            "#       Checks the plugin, counts its layers in the engine and records the engine in",
            "#       manifest.json, so that bitnet_export.load_session loads it.",
            "#   ./build_engine.sh --embed-plugin     the same; the engine carries the plugin.",
            "#   ./build_engine.sh trtexec            trtexec of a TensorRT SDK, no Python.",
            "#       The engine is for programs of your own: it is not recorded.",
            "# Run it on the machine that will run the engine: it fits one GPU model and one",
            "# version of TensorRT.",
            "set -eu",
            'cd "$(dirname "$0")"',
            'if [ "${1:-}" != trtexec ]; then',
            f"    {python}",
            "fi",
            "shift",
            f'exec {trtexec_command(environment)} "$@"',
            "",
        ]
    )


def trtexec_command(environment: dict[str, Any]) -> str:
    """The trtexec call. Precision is in the graph, hence --stronglyTyped."""
    options = [f"--onnx={manifest.MODEL}", f"--saveEngine={manifest.ENGINE}", "--stronglyTyped"]
    plugin = environment.get("plugin")
    if plugin:
        options.append(f"--dynamicPlugins=./{plugin['file']}")
        if environment["build"].get("embed_plugin"):
            options.append(f"--setPluginsToSerialize=./{plugin['file']}")
    options += trtexec_shapes(environment["profile"])
    options.append("--profilingVerbosity=detailed")
    return shlex.join(["trtexec", *options])
