"""One error for the tests of several arms, from all of their runs.

A difference of two arms over three seeds has an error with two degrees of freedom, so a test that
is corrected over 30 needs |t| > 24.5. Arms crossed with seeds (all arms of a seed see the same
batches) have more: of

    score_as = arm_a + seed_s + rest_as

the residual mean square has (arms - 1)(seeds - 1) degrees of freedom, 10 for six arms and three
seeds: |t| > 4.26. It is the error of a randomised block design (Fisher 1935), and needs a `rest`
of equal variance in all arms.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

MIN_ARMS = 3  # two have the error of their difference already
# The check must find what it can, not prove it: a level as large as is usual for preliminary tests
# (Bancroft 1964, Biometrics 20:427).
EQUAL_LEVEL = 0.25
DRAWS = 4_000

Layout = Mapping[Hashable, np.ndarray]  # an arm's scores, shape (seeds,), the same seeds for all


class PooledError(NamedTuple):
    """The variance of one run's score around what its arm and its seed explain."""

    variance: float
    freedom: int
    arms: int


def pooled_errors(
    layouts: Sequence[Layout | None], kinds: Sequence[Hashable] = ()
) -> list[PooledError | None]:
    """The error of each layout (a task, say); None where there is none, or the check refuses all.

    The check is one for all layouts, since an arm that differs more from seed to seed does so on
    more than one task; but one for each of their `kinds` where they have some: text can be lost
    very unevenly and benchmarks evenly. It is Cochran's C (1941), the largest arm's share of the
    residual squares, here the mean of its shares over layouts. Its distribution under equal
    variances depends on nothing but the shapes, and is simulated.
    """
    usable: dict[Hashable, list[int]] = {}
    for i, layout in enumerate(layouts):
        if layout and _has_error(layout):
            usable.setdefault(kinds[i] if kinds else None, []).append(i)
    errors: list[PooledError | None] = [None] * len(layouts)
    for of_kind in usable.values():
        for i in of_kind if _are_equal([layouts[i] for i in of_kind]) else ():
            scores = np.array([*layouts[i].values()])
            arms, seeds = scores.shape
            freedom = (arms - 1) * (seeds - 1)
            errors[i] = PooledError(float(_squares(scores).sum() / freedom), freedom, arms)
    return errors


def _has_error(layout: Layout) -> bool:
    scores = np.array([*layout.values()])
    enough = scores.shape[0] >= MIN_ARMS and scores.shape[1] >= MIN_SEEDS
    return enough and bool(_squares(scores).sum() > 1e-20)


def _are_equal(layouts: Sequence[Layout]) -> bool:
    names = list(dict.fromkeys(name for layout in layouts for name in layout))
    columns = [tuple(names.index(name) for name in layout) for layout in layouts]
    scores = [np.array([*layout.values()])[None] for layout in layouts]
    largest = _largest_share(columns, scores)[0]
    seeds = tuple(values.shape[-1] for values in scores)
    return float((_null_shares(tuple(columns), seeds) >= largest).mean()) > EQUAL_LEVEL


@functools.cache
def _null_shares(columns: tuple[tuple[int, ...], ...], seeds: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=(DRAWS, len(arms), n)) for arms, n in zip(columns, seeds)]
    return _largest_share(columns, scores)


def _largest_share(columns: Sequence[Sequence[int]], scores: Sequence[np.ndarray]) -> np.ndarray:
    """The largest of the arms' mean shares over layouts, shape (draws,).

    A layout's scores have shape (draws, arms, seeds), its `columns` (arms,) say which arms.
    """
    arms = 1 + max(max(numbers) for numbers in columns)
    sums, counts = np.zeros((len(scores[0]), arms)), np.zeros(arms)
    for numbers, values in zip(columns, scores):
        sums[:, numbers] += _shares(values)
        counts[[*numbers]] += 1
    return (sums / counts).max(axis=1)


def _shares(scores: np.ndarray) -> np.ndarray:
    """Each arm's share of the residual squares, times the arms, shape (..., arms)."""
    squares = _squares(scores)
    return squares / squares.mean(axis=-1, keepdims=True)


def _squares(scores: np.ndarray) -> np.ndarray:
    """Sums over seeds of the squared residuals of arms and seeds, shape (..., arms)."""
    rest = scores - scores.mean(axis=-1, keepdims=True)
    return ((rest - rest.mean(axis=-2, keepdims=True)) ** 2).sum(axis=-1)
