"""What is left of a study: time, disk and memory, and the differences that it could detect."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from config import BENCHMARKS, CHOICE_BENCHMARKS, FAMILIES, Settings
from dataset_descriptions import describe
from lora_tradeoffs.records import read_training
from lora_tradeoffs.study.hypotheses import smallest_p_values
from lora_tradeoffs.study.steps import ANALYSES, Outcomes, Step
from lora_tradeoffs.study.study_file import StudyPlan
from lora_tradeoffs.training.run import Run

GB = 1e9
TRAINING = ("sweep", "train")


# -------------------------------------------------------------------------------- seconds


def step_seconds(run: Run, done: Sequence[Run]) -> float | None:
    """Seconds a training step takes, validating and saving included, by the last of the done runs
    that has the run's family and method, and the nearest rank; None if there is none."""
    kind = run.config.family, run.config.method
    alike = [other for other in done if (other.config.family, other.config.method) == kind]
    if not alike:
        return None
    nearest = min(reversed(alike), key=lambda other: abs(other.config.rank - run.config.rank))
    record = read_training(nearest.folder, "seconds", "steps")
    return record.get("wall_seconds", record["seconds"]) / record["steps"]


def analysis_seconds(step: Step, outcomes: dict[str, dict[str, Any]]) -> float | None:
    """Seconds of a step that measures, at the slowest rate a run of its stage's earlier steps."""
    rates = [
        outcome["seconds"] / outcome["runs"]
        for outcome in outcomes.values()
        if outcome["stage"] == step.stage and outcome.get("new_results") and outcome.get("runs")
    ]
    return max(rates) * len(step.runs) if rates else None


# ------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Need:
    """What a step takes: seconds (None if unknown), bytes on disk and in memory, and words.

    `temporary` is what it writes to disk beside and is deleted once it is measured.
    """

    seconds: float | None = None
    disk: int = 0
    temporary: int = 0
    memory: int = 0
    words: str = ""


def print_plan(
    study: StudyPlan,
    settings: Settings,
    runs: Sequence[Run],
    steps: Sequence[Step],
    done: set[str],
    workers: int = 1,
) -> None:
    """A line a step: its state, and what it takes; then the sums, and what can be detected."""
    from lora_tradeoffs.hardware import pick_device

    done_runs = [run for step in steps for run in step.runs if run.is_done]
    outcomes = Outcomes(settings).read()
    width = max(len(step.name) for step in steps)
    left: dict[Step, Need] = {}
    for step in steps:
        need = Need()
        if step.stage in TRAINING:
            need = training_need(study, settings, step, done_runs)
        elif step.stage in ANALYSES:
            need = Need(analysis_seconds(step, outcomes), words=f"{len(step.runs)} runs")
        state, time = "done", ""
        if step.name not in done:
            left[step] = need
            state = "failed" if "error" in outcomes.get(step.name, ()) else "left"
            time = "?" if need.seconds is None else hours(need.seconds)
        print(f"  {step.name:<{width}}  {state:<7} {time:>9}  {need.words}")
    total = sum(need.seconds or 0.0 for need in left.values())
    line = f"left: {hours(total)} of {'GPU' if pick_device() == 'cuda' else pick_device()} time"
    if workers > 1:
        line += f", about {hours(total / workers)} with {workers} workers"
    quick = ("prepare", "report")
    unknown = [s.stage for s, n in left.items() if n.seconds is None and s.stage not in quick]
    if unknown:
        line += f", without {', '.join(dict.fromkeys(unknown))} (known once one run has finished)"
    print(line)
    disk = sum(need.disk for need in left.values())
    disk += workers * max([0, *(need.temporary for need in left.values())])
    memory = max([0, *(need.memory for need in left.values())])
    print(
        f"disk for what is left: {disk / GB:.1f} GB; memory: up to {memory / GB:.1f} GB a process"
    )
    print("\n".join(detectable_differences(study, settings, runs)))


