"""What this machine is and has: versions, processor, GPU, compilers, execution providers.

Facts only, each found without importing a heavy library where its metadata will do; what to make
of them (doctor's advice, a report's environment block) is decided elsewhere.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib.metadata
import os
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

# The libraries whose versions decide what a run produces.
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "onnx-graphsurgeon",
    "polygraphy",
    "transformers",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)
# Processor flags that ONNX Runtime's int8 and 2-bit kernels are written for, best first.
CPU_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "asimddp", "i8mm", "asimd")
_PROBE_SECONDS = 10


def version(package: str) -> str | None:
    """The installed version of a distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_versions() -> dict[str, str]:
    """Versions of the installed ones among PACKAGES."""
    found = {package: version(package) for package in PACKAGES}
    return {package: v for package, v in found.items() if v is not None}


def describe() -> dict[str, Any]:
    """The keys of the report's environment block; imports onnxruntime for its providers."""
    return {
        "bitnet_export": version("bitnet-export") or "unknown",
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "gpu": ", ".join(gpu["name"] + " driver " + gpu["driver"] for gpu in gpus()),
        "providers": ort_providers(),
        "packages": package_versions(),
    }


def usable_cores() -> int:
    """Logical processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Main memory in bytes, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


@cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's entries in /proc/cpuinfo; {} where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """The processor's marketing name, or its architecture."""
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...] | None:
    """Which of CPU_FLAGS the processor has; None where that cannot be read (not Linux)."""
    info = _cpuinfo()
    if not info:
        return None
    flags = (info.get("flags") or info.get("Features") or "").split()
    return tuple(flag for flag in CPU_FLAGS if flag in flags)


def ort_providers() -> list[str]:
    """ONNX Runtime's available execution providers; [] without ONNX Runtime."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


@cache
def gpus() -> tuple[dict[str, str], ...]:
    """NVIDIA GPUs by nvidia-smi: name, compute_capability, memory, driver. Of several, those that
    CUDA lets this process see come first, in CUDA's order: the first is the one that is used."""
    query = "name,compute_cap,memory.total,driver_version,pci.bus_id"
    text = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    keys = ("name", "compute_capability", "memory", "driver", "bus")
    found = [dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys)]
    order = {_bus(name): i for i, name in enumerate(cuda_bus_ids())} if len(found) > 1 else {}
    found.sort(key=lambda gpu: order.get(_bus(gpu["bus"]), len(order)))
    return tuple({key: gpu[key] for key in keys[:-1]} for gpu in found)


def cuda_bus_ids(library: str = "libcuda.so.1") -> list[str]:
    """PCI bus ids of the devices that CUDA's driver shows this process, its device 0 first (by
    default the fastest; CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER decide); [] without one."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return []
    count, device, text = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(32)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return []
    names = []
    for i in range(count.value):
        if cuda.cuDeviceGet(ctypes.byref(device), i):
            return []
        if cuda.cuDeviceGetPCIBusId(text, len(text), device):
            return []
        names.append(text.value.decode())
    return names


def _bus(name: str) -> tuple[int, ...]:
    """ "00000000:01:00.0" and "0000:01:00.0" are one place; () for what is none."""
    try:
        return tuple(int(part, 16) for part in name.replace(".", ":").split(":"))
    except ValueError:
        return ()


def tool_version(tool: str, *arguments: str) -> str | None:
    """The first line with a digit that ``tool --version`` prints, None if it is not on PATH."""
    if shutil.which(tool) is None:
        return None
    text = _output(tool, *(arguments or ("--version",)))
    with_number = [line for line in text.splitlines() if any(c.isdigit() for c in line)]
    return with_number[0].strip() if with_number else "unknown version"


def nvcc_version() -> str | None:
    """The release of nvcc, on PATH or in /usr/local/cuda; None without one."""
    for tool in ("nvcc", "/usr/local/cuda/bin/nvcc"):
        for line in _output(tool, "--version").splitlines():
            if "release" in line:
                return line.split("release", 1)[1].split(",")[0].strip()
    return None


def shared_library(name: str) -> str | None:
    """The file name the dynamic linker finds for ``name`` ("nvinfer"), None if there is none."""
    return ctypes.util.find_library(name)


def _output(*command: str) -> str:
    """What a command prints, "" if it is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""
