"""Intervals and tests: coverage and error rates on simulated data, and independent versions."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from lora_tradeoffs.adaptation.metrics import bleu_statistics, classification_scores, code_scores
from lora_tradeoffs.statistics import comparisons
from lora_tradeoffs.statistics.comparisons import (
    bca_interval,
    compare_checkpoints,
    detectable_over_items,
    estimate,
    grouped,
    holm,
    leave_one_out,
    mcnemar,
    resampled,
    sign_flip_interval,
    sign_flip_p,
)
from lora_tradeoffs.statistics.scores import Scores, macro_f1, mean_scores, smoothed_bleu

ITEMS = 300


def accuracy_sample(rng):
    """300 items of a model that is right with probability .8."""
    return mean_scores("accuracy", rng.random(ITEMS) < 0.8)


def answer_sample(rng):
    """300 SQuAD F1s: 0 with probability .35, 1 with .45, else between .2 and .9 (mean .55)."""
    kind = rng.random(ITEMS)
    partial = rng.uniform(0.2, 0.9, ITEMS)
    return mean_scores("f1", np.where(kind < 0.35, 0, np.where(kind < 0.8, 1, partial)))


@cache
def code_pool(size=3000, seed=0):
    """BLEU statistics of texts of 5 to 120 Zipf-distributed words, each with its own error rate."""
    rng = np.random.default_rng(seed)
    references, predictions = [], []
    for _ in range(size):
        length = int(np.clip(rng.lognormal(3.3, 0.6), 5, 120))
        words = np.minimum(rng.zipf(1.3, length), 500)
        wrong = rng.random(length) < rng.beta(1, 2)
        changed = np.where(wrong, np.minimum(rng.zipf(1.3, length), 500), words)
        references.append(words.astype(str).tolist())
        kept = max(4, int(length * rng.uniform(0.7, 1.2)))
        predictions.append(changed[:kept].astype(str).tolist())
    return bleu_statistics(predictions, references)


def code_sample(rng):
    """300 texts drawn from the pool."""
    drawn = code_pool()[rng.integers(len(code_pool()), size=ITEMS)]
    return Scores("codexglue_bleu", drawn, smoothed_bleu)


POPULATIONS = {
    "accuracy": (accuracy_sample, lambda: 0.8),
    "squad f1": (answer_sample, lambda: 0.45 + 0.2 * 0.55),
    "codexglue bleu": (code_sample, lambda: float(smoothed_bleu(code_pool().sum(axis=0)))),
}


def coverage(sample, truth, draws, level, resamples, seed):
    rng, truth = np.random.default_rng(seed), truth()
    inside = 0
    for draw in range(draws):
        found = estimate(sample(rng), resamples=resamples, seed=draw, level=level)
        inside += found.low <= truth <= found.high
    return inside / draws


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_interval_covers_the_truth_as_often_as_it_says(population, level):
    draws = 250
    found = coverage(*POPULATIONS[population], draws, level, resamples=400, seed=7)
    # three standard errors of a binomial share
    assert abs(found - level) < 3 * math.sqrt(level * (1 - level) / draws)


def test_the_standard_error_of_an_accuracy_is_the_binomial_one():
    scores = mean_scores("accuracy", [1] * 240 + [0] * 60)
    found = estimate(scores, resamples=20_000)
    assert (found.value, found.n) == (0.8, 300)
    # the standard error of a standard deviation over 20,000 draws is .5 %
    assert found.stderr == pytest.approx(math.sqrt(0.8 * 0.2 / 300), rel=0.02)


def test_a_resampled_figure_is_the_metric_of_the_resampled_items():
    from sklearn.metrics import f1_score

    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(3, size=50), rng.integers(3, size=50)
    both = classification_scores(predictions, labels, (0, 1, 2))
    found = resampled(both, 20, seed=5)
    drawn = np.random.default_rng(5).integers(50, size=(20, 50))
    for column, items in enumerate(drawn):
        ours, gold = predictions[items], labels[items]
        assert found[0, column] == pytest.approx((ours == gold).mean())
        expected = f1_score(gold, ours, average="macro", labels=[0, 1, 2], zero_division=0)
        assert found[1, column] == pytest.approx(expected)


def test_resampling_does_not_depend_on_the_size_of_its_blocks(monkeypatch):
    scores = accuracy_sample(np.random.default_rng(0))
    whole = resampled([scores], 50, seed=1)
    monkeypatch.setattr(comparisons, "BLOCK_CELLS", 7 * ITEMS)
    assert np.array_equal(whole, resampled([scores], 50, seed=1))
    assert not np.array_equal(whole, resampled([scores], 50, seed=2))


def test_nothing_is_resampled_from_nothing_or_from_other_items():
    with pytest.raises(ValueError, match="same items"):
        resampled([mean_scores("accuracy", [])], 10, seed=0)
    with pytest.raises(ValueError, match="same items"):
        resampled([mean_scores("a", [1, 0]), mean_scores("a", [1])], 10, seed=0)


def test_leaving_one_item_out_is_the_figure_of_the_others():
    rng = np.random.default_rng(3)
    (_, f1) = classification_scores(rng.integers(2, size=12), rng.integers(2, size=12), (1,))
    found = leave_one_out(f1)
    for item in range(12):
        others = np.delete(f1.statistics, item, axis=0)
        assert found[item] == pytest.approx(Scores("f1", others, macro_f1).value)


@pytest.mark.parametrize("kind", ["skewed", "right or wrong"])
def test_the_interval_is_that_of_scipy_on_the_same_draws(kind):
    from scipy.stats import bootstrap

    rng = np.random.default_rng(2)
    # skewed: bias and acceleration matter; right or wrong: many draws equal the figure itself
    values = rng.exponential(size=40) if kind == "skewed" else (rng.random(20) < 0.8) + 0.0
    options = {"vectorized": True, "axis": -1, "rng": np.random.default_rng(3)}
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", **options)
    theirs = bootstrap(
        (values,), np.mean, n_resamples=0, bootstrap_result=drawn, method="BCa", **options
    ).confidence_interval
    jackknife = leave_one_out(mean_scores("mean", values))
    ours = bca_interval(drawn.bootstrap_distribution, values.mean(), jackknife)
    assert ours == pytest.approx((theirs.low, theirs.high))
    if kind == "skewed":
        percentile = drawn.confidence_interval
        assert ours[0] > percentile.low + 0.005
        assert ours[1] > percentile.high + 0.005


def test_items_that_are_all_wrong_do_not_make_a_certainty():
    found = estimate(mean_scores("exact_match", [0] * 300))
    # Clopper and Pearson: the largest p with (1 - p)^300 >= .025
    assert (found.low, found.stderr) == (0, 0)
    assert found.high == pytest.approx(1 - 0.025 ** (1 / 300))
    all_right = estimate(mean_scores("exact_match", [1] * 300))
    assert (all_right.low, all_right.high) == pytest.approx((0.025 ** (1 / 300), 1))
    f1 = estimate(classification_scores([0, 1] * 9, [0, 1] * 9, (0, 1))[1])
    assert f1.value == 1 and math.isnan(f1.low) and math.isnan(f1.high)
    groups = grouped(mean_scores("exact_match", [0] * 300), np.arange(300) // 10)
    assert estimate(groups).high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_a_resample_without_an_answerable_question_is_left_out():
    scores = mean_scores("f1_has_answer", [0.5, 1, 0, 0], np.array([1, 1, 0, 0]))
    found = estimate(scores, resamples=500)
    assert found.n == 2
    assert 0.5 <= found.low <= found.high <= 1
    assert found.stderr > 0


def test_a_metric_for_which_no_item_counts_is_nan_and_no_error():
    scores = mean_scores("f1_has_answer", [1, 1], np.zeros(2))  # two unanswerable questions
    found = estimate(scores)
    assert found.n == 0
    assert all(map(math.isnan, (found.value, found.stderr, found.low, found.high)))
    with pytest.raises(ValueError, match="no item counts"):
        compare_checkpoints(scores, scores)


@pytest.mark.filterwarnings("error")
def test_a_single_item_has_a_figure_without_a_warning():
    assert estimate(mean_scores("f1", [0.5])).value == 0.5


def test_resampling_groups_widens_the_error_of_items_that_hang_together():
    once = accuracy_sample(np.random.default_rng(1))
    hits = np.tile(once.items, 4)  # every item four times
    copies = mean_scores("accuracy", hits)
    together = grouped(copies, np.tile(np.arange(ITEMS), 4))
    assert together.value == copies.value == once.value
    assert compare_checkpoints(together, together).test == "paired bootstrap"
    assert estimate(together).stderr == pytest.approx(estimate(once).stderr)
    f1 = Scores("f1", np.stack([hits, 1 - hits, 0 * hits], axis=1), macro_f1)
    for scores in (copies, f1):  # n are the items
        assert estimate(scores, groups=np.tile(np.arange(ITEMS), 4)).n == 4 * ITEMS
    # four times the items, half the error: what resampling them singly believes
    assert estimate(copies).stderr == pytest.approx(estimate(once).stderr / 2, rel=0.1)


def test_mcnemar_is_the_binomial_test_of_the_items_that_differ():
    first = np.array([1.0] * 6 + [0] + [1] * 50 + [np.nan])
    second = np.array([0.0] * 6 + [1] + [1] * 50 + [np.nan])
    # six against one: 2 * (C(7,0) + C(7,1)) / 2^7
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 7) / 128)
    assert mcnemar(second, first) == mcnemar(first, second)
    assert mcnemar(first, first) == 1


def test_two_checkpoints_of_right_and_wrong_items_are_compared_by_mcnemar():
    first = mean_scores("accuracy", [1] * 80 + [1] * 12 + [0] * 3 + [0] * 5)
    second = mean_scores("accuracy", [1] * 80 + [0] * 12 + [1] * 3 + [0] * 5)
    found = compare_checkpoints(first, second)
    assert found.test == "exact McNemar"
    assert found.difference == pytest.approx(0.09)
    # the variance of a difference of paired shares: (b + c - (b - c)^2 / n) / n^2
    error = math.sqrt((12 + 3 - 81 / 100) / 100**2)
    assert found.stderr == pytest.approx(error, rel=0.03)
    assert found.low < 0.09 < found.high
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * found.stderr, rel=1e-5)
    back = compare_checkpoints(second, first)
    assert (back.difference, back.p_value) == pytest.approx((-0.09, found.p_value))


def test_equal_checkpoints_do_not_differ_but_six_items_would_be_needed_to_tell():
    scores = mean_scores("accuracy", [1] * 70 + [0] * 30)
    found = compare_checkpoints(scores, scores)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.detectable == pytest.approx(0.06)


def test_checkpoints_are_compared_on_one_metric_and_the_same_items_alone():
    with pytest.raises(ValueError, match="f1 over 2 items, f1 over 3 items"):
        compare_checkpoints(mean_scores("f1", [1, 0.5]), mean_scores("f1", [1, 0.5, 0]))
    with pytest.raises(ValueError, match="not the same metric"):
        compare_checkpoints(mean_scores("f1", [1]), mean_scores("accuracy", [1]))


def test_the_paired_bootstrap_is_wrong_about_equal_models_in_five_percent():
    rng = np.random.default_rng(11)
    draws, found = 300, 0
    for _ in range(draws):
        ease = rng.normal(size=ITEMS)
        first, second = (np.clip(0.5 + 0.3 * ease + rng.normal(0, 0.2, ITEMS), 0, 1) for _ in "ab")
        pair = mean_scores("f1", first), mean_scores("f1", second)
        found += compare_checkpoints(*pair, resamples=400).p_value <= 0.05
    assert abs(found / draws - 0.05) < 3 * math.sqrt(0.05 * 0.95 / draws)


def test_the_observed_difference_is_one_of_its_resamples():
    better = mean_scores("f1", np.linspace(0.5, 0.6, 50))
    worse = mean_scores("f1", np.linspace(0, 0.1, 50))
    assert compare_checkpoints(better, worse, resamples=99).p_value == 1 / 100
    assert compare_checkpoints(better, better, resamples=99).p_value == 1


def test_the_paired_bootstrap_of_bleu_agrees_with_sacrebleus_randomisation(real_data):
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    lines = Path(real_data, "codexglue", "test.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["code"] for line in lines]
    rng = np.random.default_rng(6)

    def corrupt(rate):
        kept = lambda text: [w if rng.random() > rate else "x" for w in text.split()]  # noqa: E731
        return [" ".join(kept(text)) for text in references]

    first, second = corrupt(0.2), corrupt(0.208)
    _, theirs = PairedTest(
        [("first", first), ("second", second)],
        {"BLEU": BLEU(force=True)},
        [references],
        test_type="ar",
        n_samples=2000,
    )()
    expected = theirs["BLEU"][1].p_value
    ours = compare_checkpoints(
        code_scores(first, references)[1], code_scores(second, references)[1]
    )
    assert ours.test == "paired bootstrap"
    assert 0.02 < expected < 0.8  # where the two could disagree
    assert ours.p_value == pytest.approx(expected, abs=0.06)


def test_sign_flips_count_the_sums_that_are_as_extreme():
    assert sign_flip_p([0.3, 0.1, 0.2, 0.4, 0.5, 0.1]) == 2 / 2**6
    # sums of +-3 +-1 +-1: 5 3 3 1 and their negatives; at least 3 in size are six of eight
    assert sign_flip_p([3, 1, -1]) == 6 / 8
    with pytest.raises(ValueError, match="21 differences"):
        sign_flip_p([1] * 21)


def test_the_detectable_difference_is_found_in_four_of_five_studies():
    found = np.random.default_rng(8).normal(detectable_over_items(1.0), 1.0, 20_000)
    # three standard errors of a share of .8 of 20,000 studies
    assert (abs(found) > 1.959964).mean() == pytest.approx(0.8, abs=0.0085)


def test_holm_multiplies_by_the_tests_that_are_left():
    # sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04; never below the one before: .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1, 1])


def test_a_test_that_could_not_be_made_still_counts_in_the_family():
    assert holm([math.nan, 0.02]) == pytest.approx([math.nan, 0.04], nan_ok=True)
    assert holm([]).tolist() == []


def test_the_interval_of_sign_flips_is_what_the_test_does_not_reject():
    rng = np.random.default_rng(8)
    for count in (6, 7, 9):
        differences = rng.normal(0.5, 1, count)
        low, high = sign_flip_interval(differences)
        for bound, side in ((low, 1), (high, -1)):
            assert sign_flip_p(differences - bound - side * 1e-6) > 0.05
            assert sign_flip_p(differences - bound + side * 1e-6) <= 0.05
    assert sign_flip_interval(differences[:6]) == (differences[:6].min(), differences[:6].max())
    assert np.isnan(sign_flip_interval(differences[:5])).all()
