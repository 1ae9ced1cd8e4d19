"""The study: train, evaluate and analyse the whole grid, and end with a report.

    python run_study.py --dry-run       # what is done, what is left, time, disk, memory
    python run_study.py                 # start, or continue where it was stopped
    python run_study.py --preset demo --families similar --ranks 8
    python run_study.py study.yaml      # the study of a file, such as outputs/<study>/study.yaml

Every step is a process of one of the scripts. One that fails is named at the end, the others go on,
and the same command tries it again. The result is outputs/<study>/report.html; study.yaml beside it
says what the study is, and repeats it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import RANKS, Settings, UserError, resolve_settings
from lora_tradeoffs.checkpoints import MANIFEST, checkpoints
from lora_tradeoffs.command_line import (
    Parser,
    add_common_arguments,
    guarded,
    positive_int,
    seed_number,
)
from lora_tradeoffs.files import locked, read_json
from lora_tradeoffs.records import DOCUMENT, read_run
from lora_tradeoffs.study.hypotheses import check_written
from lora_tradeoffs.study.plan import plan_steps
from lora_tradeoffs.study.processes import StepRunner
from lora_tradeoffs.study.same_study import check_study, checked_runs
from lora_tradeoffs.study.steps import ANALYSES, STAGES, DoneTests, Step
from lora_tradeoffs.study.study_file import (
    SETTINGS,
    StudyPlan,
    fields_of_flags,
    is_of_type,
    naming,
    read_study_file,
)
from lora_tradeoffs.study.task_files import check_task_files, write_task_files
from lora_tradeoffs.training.arms import add_adapter_argument, settable_help
from lora_tradeoffs.training.learning_rates import FACTORS
from lora_tradeoffs.training.run import Run

PLANE = "learning_forgetting_plane.png"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=settable_help())
    text = "a study as YAML (docs/study.md); flags below that say what a study is are in it instead"
    parser.add_argument("file", nargs="?", type=Path, metavar="study.yaml", help=text)
    add_common_arguments(parser)
    ranks, factors = (" ".join(f"{n:g}" for n in numbers) for numbers in (RANKS, FACTORS))
    group = parser.add_argument_group("the grid of runs (default: the preset's)")
    add = group.add_argument
    text = "families to train on (default: both), also those of your task files, or tasks as in a+b"
    add("--families", nargs="+", metavar="FAMILY", help=text)
    text = "a family of these tasks, built-in or of your own (docs/tasks.md)"
    add("--tasks", nargs="+", metavar="TASK", help=text)
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
    text = "also measure the last checkpoints with scaled updates (always but in the demo)"
    add("--scale-update", action="store_true", help=text)
    text = "delete all checkpoints of a run but the last once all analyses have measured them"
    add("--measure-then-delete", action="store_true", help=text)
    add = parser.add_argument_group("execution").add_argument
    text = f"run only these stages: {', '.join(STAGES)}"
    add("--only", nargs="+", choices=STAGES, metavar="STAGE", help=text)
    text = "run N steps at a time, each on a GPU of its own or on its share of the cores"
    add("--workers", type=positive_int, default=1, metavar="N", help=text)
    text = """run every step as a job of a cluster's scheduler, by a command that submits a script
        and waits, e.g. "sbatch --wait --gres=gpu:1 -t 8:00:00" (docs/study.md)"""
    add("--launch", metavar="COMMAND", help=text)
    text = "train every run on N GPUs, through accelerate launch"
    add("--gpus-per-run", type=positive_int, default=1, metavar="N", help=text)
    text = "accelerate's configuration for full fine-tuning, e.g. examples/slurm/fsdp2.yaml"
    add("--accelerate-config", type=Path, metavar="FILE", help=text)
    add("--dry-run", action="store_true", help="print the plan and what it needs")
    return parser


# ------------------------------------------------------------------------------ the checks


def read_plan(args: argparse.Namespace) -> tuple[StudyPlan, Settings]:
    """The study of the file or the flags, without what depends on the model. Raises UserError."""
    given = read_study_file(args.file) if args.file else {}
    for name in SETTINGS:
        if getattr(args, name, None) is None:
            setattr(args, name, given.get(name))
    with naming(args.file):
        settings = resolve_settings(args)
    flags = fields_of_flags(args, settings)
    if args.file and flags:
        raise UserError(f"{', '.join(flags)}: {args.file} says what the study is; write it there")
    with naming(args.file):
        study = StudyPlan.of(given or flags, settings)
        check_task_files(given, study, settings)
        for stage, options in study.measure.items():
            check_options(stage, options)
        check_written(study.hypotheses, study.measure, study.families_of)
    if study.measure_then_delete and args.only:
        raise UserError("--measure-then-delete needs every stage: leave --only out")
    return study, settings


def classes_of(stage: str) -> tuple[type, type]:
    """The analysis that measures in a stage, and its options."""
    from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions
    from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions
    from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions
    from lora_tradeoffs.retention.analysis import Retention, RetentionOptions

    return {
        "evaluate": (Adaptation, AdaptationOptions),
        "retention": (Retention, RetentionOptions),
        "drift": (DriftAnalysis, DriftOptions),
        "gradients": (GradientAnalysis, GradientOptions),
    }[stage]


def options_of(stage: str, options: Mapping[str, Any]) -> Any:
    """The options of the stage's analysis: all but which checkpoints it measures."""
    return classes_of(stage)[1](**{k: v for k, v in options.items() if k != "checkpoints"})


