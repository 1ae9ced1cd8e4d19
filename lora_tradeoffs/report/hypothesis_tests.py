"""The tests of hypotheses: what each is tested over, and why one cannot be tested.

Two arms are compared over the seeds that both have, paired, and over items where all runs have
them. The error is pooled over the planned arms of the family where the variances allow it
(pooled_error.py). Two runs of one seed are compared over items, two predictors of forgetting over
arms at their learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.records import CONTROL
from lora_tradeoffs.report.arm_tests import ALPHA, Parts
from lora_tradeoffs.report.compared_rows import (
    forgetting_parts,
    last_losses,
    last_test_scores,
    over_seeds,
    rows_of,
    score_parts,
)
from lora_tradeoffs.statistics.comparisons import (
    MIN_SEEDS,
    Comparison,
    detectable_over_items,
    sign_flip_interval,
    sign_flip_p,
)
from lora_tradeoffs.statistics.contrasts import (
    Contrast,
    WeightedScores,
    contrast,
    shared_seeds,
    weighted_scores,
)
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.statistics.seed_intervals import SEEDS
from lora_tradeoffs.study.hypotheses import EQUAL, FLIPS, FORGOTTEN, MEASURED_BY, OUTCOMES, SHRUNK
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import SCRIPTS
from lora_tradeoffs.tables.predictors import PREDICTORS, correlation_difference
from lora_tradeoffs.tables.retention import matched_pairs, no_common_level, shrink_effects

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

MOST_FLIPPED = 20  # seeds: a million flips
Shifted = Callable[[float], Contrast]  # the contrast minus a shift


class Hypothesis(NamedTuple):
    """`first` minus `second` in an outcome of a family's runs.

    Both are arms, or predictors whose correlations with the outcome are compared; of the outcomes
    by shrinking intruders `second` is None. With a `seed` the two runs of that seed are compared.
    """

    name: str
    family: str
    first: Arm | str
    second: Arm | str | None
    outcome: str
    test: str
    margin: float
    is_primary: bool
    seed: int | None = None
    tasks: tuple[str, ...] = ()  # that the runs were trained on

    @property
    def is_of_predictors(self) -> bool:
        return self.first in PREDICTORS

    @property
    def about(self) -> str:
        if self.second is None:
            return str(self.first)
        return f"{self.first} minus {self.second}"

    @property
    def claim(self) -> str:
        """What the test shows if it succeeds."""
        if self.is_of_predictors:
            names = " and ".join(PREDICTORS[name] for name in (self.first, self.second))
            return f"the rank correlations of {self.outcome} with {names} differ"
        margin = f"{self.margin:g}"
        words = {
            "difference": "differ",
            FLIPS: "differ",
            "equivalence": f"differ by less than {margin}",
            "superiority": f"the first is better by more than {margin}",
            "non-inferiority": f"the first is worse by less than {margin}",
        }
        direction = ""
        if self.test in ("superiority", "non-inferiority"):
            is_more_better = OUTCOMES.get(self.outcome, True)
            direction = " (more is better)" if is_more_better else " (less is better)"
        compared = f"{self.first} and {self.second}"
        if self.second is None:
            compared = f"{self.first} with its intruders shrunk and with their control shrunk"
        elif self.seed is not None:
            compared = f"these two checkpoints of seed {self.seed}, {compared},"
        outcome = self.outcome.removesuffix(" by shrinking intruders")
        return f"{compared} in {outcome}: {words[self.test]}{direction}"

    @property
    def is_two_sided(self) -> bool:
        return self.test in ("difference", FLIPS)

    def detectable(self, at: Shifted) -> float:
        """The smallest true difference that the test finds; nan for one of a smaller difference."""
        found = at(0.0).comparison.detectable
        if self.test == "superiority":
            return found + self.margin
        return found if self.is_two_sided else math.nan

    def p_value(self, at: Shifted) -> float:
        def above(limit: float) -> float:
            """One-sided, of the true difference being above the limit."""
            comparison = at(limit).comparison
            half = comparison.p_value / 2
            return half if comparison.difference > 0 else 1 - half

        if self.is_two_sided:
            return at(0.0).comparison.p_value
        if self.test == "equivalence":
            return max(above(-self.margin), 1 - above(self.margin))
        limit = -self.margin if self.test == "non-inferiority" else self.margin
        return above(limit) if OUTCOMES.get(self.outcome, True) else 1 - above(-limit)


class Tested(NamedTuple):
    """A contrast minus a shift, and the sample that it was tested on, in words."""

    at: Shifted
    sample: str


def tested(study: StudyRecords, h: Hypothesis, tests: int = 1) -> Tested | str:
    """The hypothesis' contrast; or why there is none.

    What is detectable is so at the first, strictest step of a correction over `tests`.
    """
    level = 1 - ALPHA / tests * (1 if h.is_two_sided else 2)
    if h.is_of_predictors:
        return _of_predictors(study, h, level)
    if h.outcome in EQUAL or h.outcome in SHRUNK:
        rows = _matched(study, h) if h.outcome in EQUAL else _shrunk(study, h)
        return rows if isinstance(rows, str) else _of_differences(rows, h, level)
    outcome = _parts(study, h)
    if isinstance(outcome, str):
        return outcome
    parts, items = outcome
    made = parts({h.first: 1, h.second: -1})
    if h.seed is not None:
        return _of_checkpoints(made, items, h)
    seeds = shared_seeds(made)
    if problem := _too_few(h, seeds):
        return problem
    if h.test == FLIPS:
        return _flipped(weighted_scores(made).sum(axis=0), seeds)
    others = study.planned_arms.get(h.family, set()) - {h.first, h.second}
    arms = [h.first, h.second]
    arms += [a for a in sorted(others) if len(shared_seeds(parts({h.first: 1, a: 1}))) >= MIN_SEEDS]
    layout = dict(zip(arms, weighted_scores(parts(dict.fromkeys(arms, 1)))))
    error = pooled_errors([layout])[0]

    def at(shift: float) -> Contrast:
        return contrast(made, items, level, error, shift)

    if math.isnan(at(0.0).comparison.p_value):
        return "its runs were measured on different numbers of items"
    return Tested(at, f"{len(seeds)} seeds")


def _too_few(h: Hypothesis, seeds: Sequence[int]) -> str:
    if len(seeds) >= MIN_SEEDS:
        return ""
    who = f"{h.first} has" if h.second is None else f"{h.first} and {h.second} share"
    return f"{who} {len(seeds)} seeds, and at least {MIN_SEEDS} are needed"


def _of_differences(rows: DataFrame, h: Hypothesis, level: float) -> Tested | str:
    """Over seeds, of a row a seed that is a difference already."""
    seeds = tuple(rows["seed"])
    if problem := _too_few(h, seeds):
        return problem
    if h.test == FLIPS:
        return _flipped(rows["value"].to_numpy(), seeds)
    return Tested(partial(over_seeds, rows, level), f"{len(seeds)} seeds")


def _flipped(differences: np.ndarray, seeds: Sequence[int]) -> Tested | str:
    """The exact test of sign flips, which says nothing about other items."""
    count, nan = len(differences), math.nan
    if count > MOST_FLIPPED:
        return f"{count} seeds have too many sign flips to go through ({MOST_FLIPPED} at most)"
    low, high = sign_flip_interval(differences)
    p_value = sign_flip_p(differences)
    value = float(np.mean(differences))
    test = "exact sign flips over seeds"
    comparison = Comparison(test, value, nan, low, high, p_value, nan, count)
    result = Contrast(comparison, tuple(seeds), SEEDS)
    return Tested(lambda _: result, f"{count} seeds, of which the smallest p is {2 / 2**count:.2g}")


def _of_checkpoints(made: Parts, items: object, h: Hypothesis) -> Tested | str:
    """The two runs of a seed, over items."""
    of_seed = [
        [part._replace(rows={s: row for s, row in part.rows.items() if s == h.seed}) for part in of]
        for of in made
    ]
    if not shared_seeds(of_seed):
        return f"{h.first} and {h.second} have no runs of seed {h.seed}"
    result = contrast(of_seed, items, 1 - ALPHA)
    if math.isnan(result.comparison.p_value):
        return "its runs have no outcomes of the same items"
    return Tested(lambda _: result, f"seed {h.seed} alone")


def _of_predictors(study: StudyRecords, h: Hypothesis, level: float) -> Tested | str:
    """Two rank correlations, over arms at their learning rates."""
    if study.retention is None:
        return "retention is not measured (python retention_eval.py)"
    rows = study.checkpoints_at_all_rates
    for name in (h.first, h.second):
        if name not in rows:
            return _unmeasured(name)
    rows = rows[rows["family"] == h.family]
    found = correlation_difference(rows, (h.first, h.second), h.outcome.replace(" ", "_"))
    if math.isnan(found["rho"]):
        return found["reason"].replace("arms", "arms at their learning rates")
    over = f"{found['arms']} arms x learning rates"
    figures = (found[name] for name in ("rho", "stderr", "low", "high", "p_value"))
    detectable = detectable_over_items(found["stderr"], level)
    comparison = Comparison("exchanged predictors", *figures, detectable, found["arms"])
    result = Contrast(comparison, (), over)
    each = "correlations {:+.2f} and {:+.2f}".format(*found["each"])
    return Tested(lambda _: result, "; ".join(filter(None, [each, found["reason"]])))


def _parts(study: StudyRecords, h: Hypothesis) -> tuple[Callable[..., Parts], object] | str:
    """What makes a contrast's parts of weights by arm, and its items; or why nothing does."""
    if h.outcome in ("score", "validation loss", *DESCRIPTIONS):
        if study.adaptation is None:
            return "adaptation is not measured (python eval.py)"
        tasks = [h.outcome] if h.outcome in DESCRIPTIONS else h.tasks
        is_loss = h.outcome == "validation loss"
        rows = (last_losses if is_loss else last_test_scores)(study.adaptation)
        if rows.empty:
            what = "the validation loss" if is_loss else "the test split"
            return f"{what} is not measured (python eval.py --overwrite)"
        return partial(score_parts, rows, h.family, tasks), study.adaptation_items
    if study.retention is None:
        return "retention is not measured (python retention_eval.py)"
    items = study.retention_items
    if outcome := FORGOTTEN.get(h.outcome):
        parts = partial(forgetting_parts, study.retention, h.family, items=items, outcome=outcome)
        return parts, items
    rows = study.checkpoints
    if h.outcome not in rows:
        return _unmeasured(h.outcome)
    rows = rows[rows["is_last"] & (rows["family"] == h.family)].dropna(subset=[h.outcome])
    return partial(_by_arm, rows.assign(value=rows[h.outcome], metric=h.outcome)), None


