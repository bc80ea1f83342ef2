"""doctor's advice: the facts of env.py judged against what each target needs.

A check is ok, limited (works, but not at its best), absent (an option this machine does not
have) or missing (a required package is not here).
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass

from bitnet_export import env, native

OK, LIMITED, ABSENT, MISSING = "ok", "limited", "absent", "missing"

# Package -> lowest version, from pyproject's dependencies.
REQUIRED = {
    "torch": "2.9",
    "onnx": "1.19",
    "onnxscript": "0.5",
    "onnx-graphsurgeon": "0.6.1",
    "polygraphy": "0.49.26",
    "safetensors": "0.5",
    "numpy": "1.26",
}
ORT_2BIT_CPU, ORT_2BIT_CUDA = "1.28", "1.31"
TRT_MINIMUM = "10.10"
# The plugin's kernels are built for it; others fall back to PTX.
TURING = "7.5"


@dataclass(frozen=True)
class Check:
    """One line of doctor: where it belongs, what it is about, its status, a remedy."""

    group: str
    name: str
    status: str
    detail: str
    fix: str = ""


def run_checks() -> list[Check]:
    """All checks, in the order they are shown."""
    sections = (_packages, _onnxruntime, _processor, _gpu, _tensorrt, _compilers, _native)
    return [check for section in sections for check in section()]


def at_least(found: str, minimum: str) -> bool:
    """Whether version ``found`` ("2.13.0+cpu") is ``minimum`` or newer."""
    return _numbers(found) >= _numbers(minimum)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    digits = ("".join(c for c in part if c.isdigit()) for part in parts)
    return tuple(int(d) for d in digits if d)


def _packages() -> Iterator[Check]:
    group = "Packages"
    yield Check(group, "python", OK, platform.python_version())
    for package, minimum in REQUIRED.items():
        found = env.version(package)
        fix = f"pip install '{package}>={minimum}'"
        if found is None:
            yield Check(group, package, MISSING, "not installed", fix)
        elif not at_least(found, minimum):
            yield Check(group, package, MISSING, f"{found}, needs {minimum}", fix)
        else:
            yield Check(group, package, OK, found)
    found = env.version("transformers")
    status = OK if found else ABSENT
    detail = found or "not installed: no Hugging Face directories"
    yield Check(group, "transformers", status, detail, "pip install 'bitnet-export[hf]'")


def _onnxruntime() -> Iterator[Check]:
    group = "ONNX Runtime (targets onnx, ort)"
    found = env.version("onnxruntime") or env.version("onnxruntime-gpu")
    if found is None:
        yield Check(
            group, "onnxruntime", MISSING, "not installed", "pip install 'bitnet-export[ort]'"
        )
        return
    if at_least(found, ORT_2BIT_CPU):
        yield Check(group, "onnxruntime", OK, found)
    else:
        yield Check(
            group,
            "onnxruntime",
            LIMITED,
            f"{found}: 2-bit kernels need {ORT_2BIT_CPU}",
            f"pip install --upgrade 'onnxruntime>={ORT_2BIT_CPU}'",
        )
    providers = env.ort_providers()
    names = ", ".join(p.removesuffix("ExecutionProvider") for p in providers)
    yield Check(group, "execution providers", OK, names or "none")
    if env.gpus() and "CUDAExecutionProvider" not in providers:
        yield Check(
            group,
            "CUDA provider",
            ABSENT,
            "there is a GPU, but this build of ONNX Runtime cannot use it",
            "pip uninstall onnxruntime && pip install 'bitnet-export[ort-gpu]'",
        )


def _processor() -> Iterator[Check]:
    group = "Processor"
    yield Check(group, "model", OK, f"{env.cpu_model()}, {env.usable_cores()} logical processors")
    memory = env.memory_bytes()
    if memory:
        yield Check(group, "memory", OK, f"{memory / 1e9:.1f} GB")
    flags = env.cpu_flags()
    if flags is None:
        yield Check(group, "instruction sets", LIMITED, "cannot be read on this system")
        return
    shown = ", ".join(flags) or "none of the known"
    status, detail = _kernel_speed(flags)
    yield Check(group, "instruction sets", status, f"{shown}: {detail}")


def _kernel_speed(flags: tuple[str, ...]) -> tuple[str, str]:
    """What ONNX Runtime's int8 and 2-bit kernels can use."""
    if {"avx512_vnni", "avx_vnni", "amx_int8"} & set(flags):
        return OK, "int8 and 2-bit matmuls run on VNNI, the fast case"
    if {"asimddp", "i8mm"} & set(flags):
        return OK, "int8 and 2-bit matmuls run on the dot-product instructions"
    if "avx2" in flags or "avx512f" in flags:
        return LIMITED, "int8 matmuls without VNNI: expect less than the documented speedups"
    return LIMITED, "no vector int8 instructions: the ternary model may be slower than fp32"


