"""Metrics of adaptation: pure functions with per-item values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def correct(predictions: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Per-item correctness, shape (items,), bool. Raises ValueError if the lengths differ."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"{predictions.shape} predictions for {labels.shape} labels")
    return predictions == labels


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of the items that are right, in [0, 1]; nan for none."""
    hits = correct(predictions, labels)
    return float(hits.mean()) if len(hits) else float("nan")
