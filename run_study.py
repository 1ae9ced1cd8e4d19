"""The study: train, evaluate and analyse the whole grid, and end with a report.

    python run_study.py --dry-run       # what is done, what is left, time, disk, memory
    python run_study.py                 # go on from where it was stopped
    python run_study.py --preset demo --families similar --ranks 8

Every step is a process of one of the scripts. One that fails is named at the end, the others go on,
and the same command tries it again. Everything ends in outputs/<study>/report.html.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence

from config import (
    FAMILIES,
    RANKS,
    Parser,
    Settings,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from lora_tradeoffs.files import checkpoints, read_json, write_json
from lora_tradeoffs.study.plan import plan_runs, plan_steps
from lora_tradeoffs.study.processes import Conductor
from lora_tradeoffs.study.steps import ANALYSES, STAGES, Stamps, Step, steps_done
from lora_tradeoffs.training.learning_rates import FACTORS
from lora_tradeoffs.training.run import Run
from training_configs import settable_help

PLANE = "learning_forgetting_plane.png"
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
    grid.add_argument(
        "--lr-sweep",
        nargs="*",
        type=float,
        metavar="FACTOR",
        help="search every arm's learning rate with the first seed (at factors of its default,"
        f" {' '.join(f'{f:g}' for f in FACTORS)} or those given, and further where needed), train"
        " the other seeds at the one that it chose, and measure them all",
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


# ------------------------------------------------------------------------------- the study


def check_study(args: argparse.Namespace, settings: Settings, stamps: Stamps) -> None:
    """Write down what the study is, or compare. Raises UserError with the fields that differ."""
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
    if args.lr_sweep is not None and any(v.startswith("learning_rate=") for v in args.set):
        raise UserError("--lr-sweep and --set learning_rate both say the rate; leave one out")
    if args.measure_then_delete and args.only:
        raise UserError("--measure-then-delete measures in every stage; leave --only out")


def check_runs(runs: Sequence[Run], settings: Settings) -> None:
    """Raise UserError for a rank above the base's matrices, before anything is begun."""
    from lora_tradeoffs.models.base import empty_model, read_model_config
    from lora_tradeoffs.training.costs import trainable_shapes

    model = empty_model(read_model_config(settings), settings.model)
    for run in runs:
        trainable_shapes(model, run.config)


def delete_measured(run: Run, steps: Sequence[Step], stamps: Stamps) -> None:
    """Remove all checkpoints of a run but the last, if all that measures them has ended well."""
    own = [s for s in steps if s.stage in ANALYSES and run in s.runs]
    if not run.is_done or not all(stamps.is_done(step) for step in own):
        return
    for checkpoint in checkpoints(run.folder)[:-1]:
        (checkpoint / "manifest.json").unlink()  # first, so that what is left is not whole
        shutil.rmtree(checkpoint)


def print_tables(stamps: Stamps) -> None:
    """The scores and what was kept, at the last checkpoints."""
    from lora_tradeoffs.tables.scores import adaptation_table, retention_table

    for stage, table in (("evaluate", adaptation_table), ("retention", retention_table)):
        path = stamps.documents[stage]
        if path.is_file():
            print(f"\n{ANALYSES[stage]}\n{table(read_json(path)['records'])}")


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    settings = resolve_settings(args)
    from filelock import FileLock, Timeout

    from lora_tradeoffs.models.base import read_model_config

    stamps = Stamps(settings)
    runs = plan_runs(args, settings, read_model_config(settings).hidden_size)
    steps = plan_steps(args, settings, runs)
    if args.dry_run:
        from lora_tradeoffs.hardware import pick_device
        from lora_tradeoffs.study.estimates import print_plan

        print(settings.headline(pick_device()), flush=True)
        print_plan(args, settings, stamps, runs, steps)
        return 0
    if not all(stamps.is_done(step) for step in steps if step.stage in ("sweep", "train")):
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
    done = steps_done(steps, stamps)
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
