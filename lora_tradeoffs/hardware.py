"""The machine that the suite runs on: device, precision, memory, versions."""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from config import ROOT

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "numpy")


def pick_device(fp64: bool = False) -> str:
    """The first available of cuda, mps and cpu; of cuda and cpu if it is to compute in fp64."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and not fp64 else "cpu"


def pick_precision(requested: str, device: str) -> str:
    """The requested precision; for "auto" bf16 (autocast) if the device computes in it, else fp32.

    CPUs need AMX or AVX512-BF16 for it: without them bf16 is emulated, and slower than fp32.
    """
    import torch

    if requested != "auto":
        return requested
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = device == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return "bf16" if fast else "fp32"


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def widest_float(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on Apple's GPUs, which have no fp64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def describe_environment(
    device: str, bf16: bool, attention: str, world_size: int
) -> dict[str, Any]:
    """Versions, commit, hardware, and the number of threads, on which gradients depend."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "versions": versions,
        "git_commit": _git_commit(),
        "device": device,
        "device_name": name,
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "precision": "fp32 weights, bf16 autocast" if bf16 else "fp32",
        "attention": attention,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return (
                next(line for line in file if line.startswith("model name")).split(": ")[1].strip()
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(ROOT), "describe", "--always", "--dirty"]
    command += ["--abbrev=40"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def reset_peak_memory(device: str) -> None:
    """Start a new measurement of peak memory."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM, the peak of the resident set
        except OSError:
            pass


def peak_memory(device: str) -> int:
    """Bytes at the peak since `reset_peak_memory`: allocated on the GPU, or resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Free what the last run held, before the next one starts."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
