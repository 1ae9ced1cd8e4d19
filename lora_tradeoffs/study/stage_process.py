"""One script's `main` in a process of its own, for run_study.py; ends when that ends."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from threading import Thread

# what most steps need
LIBRARIES = ("torch", "transformers.trainer", "peft", "datasets", "transformers.models.llama")


def context() -> multiprocessing.context.BaseContext:
    """How processes begin: as forks of one that has the libraries loaded, seconds sooner each.

    A GPU's driver does not outlive a fork, nor do some of macOS's libraries: there they begin anew.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(list(LIBRARIES))
    return forks


def run(script: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What the process does: `script`'s main; all that it says is appended to `log`."""
    if hasattr(os, "setsid"):  # Ctrl-C reaches it through the study alone
        os.setsid()
    Thread(target=_end_with_parent, daemon=True).start()
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:  # else read when it is loaded
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [f"{script}.py", *arguments]
    sys.exit(importlib.import_module(script).main(arguments))


def _end_with_parent() -> None:
    """End at once when the study does: a killed one leaves nobody behind who writes."""
    multiprocessing.parent_process().join()
    os._exit(1)
