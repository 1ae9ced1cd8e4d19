"""The study: train, evaluate and analyse the whole grid, and end with a report.

    python run_study.py --dry-run       # what is done, what is left, time, disk, memory
    python run_study.py                 # go on from where it was stopped
    python run_study.py --preset demo --families similar --ranks 8

Every step is a process of one of the scripts. One that fails is named at the end, the others go on,
and the same command tries it again. Everything ends in outputs/<study>/report.html.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import (
    FAMILIES,
    RANKS,
    ROOT,
    Parser,
    Settings,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from study_plan import ANALYSES, DOCUMENTS, STAGES, Stamps, Step, plan_runs, plan_steps
from training_configs import settable_help
from training_run import Run

PLANE = "learning_forgetting_plane.png"
POLL = 0.05  # seconds between two looks at the processes
# What makes a study the same one; the grid itself may grow.
KEPT = ("preset", "model", "data", "max_steps", "set", "dtype", "items", "measure_then_delete")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train, evaluate and analyse the whole grid, then write the report.",
        epilog="fields for --set: " + settable_help(),
    )
    add_common_arguments(parser)
    grid = parser.add_argument_group("the grid (default: the preset's)")
    grid.add_argument("--families", nargs="+", choices=FAMILIES)
    grid.add_argument(
        "--ranks", nargs="+", type=int, metavar="R", help=f"beside full (the study's: {RANKS})"
    )
    grid.add_argument("--full-qv", action="store_true", help="q_proj and v_proj, dense, too")
    grid.add_argument("--seeds", nargs="+", type=int, metavar="S")
    grid.add_argument(
        "--single-task-controls", action="store_true", help="every arm on each task alone, too"
    )
    run = parser.add_argument_group("the runs and what is measured of them")
    run.add_argument("--max-steps", type=int, help="optimizer steps in place of epochs")
    run.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    run.add_argument("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE")
    run.add_argument("--items", type=int, help="measure at most N items a task and benchmark")
    run.add_argument(
        "--scale-update", action="store_true", help="measure scaled updates (in the study: always)"
    )
    run.add_argument(
        "--measure-then-delete",
        action="store_true",
        help="keep the last checkpoint of a run alone once all are measured",
    )
    how = parser.add_argument_group("how it is run")
    how.add_argument("--only", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    how.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes at a time, a GPU each"
    )
    how.add_argument("--dry-run", action="store_true", help="print the plan and what it needs")
    return parser


# ------------------------------------------------------------------------------- processes


@dataclass
class Running:
    """A step that is under way."""

    step: Step
    process: subprocess.Popen
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

    def carry_out(self, steps: Sequence[Step], done: set[str], after: Any) -> None:
        """Begin each step when those that it needs are over; `after(step)` follows a good end."""
        from tqdm import tqdm

        waiting = [step for step in steps if step.name not in done]
        planned = {step.name for step in waiting}
        self.logs.mkdir(parents=True, exist_ok=True)
        before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=len(waiting), unit="step") as progress:
                while (waiting and not self.signals) or self.running:
                    ready = [s for s in waiting if not planned & set(s.needs)]
                    while ready and len(self.running) < self.workers and not self.signals:
                        step = ready.pop(0)
                        waiting.remove(step)
                        self._begin(step)
                        progress.set_description(", ".join(r.step.name for r in self.running))
                    for run in [r for r in self.running if r.process.poll() is not None]:
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
            run.process.send_signal(signal.SIGKILL if self.signals else signal.SIGINT)
        self.signals.append(number)

    def _begin(self, step: Step) -> None:
        slots = set(range(self.workers)) - {r.slot for r in self.running}
        slot, log = min(slots), self.logs / f"{step.name}.log"
        command = [sys.executable, "-u", str(ROOT / "stage_process.py"), step.script]
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ python {step.script}.py {' '.join(step.arguments())}\n")
            file.flush()
            process = subprocess.Popen(
                [*command, *step.arguments()],
                stdin=subprocess.PIPE,  # it ends with this process
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.devices[slot]},
                start_new_session=True,  # Ctrl-C reaches it through this process alone
            )
        units = self.stamps.units(step)
        self.running.append(Running(step, process, log, time.monotonic(), units, slot))

    def _end(self, run: Running, after: Any) -> str:
        """Note how it ended; a line that says so."""
        step, seconds, code = run.step, time.monotonic() - run.begun, run.process.returncode
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


# ------------------------------------------------------------------------------- the study


def check_study(args: argparse.Namespace, settings: Settings, stamps: Stamps) -> None:
    """Write down what the study is, or compare. Raises UserError with the fields that differ."""
    from checkpoint_utils import read_json, write_json

    asked = {name: getattr(args, name, None) for name in KEPT}
    asked |= {"preset": settings.preset.name, "model": settings.model, "data": settings.data}
    path = stamps.study / "study.json"
    if not path.is_file():
        write_json(path, asked)
        return
    before = read_json(path)
    different = [
        f"{name} is {asked[name]!r} and was {before.get(name)!r}"
        for name in KEPT
        if asked[name] != before.get(name)
    ]
    if different:
        raise UserError(
            f"the study {settings.study!r} was begun otherwise: {'; '.join(different)}. Ask for the"
            " same, or begin another with --study NAME"
        )


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("workers", "items", "max_steps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} takes at least 1")
    if args.measure_then_delete and args.only:
        raise UserError("--measure-then-delete measures in every stage; leave --only out")


def check_runs(runs: Sequence[Run], settings: Settings) -> None:
    """Raise UserError for a rank above the base's matrices, before anything is begun."""
    from checkpoint_utils import empty_model, read_model_config
    from training_costs import trainable_shapes

    model = empty_model(read_model_config(settings), settings.model)
    for run in runs:
        trainable_shapes(model, run.config)


