"""Which runs a study has, and the steps that make and measure them, in order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from config import FAMILIES, Settings
from lora_tradeoffs.study.steps import ANALYSES, STAGES, Step, Sweep
from lora_tradeoffs.training import plan
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.learning_rates import FACTORS, run_options
from lora_tradeoffs.training.run import Run
from training_configs import parse_assignments

# The sample rows are no evidence, whatever is measured on them: as little as fills every figure.
# By stage and family (None: both).
SAMPLE_OPTIONS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("evaluate", None): {"limit": 16, "shots": 0},
    ("evaluate", "dissimilar"): {
        **{"checkpoints": ("last",), "splits": ("validation",), "limit": 4, "shots": 0},
    },
    ("retention", None): {"checkpoints": ("last",), "limit": 16, "documents": 4},
    ("drift", None): {"top_k": (4, 8, 16, 32)},
    ("gradients", None): {"checkpoints": ("last",), "batches": 2, "batch_size": 2},
}


# ------------------------------------------------------------------------------------- runs


def plan_runs(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs that the flags ask for, by family, seed and arm. Raises UserError.

    In a sweep these are at the default rates: the others are known once the rates are chosen.
    """
    values = parse_assignments(args.set)
    if args.max_steps is not None:
        values["max_steps"] = args.max_steps
    if args.dtype != "auto":
        values["dtype"] = args.dtype
    runs: dict[str, Run] = {}
    for family in args.families or FAMILIES:
        mixes = {FAMILIES[family]: values}
        if args.single_task_controls:
            controls = plan.control_values(settings, FAMILIES[family], values)
            mixes |= {(task,): values | own for task, own in controls.items()}
        words = ["full", *(f"lora:{rank}" for rank in args.ranks)] if args.ranks else []
        words = words + args.adapter or [*settings.preset.arms[family]]
        arms = [ArmSpec.parse(word) for word in words + ["full_qv"] * args.full_qv]
        for seed in dict.fromkeys(args.seeds or settings.preset.seeds):
            for mix, changed in mixes.items():
                planned = plan.plan_runs(settings, hidden_size, [mix], arms, [seed], changed)
                runs |= {run.name: run for run in planned}
    return list(runs.values())


def sweep_of(args: argparse.Namespace, settings: Settings) -> Sweep | None:
    """The learning-rate search that the flags ask for, with the first of the seeds."""
    if args.lr_sweep is None:
        return None
    return Sweep((args.seeds or settings.preset.seeds)[0], tuple(args.lr_sweep or FACTORS))


# ------------------------------------------------------------------------------------ steps


def plan_steps(args: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> list[Step]:
    """Every step of the stages that are asked for, in the order in which they start."""
    sweep = sweep_of(args, settings)
    steps = [Step("prepare", "prepare", {}, tuple(runs))]
    analyses: list[Step] = []
    for run in runs:
        # measured and deleted before the next one starts: the disk holds one run's checkpoints
        before = tuple(s.name for s in analyses) if args.measure_then_delete else ()
        steps.append(_training_step(run, ("prepare", *before), sweep))
        if args.measure_then_delete:
            needs = (steps[-1].name,)
            analyses += (new := _analyses(args, settings, [run], f"-{run.name}", needs, sweep))
            steps += new
    if not args.measure_then_delete:
        steps += _analyses(args, settings, runs, "", tuple(step.name for step in steps), sweep)
    steps.append(Step("report", "report", {}, needs=tuple(step.name for step in steps)))
    return [step for step in steps if step.stage in (args.only or STAGES)]


def _training_step(run: Run, needs: tuple[str, ...], sweep: Sweep | None) -> Step:
    """What trains the run: in a sweep its search, or, with later seeds, at the chosen rate."""
    config = run.config
    options = run_options(run) | {"seed": config.seed}
    name, stage = f"train-{run.name}", "train"
    if sweep is not None and config.seed == sweep.seed:
        name, stage = f"sweep-{run.arm}", "sweep"
        options["lr_sweep"] = sweep.factors
    elif sweep is not None:
        needs = (*needs, f"sweep-{run.arm}")
        options["swept_rates"] = True
    return Step(name, stage, options, (run,), needs, sweep)


def _analyses(
    args: argparse.Namespace,
    settings: Settings,
    runs: Sequence[Run],
    suffix: str,
    needs: tuple[str, ...],
    sweep: Sweep | None,
) -> list[Step]:
    """The steps that measure these runs.

    Several workers share them, after one has measured the base, with the last checkpoint of a run
    of each family.
    """
    steps: list[Step] = []
    families = list(dict.fromkeys(run.config.family for run in runs))
    for stage in ANALYSES:
        by_family = settings.data == "sample" and any(
            (stage, f) in SAMPLE_OPTIONS for f in families
        )
        for family in families if by_family else [None]:
            members = [run for run in runs if family in (None, run.config.family)]
            options = analysis_options(args, settings, stage, family)
            name = f"{stage}{suffix}" + (f"-{family}" if by_family and not suffix else "")
            # drift spreads matrices over the cores by itself
            shards = 1 if stage == "drift" or suffix else min(args.workers, len(members))
            if shards == 1:
                steps.append(Step(name, stage, options, tuple(members), needs, sweep))
                continue
            first_runs = tuple({run.config.family: run for run in reversed(members)}.values())
            last = {**options, "checkpoints": ("last",)}
            steps.append(Step(f"{name}-base", stage, last, first_runs, needs, sweep))
            for k in range(shards):
                shard = f"{name}-{k + 1}of{shards}", stage, options, tuple(members[k::shards])
                steps.append(Step(*shard, (*needs, f"{name}-base"), sweep))
    return steps


def analysis_options(
    args: argparse.Namespace, settings: Settings, stage: str, family: str | None = None
) -> dict[str, Any]:
    """The options of a stage that differ from its script's defaults."""
    options: dict[str, Any] = {}
    if settings.data == "sample":
        options |= SAMPLE_OPTIONS.get((stage, family)) or SAMPLE_OPTIONS.get((stage, None), {})
    if stage != "drift":
        options["dtype"] = args.dtype
    if args.items and stage in ("evaluate", "retention"):
        options["limit"] = args.items
    if stage == "retention" and (args.scale_update or settings.preset.name == "study"):
        options["scale_update"] = ()
    return options
