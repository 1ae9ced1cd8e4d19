"""The study: train, evaluate and analyse the whole grid, and end with a report.

    python run_study.py --dry-run       # what is done, what is left, time, disk, memory
    python run_study.py                 # start, or continue where it was stopped
    python run_study.py --preset demo --families similar --ranks 8

Every step is a process of one of the scripts. One that fails is named at the end, the others go on,
and the same command tries it again. The result is outputs/<study>/report.html.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import FAMILIES, RANKS, Settings, UserError, resolve_settings
from lora_tradeoffs.checkpoints import MANIFEST, checkpoints
from lora_tradeoffs.command_line import (
    Parser,
    add_common_arguments,
    guarded,
    positive_int,
    seed_number,
)
from lora_tradeoffs.files import read_json, write_json
from lora_tradeoffs.records import DOCUMENT, STUDY, run_fields
from lora_tradeoffs.study.plan import plan_runs, plan_steps
from lora_tradeoffs.study.processes import StepRunner
from lora_tradeoffs.study.steps import ANALYSES, STAGES, DoneTests, Step
from lora_tradeoffs.tables.arms import Arm, arm_of
from lora_tradeoffs.training.arms import add_adapter_argument, settable_help
from lora_tradeoffs.training.learning_rates import FACTORS
from lora_tradeoffs.training.run import Run
from lora_tradeoffs.training.run_record import changed

PLANE = "learning_forgetting_plane.png"
# What makes a study the same one; the grid itself may grow.
FIXED = ("preset", "model", "data", "max_steps", "set", "dtype", "items", "measure_then_delete")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=settable_help())
    add_common_arguments(parser)
    ranks, factors = (" ".join(f"{n:g}" for n in numbers) for numbers in (RANKS, FACTORS))
    group = parser.add_argument_group("the grid of runs (default: the preset's)")
    add = group.add_argument
    add("--families", nargs="+", choices=FAMILIES, help="families of tasks to train on")
    add("--ranks", nargs="+", type=int, metavar="R", help=f"LoRA ranks beside full, e.g. {ranks}")
    add("--full-qv", action="store_true", help="also train q_proj and v_proj without LoRA")
    add_adapter_argument(group)
    add("--seeds", nargs="+", type=seed_number, metavar="S", help="seeds of every configuration")
    text = "also train every configuration on each task alone (needed for transfer)"
    add("--single-task-controls", action="store_true", help=text)
    text = f"""search the learning rate of every configuration with the first seed, from these
        factors of its default ({factors}), and train the other seeds at the rate that it chose"""
    add("--lr-sweep", nargs="*", type=float, metavar="FACTOR", help=text)
    add = parser.add_argument_group("training and measuring").add_argument
    add("--max-steps", type=positive_int, metavar="N", help="train N optimizer steps, not epochs")
    text = "precision: bf16 (autocast), fp32, or auto (default), which is bf16 where it is fast"
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=text)
    text = "set fields of the training configuration (listed below)"
    add("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help=text)
    add("--items", type=positive_int, metavar="N", help="measure N items of a task or benchmark")
    text = "also measure the last checkpoints with scaled updates (preset study: always)"
    add("--scale-update", action="store_true", help=text)
    text = "delete all checkpoints of a run but the last once all analyses have measured them"
    add("--measure-then-delete", action="store_true", help=text)
    add = parser.add_argument_group("execution").add_argument
    text = f"run only these stages: {', '.join(STAGES)}"
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=text)
    text = "run N steps at a time, each on a GPU of its own or on its share of the cores"
    add("--workers", type=positive_int, default=1, metavar="N", help=text)
    add("--dry-run", action="store_true", help="print the plan and what it needs")
    return parser


# ------------------------------------------------------------------------------ the checks


def folder_digests(settings: Settings) -> dict[str, str]:
    """Digests of the model's weights and of the rows, where these are in folders of the user's."""
    from lora_tradeoffs.data.sources import source_digest
    from lora_tradeoffs.models.base import prepare_base

    digests = {}
    if Path(settings.model).expanduser().is_dir():
        digests["model"] = prepare_base(settings).digest
    if settings.data not in ("hub", "sample"):
        digests["data"] = source_digest(Path(settings.data))
    return digests


def check_study(args: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> None:
    """Write what defines the study, or compare. Raises UserError with the fields that differ.

    The same weights or rows in another folder are no difference. `arms`, by family, grow with the
    grid: the report's confirmatory tests are those of all of them.
    """
    mixes = [run for run in runs if run.config.tasks == FAMILIES[run.config.family]]
    arms = {f: {planned_arm(run) for run in mixes if run.config.family == f} for f in FAMILIES}
    request = {name: getattr(args, name, None) for name in FIXED}
    request |= {"preset": settings.preset.name, "model": settings.model, "data": settings.data}
    path = settings.output_dir / "outputs" / settings.study / "study.json"
    before = read_json(path, STUDY) if path.is_file() else dict(request)
    request["digests"] = before.get("digests", {})
    if not path.is_file():
        request["digests"] = folder_digests(settings)
    if any(request[name] != before[name] for name in ("model", "data")):
        here = folder_digests(settings).items()
        same = [name for name, digest in here if request["digests"].get(name) == digest]
        request |= {name: before[name] for name in same}
    for family, planned in before.get("arms", {}).items():
        arms[family] |= {Arm(**fields) for fields in planned}
    fixed = [{name: record.get(name) for name in FIXED} for record in (before, request)]
    if changes := changed(*fixed):
        raise UserError(
            f"study {settings.study!r} was started with different settings: {'; '.join(changes)}."
            " Use the same, or start another with --study NAME"
        )
    request["arms"] = {
        family: [_arm_fields(arm) for arm in sorted(of_family)]
        for family, of_family in arms.items()
    }
    if request != before:
        write_json(path, request)


def planned_arm(run: Run) -> Arm:
    """The arm by which the report knows the run."""
    record = run.config.record() | {"run": run.name, "task": ""}
    return arm_of(record | run_fields(run.name, record))


def _arm_fields(arm: Arm) -> dict[str, Any]:
    """The fields of an arm that are not the default's, for JSON."""
    default = Arm(arm.method)
    return {
        name: value
        for name, value in vars(arm).items()
        if value != getattr(default, name) or name in ("method", "rank")
    }


