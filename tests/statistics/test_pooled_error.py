"""The error that arms share: by least squares, refused where arms differ, in simulations."""

import math

import numpy as np
import pytest
from scipy.stats import t
from simulated_studies import SPREADS, difference_errors

from lora_tradeoffs.statistics import pooled_error
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.statistics.seed_intervals import compare_over_seeds

STUDIES = 1_000


def layout(scores):
    return {f"arm {i}": row for i, row in enumerate(scores)}


def test_it_is_the_residual_mean_square_of_arms_and_seeds(monkeypatch):
    monkeypatch.setattr(pooled_error, "EQUAL_LEVEL", -1)
    scores = np.random.default_rng(0).normal(size=(6, 3)) + np.arange(6)[:, None] + [0, 5, 9]
    (error,) = pooled_errors([layout(scores)])
    # least squares with a dummy variable for every arm and seed
    arms, seeds = (np.eye(n)[index.ravel()] for n, index in zip((6, 3), np.indices((6, 3))))
    _, (rest,), rank, _ = np.linalg.lstsq(
        np.hstack([arms, seeds])[:, :-1], scores.reshape(-1, 1), rcond=None
    )
    assert error.freedom == 18 - rank == 10
    assert error.variance == pytest.approx(rest / 10)
    assert t.isf(0.05 / 60, error.freedom) == pytest.approx(4.26, abs=0.005)


def test_arms_that_differ_more_from_seed_to_seed_keep_errors_of_their_own():
    rng = np.random.default_rng(1)
    tasks = rng.normal(size=(6, 6, 3))
    assert None not in pooled_errors([*map(layout, tasks)])
    tasks[:, 2] *= 6
    assert pooled_errors([*map(layout, tasks)]) == [None] * 6
    # on every task, or the check would see too little
    assert None not in pooled_errors([layout(np.delete(task, 2, axis=0)) for task in tasks])


@pytest.mark.parametrize(
    "scores",
    [np.ones((2, 3)) * [[1, 2, 4]], np.zeros((6, 2)), np.ones((6, 3)), np.zeros((6, 0))],
    ids=["two arms", "two seeds", "no noise", "no seeds"],
)
def test_what_has_no_error_to_pool_has_none(scores):
    good = layout(np.random.default_rng(3).normal(size=(6, 3)))
    assert pooled_errors([layout(scores), None, good])[:2] == [None, None]


@pytest.mark.parametrize("name", ["all arms alike", "full fine-tuning 3 times"])
def test_equal_arms_are_found_different_in_five_percent_of_studies(name):
    family, single, pooled = difference_errors(STUDIES, SPREADS[name])
    assert family < 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / STUDIES)
    assert 0.03 < single < 0.07  # and the 95 % intervals hold the truth in 93 to 97 %
    assert pooled > 0.7 if name == "all arms alike" else pooled < 0.1


def test_without_the_check_noisier_arms_are_found_different_too_often(monkeypatch):
    monkeypatch.setattr(pooled_error, "EQUAL_LEVEL", -1)
    family, _, pooled = difference_errors(300, SPREADS["full fine-tuning 3 times"])
    assert pooled == 1 and family > 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREADS)
def test_the_check_keeps_the_error_rate(name):
    family, single, _ = difference_errors(4_000, SPREADS[name])
    assert family < 0.07 + 2 * math.sqrt(0.07 * 0.93 / 4_000)
    assert 0.03 < single < 0.07


def test_an_outcome_that_one_arm_varies_in_does_not_hide_among_others():
    """Text is lost unevenly by one of six arms, three other outcomes evenly by all."""
    rng, kinds, rejected = np.random.default_rng(0), ("text", "mean", "mean", "mean"), []
    for _ in range(300):
        layouts = [
            {arm: rng.normal(0, 100 if kind == "text" and arm == 0 else 1, 3) for arm in range(6)}
            for kind in kinds
        ]
        differences = layouts[0][0] - layouts[0][1]
        rejected.append([])
        for error in (pooled_errors(layouts)[0], pooled_errors(layouts, kinds)[0]):
            pooled = error and (error.variance * 2 / 3, error.freedom)
            rejected[-1].append(compare_over_seeds(differences, pooled=pooled).p_value < 0.05)
    together, apart = np.mean(rejected, axis=0)
    assert together > 0.1 and 0.02 < apart < 0.08
