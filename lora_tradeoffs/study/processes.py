"""The processes of a study: each step in one, several side by side, all ended by one signal."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import runpy
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
from lora_tradeoffs.files import shared_mount
from lora_tradeoffs.hardware import usable_cores
from lora_tradeoffs.study.jobs import Job, launch_words
from lora_tradeoffs.study.steps import Outcomes, Step, command_line, count_results, progress

POLL = 0.05  # seconds between two looks at the processes
LOOK = 10.0  # and at their logs
# what most steps need
LIBRARIES = ("torch", "transformers.trainer", "peft", "datasets", "transformers.models.llama")


@dataclass
class RunningStep:
    """A step whose process has started."""

    step: Step
    process: BaseProcess | Job
    log: Path
    start: float
    before: tuple[int, list[Path]]  # its `progress` at the start
    slot: int


class StepRunner:
    """Runs steps in processes, `workers` at a time, and notes how they ended.

    With `launch`, a command that submits a script, steps are jobs of a scheduler. Training takes
    `gpus` GPUs a run, by accelerate, and full fine-tuning its configuration. Raises UserError.
    """

    def __init__(
        self,
        settings: Settings,
        workers: int,
        launch: str | None = None,
        gpus: int = 1,
        configuration: Path | None = None,
    ) -> None:
        if configuration and not (configuration.is_file() and gpus > 1):
            raise UserError("--accelerate-config takes a file, and needs --gpus-per-run 2 or more")
        self.settings, self.workers = settings, workers
        self.launch = None if launch is None else launch_words(launch)
        if mount := shared_mount(settings.output_dir):
            print(f"{settings.output_dir} is a network mount ({mount}): runs are locked by files")
        elif launch:
            print(f"{settings.output_dir} is on a disk of this host: jobs must run here, too")
        self.distributed = gpus, configuration
        # seconds in which processes that accelerate started save a checkpoint at a signal
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "240")
        self.outcomes = Outcomes(settings)
        self.logs = settings.logs_dir / "steps"
        shares = [{}] * workers if launch else worker_environments(workers, gpus)
        self.environments = [budgets(settings) | share for share in shares]
        self.running: list[RunningStep] = []
        self.failed: dict[str, str] = {}  # step: its error
        self.signals: list[int] = []

    def run(self, steps: Sequence[Step], after: Callable[[Step], None]) -> None:
        """Start each step once those that it needs have ended; `after(step)` follows a success."""
        from tqdm import tqdm

        waiting = list(steps)
        unfinished = {step.name for step in steps}
        context = process_context() if waiting and not self.launch else None
        looked = -math.inf
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
                        looked = -math.inf
                    for run in [r for r in self.running if not r.process.is_alive()]:
                        self.running.remove(run)
                        if self._is_worth_another_job(run):
                            self._note(run)
                            waiting.insert(0, run.step)
                            tqdm.write(f"{run.step.name}: stopped early, submitted again")
                            continue
                        unfinished.discard(run.step.name)
                        tqdm.write(self._finish(run, after))
                        progress.update()
                    if time.monotonic() - looked > LOOK:
                        looked = time.monotonic()
                        states = (f"{r.step.name} {last_count(r.log)}" for r in self.running)
                        progress.set_description(", ".join(map(str.strip, states)))
                    time.sleep(POLL)
        finally:
            for run in self.running:
                run.process.kill()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _stop(self, number: int, _: Any) -> None:
        """The first signal lets the processes end well (training saves a checkpoint)."""
        print("\nstopping after the running steps; Ctrl-C again stops now", flush=True)
        now = bool(self.signals)
        self.signals.append(number)  # first: SLURM may take a while, and a second signal come
        for run in self.running:
            if isinstance(run.process, Job):
                run.process.stop(now)
            elif now:
                kill_tree(run.process.pid)
            else:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(run.process.pid, signal.SIGINT)

    def _start(self, step: Step, context: BaseContext) -> None:
        slot = min(set(range(self.workers)) - {run.slot for run in self.running})
        log = self.logs / f"{step.name}.log"
        command = command_line(step, self.settings, *self.distributed)
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python {' '.join(command)}\n")
        before = progress(step, self.settings)
        if self.launch:
            process = Job(self.launch, command, log, self.environments[slot])
        else:
            environment = {**os.environ, **self.environments[slot]}
            process = context.Process(target=run_script, args=(command, log, environment))
            process.start()
        self.running.append(RunningStep(step, process, log, time.monotonic(), before, slot))

    def _is_worth_another_job(self, run: RunningStep) -> bool:
        """Whether a job got further before it failed, as at its time limit; 2 is a user's error."""
        is_stopped = self.launch and not self.signals and run.process.exitcode not in (0, 2)
        return bool(is_stopped) and progress(run.step, self.settings) != run.before

    def _finish(self, run: RunningStep, after: Callable[[Step], None]) -> str:
        """Note how the step ended; a line that says so."""
        step, code, took = run.step, run.process.exitcode, duration(time.monotonic() - run.start)
        if code == 0:
            self._note(run, runs=len(step.runs))
            after(step)
            return f"{step.name}: {took}"
        if self.signals:
            self._note(run)
            return f"{step.name}: interrupted after {took}"
        error = self.failed[step.name] = last_error_line(run.log)
        self._note(run, exit_code=code, error=error, log=str(run.log))
        return f"{step.name}: failed after {took}: {error} (see {run.log})"

    def _note(self, run: RunningStep, **outcome: Any) -> None:
        new = count_results(run.step, self.settings) - run.before[0]
        self.outcomes.add(run.step, time.monotonic() - run.start, new, **outcome)


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
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _exit_with_parent() -> None:
    """End at once when the study does: a killed study leaves no process that still writes."""
    multiprocessing.parent_process().join()
    kill_tree(os.getpid())


def budgets(settings: Settings) -> dict[str, str]:
    """The variables of the settings that no script has a flag for, as the study resolved them."""
    names = ("examples_per_task", "eval_examples_per_task")
    return {name.upper(): str(getattr(settings, name)) for name in names}


def kill_tree(pid: int) -> None:
    """Kill a process and all that it has started."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def worker_environments(workers: int, gpus: int = 1) -> list[dict[str, str]]:
    """The environment of every worker: its GPUs, or its share of the cores.

    Raises UserError for more than there are.
    """
    if workers * gpus == 1:
        return [{}]
    import torch

    flags = f"--workers {workers}" + f" --gpus-per-run {gpus}" * (gpus > 1)
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = (
            visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        )
        if workers * gpus > len(names):
            raise UserError(f"{flags}: this machine has {len(names)} GPUs")
        shares = [names[i * gpus : (i + 1) * gpus] for i in range(workers)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    cores = usable_cores()
    if workers * gpus > cores:
        raise UserError(f"{flags}: this machine has {cores} cores")
    return [{"OMP_NUM_THREADS": str(cores // (workers * gpus))}] * workers


def last_error_line(log: Path) -> str:
    """The last error in a step's log, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1].removeprefix("error: ")


def last_count(log: Path) -> str:
    """How far the last progress bar of a step's log is, as in "34/75"; empty if it has none."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        tail = file.read().decode(errors="replace").rpartition("\n$ ")[2]
    return (re.findall(r"\| (\d+/\d+) \[", tail) or [""])[-1]


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