def check_arguments(args: argparse.Namespace) -> None:
    if args.lr_sweep is not None and any(v.startswith("learning_rate=") for v in args.set):
        raise UserError("--lr-sweep and --set learning_rate both set the rate: leave one out")
    if args.measure_then_delete and args.only:
        raise UserError("--measure-then-delete needs every stage: leave --only out")


def check_ranks(runs: Sequence[Run], settings: Settings) -> None:
    """Raise UserError for a rank above the base's matrices, before any step starts."""
    from lora_tradeoffs.models.base import empty_model, read_model_config
    from lora_tradeoffs.training.costs import trainable_shapes

    model = empty_model(read_model_config(settings), settings.model)
    for run in runs:
        trainable_shapes(model, run.config)


# ------------------------------------------------------------------------------- the study


def unmeasured_runs(
    settings: Settings, stage: str, options: Mapping[str, Any], runs: Sequence[str]
) -> set[str]:
    """Names of these runs, and "base", of which the stage's analysis has a measurement pending."""
    from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions
    from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions
    from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions
    from lora_tradeoffs.measuring.loop import pending
    from lora_tradeoffs.measuring.subjects import find_subjects
    from lora_tradeoffs.models.base import prepare_base
    from lora_tradeoffs.retention.analysis import Retention, RetentionOptions

    analysis_class, options_class = {
        "evaluate": (Adaptation, AdaptationOptions),
        "retention": (Retention, RetentionOptions),
        "drift": (DriftAnalysis, DriftOptions),
        "gradients": (GradientAnalysis, GradientOptions),
    }[stage]
    fields = {name: value for name, value in options.items() if name != "checkpoints"}
    base = prepare_base(settings)
    analysis = analysis_class(settings, base, options_class(**fields))
    analysis.trusts_records = True
    subjects = find_subjects(settings, base, runs, options.get("checkpoints", ("all",)))
    return {unit.subject.run for unit in pending(analysis, analysis.units(subjects))}