def delete_measured(run: Run, steps: Sequence[Step], stamps: Stamps) -> None:
    """Remove all checkpoints of a run but the last, if all that measures them has ended well."""
    from checkpoint_utils import checkpoints

    own = [s for s in steps if s.stage in ANALYSES and run in s.runs]
    if not run.is_done or not all(stamps.is_done(step) for step in own):
        return
    for checkpoint in checkpoints(run.folder)[:-1]:
        (checkpoint / "manifest.json").unlink()  # first, so that what is left is not whole
        shutil.rmtree(checkpoint)


def print_tables(stamps: Stamps) -> None:
    """The scores and what was kept, at the last checkpoints."""
    import eval
    import retention_eval
    from checkpoint_utils import read_json

    for stage, script in (("evaluate", eval), ("retention", retention_eval)):
        path = stamps.places[stage] / f"{DOCUMENTS[stage]}.json"
        if path.is_file():
            print(f"\n{DOCUMENTS[stage]}\n{script.table(read_json(path)['records'])}")


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    settings = resolve_settings(args)
    from filelock import FileLock, Timeout

    from checkpoint_utils import read_model_config

    stamps = Stamps(settings)
    runs = plan_runs(args, settings, read_model_config(settings).hidden_size)
    steps = plan_steps(args, settings, runs)
    if args.dry_run:
        from run_records import pick_device
        from study_estimates import print_plan

        print(settings.headline(pick_device()), flush=True)
        print_plan(args, settings, stamps, runs, steps)
        return 0
    if not all(stamps.is_done(step) for step in steps if step.stage == "train"):
        check_runs(runs, settings)
    print(settings.headline("as each step says"), flush=True)
    stamps.study.mkdir(parents=True, exist_ok=True)
    lock = FileLock(stamps.study / ".study.lock")  # results.py has its own, ".lock"
    try:
        with lock.acquire(timeout=0):
            check_study(args, settings, stamps)
            return conduct(args, settings, stamps, steps)
    except Timeout:
        raise UserError(
            f"another run_study.py is at work on the study {settings.study!r}"
        ) from None


def conduct(
    args: argparse.Namespace, settings: Settings, stamps: Stamps, steps: Sequence[Step]
) -> int:
    """Carry out what is left; the exit code."""
    done = {step.name for step in steps if stamps.is_done(step)}
    left = [step for step in steps if step.name not in done]
    if left and left[0].stage != "report":  # it reads what they make
        done -= {step.name for step in steps if step.stage == "report"}
    print(f"{len(steps)} steps, {len(done)} of them are done", flush=True)
    conductor = Conductor(settings, stamps, args.workers)

    def after(step: Step) -> None:
        if args.measure_then_delete and step.stage in ANALYSES:
            for run in step.runs:
                delete_measured(run, steps, stamps)

    conductor.carry_out(steps, done, after)
    if conductor.signals:
        print("interrupted; run the same command to go on", file=sys.stderr)
        return 128 + conductor.signals[0]
    print_tables(stamps)
    for name, message in conductor.failed.items():
        print(f"error: {name}: {message} (log: {conductor.logs / f'{name}.log'})", file=sys.stderr)
    plane, report = stamps.study / "figures" / PLANE, stamps.study / "report.html"
    for name, path in (("the learning-forgetting plane", plane), ("report", report)):
        if path.is_file():
            print(f"{name}: {path}")
    if conductor.failed:
        count = len(conductor.failed)
        print(f"{count} of {len(steps)} steps failed; mend them and run it again", file=sys.stderr)
    return 1 if conductor.failed else 0


if __name__ == "__main__":
    sys.exit(main())
