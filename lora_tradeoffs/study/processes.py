"""The processes of a study: each step in one, several side by side, all ended by one signal."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread
from typing import Any

from config import Settings, UserError
from lora_tradeoffs.study.steps import Outcomes, Step, command_line, count_results

POLL = 0.05  # seconds between two looks at the processes
# what most steps need
LIBRARIES = ("torch", "transformers.trainer", "peft", "datasets", "transformers.models.llama")


@dataclass
class RunningStep:
    """A step whose process has started."""

    step: Step
    process: BaseProcess
    log: Path
    start: float
    results: int  # how many of its results existed at the start
    slot: int


class StepRunner:
    """Runs steps in processes, `workers` at a time, and notes how they ended."""

    def __init__(self, settings: Settings, workers: int) -> None:
        self.settings, self.workers = settings, workers
        self.outcomes = Outcomes(settings)
        self.logs = settings.logs_dir / "steps"
        self.environments = worker_environments(workers)
        self.running: list[RunningStep] = []
        self.failed: dict[str, str] = {}  # step: its error
        self.signals: list[int] = []

    def run(self, steps: Sequence[Step], after: Callable[[Step], None]) -> None:
        """Start each step once those that it needs have ended; `after(step)` follows a success."""
        from tqdm import tqdm

        waiting = list(steps)
        unfinished = {step.name for step in steps}
        context = process_context() if waiting else None
        self.logs.mkdir(parents=True, exist_ok=True)
        handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=len(waiting), unit="step") as progress:
                while (waiting and not self.signals) or self.running:
                    ready = [s for s in waiting if not unfinished & set(s.needs)]
                    while ready and len(self.running) < self.workers and not self.signals:
                        step = ready.pop(0)
                        waiting.remove(step)
                        self._start(step, context)
                        progress.set_description(", ".join(r.step.name for r in self.running))
                    for run in [r for r in self.running if not r.process.is_alive()]:
                        self.running.remove(run)
                        unfinished.discard(run.step.name)
                        tqdm.write(self._finish(run, after))
                        progress.update()
                    time.sleep(POLL)
        finally:
            for run in self.running:
                run.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        """The first signal lets the processes end well (training saves a checkpoint)."""
        print("\nstopping after the running steps; Ctrl-C again stops now", flush=True)
        for run in self.running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(run.process.pid, signal.SIGKILL if self.signals else signal.SIGINT)
        self.signals.append(number)

    def _start(self, step: Step, context: BaseContext) -> None:
        slot = min(set(range(self.workers)) - {run.slot for run in self.running})
        log, command = self.logs / f"{step.name}.log", command_line(step, self.settings)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python {' '.join(command)}\n")
        environment = {**os.environ, **budgets(self.settings), **self.environments[slot]}
        process = context.Process(target=run_script, args=(command, log, environment))
        process.start()
        results = count_results(step, self.settings)
        self.running.append(RunningStep(step, process, log, time.monotonic(), results, slot))

    def _finish(self, run: RunningStep, after: Callable[[Step], None]) -> str:
        """Note how the step ended; a line that says so."""
        step, seconds, code = run.step, time.monotonic() - run.start, run.process.exitcode
        if code == 0:
            new = count_results(step, self.settings) - run.results
            runs = len(step.runs)
            self.outcomes.write(step, seconds=round(seconds, 1), runs=runs, new_results=new)
            after(step)
            return f"{step.name}: {duration(seconds)}"
        if self.signals:
            return f"{step.name}: interrupted after {duration(seconds)}"
        error = self.failed[step.name] = last_error_line(run.log)
        self.outcomes.write(step, exit_code=code, error=error, log=str(run.log))
        return f"{step.name}: failed after {duration(seconds)}: {error} (see {run.log})"


# ------------------------------------------------------------------------------ one process


def process_context() -> BaseContext:
    """How processes start: as forks of one that has the libraries loaded, seconds sooner each.

    A GPU's driver does not survive a fork, nor do some of macOS's libraries: there they start new.
    """
    import torch

    if sys.platform != "linux" or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    return context


def run_script(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """In the new process: run `python COMMAND`, with all output appended to `log`."""
    if hasattr(os, "setsid"):  # Ctrl-C reaches it through the study alone
        os.setsid()
    Thread(target=_exit_with_parent, daemon=True).start()
    with log.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:  # else read when it is loaded
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    module, arguments = command[0].removesuffix(".py"), command[1:]
    if module == "-m":
        module, arguments = arguments[0], arguments[1:]
    sys.argv = [f"{module}.py", *arguments]
    sys.exit(importlib.import_module(module).main(arguments))


def _exit_with_parent() -> None:
    """End at once when the study does: a killed study leaves no process that still writes."""
    multiprocessing.parent_process().join()
    os._exit(1)


def budgets(settings: Settings) -> dict[str, str]:
    """The variables of the settings that no script has a flag for, as the study resolved them."""
    names = ("examples_per_task", "eval_examples_per_task")
    return {name.upper(): str(getattr(settings, name)) for name in names}


def worker_environments(workers: int) -> list[dict[str, str]]:
    """The environment of every worker: a GPU each, or its share of the cores.

    Raises UserError for more workers than GPUs, or cores.
    """
    if workers == 1:
        return [{}]
    import torch

    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = (
            visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        )
        if workers > len(names):
            raise UserError(f"--workers {workers}: this machine has {len(names)} GPUs")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:workers]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers > cores:
        raise UserError(f"--workers {workers}: this machine has {cores} cores")
    return [{"OMP_NUM_THREADS": str(cores // workers)}] * workers


def last_error_line(log: Path) -> str:
    """The last error in a step's log, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
