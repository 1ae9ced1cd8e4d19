"""Weighted differences of arms, paired by seed and, where per-item outcomes exist, by item.

A contrast is a sum of weight times score: LoRA minus full fine-tuning, multi-task minus
single-task, the slope of the score over ranks. Over several tasks or benchmarks it is the mean
of their contrasts; their items differ, so the variances over items add. The error over seeds is
that of the contrast's own arms, or one that is pooled over more (pooled_error.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lora_tradeoffs.records import metric_scale
from lora_tradeoffs.statistics.comparisons import (
    LEVEL,
    MIN_SEEDS,
    POWER,
    Comparison,
    compare_checkpoints,
    leave_one_out,
)
from lora_tradeoffs.statistics.seed_intervals import (
    BOTH,
    ITEMS,
    NOTHING,
    SEEDS,
    compare_over_seeds,
    shared_variance,
)

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_tradeoffs.statistics.pooled_error import PooledError
    from lora_tradeoffs.statistics.scores import Scores

BySeed = Mapping[int, Any]  # seed -> row (of DataFrame.itertuples)
Items = Callable[[Any], "Scores | None"]  # a row's per-item statistics; None if they do not exist


class WeightedScores(NamedTuple):
    """One arm's scores on one task, and their weight."""

    weight: float
    rows: BySeed


class Contrast(NamedTuple):
    """A contrast's value and test, and the seeds that all its arms share.

    `over` says what the interval is over: SEEDS, ITEMS, BOTH or NOTHING (seed_intervals.py);
    `freedom` are the degrees of freedom of the error over seeds.
    """

    comparison: Comparison
    seeds: tuple[int, ...]
    over: str
    freedom: int = 0


def by_seed(rows: DataFrame) -> dict[int, Any]:
    """The rows by seed. Raises ValueError if a seed has several."""
    row_of = {int(row.seed): row for row in rows.itertuples()}
    if len(row_of) != len(rows):
        raise ValueError(f"{len(rows)} rows of {len(row_of)} seeds: one figure a seed is needed")
    return row_of


def weighted_scores(tasks: Sequence[Sequence[WeightedScores]]) -> np.ndarray:
    """Weight times score, the mean over tasks, shape (arms, seeds): of the seeds that all share.

    Several tasks are averaged on a scale of 0 to 1.
    """
    if len(tasks) > 1:
        tasks = [[_on_unit_scale(s) for s in scores] for scores in tasks]
    seeds = shared_seeds(tasks)
    values = [[[s.weight * s.rows[seed].value for seed in seeds] for s in t] for t in tasks]
    return np.mean(values, axis=0) if values else np.zeros((0, 0))


def shared_seeds(tasks: Sequence[Sequence[WeightedScores]]) -> tuple[int, ...]:
    """The seeds that all parts have, rising."""
    seeds = [set(part.rows) for parts in tasks for part in parts]
    return tuple(sorted(set.intersection(*seeds))) if seeds else ()


