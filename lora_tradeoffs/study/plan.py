"""Which runs a study has, and the steps that make and measure them, in order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from config import FAMILIES, Settings
from lora_tradeoffs.study.steps import ANALYSES, STAGES, Step, Sweep
from lora_tradeoffs.training import plan
from lora_tradeoffs.training.learning_rates import FACTORS
from lora_tradeoffs.training.run import Run
from training_configs import parse_assignments

# The sample rows are no evidence whatever is measured: the least that fills every figure. By stage
# and family (None: both).
SAMPLE_FLAGS = {
    ("evaluate", None): ("--limit", "16", "--shots", "0"),
    ("evaluate", "dissimilar"): (
        *("--checkpoints", "last", "--splits", "validation", "--limit", "6", "--shots", "0"),
    ),
    ("retention", None): ("--checkpoints", "last", "--limit", "16"),
    ("drift", None): ("--top-k", "4", "8", "16", "32"),
    ("gradients", None): ("--checkpoints", "last", "--batches", "3", "--batch-size", "2"),
}


# ------------------------------------------------------------------------------------- runs


def plan_runs(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs that are asked for, families together, seed by seed. Raises UserError.

    Of a sweep at the default rates: what they stand for is known once the rates are chosen.
    """
    values = parse_assignments(args.set)
    if args.max_steps is not None:
        values["max_steps"] = args.max_steps
    if args.dtype != "auto":
        values["dtype"] = args.dtype
    runs: dict[str, Run] = {}
    for family in args.families or FAMILIES:
        mixes = [FAMILIES[family]]
        if args.single_task_controls:
            mixes += [(task,) for task in FAMILIES[family]]
        arms = _arms(args, settings, family)
        for seed in dict.fromkeys(args.seeds or settings.preset.seeds):
            planned = plan.plan_runs(settings, hidden_size, mixes, arms, [seed], values)
            runs |= {run.name: run for run in planned}
    return list(runs.values())


def _arms(args: argparse.Namespace, settings: Settings, family: str) -> list[tuple[str, int]]:
    """The arms. Ranks that are asked for stand beside full fine-tuning."""
    arms = list(settings.preset.arms[family])
    if args.ranks:
        arms = [("full", 0), *(("lora", rank) for rank in dict.fromkeys(args.ranks))]
    return arms + [("full_qv", 0)] * args.full_qv


def training_extras(args: argparse.Namespace) -> list[str]:
    """Flags that go to multi_task_training.py as they are."""
    extras = [] if args.max_steps is None else ["--max-steps", str(args.max_steps)]
    extras += ["--dtype", args.dtype] if args.dtype != "auto" else []
    return extras + (["--set", *args.set] if args.set else [])


def flags_of(run: Run, args: argparse.Namespace) -> list[str]:
    """The command line that makes the run."""
    config = run.config
    mix = ["--tasks", *config.tasks]
    if config.tasks == FAMILIES[config.family]:
        mix = [f"--{config.family}"]
    arm = {"full": ["--full-finetune"], "full_qv": ["--full-qv"]}.get(config.method)
    arm = arm or ["--lora", str(config.rank)]
    return [*mix, *arm, "--seed", str(config.seed), *training_extras(args)]


# ------------------------------------------------------------------------------------ steps


