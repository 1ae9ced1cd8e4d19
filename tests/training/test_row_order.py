"""The order of a run's rows."""

import numpy as np
import pytest

from lora_tradeoffs.training.row_order import WINDOW, order_rows, steps_for, task_shares

ROWS = (900, 300, 300)


@pytest.fixture
def lengths():
    random = np.random.default_rng(0)
    return [
        random.integers(low, high, n)
        for n, (low, high) in zip(ROWS, ((8, 60), (20, 90), (200, 400)))
    ]


def order_of(lengths, steps=200, batch=16, seed=1, mixing="proportional"):
    return order_rows(lengths, task_shares(ROWS, mixing), batch, steps, seed)


def task_of(rows):
    return np.searchsorted(np.cumsum(ROWS), rows, side="right")


def test_order_depends_on_the_seed_alone(lengths):
    assert np.array_equal(order_of(lengths), order_of(lengths))
    assert not np.array_equal(order_of(lengths), order_of(lengths, seed=2))


def test_an_epoch_reads_every_row_once(lengths):
    steps = steps_for(ROWS, 2, 15)
    rows, counts = np.unique(order_of(lengths, steps, 15), return_counts=True)
    assert len(rows) == sum(ROWS)
    assert set(counts) == {2}


@pytest.mark.parametrize("mixing", ["proportional", "equal"])
def test_every_window_holds_the_tasks_in_their_shares(lengths, mixing):
    order, shares = order_of(lengths, mixing=mixing), task_shares(ROWS, mixing)
    for window in np.split(order, 200 // WINDOW):
        counts = np.bincount(task_of(window), minlength=3)
        assert np.abs(counts - shares * len(window)).max() <= 1


def test_shares_between_equal_and_proportional_by_temperature():
    assert task_shares((900, 100), "proportional").tolist() == [0.9, 0.1]
    assert task_shares((900, 100), "equal").tolist() == [0.5, 0.5]
    assert task_shares((900, 100), "temperature", 2).tolist() == [0.75, 0.25]


def test_rows_of_a_batch_have_like_lengths(lengths):
    """Padding wastes under a tenth; in random order it wastes more than the tokens themselves."""
    every = np.concatenate(lengths)

    def waste(order):
        batches = every[order].reshape(-1, 16)
        return batches.max(axis=1).sum() * 16 / batches.sum() - 1

    order = order_of(lengths)
    assert waste(order) < 0.1
    assert waste(np.random.default_rng(0).permutation(order)) > 1


def test_batches_of_a_window_are_in_random_order(lengths):
    means = np.concatenate(lengths)[order_of(lengths)].reshape(-1, 16).mean(axis=1)[:WINDOW]
    assert abs(np.corrcoef(means, np.arange(WINDOW))[0, 1]) < 0.5


def test_a_tiny_share_and_more_steps_than_rows_are_laid_out():
    order = order_rows(
        [np.full(3, 9), np.full(400, 5)], task_shares((3, 400), "proportional"), 4, 301, 0
    )
    assert order.shape == (1204,)
    assert 6 <= (order < 3).sum() <= 12
