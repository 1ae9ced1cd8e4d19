"""Forgetting at matched adaptation: against curves worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from lora_tradeoffs.retention.matched import Curve, matched_forgetting
from lora_tradeoffs.statistics.comparisons import resampled
from lora_tradeoffs.statistics.scores import Scores, mean_scores, smoothed_bleu

ITEMS = 100


def right(share, items=ITEMS):
    """Items of which the first `share` are right."""
    return mean_scores("accuracy", np.arange(items) < round(share * items))


def curve(arm, scales, adaptation, retention):
    return Curve(
        arm,
        scales,
        {"task": [right(value) for value in adaptation]},
        {"benchmark": [right(value) for value in retention]},
    )


LORA = curve("lora", [0, 0.5, 1], [0.50, 0.60, 0.70], [0.80, 0.78, 0.70])
FULL = curve("full", [0, 0.5, 1], [0.50, 0.70, 0.90], [0.80, 0.60, 0.40])


def test_the_largest_common_score_is_matched_by_default():
    """LoRA ends at .7 with .7 retained; full fine-tuning has .7 at t = .5, with .6 retained."""
    found = matched_forgetting(LORA, FULL)
    assert found.score == pytest.approx(0.70)
    assert found.scales == pytest.approx((1, 0.5))
    assert found.forgetting == pytest.approx((0.10, 0.20))
    assert found.difference == pytest.approx(-0.10)
    assert found.low < found.difference < found.high and found.stderr > 0
    assert found.defined == 1 and found.reason == ""
    other = matched_forgetting(FULL, LORA)
    assert other.difference == pytest.approx(0.10)
    assert (other.low, other.high) == pytest.approx((-found.high, -found.low))


def test_between_two_scales_the_curves_are_lines():
    """.65: half way from t = .5 to 1 for LoRA (.74), three quarters from 0 to .5 for full (.65)."""
    found = matched_forgetting(LORA, FULL, score=0.65)
    assert found.scales == pytest.approx((0.75, 0.375))
    assert found.forgetting == pytest.approx((0.06, 0.15))
    assert found.difference == pytest.approx(-0.09)


def test_tasks_and_benchmarks_are_averaged_and_bleu_counts_in_hundredths():
    """The second task's BLEU goes from 0 to 100: the mean of both from .25 to .85."""
    perfect = np.array([10.0, 10, *[10] * 4, *[10] * 4])
    wrong = np.array([10.0, 10, *[0] * 4, *[1e9] * 4])

    def bleu(row):
        return Scores("bleu", np.tile(row, (30, 1)), smoothed_bleu)

    tasks = {"task": [right(0.5), right(0.7)], "code": [bleu(wrong), bleu(perfect)]}
    kept = {"one": [right(0.8), right(0.4)], "two": [right(0.6, 50), right(0.6, 50)]}
    arm = Curve("arm", [0, 1], tasks, kept)
    found = matched_forgetting(arm, replace(arm, arm="same"), score=0.55)
    assert found.scales == pytest.approx((0.5, 0.5))
    assert found.forgetting == pytest.approx((0.1, 0.1))
    assert found.difference == 0 and found.stderr == 0  # the same items in both arms


def test_the_interval_resamples_both_sides_and_both_arms_together():
    """The same numbers from the draws, a resample at a time."""
    rng = np.random.default_rng(0)

    def random_curve(arm, gain, loss):
        scales = [0, 0.5, 1]
        ease = rng.random(ITEMS)
        hard = rng.random(80)
        adaptation = [mean_scores("accuracy", ease < 0.5 + gain * t) for t in scales]
        retention = [mean_scores("accuracy", hard < 0.7 - loss * t) for t in scales]
        return Curve(arm, scales, {"task": adaptation}, {"benchmark": retention})

    first, second = random_curve("a", 0.3, 0.1), random_curve("b", 0.4, 0.3)
    found = matched_forgetting(first, second, resamples=300, seed=5)
    gains = resampled([*first.adaptation["task"], *second.adaptation["task"]], 300, 5)
    kept = resampled([*first.retention["benchmark"], *second.retention["benchmark"]], 300, 6)
    draws = []
    for gain, keep in zip(gains.T, kept.T):
        score = min(gain[:3].max(), gain[3:].max())
        at = [np.interp(score, gain[part], keep[part]) for part in (slice(3), slice(3, 6))]
        draws.append((keep[0] - at[0]) - (keep[3] - at[1]))
    assert found.stderr == pytest.approx(np.std(draws, ddof=1))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_a_curve_that_falls_again_is_read_off_at_its_first_crossing():
    """It has .6 at t = .25, again between .5 and 1, and once more before 1.5."""
    wavy = curve("wavy", [0, 0.5, 1, 1.5], [0.5, 0.7, 0.55, 0.9], [0.8, 0.76, 0.5, 0.2])
    found = matched_forgetting(wavy, FULL, score=0.6)
    assert found.scales == pytest.approx((0.25, 0.25))
    assert found.forgetting == pytest.approx((0.02, 0.10))
    assert "wavy passes 0.6 more than once" in found.reason and "full" not in found.reason
    falls = curve("falls", [0, 1, 1.25], [0.5, 0.7, 0.6], [0.8, 0.7, 0.6])
    found = matched_forgetting(falls, FULL)  # .7 is its peak: reached once
    assert found.scales == pytest.approx((1, 0.5)) and found.reason == ""


