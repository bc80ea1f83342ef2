"""A Triton Inference Server model repository: ``--triton DIR``.

DIR/NAME/config.pbtxt and DIR/NAME/1/model.plan or model.onnx, and DIR/README.md on how to start
the server so that it knows the plugin. Triton is not run here; the files follow its documented
format.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import manifest
from bitnet_export.errors import UsageError
from bitnet_export.targets.base import BuildJob

if TYPE_CHECKING:
    import onnx

# numpy names -> Triton's; FP16 and FP32 break the pattern TYPE_ + upper case.
DATA_TYPES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    **{name: name.upper() for name in ("int8", "int16", "int32", "int64")},
    **{name: name.upper() for name in ("uint8", "uint16", "uint32", "uint64")},
}
# How long a request may wait for others to share a batch: short next to one inference.
QUEUE_DELAY_MICROSECONDS = 500
PLAN, ONNX = "tensorrt_plan", "onnxruntime_onnx"


@dataclass(frozen=True)
class Tensor:
    """An input or output: sizes, axis names where dynamic, "" or None where not even a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def check_repository(repository: Path, name: str, overwrite: bool) -> Path:
    """The directory of a model in the repository. Raises UsageError where it is there already and
    may not be replaced."""
    path = repository / model_name_of(name)
    if path.exists() and not (overwrite and (path / "config.pbtxt").is_file()):
        raise UsageError(
            f"{path} exists", where=f"--triton {repository}", fix="pass --force, or another DIR"
        )
    return path


def write_repository(job: BuildJob, name: str) -> Path:
    """Write the model repository of an export -> DIR/NAME.

    A trt export gets a TensorRT plan, which is left out as long as there is no engine; the README
    says what to copy where. Raises UsageError where there is one already.
    """
    assert job.options.triton is not None
    repository = job.options.triton
    home = check_repository(repository, name, job.options.overwrite)
    shutil.rmtree(home, ignore_errors=True)
    version = home / "1"
    version.mkdir(parents=True)
    is_plan = job.options.target == "trt"
    inputs = [Tensor(n, e["dtype"], tuple(e["shape"])) for n, e in job.inputs.items()]
    outputs = graph_outputs(job.lowered.model)
    most = max_batch(inputs, outputs, job.environment.get("profile"), job.high)
    text = config(home.name, PLAN if is_plan else ONNX, inputs, outputs, most)
    (home / "config.pbtxt").write_text(text)
    source = manifest.ENGINE if is_plan else manifest.MODEL
    target = version / ("model.plan" if is_plan else "model.onnx")
    if (job.directory / source).is_file():
        shutil.copy2(job.directory / source, target)
        data = job.directory / f"{manifest.MODEL}.data"
        if not is_plan and data.is_file():
            shutil.copy2(data, version / data.name)
    plugin = job.environment.get("plugin")
    if is_plan and plugin:
        for file in (plugin["file"], plugin.get("register")):
            if file:
                shutil.copy2(job.directory / file, home / file)
    (repository / "README.md").write_text(readme(home.name, is_plan, plugin, target.is_file()))
    return home


def model_name_of(name: str) -> str:
    """A model's name as a directory and URL part."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "model"


def graph_outputs(model: onnx.ModelProto) -> list[Tensor]:
    """The outputs of the ONNX graph."""
    import numpy as np
    from onnx import helper

    found = []
    for value in model.graph.output:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value or d.dim_param for d in tensor.shape.dim)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        found.append(Tensor(value.name, dtype, shape))
    return found


def max_batch(
    inputs: list[Tensor],
    outputs: list[Tensor],
    profile: Mapping[str, Any] | None,
    high: Mapping[str, int],
) -> int:
    """The largest batch Triton may make; 0, no batching, unless every tensor begins with the same
    dynamic axis."""
    first = {t.shape[0] if t.shape else None for t in inputs}
    if len(first) != 1 or not isinstance(axis := next(iter(first)), str):
        return 0
    if any(not t.shape or t.shape[0] != axis for t in outputs):
        return 0
    if profile:
        return min(int(shapes["max"][0]) for shapes in profile.values())
    return high.get(axis, 8)


def config(name: str, platform: str, inputs: list[Tensor], outputs: list[Tensor], most: int) -> str:
    """The text of config.pbtxt (Triton's model_config.proto)."""
    parts = [f'name: "{name}"', f'platform: "{platform}"', f"max_batch_size: {most}"]
    for title, tensors in (("input", inputs), ("output", outputs)):
        rows = [_tensor(t, batched=most > 0) for t in tensors]
        parts.append(f"{title} [\n" + ",\n".join(rows) + "\n]")
    if most:
        parts.append(
            f"dynamic_batching {{\n  max_queue_delay_microseconds: {QUEUE_DELAY_MICROSECONDS}\n}}"
        )
    kind = "KIND_GPU" if platform == PLAN else "KIND_CPU"
    parts.append(f"instance_group [ {{ count: 1, kind: {kind} }} ]")
    return "\n".join(parts) + "\n"


def _tensor(tensor: Tensor, *, batched: bool) -> str:
    shape = tensor.shape[1:] if batched else tensor.shape
    dims = ", ".join(str(d) if isinstance(d, int) and d > 0 else "-1" for d in shape)
    kind = f"TYPE_{DATA_TYPES[tensor.dtype]}"
    if not shape:  # Triton has no rank 0: one element, reshaped to nothing
        dims = "1 ], reshape { shape: [ ] "
        return f'  {{ name: "{tensor.name}", data_type: {kind}, dims: [ {dims}}} }}'
    return f'  {{ name: "{tensor.name}", data_type: {kind}, dims: [ {dims} ] }}'


def readme(name: str, is_plan: bool, plugin: Mapping[str, Any] | None, has_model: bool) -> str:
    """How to start Triton on the repository."""
    run = "tritonserver --model-repository=."
    lines = [f"# Triton model repository: {name}", ""]
    if not is_plan:
        return "\n".join([*lines, "Start it in this directory:", "", f"    {run}", ""])
    if not has_model:
        lines += [
            "The engine is not built yet: an engine fits one GPU model and TensorRT version. Run",
            "`build_engine.sh` in the export's directory, on the server's machine and with the",
            f"server's version of TensorRT, then copy `model.engine` to `{name}/1/model.plan`.",
            "",
        ]
    register = (plugin or {}).get("register", "libbitnet_tensorrt_register.so")
    if not plugin or "register" not in plugin:
        lines += [
            f"Put `libbitnet_tensorrt_plugin.so` and `{register}` into `{name}/`: the export did",
            "not find both. `bitnet-export doctor` shows where they are.",
            "",
        ]
    return "\n".join(
        [
            *lines,
            "The engine's TernaryMatMul layers are in a plugin library. Start Triton so that it",
            f"opens `{register}`, which registers the plugin beside it:",
            "",
            f"    {run} --backend-config=tensorrt,plugins=$PWD/{name}/{register}",
            "",
            "An engine built with `--embed-plugin` carries the library itself; TensorRT loads it",
            "only where the server allows host code in engines.",
            "",
        ]
    )
