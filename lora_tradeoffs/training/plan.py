"""The runs that a request stands for: task mixes x arms x seeds, each with its configuration."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from config import Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.checkpoints import checkpoint_step, checkpoints
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.learning_rates import chosen_rate, rates_around
from lora_tradeoffs.training.row_order import steps_for, task_shares
from lora_tradeoffs.training.run import Run
from training_configs import ADAPTER_FIELDS, TrainingConfig, default_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OPTIMIZER_FIELDS = ("optim", "optim_args", "optim_target_modules")


def plan_runs(
    settings: Settings,
    hidden_size: int,
    mixes: Sequence[tuple[str, ...]],
    arms: Sequence[ArmSpec],
    seeds: Sequence[int],
    values: Mapping[str, Any],
    sweep: Sequence[float] | None = None,
    swept_rates: bool = False,
    family: str = "",
) -> list[Run]:
    """A run for every task mix, arm and seed, in this order.

    `values` replace fields of TrainingConfig, and an arm's own beat them; a field that belongs to
    some of the arms is left out for the others. With `sweep`, factors of the default learning rate,
    every run is planned at each of these rates; with `swept_rates`, at the rate that a sweep chose.
    `family` is the mixes' own unless they are parts of another. Raises UserError for a combination
    that is not allowed.
    """
    has_rate = any("learning_rate" in given for given in (values, *(arm.values for arm in arms)))
    if has_rate and (sweep is not None or swept_rates):
        flag = "--swept-rates" if swept_rates else "--lr-sweep"
        raise UserError(
            f"{flag} and --set learning_rate both set the learning rate; use one of them"
        )
    runs: list[Run] = []
    planned: dict[str, ArmSpec] = {}
    for tasks in mixes:
        for arm in arms:
            own = arm.own(values, arms)
            scaling = own.get("scaling", "2r")
            for seed in dict.fromkeys(seeds):
                default = default_config(
                    *(settings, tasks, arm.method, arm.rank, seed, hidden_size, scaling, family)
                )
                config = dataclasses.replace(default, **own)
                name = config.run_name(default)
                if (other := planned.setdefault(name, arm)) is not arm:
                    also = f", also as {other}" if str(other) != str(arm) else ""
                    raise UserError(f"the arm {arm} occurs twice{also}; leave one out")
                run = Run(name, config, settings.runs_dir / name, default)
                rates = [config.learning_rate]
                if sweep is not None:
                    rates = rates_around(default.learning_rate, sweep)
                elif swept_rates:
                    rates = [chosen_rate(run)]
                runs += [run.at_rate(rate) for rate in rates]
    return runs


def check_arms(runs: Sequence[Run], model: PreTrainedModel, device: str) -> None:
    """Raise UserError for an arm that the model, an architecture without weights, cannot have,
    and for a tracker that is not installed."""
    from lora_tradeoffs.trackers import tracker_names
    from lora_tradeoffs.training.costs import trainable_shapes
    from lora_tradeoffs.training.trainer import check_optimizer

    for report_to in {run.config.report_to for run in runs}:
        tracker_names(report_to)
    arms = {(run.arm, run.config.tasks): run.config for run in runs}
    for config in arms.values():
        trainable_shapes(model, config)
        if any(getattr(config, f) != getattr(TrainingConfig, f) for f in OPTIMIZER_FIELDS):
            check_optimizer(config, model, device)


def expected_rows(config: TrainingConfig, settings: Settings) -> list[int]:
    """Train rows by task, before any is read: line counts, or the data sets' official sizes."""
    rows = []
    for task in config.tasks:
        count = describe(task).rows.get("train", config.examples_per_task)
        if path := describe(task).row_file(settings.data_folder, "train"):
            with contextlib.suppress(OSError), path.open("rb") as file:
                count = sum(1 for _ in file)
        rows.append(min(count, config.examples_per_task, config.limit or count))
    return rows


def expected_steps(config: TrainingConfig, settings: Settings) -> int:
    """The run's steps as far as they are known before any row is read."""
    rows = expected_rows(config, settings)
    return config.max_steps or steps_for(rows, config.epochs, config.batch_size)


def control_values(
    settings: Settings, tasks: tuple[str, ...], values: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """By task, what its single-task control changes: it sees the rows that the mixed run sees.

    With epochs and proportional mixing it does so by itself; else its steps are the task's share of
    the mixed run's.
    """
    dense = {name: value for name, value in values.items() if name not in ADAPTER_FIELDS}
    mixed = dataclasses.replace(default_config(settings, tasks, "full", 0, 0, 2048), **dense)
    if not mixed.max_steps and mixed.mixing == "proportional" and not mixed.weights:
        return {task: {} for task in tasks}
    rows = expected_rows(mixed, settings)
    shares = task_shares(rows, mixed.mixing, mixed.temperature, mixed.weights)
    steps = [max(1, round(expected_steps(mixed, settings) * share)) for share in shares]
    return {task: {"max_steps": n} for task, n in zip(tasks, steps, strict=True)}


def print_plan(
    runs: Sequence[Run], settings: Settings, architecture: PreTrainedModel, bf16: bool
) -> None:
    """Print a table of the runs: state, steps, trainable parameters, expected memory and disk."""
    import pandas as pd

    from lora_tradeoffs.training.costs import GB, expected_cost

    rows, disk = [], 0
    for run in runs:
        cost = expected_cost(architecture, run.config, bf16)
        disk += 0 if run.is_done else cost.disk
        saved, steps = checkpoints(run.folder), expected_steps(run.config, settings)
        resumable = f"at step {checkpoint_step(saved[-1])}" if saved else "new"
        row = {
            "run": run.name,
            "state": "done" if run.is_done else resumable,
            "steps": steps if run.config.max_steps else f"about {steps}",
            "trainable": f"{cost.trainable:,} ({cost.trainable / cost.parameters:.2%})",
            "memory GB": f"{cost.memory / GB:.1f}",
            "disk GB": f"{cost.disk / GB:.2f}",
        }
        rows.append(row)
    print(f"{len(runs)} runs in {settings.runs_dir}")
    print(pd.DataFrame(rows).to_string(index=False))
    print(f"memory: expected peak of a device; disk for unfinished runs: {disk / GB:.1f} GB")