def plan_steps(args: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> list[Step]:
    """Every step of the stages that are asked for, in the order in which they are begun."""
    tasks = sorted({task for run in runs for task in run.config.tasks})
    steps = [Step("prepare", "prepare", (*tasks, *common_flags(settings)))]
    analyses: list[Step] = []
    for run in runs:
        # measured and deleted before the next one begins: what is left is one run's checkpoints
        before = tuple(s.name for s in analyses) if args.measure_then_delete else ()
        train = _training_step(args, settings, run, ("prepare", *before))
        steps.append(train)
        if args.measure_then_delete:
            own = _analyses(args, settings, [run], f"-{run.name}", (train.name,))
            steps += own
            analyses += own
    if not args.measure_then_delete:
        made = tuple(step.name for step in steps)
        steps += _analyses(args, settings, runs, "", made)
    report = ("report", "report", tuple(common_flags(settings)), ())
    steps.append(Step(*report, tuple(s.name for s in steps)))
    return [step for step in steps if step.stage in (args.only or STAGES)]


def _training_step(
    args: argparse.Namespace, settings: Settings, run: Run, needs: tuple[str, ...]
) -> Step:
    """What trains the run: of a sweep its search, or, of later seeds, at the rate that it chose."""
    flags, sweep = [*flags_of(run, args), *common_flags(settings)], sweep_of(args, settings)
    if sweep is None:
        return Step(f"train-{run.name}", "train", tuple(flags), (run,), needs)
    if run.config.seed == sweep.seed:
        flags += ["--lr-sweep", *map(str, sweep.factors)]
        return Step(f"sweep-{run.arm}", "sweep", tuple(flags), (run,), needs, sweep)
    flags += ["--swept-rates"]
    needs = (*needs, f"sweep-{run.arm}")
    return Step(f"train-{run.name}", "train", tuple(flags), (run,), needs, sweep)


def sweep_of(args: argparse.Namespace, settings: Settings) -> Sweep | None:
    """The search that is asked for, with the first of the seeds."""
    if args.lr_sweep is None:
        return None
    return Sweep((args.seeds or settings.preset.seeds)[0], tuple(args.lr_sweep or FACTORS))


def common_flags(settings: Settings) -> list[str]:
    """What the study runs on; every script takes these."""
    names = ("preset", "study", "model", "data")
    values = (settings.preset.name, settings.study, settings.model, settings.data)
    return [part for name, value in zip(names, values) for part in (f"--{name}", value)]


def _analyses(
    args: argparse.Namespace,
    settings: Settings,
    runs: Sequence[Run],
    suffix: str,
    needs: tuple[str, ...],
) -> list[Step]:
    """The steps that measure these runs.

    Several workers share them; before, one measures the base, with the last checkpoint of a run of
    each family.
    """
    found: list[Step] = []
    sweep = sweep_of(args, settings)
    for stage in ANALYSES:
        by_family = {run.config.family: [] for run in runs}
        for run in runs:
            by_family[run.config.family].append(run)
        own_flags = settings.data == "sample" and any((stage, f) in SAMPLE_FLAGS for f in by_family)
        groups = by_family if own_flags else {None: list(runs)}
        for family, members in groups.items():
            flags = (*_stage_flags(args, settings, stage, family), *common_flags(settings))
            name = f"{stage}{suffix}" + (f"-{family}" if own_flags and not suffix else "")
            before = needs
            # drift spreads matrices over the cores by itself
            shards = 1 if stage == "drift" or suffix else min(args.workers, len(members))
            if shards > 1:
                firsts = tuple({run.config.family: run for run in reversed(members)}.values())
                flags_first = (*flags, "--checkpoints", "last")
                found.append(Step(f"{name}-base", stage, flags_first, firsts, needs, sweep))
                before = (*needs, found[-1].name)
            for shard in range(shards):
                part = tuple(members[shard::shards])
                numbered = f"{name}-{shard + 1}of{shards}" if shards > 1 else name
                found.append(Step(numbered, stage, flags, part, before, sweep))
    return found


def _stage_flags(
    args: argparse.Namespace, settings: Settings, stage: str, family: str | None
) -> tuple[str, ...]:
    flags: tuple[str, ...] = ()
    if settings.data == "sample":
        flags = SAMPLE_FLAGS.get((stage, family)) or SAMPLE_FLAGS.get((stage, None), ())
    if stage in ("evaluate", "retention", "gradients"):
        flags += ("--dtype", args.dtype)
    if args.items and stage in ("evaluate", "retention"):
        flags += ("--limit", str(args.items))
    if stage == "retention" and (args.scale_update or settings.preset.name == "study"):
        flags += ("--scale-update",)
    return flags
