"""Weighted differences of arms, paired by seed and, where per-item outcomes are there, by item.

A contrast is a sum of weight times score: LoRA minus full fine-tuning, multi-task minus
single-task, the slope of the score over ranks. Of several tasks or benchmarks it is the mean of
theirs; those are different items, so the variances over items add.
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

    from lora_tradeoffs.statistics.scores import Scores

BySeed = Mapping[int, Any]  # a row (of DataFrame.itertuples) a seed
Items = Callable[[Any], "Scores | None"]  # per-item statistics of a row; None if they are not there


class Part(NamedTuple):
    """One arm's scores on one task, and their weight."""

    weight: float
    rows: BySeed


class Contrast(NamedTuple):
    """What a contrast is, the seeds that all its parts share, and what its interval counts."""

    found: Comparison
    seeds: tuple[int, ...]
    over: str


def by_seed(rows: DataFrame) -> dict[int, Any]:
    """The rows by seed. Raises ValueError if a seed has several."""
    found = {int(row.seed): row for row in rows.itertuples()}
    if len(found) != len(rows):
        raise ValueError(f"{len(rows)} rows of {len(found)} seeds: one figure a seed is needed")
    return found


def contrast(
    tasks: Sequence[Sequence[Part]], items: Items | None = None, level: float = LEVEL
) -> Contrast:
    """The mean over tasks of each task's weighted sum, with the test that its seeds allow.

    Three seeds and more: over seeds, and over items where all parts have theirs. One seed: over
    items, about these runs alone. Two seeds, one without items, or parts of a task that were
    measured on other numbers of items: the figure, all else nan. `level` is that at which the
    detectable difference is reckoned. BLEU counts in hundredths where several tasks are averaged.
    """
    seeds = tuple(sorted(set.intersection(*(set(p.rows) for parts in tasks for p in parts))))
    differences = np.array(
        [
            np.mean([sum(_unit(p, tasks) * p.rows[s].value for p in parts) for parts in tasks])
            for s in seeds
        ]
    )
    found = {s: [_scores(parts, s, items) for parts in tasks] for s in seeds}
    columns = list(zip(*found.values()))
    same = all(len(_item_counts(column)) < 2 for column in columns)
    paired = bool(seeds) and same and all(None not in column for column in columns)
    if len(seeds) >= MIN_SEEDS and same:
        variance = _shared(tasks, found) if paired else 0.0
        compared = compare_over_seeds(differences, variance, level)
        return Contrast(compared, seeds, BOTH if variance else SEEDS)
    if len(seeds) == 1 and paired:
        compared = _over_items(tasks, found[seeds[0]], differences[0], level)
        return Contrast(compared, seeds, ITEMS)
    nan, value = math.nan, float(differences.mean()) if len(seeds) else math.nan
    return Contrast(Comparison("", value, nan, nan, nan, nan, nan, len(seeds)), seeds, NOTHING)


def _unit(part: Part, tasks: Sequence[Sequence[Part]]) -> float:
    """The part's weight, over the metric's scale where several tasks are averaged."""
    row = next(iter(part.rows.values()))
    return part.weight / (metric_scale(row.metric) if len(tasks) > 1 else 1)


def _scores(parts: Sequence[Part], seed: int, items: Items | None) -> list[Scores] | None:
    found = [items(part.rows[seed]) if items else None for part in parts]
    return None if any(scores is None for scores in found) else found


def _item_counts(column: Sequence[list[Scores] | None]) -> set[int]:
    """Of how many items a task's scores are, those of all seeds that are there."""
    return {len(scores.statistics) for own in column if own is not None for scores in own}


def _influence(
    tasks: Sequence[Sequence[Part]], parts: Sequence[Part], scores: Sequence[Scores]
) -> np.ndarray:
    """The task's weighted sum without each item in turn, shape (items,)."""
    return sum(_unit(part, tasks) * leave_one_out(s) for part, s in zip(parts, scores))


def _shared(tasks: Sequence[Sequence[Part]], found: Mapping[int, list[list[Scores]]]) -> float:
    total = 0.0
    for number, parts in enumerate(tasks):
        influences = [_influence(tasks, parts, own[number]) for own in found.values()]
        total += shared_variance(np.array(influences))
    return total / len(tasks) ** 2


def _over_items(
    tasks: Sequence[Sequence[Part]],
    found: Sequence[Sequence[Scores]],
    value: float,
    level: float,
) -> Comparison:
    """One seed: the paired test of two checkpoints, else a normal interval over items."""
    from scipy.stats import norm

    weights = [part.weight for part in tasks[0]]
    errors = float(norm.isf((1 - level) / 2) + norm.ppf(POWER))
    if len(tasks) == 1 and weights == [1, -1]:
        compared = compare_checkpoints(*found[0])
        least = compared.detectable
        if level > LEVEL:  # McNemar's p-value of k items that all fall to one side is 2 / 2^k
            fewest = (math.floor(math.log2(2 / (1 - level))) + 1) / compared.n
            own = errors * compared.stderr
            least = max(own, fewest) if compared.test == "exact McNemar" else own or math.nan
        return replace(compared, detectable=least)
    variances = [
        shared_variance(_influence(tasks, parts, scores)[None])
        for parts, scores in zip(tasks, found)
    ]
    stderr = math.sqrt(sum(variances)) / len(tasks)
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