def _unmeasured(predictor: str) -> str:
    script = SCRIPTS[f"{MEASURED_BY[predictor]}.json"]
    return f"{PREDICTORS[predictor]} is not measured (python {script})"


def _by_arm(rows: DataFrame, weights: dict[Arm, float]) -> Parts:
    return [[WeightedScores(weight, rows_of(rows, arm)) for arm, weight in weights.items()]]


def _matched(study: StudyRecords, h: Hypothesis) -> DataFrame | str:
    """Forgetting where both have the same score or loss on validation, from scaled updates."""
    outcome, _, equal = h.outcome.partition(" at equal ")
    rows = None if study.retention is None else matched_pairs(study.retention, equal)
    if rows is None or rows.empty:
        reason = f"no {equal} of scaled updates is measured"
        return f"{reason} (python retention_eval.py --scale-update --overwrite)"
    rows = rows[(rows["family"] == h.family) & (rows["arm"] == h.first)]
    rows = rows[(rows["other"] == h.second) & (rows["task"] == FORGOTTEN[outcome])]
    return no_common_level(rows, equal) or rows


def _shrunk(study: StudyRecords, h: Hypothesis) -> DataFrame | str:
    """What is lost more by shrinking an arm's intruders than by their control, at the least
    factor."""
    rows = None if study.shrunk is None else shrink_effects(study.shrunk, CONTROL)
    if rows is None or rows.empty:
        return "no intruders were shrunk (python retention_eval.py --shrink-intruders)"
    rows = rows[(rows["family"] == h.family) & (rows["arm"] == h.first)]
    rows = rows[rows["task"] == FORGOTTEN[h.outcome.partition(" by ")[0]]]
    return rows[rows["shrink"] == rows["shrink"].min()]