def delete_measured(run: Run, steps: Sequence[Step], ended: set[str]) -> None:
    """Remove all checkpoints of a run but the last, once all steps that measure it have ended."""
    measuring = {s.name for s in steps if s.stage in ANALYSES and run in s.runs}
    if run.is_done and measuring <= ended:
        for checkpoint in checkpoints(run.folder)[:-1]:
            (checkpoint / MANIFEST).unlink()  # first, so that what is left is not whole
            shutil.rmtree(checkpoint)


def print_tables(settings: Settings) -> None:
    """Adaptation and retention at the last checkpoints."""
    from lora_tradeoffs.tables.scores import adaptation_table, retention_table

    for name, table in (("adaptation", adaptation_table), ("retention", retention_table)):
        path = settings.document(name)
        if path.is_file():
            print(f"\n{name}\n{table(read_json(path, DOCUMENT)['records'])}")


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    settings = resolve_settings(args)
    import functools

    from filelock import FileLock, Timeout

    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import read_model_config
    from lora_tradeoffs.study.estimates import print_plan

    runs = plan_runs(args, settings, read_model_config(settings).hidden_size)
    steps = plan_steps(args, settings, runs)
    print(settings.headline(pick_device()), flush=True)
    tests = DoneTests(settings, functools.partial(unmeasured_runs, settings))
    if args.dry_run:
        print_plan(args, settings, runs, steps, _done(tests, steps))
        return 0
    folder = settings.output_dir / "outputs" / settings.study
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".study.lock")  # results.py has its own, ".lock"
    try:
        with lock.acquire(timeout=0):
            check_study(args, settings, runs)
            return run_steps(args, settings, steps, _done(tests, steps))
    except Timeout:
        raise UserError(f"another run_study.py is running the study {settings.study!r}") from None


def _done(tests: DoneTests, steps: Sequence[Step]) -> set[str]:
    done = tests.done_steps(steps)
    print(f"{len(steps)} steps: {len(done)} done, {len(steps) - len(done)} to run", flush=True)
    return done


def run_steps(
    args: argparse.Namespace, settings: Settings, steps: Sequence[Step], done: set[str]
) -> int:
    """Run the steps that are not done, and say how the study stands; the exit code."""
    waiting = [step for step in steps if step.name not in done]
    if any(step.stage in ("sweep", "train") for step in waiting):
        check_ranks([run for step in waiting for run in step.planned_runs], settings)
    runner, ended = StepRunner(settings, args.workers), set(done)

    def after(step: Step) -> None:
        ended.add(step.name)
        if args.measure_then_delete and step.stage in ANALYSES:
            for run in step.runs:
                delete_measured(run, steps, ended)

    if args.measure_then_delete:  # what was measured before the last start ended
        for run in {run.name: run for step in steps for run in step.runs}.values():
            delete_measured(run, steps, ended)
    runner.run(waiting, after)
    if runner.signals:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 128 + runner.signals[0]
    print_tables(settings)
    for name, message in runner.failed.items():
        print(f"error: {name}: {message} (log: {runner.logs / f'{name}.log'})", file=sys.stderr)
    folder = settings.output_dir / "outputs" / settings.study
    plane, report = folder / "figures" / PLANE, folder / "report.html"
    for name, path in (("learning-forgetting plane", plane), ("report", report)):
        if path.is_file():
            print(f"{name}: {path}")
    if runner.failed:
        failed = f"{len(runner.failed)} of {len(steps)} steps failed"
        print(f"{failed}; fix them and run the same command again", file=sys.stderr)
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