def training_need(
    study: StudyPlan, settings: Settings, step: Step, done_runs: Sequence[Run]
) -> Need:
    """What a step that trains takes: one run, or those of a sweep that are not done."""
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.models.base import empty_model, read_model_config
    from lora_tradeoffs.training.costs import expected_cost
    from lora_tradeoffs.training.plan import expected_steps

    bf16 = pick_precision(study.dtype, pick_device()) == "bf16"
    model = empty_model(read_model_config(settings), settings.model)
    seconds, disk, kept, memory, words = 0.0, 0, 0, 0, ""
    for run in [run for run in step.runs if not run.is_done] or step.runs:
        cost = expected_cost(model, run.config, bf16)
        count = run.config.max_steps or expected_steps(run.config, settings)
        rate = step_seconds(run, done_runs)
        seconds = None if rate is None or seconds is None else seconds + rate * count
        disk += cost.disk
        kept += cost.disk // run.config.checkpoints if study.measure_then_delete else cost.disk
        memory = max(memory, cost.memory)
        words = f"{count} steps"
    words += f" at {len(step.runs)} learning rates, or more" if step.stage == "sweep" else ""
    words += f", disk {kept / GB:.2f} GB, memory up to {memory / GB:.1f} GB"
    return Need(seconds, kept, disk - kept, memory, words)


def hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{seconds / 60:.1f} min"
    )


# --------------------------------------------------------------------- what it can detect


def detectable_differences(study: StudyPlan, settings: Settings, runs: Sequence[Run]) -> list[str]:
    """The smallest difference of two scores that the items and seeds can show, as sentences.

    Over items: two checkpoints' scores in [0, 1], each with the largest variance that it can have
    (1/4), found with 80 % power at the 5 % level. Paired tests on the same items usually see less.
    """
    from lora_tradeoffs.statistics.comparisons import LEVEL, MIN_SEEDS, detectable_over_items
    from lora_tradeoffs.statistics.pooled_error import MIN_ARMS
    from lora_tradeoffs.statistics.seed_intervals import detectable

    tasks = list(dict.fromkeys(task for run in runs for task in run.config.tasks))
    asked = study.measure.get("retention", {}).get("tasks", CHOICE_BENCHMARKS)
    measured = {"evaluate": tasks, "retention": [name for name in asked if name in BENCHMARKS]}
    parts = []
    for stage, names in measured.items():
        limit = study.measure.get(stage, {}).get("limit", study.items)
        for name in names if stage in study.measure else ():
            if not (count := items(name, settings)):
                continue
            count = min(count, limit or count)
            parts.append(f"{name} {detectable_over_items((0.5 / count) ** 0.5):.3f} ({count:,})")
    what = "smallest detectable difference between two"
    lines = [f"{what} checkpoints (items): {', '.join(parts) or 'unknown'}"]
    seeds = len({run.config.seed for run in runs})
    if seeds < MIN_SEEDS:
        lines.append(f"{what} methods: none with {seeds} seed(s); it takes {MIN_SEEDS}")
    else:
        mixes = [r for r in runs if r.config.tasks == FAMILIES[r.config.family]]
        mixes = [r for r in mixes if r.config.is_adapter]
        compared = list({(r.config.family, r.arm): r.config.family for r in mixes}.values())
        tests = sum(len(FAMILIES[family]) for family in compared)
        if study.hypotheses:
            tests = study.primary_tests
        pooled = 1 + min(map(compared.count, compared), default=0)
        freedom = (seeds - 1) * (pooled - 1 if pooled >= MIN_ARMS else 1)
        level = 1 - (1 - LEVEL) / max(tests, 1)
        lines.append(
            f"{what} methods, with {seeds} seeds and {tests} test{'s' * (tests != 1)}:"
            f" {detectable(2 / seeds, freedom, level=level):.1f} standard deviations of a score"
            f" from seed to seed ({freedom} degrees of freedom, if the arms vary alike)"
        )
    return lines + smallest_p_values(study.hypotheses, seeds, study.primary_tests)


def items(name: str, settings: Settings) -> int:
    """Items of a task's test split, or of a benchmark; 0 if unknown.

    Of a folder the lines of the file, else the official number.
    """
    source, benchmark = settings.data_folder, BENCHMARKS.get(name)
    if benchmark:
        path = source and source / name / f"{benchmark.split}.jsonl"
    else:
        path = describe(name).row_file(source, "test")
    if path is not None:
        with suppress(OSError), path.open("rb") as file:
            return sum(1 for _ in file)
        return 0
    if benchmark:
        return benchmark.items
    description = describe(name)
    split = "test" if description.hub_splits["test"] == "test" else "validation"
    return description.rows.get(split, 0)
