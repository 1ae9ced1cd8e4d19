"""What is left of a study, and what it would take: time, disk, memory, and what it could show."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config import BENCHMARKS, GRADIENT_BATCHES, MID_TRAINING_LIMIT, ROOT, Settings
from dataset_descriptions import describe
from lora_tradeoffs.study.plan import common_flags, flags_of
from lora_tradeoffs.study.steps import ANALYSES, STAGES, Stamps, Step, steps_done
from lora_tradeoffs.training.run import Run

PROBE_STEPS = 4
# Every analysis is asked for few and for more: the difference is what an item takes (an item of a
# task or benchmark, a batch), the rest what it takes to begin. Of drift an item is a checkpoint:
# the first time the base is decomposed, too.
PROBES = {
    "evaluate": ("--limit", 4, 16),
    "retention": ("--limit", 4, 16),
    "gradients": ("--batches", 2, 6),
}
GB = 1e9
TRAINING = ("sweep", "train")
BENCHMARK_ITEMS = {"hellaswag": 10_042, "arc_challenge": 1_172, "winogrande": 1_267}

Arm = tuple[str, str, int]  # family, method, rank


def arm_of(run: Run) -> Arm:
    return run.config.family, run.config.method, run.config.rank


# -------------------------------------------------------------------------------- seconds


@dataclass(frozen=True)
class Rates:
    """Seconds a training step; and of each analysis seconds to begin, and an item."""

    step: float
    start: dict[str, float]
    item: dict[str, float]


def measured_rates(runs: Sequence[Run]) -> dict[Arm, float]:
    """Seconds a training step, validating and saving included, of every arm with a done run."""
    found = {}
    for run in runs:
        if run.is_done:
            done = json.loads((run.folder / "training.json").read_text(encoding="utf-8"))
            found[arm_of(run)] = done.get("wall_seconds", done["seconds"]) / done["steps"]
    return found


def rate_of(run: Run, rates: dict[Arm, float]) -> float | None:
    """Seconds a step: the arm's own, else those of the nearest rank of its family and method."""
    family, method, rank = arm_of(run)
    near = {r: v for (f, m, r), v in rates.items() if (f, m) == (family, method)}
    return near[min(near, key=lambda other: abs(other - rank))] if near else None


def probe(
    run: Run, args: argparse.Namespace, settings: Settings, stages: Sequence[str]
) -> Rates | None:
    """What a few steps of the run take, and each analysis of it; None if it failed.

    In a folder that is deleted.
    """
    with tempfile.TemporaryDirectory() as name:
        for place in (settings.bases_dir, settings.tokenizers_dir):
            place.mkdir(parents=True, exist_ok=True)
            link = Path(name) / place.relative_to(settings.output_dir)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place.resolve(), target_is_directory=True)
        common = common_flags(settings)
        asked = [*flags_of(run, args), *common, "--max-steps", str(PROBE_STEPS)]
        asked += ["--set", "checkpoints=1", "eval_examples_per_task=1", "report_to=none"]
        if _seconds(name, "multi_task_training", asked) is None:
            return None
        (training,) = Path(name).glob("models/*/*/training.json")
        record = json.loads(training.read_text(encoding="utf-8"))
        start, item = {}, {}
        for stage in stages:
            once = [*common, "--checkpoints", "last", "--overwrite", "--no-figures"]
            once += ["--dtype", args.dtype] if stage in PROBES else []
            once += ["--splits", "validation", "--shots", "0"] if stage == "evaluate" else []
            flag, *counts = PROBES.get(stage, ("", 0, 0))
            few, more = (
                _seconds(name, STAGES[stage], [*once, *([flag, str(n)] if flag else [])])
                for n in counts
            )
            if few is None or more is None:
                return None
            if stage == "drift":
                start[stage], item[stage] = max(0.0, few - more), more
                continue
            # of two models, the base and the checkpoint
            tasks = {"evaluate": len(run.config.tasks), "retention": len(BENCHMARK_ITEMS)}
            asked_for = 2 * tasks.get(stage, 1) * (counts[1] - counts[0])
            start[stage], item[stage] = few, max(0.0, more - few) / asked_for
    return Rates(record["seconds"] / record["steps"], start, item)


