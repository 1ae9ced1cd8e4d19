"""The order of all rows of a run, computed before it starts.

The order depends on the data and the seed alone: every arm of a seed sees the same batches, and a
resumed run sees the batches that an uninterrupted one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Batches per window. Each window has the tasks in their shares, and groups rows by length.
WINDOW = 50


def task_shares(
    rows: Sequence[int], mixing: str, temperature: float = 1.0, weights: Sequence[float] = ()
) -> np.ndarray:
    """Each task's share of the examples, shape (tasks,), sum 1: by `weights`, else by its rows."""
    exponent = {"proportional": 1.0, "equal": 0.0, "temperature": 1 / temperature}[mixing]
    shares = np.asarray(weights or np.asarray(rows, float) ** exponent, float)
    return shares / shares.sum()


def steps_for(rows: Sequence[int], epochs: float, batch_size: int) -> int:
    """Optimizer steps that `epochs` passes over all rows take, at least one."""
    return max(1, math.ceil(epochs * sum(rows) / batch_size))


def order_rows(
    lengths: Sequence[np.ndarray], shares: np.ndarray, batch_size: int, steps: int, seed: int
) -> np.ndarray:
    """Indices into the tasks' concatenated rows, in training order, shape (steps * batch_size,).

    `lengths` holds each task's row lengths in tokens. Each task is read epoch by epoch, in a new
    permutation each time. A window of at most WINDOW batches, and at most one epoch, holds the
    tasks in their shares (to within one row, which is carried over). Within a window, rows are
    grouped by length into batches in random order, and sorted by length within a batch, so that
    micro-batches have little padding too.
    """
    random = np.random.default_rng(seed)
    offsets = np.cumsum([0, *map(len, lengths)])
    all_lengths = np.concatenate(lengths)
    streams = [_epochs(len(rows), random) for rows in lengths]
    window = min(WINDOW, max(1, len(all_lengths) // batch_size))
    order, drawn = [], np.zeros(len(lengths), int)
    for first in range(0, steps, window):
        batches = min(window, steps - first)
        wanted = _apportion(shares, drawn, batches * batch_size)
        drawn += wanted
        rows = np.concatenate(
            [
                offset + np.array([next(stream) for _ in range(count)], int)
                for offset, stream, count in zip(offsets, streams, wanted, strict=False)
            ]
        )
        random.shuffle(rows)  # equal lengths in random order
        rows = rows[np.argsort(all_lengths[rows], kind="stable")].reshape(batches, batch_size)
        order.append(rows[random.permutation(batches)].ravel())
    return np.concatenate(order)


def _epochs(rows: int, random: np.random.Generator) -> Any:
    while True:
        yield from random.permutation(rows)


def _apportion(shares: np.ndarray, drawn: np.ndarray, rows: int) -> np.ndarray:
    """The tasks' numbers of rows among the next `rows`: each goes to the task furthest behind."""
    target = shares * (drawn.sum() + rows)
    counts = drawn.copy()
    for _ in range(rows):
        counts[np.argmax(target - counts)] += 1
    return counts - drawn
