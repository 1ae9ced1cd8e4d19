"""The rows that each question compares: an arm's records by seed, as the parts of contrasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_tradeoffs.records import LOSS
from lora_tradeoffs.statistics.comparisons import MIN_SEEDS
from lora_tradeoffs.statistics.contrasts import Contrast, Items, WeightedScores, by_seed
from lora_tradeoffs.statistics.seed_intervals import BOTH, SEEDS, compare_over_seeds
from lora_tradeoffs.tables.arms import GRID, Arm
from lora_tradeoffs.tables.frames import last_checkpoints, scores
from lora_tradeoffs.tables.retention import MEAN, mean_forgetting, retained

if TYPE_CHECKING:
    from pandas import DataFrame


def last_test_scores(adaptation: DataFrame) -> DataFrame:
    """Primary metrics of the last checkpoints on test, the plain prompt, no in-context examples."""
    rows = scores(adaptation)
    rows = rows[(rows["shots"] == 0) & (rows["prompt"] == 0)]
    rows = last_checkpoints(rows)
    return rows[rows["split"] == "test"]


def last_losses(adaptation: DataFrame) -> DataFrame:
    """Validation losses of the last checkpoints, the plain prompt."""
    rows = adaptation[(adaptation["metric"] == LOSS) & (adaptation["prompt"] == 0)]
    return last_checkpoints(rows)


def rows_of(rows: DataFrame, arm: Arm) -> dict[int, Any]:
    """An arm's rows by seed."""
    return by_seed(rows[rows["arm"] == arm])


def score_parts(
    rows: DataFrame, family: str, tasks: Sequence[str], weights: dict[Arm, float]
) -> list[list[WeightedScores]]:
    """Parts whose contrast is that of the mean test score over the tasks."""
    by_task = [rows[(rows["family"] == family) & (rows["task"] == task)] for task in tasks]
    return [[WeightedScores(w, rows_of(on, arm)) for arm, w in weights.items()] for on in by_task]


def grid_arms(rows: DataFrame) -> set[Arm]:
    """The grid's LoRA arms that have enough seeds."""
    seeds = rows[rows["arm"].isin(GRID)].groupby("arm")["seed"].nunique()
    return set(seeds[seeds >= MIN_SEEDS].index)


def slope_weights(arms: Sequence[set[Arm]]) -> dict[Arm, float]:
    """Weights that make the least-squares slope over log2(rank) of the arms that all have."""
    shared = set.intersection(*arms)
    shared_arms = [arm for arm in GRID if arm in shared]
    if len(shared_arms) < 3:
        return {}
    doublings = np.log2([arm.rank for arm in shared_arms])
    centred = doublings - doublings.mean()
    return dict(zip(shared_arms, (centred / (centred**2).sum()).tolist()))


def over_seeds(rows: DataFrame, level: float, shift: float = 0.0) -> Contrast:
    """The test, minus `shift`, of rows that are a difference already, one a seed."""
    # each seed's error over items stands for what the seeds share of it: never too narrow
    errors = rows["stderr"].dropna()
    variance = float((errors**2).mean()) if len(errors) else 0.0
    comparison = compare_over_seeds(rows["value"].to_numpy() - shift, variance, level)
    return Contrast(comparison, tuple(rows["seed"]), BOTH if variance else SEEDS)


def forgetting_parts(
    retention: DataFrame,
    family: str,
    weights: dict[Arm, float],
    items: Items | None,
    outcome: str = MEAN,
) -> list[list[WeightedScores]]:
    """Parts whose contrast is that of the mean forgetting over an outcome's tasks.

    With items they are the tasks' own scores, of the runs that were compared with the base: the
    base's are the same for all arms, and cancel where the weights sum to zero. They would not if
    some runs were measured on fewer items; then the parts are the mean forgetting itself.
    """
    lost = mean_forgetting(retention, family, outcome)
    over = [] if lost.empty else ",".join(lost["over"]).split(",")
    rows = last_checkpoints(retained(retention))
    rows = rows[rows["run"].isin(lost["run"]) & rows["arm"].isin(weights)]
    rows = rows[(rows["family"] == family) & rows["task"].isin(over)]
    rows = rows[rows["shots"] == rows["shots"].min()]
    by_task = [rows[rows["task"] == task] for task in sorted(set(rows["task"]))]
    if items is None or any(part["n"].nunique() > 1 for part in by_task):
        return [[WeightedScores(w, rows_of(lost, arm)) for arm, w in weights.items()]]
    return [
        [WeightedScores(-w, rows_of(part, arm)) for arm, w in weights.items()] for part in by_task
    ]
