"""Intervals over seeds and items: by hand, against other versions, and in simulated studies."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import nct, norm, t, ttest_rel

from lora_tradeoffs.statistics.comparisons import leave_one_out
from lora_tradeoffs.statistics.scores import mean_scores
from lora_tradeoffs.statistics.seed_intervals import (
    compare_over_seeds,
    detectable,
    estimate_over_seeds,
    reach,
    shared_variance,
)

STUDIES, ITEMS = 1_500, 150


def detectable_by_t(stderr, freedom):
    """An independent version without items: the noncentral t whose power is 80 %."""
    bar = t.ppf(0.975, freedom)
    return brentq(lambda shift: nct.sf(bar, freedom, shift) - 0.8, 1, 2 * bar) * stderr


def test_the_reach_adds_the_squares_of_both_parts():
    # t(.975, 2) = 4.302653, z = 1.959964: 4.302653^2 * 1e-4 + 1.959964^2 * 4e-4 = .0033879
    assert reach(1e-4, 2, 4e-4) == pytest.approx(math.sqrt(0.0033879), rel=1e-4)
    assert reach(0, 2, 4e-4) == pytest.approx(norm.ppf(0.975) * 0.02)
    assert reach(1e-4, 4) == pytest.approx(t.ppf(0.975, 4) * 0.01)


def test_the_items_share_is_the_mean_covariance_of_two_seeds():
    answers = np.random.default_rng(0).random((4, 60)) < np.linspace(0.2, 0.95, 60)
    scores = [leave_one_out(mean_scores("accuracy", row)) for row in answers]
    covariances = np.cov(answers.astype(float))[np.triu_indices(4, 1)]
    assert shared_variance(np.array(scores)) == pytest.approx(covariances.mean() / 60)
    one = np.var(answers[0], ddof=1) / 60
    assert shared_variance(np.array(scores[:1])) == pytest.approx(one)


def test_seeds_that_agree_by_chance_less_than_not_at_all_share_nothing():
    opposite = np.array([[1, 0, 1, 0.0], [0, 1, 0, 1.0]])
    assert shared_variance(opposite) == 0


def test_without_items_it_is_the_paired_t_test_over_seeds():
    first, second = np.array([0.81, 0.79, 0.84, 0.80]), np.array([0.78, 0.78, 0.80, 0.79])
    theirs = ttest_rel(first, second)
    interval = theirs.confidence_interval()
    ours = compare_over_seeds(first - second)
    assert ours.difference == pytest.approx((first - second).mean())
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high))
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert (ours.n, ours.test) == (4, "paired t over seeds")
    assert ours.stderr == pytest.approx((first - second).std(ddof=1) / 2)
    exact = detectable_by_t(ours.stderr, 3)
    assert ours.detectable == pytest.approx(exact, rel=5e-3)  # 400 quantiles


def test_equal_differences_are_no_certainty_with_items_either():
    found = compare_over_seeds([0.1, 0.1, 0.1], 1e-6)
    assert (found.p_value, found.test) == (0.25, "exact sign flips over seeds")
    assert math.isnan(found.low) and math.isnan(found.detectable)


@pytest.mark.parametrize("differences", [[0.02, 0.03, 0.05], [-0.2, 0.1, 0.14, 0.16], [0, 1, -1]])
@pytest.mark.parametrize("item_variance", [0.0, 1e-4, 0.01])
def test_p_value_and_interval_agree(differences, item_variance):
    found = compare_over_seeds(differences, item_variance)
    assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0)
    if found.p_value < 1:  # at the level of its p-value the interval just ends at zero
        variance = np.var(differences, ddof=1) / len(differences)
        half = reach(variance, len(differences) - 1, item_variance, 1 - found.p_value)
        assert half == pytest.approx(abs(found.difference), rel=1e-4)
    back = compare_over_seeds(np.negative(differences), item_variance)
    assert (back.p_value, back.low) == pytest.approx((found.p_value, -found.high))


def test_two_seeds_are_refused():
    with pytest.raises(ValueError, match="needs 3 of them, here 2"):
        estimate_over_seeds([0.1, 0.2])


@pytest.mark.parametrize("seeds, item_variance", [(3, 0.0), (3, 0.02), (5, 0.1)])
def test_the_detectable_difference_is_found_in_four_of_five_studies(seeds, item_variance):
    rng, studies, spread = np.random.default_rng(1), 20_000, 0.3
    shift = detectable(spread**2 / seeds, seeds - 1, item_variance)
    differences = rng.normal(shift, spread, (studies, seeds))
    differences += rng.normal(0, math.sqrt(item_variance), (studies, 1))
    own = t.ppf(0.975, seeds - 1) ** 2 * differences.var(axis=1, ddof=1) / seeds
    found = abs(differences.mean(axis=1)) > np.sqrt(own + norm.ppf(0.975) ** 2 * item_variance)
    assert found.mean() == pytest.approx(0.8, abs=0.0085)  # three standard errors
    if not item_variance:
        assert shift == pytest.approx(detectable_by_t(spread / seeds**0.5, seeds - 1), rel=5e-3)


def simulated(seed_spread, rest, seeds=3):
    """Studies of right-or-wrong items, shape (studies, seeds, items), and the true accuracy."""
    rng = np.random.default_rng(5)
    ability = 0.8 + rng.normal(0, seed_spread, (STUDIES, seeds, 1))
    hard = rng.normal(0, 1, (STUDIES, 1, ITEMS))
    right = ability + hard + rng.normal(0, rest, (STUDIES, seeds, ITEMS)) > 0
    return right.astype(float), norm.cdf(0.8 / math.sqrt(seed_spread**2 + 1 + rest**2))


@pytest.mark.parametrize("seed_spread, rest", [(0.02, 0.3), (0.05, 0.5), (0.3, 0.5)])
def test_an_interval_over_seeds_and_items_covers_the_truth(seed_spread, rest):
    studies, truth = simulated(seed_spread, rest)
    inside = {"both": 0, "errors": 0, "seeds alone": 0}
    for right in studies:
        figures = right.mean(axis=1)
        without = (right.sum(axis=1, keepdims=True) - right) / (ITEMS - 1)
        parts = {
            "both": shared_variance(without),
            "errors": (right.var(axis=1, ddof=1) / ITEMS).mean(),
            "seeds alone": 0.0,
        }
        for name, part in parts.items():
            found = estimate_over_seeds(figures, part)
            inside[name] += found.low <= truth <= found.high
    covered = {name: count / STUDIES for name, count in inside.items()}
    margin = 3 * math.sqrt(0.95 * 0.05 / STUDIES)
    assert 0.95 - margin < covered["both"] < 0.985
    # each seed's own error holds more than what the seeds share: never too narrow
    assert covered["errors"] >= covered["both"]
    if seed_spread < 0.1:  # seeds that hardly differ say nothing of other items
        assert covered["seeds alone"] < 0.88
