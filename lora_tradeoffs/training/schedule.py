"""What a run will train on, decided before it starts: data, row order, steps and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from config import DATA_SEED, Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.training.row_order import order_rows, steps_for, task_shares
from training_configs import TrainingConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from lora_tradeoffs.data.preparation import PreparedTask
    from lora_tradeoffs.models.base import Base

MOST_ROWS = 50_000_000  # their order is laid out beforehand, in minutes


class Diverged(UserError):
    """The loss of a run became NaN or infinite: its learning rate is too high."""


@dataclass(frozen=True)
class Schedule:
    """A run's data and their order, a function of its configuration alone."""

    config: TrainingConfig
    tokenizer: Any
    prepared: dict[str, PreparedTask]  # by task
    shares: np.ndarray  # of the examples, (tasks,)
    order: np.ndarray  # of the train rows, (steps * batch_size,)
    lengths: np.ndarray  # of the train rows in tokens, one task after another
    steps: int
    checkpoint_steps: list[int]

    def train_rows(self) -> Dataset:
        """The train rows in training order."""
        from datasets import concatenate_datasets

        rows = concatenate_datasets([p.split("train") for p in self.prepared.values()])
        return rows.select_columns(["input_ids", "prompt_length"]).select(self.order)

    def validation_rows(self) -> dict[str, Dataset]:
        """At most eval_examples_per_task rows per task, the same in every run, sorted by length."""
        by_task = {}
        for task, prepared in self.prepared.items():
            rows = prepared.split("validation")
            sample = np.random.default_rng(DATA_SEED).permutation(len(rows))
            sample = sample[: self.config.eval_examples_per_task]
            sample = sample[np.argsort(np.array(rows["length"])[sample])]
            columns = ["input_ids", "prompt_length", "label"]
            columns += ["choices"] * ("choices" in rows.column_names)
            by_task[task] = rows.select_columns(columns).select(sample)
        return by_task

    def label_ids(self) -> dict[str, list[list[int]]]:
        """The tokens of the choices of every task that has some; [] where each row has its own."""
        from lora_tradeoffs.data.encoding import choice_ids

        descriptions = [describe(task) for task in self.prepared]
        return {d.name: choice_ids(self.tokenizer, d) for d in descriptions if d.has_choices}


def make_schedule(config: TrainingConfig, settings: Settings, base: Base) -> Schedule:
    """The schedule of a run; its data are prepared if they are not yet."""
    from lora_tradeoffs.data.preparation import prepare
    from lora_tradeoffs.models.base import load_tokenizer

    tokenizer = load_tokenizer(base, settings)
    prepared = prepare(
        settings, tokenizer, config.tasks, config.max_length, config.examples_per_task, config.limit
    )
    lengths = [np.array(prepared[task].split("train")["length"]) for task in config.tasks]
    rows = [len(task_lengths) for task_lengths in lengths]
    shares = task_shares(rows, config.mixing, config.temperature, config.weights)
    steps = config.max_steps or steps_for(rows, config.epochs, config.batch_size)
    if steps * config.batch_size > MOST_ROWS:
        raise UserError(
            f"{steps:,} steps of {config.batch_size:,} rows are more than {MOST_ROWS:,} rows; lower"
            " --max-steps, --set epochs or --set batch_size"
        )
    order = order_rows(lengths, shares, config.batch_size, steps, config.seed)
    saved = checkpoint_steps(steps, config.checkpoints)
    return Schedule(
        config, tokenizer, prepared, shares, order, np.concatenate(lengths), steps, saved
    )


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """The steps of `count` evenly spaced checkpoints, the last at the end."""
    return sorted({max(1, round(steps * i / count)) for i in range(1, count + 1)})