def _seconds(folder: str, script: str, flags: Sequence[str]) -> float | None:
    """What the script takes, with its results in the folder; None, after saying so, if it fails."""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *flags],
        env={**os.environ, "OUTPUT_DIR": folder},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(f"{script}.py failed on a few items: {done.stderr.strip().splitlines()[-1:]}")
        return None
    return time.monotonic() - begun


def analysis_seconds(
    step: Step, settings: Settings, stamps: Stamps, steps: Sequence[Step], probed: dict[str, Rates]
) -> float | None:
    """Of a step that measures: at the rate of its stage's ended steps, else the probe's."""
    rates = []
    for other in steps:
        stamp = stamps.read(other) if other.stage == step.stage else None
        if stamp and stamp["new"]:
            rates.append(stamp["seconds"] / len(stamp["request"]["runs"]))
    if rates:
        return max(rates) * len(step.runs)
    families = {run.config.family for run in step.runs}
    if not families <= probed.keys() or any(step.stage not in probed[f].item for f in families):
        return None
    start = max(probed[family].start[step.stage] for family in families)
    own = (probed[r.config.family].item[step.stage] * items(step, r, settings) for r in step.runs)
    return start + sum(own)


def items(step: Step, run: Run, settings: Settings) -> int:
    """How many items the step asks the run's checkpoints: see PROBES."""
    flags = dict(zip(step.flags, step.flags[1:]))
    last = flags.get("--checkpoints") == "last"
    mid = 0 if last else run.config.checkpoints - 1
    if step.stage == "drift":
        return mid + 1
    if step.stage == "gradients":
        return (mid + 1) * int(flags.get("--batches", GRADIENT_BATCHES))
    most = int(flags.get("--limit", 0))
    if step.stage == "evaluate":
        sizes = [
            split_items(t, s, settings) for t in run.config.tasks for s in ("validation", "test")
        ]
        halfway = [split_items(task, "validation", settings) for task in run.config.tasks]
    else:
        sizes = halfway = [benchmark_items(name, settings) for name in BENCHMARK_ITEMS]
        sizes = sizes * (1 + 4 * ("--scale-update" in step.flags))
    in_full = sum(min(n, most or n) for n in sizes)
    return in_full + mid * sum(min(n, most or MID_TRAINING_LIMIT) for n in halfway)


# ------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Need:
    """What a step takes: seconds (None if nothing like it was measured), bytes, and words.

    `passing` is what it writes to disk and is deleted once it is measured.
    """

    seconds: float | None = None
    disk: int = 0
    passing: int = 0
    memory: int = 0
    words: str = ""


def print_plan(
    args: argparse.Namespace,
    settings: Settings,
    stamps: Stamps,
    runs: Sequence[Run],
    steps: Sequence[Step],
) -> None:
    """A line a step: its state, and what is left of it; then the sums, and what can be shown."""
    from lora_tradeoffs.hardware import pick_device

    done = steps_done(steps, stamps)
    left = [step for step in steps if step.name not in done]
    rates = measured_rates([run for step in steps for run in step.runs])
    probed = probe_unmeasured(args, settings, left, rates)
    width = max(len(step.name) for step in steps)
    print(f"{len(steps)} steps, {len(steps) - len(left)} of them are done")
    needs = {}
    for step in steps:
        if step.stage in TRAINING:
            need = training_need(args, settings, step, rates)
        elif step.stage in ANALYSES:
            seconds = analysis_seconds(step, settings, stamps, steps, probed)
            need = Need(seconds, words=f"{len(step.runs)} runs")
        else:
            need = Need()
        state, time = "done", ""
        if step in left:
            needs[step] = need
            state = "failed" if stamps.error_file(step).is_file() else "left"
            time = "?" if need.seconds is None else hours(need.seconds)
        print(f"  {step.name:<{width}}  {state:<7} {time:>9}  {need.words}")
    total = sum(need.seconds or 0.0 for need in needs.values())
    line = f"left: {hours(total)} of {'GPU' if pick_device() == 'cuda' else pick_device()} time"
    quick = ("prepare", "report")
    unknown = {s.stage: 0 for s, n in needs.items() if n.seconds is None and s.stage not in quick}
    if unknown:
        line += f", without {', '.join(unknown)} (known once one run is measured)"
    workers = f", about {hours(total / args.workers)} with {args.workers} workers"
    print(line + (workers if args.workers > 1 else ""))
    disk = sum(need.disk for need in needs.values())
    disk += args.workers * max([0, *(need.passing for need in needs.values())])
    memory = max([0, *(need.memory for need in needs.values())])
    print(
        f"disk for what is left: {disk / GB:.1f} GB; memory: up to {memory / GB:.1f} GB a process"
    )
    print("\n".join(detectable(args, settings, runs)))


