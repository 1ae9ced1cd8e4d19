"""Forgetting at matched adaptation: two arms' curves, read off at the same validation score.

A curve leads from the base (t = 0) through an arm's update scaled by t. An arm that learns less
also forgets less, so the ends of two runs cannot be compared; where both have learned as much,
their forgetting can. Of a validation loss the negative is the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_tradeoffs.records import metric_scale
from lora_tradeoffs.statistics.comparisons import LEVEL, RESAMPLES, resampled
from lora_tradeoffs.statistics.scores import Scores

ENOUGH = 0.95  # share of resamples in which the difference has to exist


@dataclass(frozen=True, eq=False)
class Curve:
    """An arm at every scale t of its update, in rising order and with the base, t = 0, first.

    `adaptation` holds a task's Scores, one a scale, `retention` a benchmark's: one metric each,
    over the same items at every scale and in both arms.
    """

    arm: str
    scales: Sequence[float]
    adaptation: Mapping[str, Sequence[Scores]]
    retention: Mapping[str, Sequence[Scores]]


@dataclass(frozen=True)
class MatchedForgetting:
    """Forgetting of the first arm minus that of the second, where both score `score`.

    `score` is the mean over tasks, `forgetting` the base's mean over benchmarks minus each arm's,
    `scales` the t at which each arm scores that much. `defined` is the share of resamples in which
    both do. `reason` says why figures are nan, or what a reader has to know of them.
    """

    score: float
    forgetting: tuple[float, float]
    scales: tuple[float, float]
    difference: float
    stderr: float
    low: float
    high: float
    defined: float
    reason: str = ""


def matched_forgetting(
    first: Curve,
    second: Curve,
    score: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> MatchedForgetting:
    """The difference in forgetting at equal adaptation, with a percentile interval.

    `score` is the validation score at which the curves are compared; if None, the largest that both
    arms reach at some scale, recomputed in every resample. A curve is read off where it first rises
    to the score, from t = 0 on: at the smallest update that does, also if the score falls again and
    is passed more than once (`reason` then says so). Between scales both are linear in t.

    A resample draws the items of each task and each benchmark anew, the same for both arms and all
    scales; so it is a claim about these checkpoints and new items, not about other seeds. nan with
    a reason: a score that an arm does not reach or that the base has already, and, for the interval
    alone, one that both reach in fewer than 95 % of the resamples. Raises ValueError for curves
    that are not as `Curve` describes.
    """
    arms = (first, second)
    _check(arms)
    adaptation = _means(arms, "adaptation", resamples, seed)
    retention = _means(arms, "retention", resamples, seed + len(first.adaptation))
    if score is None:
        scores = np.minimum(*(values.max(axis=0) for values in adaptation))
    else:
        scores = np.full(resamples + 1, float(score))
    reached = [_first_reach(a.scales, *p, scores) for a, *p in zip(arms, adaptation, retention)]
    scales = tuple(float(scale[0]) for scale, _ in reached)
    forgotten = [values[0] - retained for values, (_, retained) in zip(retention, reached)]
    differences = forgotten[0] - forgotten[1]
    draws = differences[1:][np.isfinite(differences[1:])]
    defined = len(draws) / resamples
    stderr = low = high = float("nan")
    reasons = [
        _remark(a, g[:, 0], scores[0], scale) for a, g, scale in zip(arms, adaptation, scales)
    ]
    if np.isfinite(differences[0]) and defined < ENOUGH:
        reasons.append(f"both arms reach the score in {defined:.0%} of the resamples only")
    elif np.isfinite(differences[0]):
        stderr = float(draws.std(ddof=1))
        low, high = map(float, np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))
    return MatchedForgetting(
        score=float(scores[0]),
        forgetting=tuple(float(figure[0]) for figure in forgotten),
        scales=scales,
        difference=float(differences[0]),
        stderr=stderr,
        low=low,
        high=high,
        defined=defined,
        reason="; ".join(filter(None, reasons)),
    )


def _check(arms: tuple[Curve, Curve]) -> None:
    for curve in arms:
        scales = list(curve.scales)
        if len(scales) < 2 or scales[0] != 0 or not all(np.diff(scales) > 0):
            raise ValueError(f"{curve.arm}: scales rise from 0, the base, here {scales}")
    for side in ("adaptation", "retention"):
        names = [list(getattr(curve, side)) for curve in arms]
        if not names[0] or set(names[0]) != set(names[1]):
            raise ValueError(f"not the same {side} in both arms: {names[0]} and {names[1]}")
        for name in names[0]:
            counts = [len(getattr(curve, side)[name]) for curve in arms]
            metrics = {scores.name for curve in arms for scores in getattr(curve, side)[name]}
            if counts != [len(curve.scales) for curve in arms] or len(metrics) != 1:
                raise ValueError(f"{name} needs one metric, and its scores at every scale")


def _means(
    arms: tuple[Curve, Curve], side: str, resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means over tasks or benchmarks, (scales, 1 + resamples) an arm; what was observed is first.

    Both arms get the same draws of a task's items; tasks are drawn independently. BLEU is divided
    by 100, its scale.
    """
    names = sorted(getattr(arms[0], side))
    total = 0
    for number, name in enumerate(names):
        scores = [s for curve in arms for s in getattr(curve, side)[name]]
        draws = resampled(scores, resamples, seed + number)
        total = total + np.column_stack([[s.value for s in scores], draws]) / metric_scale(
            scores[0].name
        )
    return tuple(np.split(total / len(names), [len(arms[0].scales)]))


def _first_reach(
    scales: Sequence[float], adaptation: np.ndarray, retention: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The scale at which adaptation first rises to the score, and its retention, (draws,) each.

    `adaptation` and `retention` have shape (scales, draws), `scores` (draws,). nan where it does
    not, or has it at t = 0 already.
    """
    at, retained = np.full((2, len(scores)), np.nan)
    below_from_start = adaptation[0] < scores
    for i in range(len(scales) - 1):
        low, high = adaptation[i], adaptation[i + 1]
        here = np.isnan(at) & below_from_start & (low < scores) & (scores <= high)
        share = (scores[here] - low[here]) / (high[here] - low[here])
        at[here] = (1 - share) * scales[i] + share * scales[i + 1]
        retained[here] = (1 - share) * retention[i][here] + share * retention[i + 1][here]
    return at, retained


def _remark(curve: Curve, adaptation: np.ndarray, score: float, scale: float) -> str:
    """Why the curve, (scales,), cannot be read off at the score, or not in one way only."""
    level, start, best = map(abs, (score, adaptation[0], adaptation.max()))  # of losses, too
    if adaptation[0] >= score:
        return f"{curve.arm} has {level:.4g} before any update: the base has {start:.4g}"
    if np.isnan(scale):
        return f"{curve.arm} does not reach {level:.4g}: its best is {best:.4g}"
    low, high = adaptation[:-1], adaptation[1:]
    rises = ((low < score) & (score <= high)).sum()
    if rises > 1 or ((low > score) & (score > high)).any():
        return f"{curve.arm} passes {level:.4g} more than once: taken where it does first"
    return ""