def contrast(
    tasks: Sequence[Sequence[WeightedScores]],
    items: Items | None = None,
    level: float = LEVEL,
    error: PooledError | None = None,
    shift: float = 0.0,
) -> Contrast:
    """The mean over tasks of each task's weighted sum, with the test that its seeds allow.

    Three seeds and more: over seeds, and over items where all scores have them. One seed: over
    items, about these runs alone. Two seeds, one without items, or scores of a task that are over
    different numbers of items: the value, and nan for all else. `level` is that of the test whose
    detectable difference is computed, `error` that of one run's `weighted_scores`. Several tasks
    are averaged on a scale of 0 to 1, and have the same arms and weights. Over seeds, the test is
    that of the value minus `shift`.
    """
    seeds, differences = shared_seeds(tasks), weighted_scores(tasks).sum(axis=0)
    squares = sum(s.weight**2 for s in tasks[0])
    if len(tasks) > 1:
        tasks = [[_on_unit_scale(s) for s in scores] for scores in tasks]
    weights = [[s.weight for s in scores] for scores in tasks]
    # a row a seed, a column a task; None where a task lacks the items of an arm
    outcomes = [[_outcomes(scores, seed, items) for scores in tasks] for seed in seeds]
    columns = list(zip(*outcomes))
    same = all(len(_item_counts(column)) < 2 for column in columns)
    paired = bool(seeds) and same and all(None not in column for column in columns)
    if len(seeds) >= MIN_SEEDS and same:
        variance = _shared_variance(weights, columns) if paired else 0.0
        freedom = error.freedom if error else len(seeds) - 1
        pooled = (error.variance * squares / len(seeds), freedom) if error else None
        comparison = compare_over_seeds(differences - shift, variance, level, pooled)
        return Contrast(comparison, seeds, BOTH if variance else SEEDS, freedom)
    if len(seeds) == 1 and paired:
        return Contrast(_over_items(weights, outcomes[0], differences[0], level), seeds, ITEMS)
    nan, value = math.nan, float(differences.mean()) if len(seeds) else math.nan
    return Contrast(Comparison("", value, nan, nan, nan, nan, nan, len(seeds)), seeds, NOTHING)


def _on_unit_scale(scores: WeightedScores) -> WeightedScores:
    scale = max((metric_scale(row.metric) for row in scores.rows.values()), default=1)
    return scores._replace(weight=scores.weight / scale)


def _outcomes(
    scores: Sequence[WeightedScores], seed: int, items: Items | None
) -> list[Scores] | None:
    outcomes = [items(s.rows[seed]) if items else None for s in scores]
    return None if any(outcome is None for outcome in outcomes) else outcomes


def _item_counts(column: Sequence[list[Scores] | None]) -> set[int]:
    """How many items a task's scores are over, for the seeds that have items."""
    return {len(s.statistics) for outcomes in column if outcomes is not None for s in outcomes}


def _jackknife(weights: Sequence[float], outcomes: Sequence[Scores]) -> np.ndarray:
    """A task's weighted sum without each item in turn, shape (items,)."""
    return sum(weight * leave_one_out(scores) for weight, scores in zip(weights, outcomes))


def _shared_variance(
    weights: Sequence[Sequence[float]], columns: Sequence[Sequence[Sequence[Scores]]]
) -> float:
    """The variance over items that all seeds share, of the mean over tasks."""
    variances = [
        shared_variance(np.array([_jackknife(task_weights, outcomes) for outcomes in column]))
        for task_weights, column in zip(weights, columns)
    ]
    return sum(variances) / len(weights) ** 2


def _over_items(
    weights: Sequence[Sequence[float]],
    outcomes: Sequence[Sequence[Scores]],
    value: float,
    level: float,
) -> Comparison:
    """One seed: the paired test of two checkpoints, else a normal interval over items."""
    from scipy.stats import norm

    errors = float(norm.isf((1 - level) / 2) + norm.ppf(POWER))
    if weights == [[1, -1]]:
        comparison = compare_checkpoints(*outcomes[0])
        detectable = comparison.detectable
        if level > LEVEL:  # McNemar's p-value of k items that all fall to one side is 2 / 2^k
            fewest = (math.floor(math.log2(2 / (1 - level))) + 1) / comparison.n
            detectable = errors * comparison.stderr or math.nan
            if comparison.test == "exact McNemar":
                detectable = max(errors * comparison.stderr, fewest)
        return replace(comparison, detectable=detectable)
    stderr = math.sqrt(_shared_variance(weights, [[task] for task in outcomes]))
    half = float(norm.isf((1 - LEVEL) / 2)) * stderr
    return Comparison(
        test="normal over items",
        difference=float(value),
        stderr=stderr,
        low=value - half,
        high=value + half,
        p_value=float(2 * norm.sf(abs(value) / stderr)) if stderr else float(value == 0),
        detectable=errors * stderr or math.nan,
        n=1,
    )
