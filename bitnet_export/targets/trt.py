"""Target trt: the ONNX file with plugin nodes, and the engine where this machine can build it.

The graph is complete: domain trt.plugins, int32 weights, plugin attributes, and a function body
so that other runtimes can check it. The directory also gets the plugin library and
build_engine.sh, for the machine that has TensorRT and the GPU.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bitnet_export import env, manifest
from bitnet_export.errors import MissingRequirement
from bitnet_export.native import NativeLibrary, find_library, search_library
from bitnet_export.passes import FoldConstants, MergeSiblings, Pass, RetargetTensorRT
from bitnet_export.targets.base import BuildJob, Decision, Lowered, Target
from bitnet_export.targets.trt_build import TENSORRT, missing_for
from bitnet_export.targets.trt_engine import EnginePlan, make_engines, plan_profile
from bitnet_export.targets.trt_script import write_script

if TYPE_CHECKING:
    import onnx

    from bitnet_export.options import ExportOptions


class TrtTarget(Target):
    """Plugin nodes."""

    name = "trt"
    runs_on_cpu = False
    builds = True
    own_options = ("embed_plugin", "triton")

    def plan(
        self, model: onnx.ModelProto, options: ExportOptions, opt_sizes: Mapping[str, int]
    ) -> tuple[list[Pass], Lowered]:
        """Merge siblings and retarget; embeddings keep floating point."""
        lowered = Lowered(model, [], parity_kinds=("function",))
        if options.embeddings != "keep":
            why = "TensorRT has no operator that gathers quantized rows"
            lowered.decisions.append(Decision("embeddings", "keep", why))
        if options.dtype == "fp16":
            from bitnet_export.passes.to_fp16 import to_fp16

            lowered.model, result = to_fp16(model)
            lowered.passes.append(result)
            lowered.parity_kinds += ("fp16",)
        return [FoldConstants(), MergeSiblings(), RetargetTensorRT()], lowered

    def build(self, job: BuildJob) -> None:
        """Plugin library, build_engine.sh, and the engine where this machine can build it.

        Raises MissingRequirement saying what it lacks, a plugin of this version included, and
        StageError where TensorRT refuses the model.
        """
        plan_profile(job)
        job.environment["build"] = {
            "runtime": TENSORRT,
            "embed_plugin": job.options.embed_plugin,
        }
        job.environment["plans"] = {manifest.ENGINE: EnginePlan(manifest.ENGINE).as_dict()}
        gaps = missing_for(TENSORRT)
        try:
            add_plugin(job)
        except MissingRequirement as error:
            gaps.append(error.what)
            job.decide("plugin", "not beside the model", error.what)
        write_script(job.directory, job.environment)
        if not job.options.engine:
            return
        if gaps:
            raise MissingRequirement(
                f"model.onnx{_with_plugin(job)} and build_engine.sh are written; no engine was "
                f"built: {'; '.join(gaps)}",
                where="--target trt",
                fix="copy the directory to the machine that will run it and run build_engine.sh "
                "there; --no-engine makes the files alone a success",
            )
        make_engines(job.directory, job.environment, job.progress)


def add_plugin(job: BuildJob) -> None:
    """Copy the plugin into the directory and record it. Raises MissingRequirement."""
    library = find_library("tensorrt_plugin")
    check_version(library)
    shutil.copy2(library.path, job.directory / library.path.name)
    job.environment["plugin"] = {
        "file": library.path.name,
        "version": library.version,
        "sha256": library.sha256,
        **library.details,
    }
    # For programs that only open a plugin library: it has to lie beside the plugin.
    register = search_library("tensorrt_register").chosen
    if register is not None:
        shutil.copy2(register.path, job.directory / register.path.name)
        job.environment["plugin"]["register"] = register.path.name


def check_version(library: NativeLibrary) -> None:
    """Raise MissingRequirement where the plugin is of another version than this package: as good
    as none, for the layers it would run are not the ones that were tested."""
    ours = env.version("bitnet-export")
    if ours is not None and library.version != ours:
        raise MissingRequirement(
            f"the plugin {library.path} is of version {library.version}, this bitnet-export is "
            f"{ours}",
            where=str(library.path),
            fix="build it again (python tools/build_native.py) or install the matching wheel",
        )


def _with_plugin(job: BuildJob) -> str:
    return ", the plugin library" if "plugin" in job.environment else ""
