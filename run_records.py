"""What a run leaves about itself: its record, where it ran, and how two records differ."""

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
    from base_models import Base
    from data_preprocessing import PreparedTask
    from training_configs import TrainingConfig

RECORD_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "numpy")


def pick_device() -> str:
    """cuda, mps or cpu: the first that is there."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_precision(asked: str, device: str) -> str:
    """bf16 (autocast) where the device computes with it, else fp32; what was asked for, if it was.

    Of CPUs those with AMX or AVX512-BF16: without them bf16 is emulated, and slower than fp32.
    """
    import torch

    if asked != "auto":
        return asked
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = device == "cpu" and any(getattr(torch.cpu, check, bool)() for check in checks)
    return "bf16" if fast else "fp32"


def describe_environment(
    device: str, bf16: bool, attention: str, world_size: int
) -> dict[str, Any]:
    """Versions, commit and hardware. Gradients depend on the threads, so they are here too."""
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
    command = [
        "git",
        "--no-optional-locks",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def run_record(
    name: str,
    config: TrainingConfig,
    base: Base,
    prepared: dict[str, PreparedTask],
    shares: Any,
    steps: int,
    grid: list[int],
) -> dict[str, Any]:
    """The contents of run.json, but for the environment."""
    return {
        "record_version": RECORD_VERSION,
        "run": name,
        "config": config.record(),
        "compared": config.compared(),
        "base": base.record,
        "steps": steps,
        "checkpoint_steps": grid,
        "task_weights": _task_weights(config, prepared, shares),
        "data": {task: p.report for task, p in prepared.items()},
    }


def _task_weights(
    config: TrainingConfig, prepared: dict[str, PreparedTask], shares: Any
) -> dict[str, dict[str, float]]:
    """Each task's share of the examples, of the supervised tokens, and so of the loss."""
    tokens = {}
    for task, share in zip(config.tasks, shares):
        train = prepared[task].report["splits"]["train"]
        tokens[task] = share * train["supervised_tokens"] / train["rows"]
    total = sum(tokens.values())
    return {
        task: {
            "examples": round(float(share), 4),
            "supervised_tokens": round(float(tokens[task] / total), 4),
            "loss": round(
                float(share if config.loss_weighting == "example" else tokens[task] / total), 4
            ),
        }
        for task, share in zip(config.tasks, shares)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two records of a run: what forbids going on, and what is a warning."""
    hard = _changed(old["compared"], new["compared"])
    if old["base"]["digest"] != new["base"]["digest"]:
        hard.append(f"base model {old['base']['name']} -> {new['base']['name']}, other weights")
    hard += _changed(
        {f"data of {task}": report["fingerprint"] for task, report in old["data"].items()},
        {f"data of {task}": report["fingerprint"] for task, report in new["data"].items()},
    )
    environments = [
        {**record["environment"], **record["environment"]["versions"], "versions": None}
        for record in (old, new)
    ]
    return hard, _changed(*environments)


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def reset_peak_memory(device: str) -> None:
    """Begin to measure peak memory anew."""
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
    """Give back what the last run held, before the next begins."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    os.environ.pop("TENSORBOARD_LOGGING_DIR", None)