def test_a_dip_before_the_score_is_not_taken_for_it():
    dip = curve("dip", [0, 0.5, 1], [0.5, 0.4, 0.8], [0.8, 0.8, 0.4])
    found = matched_forgetting(dip, FULL, score=0.6)
    assert found.scales[0] == pytest.approx(0.75) and found.reason == ""


def test_a_score_that_an_arm_does_not_reach_is_nan_with_the_reason():
    found = matched_forgetting(LORA, FULL, score=0.8)
    assert np.isnan([found.difference, found.low, found.high, found.stderr]).all()
    assert "lora does not reach 0.8: its best is 0.7" in found.reason
    assert np.isnan(found.forgetting[0]) and found.forgetting[1] == pytest.approx(0.3)


def test_an_arm_that_learns_nothing_cannot_be_matched():
    flat = curve("flat", [0, 1], [0.5, 0.4], [0.8, 0.7])
    found = matched_forgetting(flat, FULL)
    assert np.isnan(found.difference) and found.score == pytest.approx(0.5)
    assert "the base has 0.5" in found.reason
    assert np.isnan(matched_forgetting(LORA, FULL, score=0.45).difference)


def test_a_score_at_the_edge_has_no_interval():
    """LoRA's best is .7: half of the resamples do not reach a fixed score of .7."""
    found = matched_forgetting(LORA, FULL, score=0.70)
    assert found.difference == pytest.approx(-0.10)
    assert 0.2 < found.defined < 0.8 and np.isnan([found.low, found.high, found.stderr]).all()
    assert "of the resamples only" in found.reason


def test_the_interval_covers_the_truth():
    """At .65 the arms have forgotten .075 and .15: 95 % intervals of 200 studies."""
    rng = np.random.default_rng(0)
    scales = np.array([0, 0.25, 0.5, 0.75, 1, 1.25])
    hits = 0
    for _ in range(200):
        arms = []
        ease, hard = rng.random(300), rng.random(300)
        for gain, loss in ((0.2, 0.1), (0.4, 0.4)):
            noise = 0.05 * rng.standard_normal((2, len(scales), 300))
            tasks = [
                mean_scores("acc", ease + e < 0.5 + gain * t) for t, e in zip(scales, noise[0])
            ]
            kept = [mean_scores("acc", hard + e < 0.7 - loss * t) for t, e in zip(scales, noise[1])]
            arms.append(Curve("arm", scales, {"task": tasks}, {"benchmark": kept}))
        found = matched_forgetting(*arms, score=0.65, resamples=400)
        hits += found.low <= 0.1 * 0.75 - 0.4 * 0.375 <= found.high
    assert 0.91 <= hits / 200 <= 0.99


def test_curves_that_do_not_fit_are_refused():
    for bad, message in (
        (replace(LORA, scales=[0.5, 1, 2]), "rise from 0"),
        (replace(LORA, scales=[0, 1, 1]), "rise from 0"),
        (replace(LORA, scales=[0, 1]), "at every scale"),
        (replace(LORA, adaptation={"other": LORA.adaptation["task"]}), "not the same adaptation"),
        (replace(LORA, retention={}), "not the same retention"),
    ):
        with pytest.raises(ValueError, match=message):
            matched_forgetting(bad, FULL)
    fewer = {"task": [right(value, 50) for value in (0.5, 0.6, 0.7)]}
    with pytest.raises(ValueError, match="the same items"):
        matched_forgetting(replace(LORA, adaptation=fewer), FULL)
