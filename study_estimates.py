"""What is left of a study, and what it would take: time, disk, memory, and what it could show."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from config import BENCHMARKS, ROOT, Settings
from dataset_descriptions import describe
from study_plan import ANALYSES, Stamps, Step, common_flags, flags_of
from training_run import Run

PROBE_STEPS = 4
GB = 1e9
BENCHMARK_ITEMS = {"hellaswag": 10_042, "arc_challenge": 1_172, "winogrande": 1_267}

Arm = tuple[str, str, int]  # family, method, rank


def arm_of(run: Run) -> Arm:
    return run.config.family, run.config.method, run.config.rank


# -------------------------------------------------------------------------------- seconds


def measured_rates(runs: Sequence[Run]) -> dict[Arm, float]:
    """Seconds a training step, of every arm that has a run which is done."""
    found = {}
    for run in runs:
        if run.is_done:
            done = json.loads((run.folder / "training.json").read_text(encoding="utf-8"))
            found[arm_of(run)] = done["seconds"] / done["steps"]
    return found


def rate_of(run: Run, rates: dict[Arm, float]) -> float | None:
    """Seconds a step: the arm's own, else those of the nearest rank of its family and method."""
    family, method, rank = arm_of(run)
    near = {r: v for (f, m, r), v in rates.items() if (f, m) == (family, method)}
    return near[min(near, key=lambda other: abs(other - rank))] if near else None


def probe(run: Run, args: argparse.Namespace, settings: Settings) -> float | None:
    """Seconds a step of a few steps, trained in a folder that is deleted; None if they failed."""
    with tempfile.TemporaryDirectory() as name:
        for place in (settings.bases_dir, settings.tokenizers_dir):
            place.mkdir(parents=True, exist_ok=True)
            link = Path(name) / place.relative_to(settings.output_dir)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(place.resolve(), target_is_directory=True)
        asked = [*flags_of(run, args), *common_flags(settings), "--max-steps", str(PROBE_STEPS)]
        asked += ["--set", "checkpoints=1", "eval_examples_per_task=1", "report_to=none"]
        done = subprocess.run(
            [sys.executable, str(ROOT / "multi_task_training.py"), *asked],
            env={**os.environ, "OUTPUT_DIR": name},
            capture_output=True,
            text=True,
        )
        found = list(Path(name).glob("models/*/*/training.json"))
        if done.returncode or not found:
            print(f"the probe of {run.name} failed: {done.stderr.strip().splitlines()[-1:]}")
            return None
        record = json.loads(found[0].read_text(encoding="utf-8"))
    return record["seconds"] / record["steps"]


def analysis_seconds(step: Step, stamps: Stamps, stage_steps: Sequence[Step]) -> float | None:
    """Of runs that are not measured, at the rate of the stage's steps that have ended."""
    rates = []
    for other in stage_steps:
        stamp = stamps.read(other)
        if stamp and stamp["new"]:
            rates.append(stamp["seconds"] / len(stamp["request"]["runs"]))
    return max(rates) * len(step.runs) if rates else None


# ------------------------------------------------------------------------------ the plan


def print_plan(
    args: argparse.Namespace,
    settings: Settings,
    stamps: Stamps,
    runs: Sequence[Run],
    steps: Sequence[Step],
) -> None:
    """A line a step: its state, and what is left of it; then the sums, and what can be shown."""
    from checkpoint_utils import empty_model, read_model_config
    from multi_task_training import _expected_steps
    from run_records import pick_device, pick_precision
    from training_costs import expected_cost

    bf16 = pick_precision(args.dtype, pick_device()) == "bf16"
    model = empty_model(read_model_config(settings), settings.model)
    left = [step for step in steps if not stamps.is_done(step)]
    rates = measured_rates(runs)
    for run in (step.runs[0] for step in left if step.stage == "train"):
        if rate_of(run, rates) is None:
            print(f"measuring {PROBE_STEPS} steps of {run.name} ...", flush=True)
            found = probe(run, args, settings)
            if found is not None:
                rates[arm_of(run)] = found
    width = max(len(step.name) for step in steps)
    print(f"{len(steps)} steps, {len(steps) - len(left)} of them are done")
    total, unknown, disk, memory = 0.0, [], 0, 0
    for step in steps:
        state = (
            "done" if step not in left else "failed" if stamps.error_file(step).is_file() else ""
        )
        seconds, told = None, ""
        if step.stage == "train":
            run = step.runs[0]
            cost = expected_cost(model, run.config, bf16)
            count = run.config.max_steps or _expected_steps(run.config, settings)
            rate = rate_of(run, rates)
            seconds = None if rate is None else rate * count
            kept = cost.disk // run.config.checkpoints if args.measure_then_delete else cost.disk
            told = f"{count} steps, disk {kept / GB:.2f} GB, memory {cost.memory / GB:.1f} GB"
            disk += kept if step in left else 0
            memory = max(memory, cost.memory)
        elif step.stage in ANALYSES:
            seconds = analysis_seconds(step, stamps, [s for s in steps if s.stage == step.stage])
            told = f"{len(step.runs)} runs"
        if step in left:
            total += seconds or 0.0
            if seconds is None and step.stage not in ("prepare", "report"):
                unknown.append(step.stage)
        time = "" if state == "done" else "?" if seconds is None else hours(seconds)
        print(f"  {step.name:<{width}}  {state or 'left':<7} {time:>9}  {told}")
    line = f"left: {hours(total)} of {'GPU' if pick_device() == 'cuda' else pick_device()} time"
    if unknown:
        line += f", without {', '.join(dict.fromkeys(unknown))} (known once one run is measured)"
    workers = f", about {hours(total / args.workers)} with {args.workers} workers"
    print(line + (workers if args.workers > 1 else ""))
    print(
        f"disk for what is left: {disk / GB:.1f} GB; memory: up to {memory / GB:.1f} GB a process"
    )
    print("\n".join(detectable(args, settings, runs)))


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
    from comparisons import MIN_SEEDS, detectable_over_items, detectable_over_seeds

    tasks = list(dict.fromkeys(task for run in runs for task in run.config.tasks))
    counts = {task: test_items(task, settings) for task in tasks}
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


def test_items(task: str, settings: Settings) -> int:
    """Rows of the test split: of a folder its lines, else the official number."""
    from data_sources import source_folder

    source = source_folder(settings)
    if source is None:
        own = describe(task)
        return own.rows["test" if own.hub_splits["test"] == "test" else "validation"]
    return _lines(source / task / "test.jsonl")


def benchmark_items(name: str, settings: Settings) -> int:
    from data_sources import source_folder

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
