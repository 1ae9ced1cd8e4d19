"""The processes of a study: several side by side, their ends noted, all ended by one signal."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from config import Settings, UserError
from lora_tradeoffs.study import stage_process
from lora_tradeoffs.study.steps import Stamps, Step

POLL = 0.05  # seconds between two looks at the processes


@dataclass
class Running:
    """A step that is under way."""

    step: Step
    process: BaseProcess
    log: Path
    begun: float
    units: int
    slot: int


class Conductor:
    """Carries out steps, `workers` at a time, and notes how they ended."""

    def __init__(self, settings: Settings, stamps: Stamps, workers: int) -> None:
        self.settings, self.stamps, self.workers = settings, stamps, workers
        self.logs = settings.logs_dir / "steps"
        self.devices = devices_for(workers)
        self.running: list[Running] = []
        self.failed: dict[str, str] = {}  # step: what it said
        self.signals: list[int] = []

    def carry_out(
        self, steps: Sequence[Step], done: set[str], after: Callable[[Step], None]
    ) -> None:
        """Begin each step when those that it needs are over; `after(step)` follows a good end."""
        from tqdm import tqdm

        waiting = [step for step in steps if step.name not in done]
        planned = {step.name for step in waiting}
        self.logs.mkdir(parents=True, exist_ok=True)
        context = stage_process.context() if waiting else None
        before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=len(waiting), unit="step") as progress:
                while (waiting and not self.signals) or self.running:
                    ready = [s for s in waiting if not planned & set(s.needs)]
                    while ready and len(self.running) < self.workers and not self.signals:
                        step = ready.pop(0)
                        waiting.remove(step)
                        self._begin(step, context)
                        progress.set_description(", ".join(r.step.name for r in self.running))
                    for run in [r for r in self.running if not r.process.is_alive()]:
                        self.running.remove(run)
                        planned.discard(run.step.name)
                        tqdm.write(self._end(run, after))
                        progress.update()
                    time.sleep(POLL)
        finally:
            for run in self.running:
                run.process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        """The first signal lets the processes end well (a run saves a checkpoint)."""
        print("\nending: waiting for what is under way (again: at once)", flush=True)
        for run in self.running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(run.process.pid, signal.SIGKILL if self.signals else signal.SIGINT)
        self.signals.append(number)

    def _begin(self, step: Step, context: BaseContext) -> None:
        slots = set(range(self.workers)) - {r.slot for r in self.running}
        slot, log = min(slots), self.logs / f"{step.name}.log"
        arguments = step.arguments()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python {_command(step.script)} {' '.join(arguments)}\n")
        environment = {**os.environ, **self.devices[slot]}
        process = context.Process(
            target=stage_process.run, args=(step.script, arguments, log, environment)
        )
        process.start()
        units = self.stamps.units(step)
        self.running.append(Running(step, process, log, time.monotonic(), units, slot))

    def _end(self, run: Running, after: Callable[[Step], None]) -> str:
        """Note how it ended; a line that says so."""
        step, seconds, code = run.step, time.monotonic() - run.begun, run.process.exitcode
        if code == 0:
            new = self.stamps.units(step) - run.units
            self.stamps.write(step, self.settings, seconds, new)
            after(step)
            return f"{step.name}: {duration(seconds)}"
        if self.signals:
            return f"{step.name}: interrupted after {duration(seconds)}"
        message = last_words(run.log)
        self.stamps.write_error(step, code, run.log, message)
        self.failed[step.name] = message
        return f"{step.name}: failed after {duration(seconds)}: {message} (see {run.log})"


def _command(script: str) -> str:
    return f"-m {script}" if "." in script else f"{script}.py"


def devices_for(workers: int) -> list[dict[str, str]]:
    """Environment of every worker: a GPU of its own, or its share of the cores.

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
            raise UserError(f"--workers {workers}: there are {len(names)} GPUs")
        return [{"CUDA_VISIBLE_DEVICES": name} for name in names[:workers]]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if workers > cores:
        raise UserError(f"--workers {workers}: there are {cores} cores")
    return [{"OMP_NUM_THREADS": str(cores // workers)}] * workers


def last_words(log: Path) -> str:
    """What a process said last that was no progress: its error, where there is one."""
    text = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.rpartition("\n$ ")[2].splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1].removeprefix("error: ")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