def probe_unmeasured(
    args: argparse.Namespace, settings: Settings, left: Sequence[Step], rates: dict[Arm, float]
) -> dict[str, Rates]:
    """Probe the arms that no rate is known of and add theirs; what a family's analyses take."""
    probed: dict[str, Rates] = {}
    analyses = list(dict.fromkeys(step.stage for step in left if step.stage in ANALYSES))
    for run in (step.runs[0] for step in left if step.stage in TRAINING and step.runs):
        if rate_of(run, rates) is None:
            print(f"measuring {PROBE_STEPS} steps of {run.name} ...", flush=True)
            stages = () if run.config.family in probed else analyses
            found = probe(run, args, settings, stages)
            if found is not None:
                rates[arm_of(run)] = found.step
                probed.setdefault(run.config.family, found)
    return probed


def training_need(
    args: argparse.Namespace, settings: Settings, step: Step, rates: dict[Arm, float]
) -> Need:
    """Of a step that trains: one run, or those of a sweep that are not done."""
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.models.base import empty_model, read_model_config
    from lora_tradeoffs.training.costs import expected_cost
    from lora_tradeoffs.training.plan import expected_steps

    bf16 = pick_precision(args.dtype, pick_device()) == "bf16"
    model = empty_model(read_model_config(settings), settings.model)
    seconds, disk, kept, memory, words = 0.0, 0, 0, 0, ""
    for run in [run for run in step.runs if not run.is_done] or step.runs:
        cost = expected_cost(model, run.config, bf16)
        count = run.config.max_steps or expected_steps(run.config, settings)
        rate = rate_of(run, rates)
        seconds = None if rate is None or seconds is None else seconds + rate * count
        disk += cost.disk
        kept += cost.disk // run.config.checkpoints if args.measure_then_delete else cost.disk
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


# ----------------------------------------------------------------------- what it can show


def detectable(args: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> list[str]:
    """The smallest difference of two scores that the items and seeds can show, as sentences.

    Over items: two checkpoints' scores in [0, 1], each with the largest variance that it can have
    (1/4), found with 80 % power at the 5 % level. Paired tests on the same items usually see less.
    """
    from lora_tradeoffs.statistics.comparisons import (
        MIN_SEEDS,
        detectable_over_items,
        detectable_over_seeds,
    )

    tasks = list(dict.fromkeys(task for run in runs for task in run.config.tasks))
    counts = {task: split_items(task, "test", settings) for task in tasks}
    counts |= {name: benchmark_items(name, settings) for name in BENCHMARK_ITEMS}
    parts = []
    for name, count in counts.items():
        if count:
            count = min(count, args.items or count)
            parts.append(f"{name} {detectable_over_items((0.5 / count) ** 0.5):.3f} ({count:,})")
    lines = [f"two checkpoints differ visibly, at the least, by (items): {', '.join(parts)}"]
    seeds = len({run.config.seed for run in runs})
    if seeds < MIN_SEEDS:
        lines.append(f"{seeds} seed(s): nothing can be said about methods; that takes {MIN_SEEDS}")
    else:
        factor = detectable_over_seeds(seeds**-0.5, seeds)
        lines.append(
            f"two methods, with {seeds} seeds: by {factor:.1f} standard deviations of their"
            " difference from seed to seed"
        )
    return lines


def split_items(task: str, split: str, settings: Settings) -> int:
    """Rows of a task's split: of a folder its lines, else the official number, or the cap."""
    from lora_tradeoffs.data.sources import VALIDATION_ROWS, source_folder

    source = source_folder(settings)
    if source is not None:
        return _lines(source / task / f"{split}.jsonl")
    own = describe(task)
    if split not in own.hub_splits:  # validation, carved from train
        return VALIDATION_ROWS
    return own.rows["test" if own.hub_splits[split] == "test" else "validation"]


def benchmark_items(name: str, settings: Settings) -> int:
    from lora_tradeoffs.data.sources import source_folder

    source = source_folder(settings)
    if source is None:
        return BENCHMARK_ITEMS[name]
    return _lines(source / name / f"{BENCHMARKS[name][2]}.jsonl")


def _lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except OSError:
        return 0