def _gpu() -> Iterator[Check]:
    group = "GPU"
    gpus = env.gpus()
    if not gpus:
        yield Check(
            group, "NVIDIA GPU", ABSENT, "none found: no TensorRT engines are built or run here"
        )
    for gpu in gpus:
        capability = gpu["compute_capability"]
        detail = f"compute capability {capability}, {gpu['memory']}, driver {gpu['driver']}"
        status = OK if at_least(capability, TURING) else LIMITED
        fix = "" if status == OK else f"the kernels need compute capability {TURING} or newer"
        yield Check(group, gpu["name"], status, detail, fix)
    nvcc = env.nvcc_version()
    yield Check(
        group,
        "CUDA compiler (nvcc)",
        OK if nvcc else ABSENT,
        nvcc or "not found: the plugin cannot be compiled here",
        "install the CUDA toolkit: https://developer.nvidia.com/cuda-downloads",
    )


def _tensorrt() -> Iterator[Check]:
    group = "TensorRT (targets trt, trt-rtx)"
    found = env.version("tensorrt")
    library = env.shared_library("nvinfer")
    fix = "pip install 'bitnet-export[trt]'"
    if found is None:
        detail = f"Python package not installed ({library} found)" if library else "not installed"
        yield Check(group, "tensorrt", ABSENT, detail, fix)
    elif at_least(found, TRT_MINIMUM):
        yield Check(group, "tensorrt", OK, found)
    else:
        yield Check(group, "tensorrt", LIMITED, f"{found}, needs {TRT_MINIMUM}", fix)
    rtx = next(
        (v for n in ("tensorrt-rtx", "tensorrt-rtx-cu12") if (v := env.version(n)) is not None),
        None,
    )
    yield Check(
        group,
        "tensorrt-rtx",
        OK if rtx else ABSENT,
        rtx or "not installed",
        "pip install tensorrt-rtx-cu12",
    )


def _compilers() -> Iterator[Check]:
    group = "Compilers (for the native libraries)"
    for name, tools, fix in (
        ("C++ compiler", ("c++", "g++", "clang++"), "apt-get install g++"),
        ("cmake", ("cmake",), "pip install cmake"),
        ("ninja", ("ninja", "make"), "pip install ninja"),
    ):
        found = next((v for tool in tools if (v := env.tool_version(tool))), None)
        yield Check(group, name, OK if found else ABSENT, found or "not found", fix)


def _native() -> Iterator[Check]:
    group = "Native libraries of this package"
    for name in native.LIBRARIES:
        search = native.search_library(name)
        chosen = search.chosen
        # What would be loaded, then each place that was looked at and what was there.
        places = "; ".join(f"{c.source}: {c.reason}" for c in search.candidates)
        if chosen is None:
            yield Check(group, name, ABSENT, f"not found ({places})", native.remedy(search))
            continue
        status, detail, fix = OK, f"{chosen.path} ({places})", ""
        ours = env.version("bitnet-export")
        if name == "tensorrt_plugin" and ours is not None and chosen.version != ours:
            status, fix = LIMITED, "python tools/build_native.py, or install the matching wheel"
            detail = f"version {chosen.version} is not used by this one, {ours}: {detail}"
        yield Check(group, name, status, detail, fix)