def check_options(stage: str, options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that the stage's analysis has not, or a wrong value."""
    kinds = {**typing.get_type_hints(classes_of(stage)[1]), "checkpoints": tuple[str, ...]}
    for name, value in options.items():
        if name not in kinds:
            raise UserError(f"measure: {stage} has no {name!r:.60}; options: {', '.join(kinds)}")
        if not is_of_type(value, kinds[name]):
            raise UserError(f"measure: {stage}: {name} is {value!r:.60}, not {kinds[name]}")
    made = options_of(stage, options)
    if stage == "retention" and "tasks" in options:
        from lora_tradeoffs.retention.benchmark_tasks import task_manager

        task_manager(made.tasks)


# ------------------------------------------------------------------------------- the study


def check_retention(settings: Settings, steps: Sequence[Step]) -> None:
    """Raise UserError if the steps train and then measure what cannot be had."""
    from lora_tradeoffs.retention.benchmark_tasks import check_sources

    options = [options_of(s.stage, s.options) for s in steps if s.stage == "retention"]
    if options and any(step.stage == "train" for step in steps):
        check_sources(settings, options[0].tasks, options[0].num_fewshot)


def unmeasured_runs(
    settings: Settings, stage: str, options: Mapping[str, Any], runs: Sequence[str]
) -> set[str]:
    """Names of these runs, and "base", of which the stage's analysis has a measurement pending.

    The precision `auto` is what it was where they were trained: on a cluster not on this host.
    """
    from lora_tradeoffs.measuring.loop import pending
    from lora_tradeoffs.measuring.subjects import find_subjects, in_trained_form
    from lora_tradeoffs.models.base import prepare_base

    settings, base = in_trained_form(settings, runs), prepare_base(settings)
    analysis = classes_of(stage)[0](settings, base, options_of(stage, options))
    analysis.trusts_records = True
    if options.get("dtype") == "auto":
        trained = read_run(settings.runs_dir / runs[0], "compared")
        analysis.bf16 = trained["compared"]["dtype"] == "bf16"
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
    study, settings = read_plan(args)
    import functools

    from filelock import Timeout

    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.study.estimates import print_plan

    runs = checked_runs(study, settings, args.file)
    steps = plan_steps(study, settings, runs, args.workers, args.only or tuple(STAGES))
    print(settings.headline(pick_device()), flush=True)
    tests = DoneTests(settings, functools.partial(unmeasured_runs, settings))
    if args.dry_run:
        print_plan(study, settings, runs, steps, _done(tests, steps), args.workers)
        print(f"\n{study.text()}", end="")
        return 0
    folder = settings.output_dir / "outputs" / settings.study
    distributed = args.gpus_per_run, args.accelerate_config
    runner = StepRunner(settings, args.workers, args.launch, *distributed)
    try:
        with locked(folder / ".study.lock", timeout=0):  # results.py has its own, ".lock"
            done = _done(tests, steps)
            check_retention(settings, [step for step in steps if step.name not in done])
            check_study(study, settings, runs)
            write_task_files(study, settings)
            return run_steps(study, settings, steps, done, runner)
    except Timeout:
        raise UserError(f"another run_study.py is running the study {settings.study!r}") from None


def _done(tests: DoneTests, steps: Sequence[Step]) -> set[str]:
    done = tests.done_steps(steps)
    print(f"{len(steps)} steps: {len(done)} done, {len(steps) - len(done)} to run", flush=True)
    return done


def run_steps(
    study: StudyPlan, settings: Settings, steps: Sequence[Step], done: set[str], runner: StepRunner
) -> int:
    """Run the steps that are not done, and say how the study stands; the exit code."""
    waiting = [step for step in steps if step.name not in done]
    ended = set(done)

    def after(step: Step) -> None:
        ended.add(step.name)
        if study.measure_then_delete and step.stage in ANALYSES:
            for run in step.runs:
                delete_measured(run, steps, ended)

    if study.measure_then_delete:  # what was measured before the last start ended
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
