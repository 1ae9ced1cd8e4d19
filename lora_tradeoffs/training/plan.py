"""Which runs a request stands for: task mixes x arms x seeds, each a configuration and a folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from config import Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.data.sources import source_folder
from lora_tradeoffs.training.learning_rates import chosen_rate, grid
from lora_tradeoffs.training.row_order import steps_for
from lora_tradeoffs.training.run import Run
from training_configs import TrainingConfig, default_config

LORA_FIELDS = ("target_modules", "scaling", "lora_dropout")


def plan_runs(
    settings: Settings,
    hidden_size: int,
    mixes: Sequence[tuple[str, ...]],
    arms: Sequence[tuple[str, int]],
    seeds: Sequence[int],
    values: Mapping[str, Any],
    sweep: Sequence[float] | None = None,
    swept_rates: bool = False,
) -> list[Run]:
    """A run for every task mix, arm (method, rank) and seed, in this order.

    `values` replace fields of TrainingConfig; of dense arms beside LoRA those that are not LoRA's.
    With `sweep`, factors of the default rate, every run is planned at each; with `swept_rates` at
    the rate that a sweep chose. Raises UserError for what cannot be.
    """
    if "learning_rate" in values and (sweep is not None or swept_rates):
        flag = "--swept-rates" if swept_rates else "--lr-sweep"
        raise UserError(f"{flag} and --set learning_rate both say the rate; leave one out")
    has_lora = any(method == "lora" for method, _ in arms)
    dense_values = {k: v for k, v in values.items() if k not in LORA_FIELDS or not has_lora}
    runs = []
    for tasks in mixes:
        for method, rank in arms:
            for seed in dict.fromkeys(seeds):
                default = default_config(settings, tasks, method, rank, seed, hidden_size)
                replaced = values if method == "lora" else dense_values
                config = dataclasses.replace(default, **replaced)
                name = config.run_name(default)
                run = Run(name, config, settings.runs_dir / name, default)
                rates = [config.learning_rate]
                if sweep is not None:
                    rates = grid(default.learning_rate, sweep)
                elif swept_rates:
                    rates = [chosen_rate(settings.runs_dir, run.arm, config)]
                runs += [run.at_rate(rate) for rate in rates]
    return runs


def expected_steps(config: TrainingConfig, settings: Settings) -> int:
    """Steps from the number of rows before any is read: lines of a folder, official sizes."""
    source, rows = source_folder(settings), []
    for task in config.tasks:
        count = describe(task).rows["train"]
        if source is not None:
            with contextlib.suppress(OSError), (source / task / "train.jsonl").open("rb") as file:
                count = sum(1 for _ in file)
        rows.append(min(count, config.examples_per_task, config.limit or count))
    return steps_for(rows, config.epochs, config.batch_size)
