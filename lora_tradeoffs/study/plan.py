"""Which runs a study has, and the steps that make and measure them, in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from config import FAMILIES, Settings, UserError
from dataset_descriptions import describe, family_of, preset_family
from lora_tradeoffs.study.steps import ANALYSES, STAGES, Step, Sweep
from lora_tradeoffs.study.study_file import StudyPlan
from lora_tradeoffs.training import plan
from lora_tradeoffs.training.learning_rates import run_options
from lora_tradeoffs.training.run import Run

# The sample rows are no evidence, whatever is measured on them: as little as fills every figure.
# By stage and family (None: both).
SAMPLE_OPTIONS: dict[tuple[str, str | None], dict[str, Any]] = {
    ("evaluate", None): {"limit": 16, "shots": 0},
    ("evaluate", "dissimilar"): {"checkpoints": ("last",), "splits": ("validation",)}
    | {"limit": 4, "shots": 0},
    ("retention", None): {"checkpoints": ("last",), "limit": 16, "documents": 4},
    ("drift", None): {"top_k": (4, 8, 16, 32)},
    ("gradients", None): {"checkpoints": ("last",), "batches": 2, "batch_size": 2},
}


# ------------------------------------------------------------------------------------- runs


def plan_runs(study: StudyPlan, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs of the study, by tasks, seed and arm. Raises UserError.

    In a sweep these are at the default rates: the others are known once the rates are chosen.
    """
    runs: dict[str, Run] = {}
    is_swept = study.learning_rates == "swept"
    named = {FAMILIES[family]: family for family in study.families}
    for tasks, arms in study.mixes.items():
        mixes, family = {tasks: study.values}, named.get(tasks) or family_of(tasks)
        for task in sorted({*FAMILIES[family]} - {*tasks}):
            path = describe(task).row_file(settings.data_folder, "train")
            if path and not path.is_file():
                raise UserError(
                    f"tasks are a part of {family}, whose {task} is measured too: {path} is"
                    f" missing; put it there, or write families: [mine={'+'.join(tasks)}]"
                )
        if study.single_task_controls:
            controls = plan.control_values(settings, tasks, study.values)
            mixes |= {(task,): study.values | own for task, own in controls.items()}
        for seed in study.seeds:
            for mix, values in mixes.items():
                what = {"swept_rates": is_swept, "family": family}
                planned = plan.plan_runs(settings, hidden_size, [mix], arms, [seed], values, **what)
                for run in planned:
                    if runs.setdefault(run.name, run).config.family != family:
                        raise UserError(f"{run.name} would be of two families; use two studies")
    return list(runs.values())


# ------------------------------------------------------------------------------------ steps


def plan_steps(
    study: StudyPlan,
    settings: Settings,
    runs: Sequence[Run],
    workers: int = 1,
    only: Collection[str] = tuple(STAGES),
) -> list[Step]:
    """Every step of the stages in `only`, in the order in which they start."""
    factors = study.learning_rates
    sweep = None if isinstance(factors, str) else Sweep(study.seeds[0], tuple(factors))
    steps = [Step("prepare", "prepare", {}, tuple(runs))]
    analyses: list[Step] = []
    for run in runs:
        # measured and deleted before the next one starts: the disk holds one run's checkpoints
        before = tuple(s.name for s in analyses) if study.measure_then_delete else ()
        steps.append(_training_step(run, ("prepare", *before), sweep))
        if study.measure_then_delete:
            needs = (steps[-1].name,)
            new = _analyses(study, settings, [run], f"-{run.name}", needs, sweep, workers)
            analyses += new
            steps += new
    if not study.measure_then_delete:
        needs = tuple(step.name for step in steps)
        steps += _analyses(study, settings, runs, "", needs, sweep, workers)
    steps.append(Step("report", "report", {}, needs=tuple(step.name for step in steps)))
    return [step for step in steps if step.stage in only]


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
    study: StudyPlan,
    settings: Settings,
    runs: Sequence[Run],
    suffix: str,
    needs: tuple[str, ...],
    sweep: Sweep | None,
    workers: int,
) -> list[Step]:
    """The steps that measure these runs.

    Several workers share them, after one has measured the base, with the last checkpoint of a run
    of each family.
    """
    steps: list[Step] = []
    families = list(dict.fromkeys(run.config.family for run in runs))
    kinds = {family: preset_family(FAMILIES[family]) for family in families}
    for stage in (stage for stage in ANALYSES if stage in study.measure):
        by_family = settings.data == "sample" and any(
            (stage, kind) in SAMPLE_OPTIONS for kind in kinds.values()
        )
        for family in families if by_family else [None]:
            members = [run for run in runs if family in (None, run.config.family)]
            options = analysis_options(study, stage, kinds.get(family))
            name = f"{stage}{suffix}" + (f"-{family}" if by_family and not suffix else "")
            # drift spreads matrices over the cores by itself
            shards = 1 if stage == "drift" or suffix else min(workers, len(members))
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


def analysis_options(study: StudyPlan, stage: str, family: str | None = None) -> dict[str, Any]:
    """The options of a stage that differ from its script's defaults."""
    options: dict[str, Any] = {}
    if study.data == "sample":
        options |= SAMPLE_OPTIONS.get((stage, family)) or SAMPLE_OPTIONS.get((stage, None), {})
    if stage != "drift":
        options["dtype"] = study.dtype
    if study.items and stage in ("evaluate", "retention"):
        options["limit"] = study.items
    own = study.measure.get(stage, {})
    return options | {k: tuple(v) if isinstance(v, list) else v for k, v in own.items()}
