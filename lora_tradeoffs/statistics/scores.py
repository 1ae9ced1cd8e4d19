"""A metric of a list of items: one row of sufficient statistics an item, and their aggregate.

Any weighting of the items thus gives its figure by one product, and one bootstrap (comparisons.py)
serves accuracy and corpus BLEU alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

ORDERS = 4  # of BLEU's n-grams


@dataclass(frozen=True, eq=False)
class Scores:
    """A metric of a list of items.

    `statistics` has shape (items, k); `aggregate` maps sums of shape (..., k) to figures of shape
    (...), and stands in AGGREGATES, so that a file needs to hold its name and the rows alone.
    """

    name: str
    statistics: np.ndarray
    aggregate: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The figure over all items; nan for none."""
        return float(self.aggregate(self.statistics.sum(axis=0)))

    @property
    def items(self) -> np.ndarray | None:
        """Values of shape (items,), nan where an item does not count.

        None for a metric of the corpus alone, and for groups of items (comparisons.grouped).
        """
        if self.aggregate is not mean or (self.statistics[:, 1] > 1).any():
            return None
        totals, counts = self.statistics.T
        return np.where(counts == 1, totals, np.nan)

    @property
    def count(self) -> int:
        """How many items the figure is over."""
        counted = self.aggregate is mean
        return int(self.statistics[:, 1].sum()) if counted else len(self.statistics)


def mean(sums: np.ndarray) -> np.ndarray:
    """Mean from (total, count), shape (..., 2); nan where nothing counts."""
    total, count = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 from (tp, fp, fn) per class, shape (..., 3 * classes); 0 for a class without any."""
    counts = np.asarray(sums, dtype=float).reshape(*np.shape(sums)[:-1], -1, 3)
    hits, false_positives, misses = np.moveaxis(counts, -1, 0)
    whole = 2 * hits + false_positives + misses
    return np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0).mean(axis=-1)


def smoothed_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU with one added to every order's matches and possible matches, in [0, 100].

    `sums`, shape (..., 10): length, reference length, matches and possible matches of four orders.
    Lin and Och 2004 (ORANGE, COLING) as in CodeXGLUE's evaluator, which is TensorFlow NMT's
    compute_bleu(smooth=True): there the first order is smoothed too. Without a token it is 0.
    """
    penalty, matches, possible = _bleu_parts(sums)
    return 100 * penalty * np.exp(np.log((matches + 1) / (possible + 1)).mean(axis=-1))


def mteval_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU as sacreBLEU's defaults compute it, in [0, 100]; `sums` as for smoothed_bleu.

    Papineni et al. 2002 with the "exp" smoothing of mteval-v13a (Chen and Cherry 2014, method 3):
    the k-th order without a match counts 1/2^k matches. 0 without any match, or where no text is
    long enough for an order.
    """
    penalty, matches, possible = _bleu_parts(sums)
    empty = matches == 0
    matches = np.where(empty, 0.5 ** np.cumsum(empty, axis=-1), matches)
    defined = (possible > 0).all(axis=-1) & ~empty.all(axis=-1)
    logs = np.log(matches / np.maximum(possible, 1)).mean(axis=-1)
    return np.where(defined, 100 * penalty * np.exp(logs), 0.0)


def _bleu_parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums = np.asarray(sums, dtype=float)
    length, reference = sums[..., 0], sums[..., 1]
    penalty = np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1)))
    return np.where(length > 0, penalty, 0.0), sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]


AGGREGATES = {f.__name__: f for f in (mean, macro_f1, smoothed_bleu, mteval_bleu)}


def mean_scores(name: str, values: Sequence[float], mask: np.ndarray | None = None) -> Scores:
    """Scores whose figure is the mean of the values, over the items of the mask or all."""
    values = np.asarray(values, dtype=float)
    counts = np.ones(len(values)) if mask is None else np.asarray(mask, dtype=float)
    return Scores(name, np.stack([values * counts, counts], axis=1), mean)
