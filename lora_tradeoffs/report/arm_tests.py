"""The tests of a question: contrasts of arms, corrected for their number, as findings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from lora_tradeoffs.report.wording import (
    CONFIRMATORY,
    FULL_TUNING,
    MISSING,
    NOTE,
    Finding,
    SentenceTemplates,
    few_seeds,
    of_a_difference,
    other_items,
    smallest_differences,
)
from lora_tradeoffs.statistics.comparisons import LEVEL, MIN_SEEDS, holm
from lora_tradeoffs.statistics.contrasts import (
    Contrast,
    Items,
    WeightedScores,
    contrast,
    shared_seeds,
    weighted_scores,
)
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.tables.arms import FULL, GRID, Arm

if TYPE_CHECKING:
    import numpy as np

ALPHA = 1 - LEVEL
Parts = list[list[WeightedScores]]  # of a contrast
Plan = dict[str, set[Arm]]  # the arms that a study was to train, by family


class Outcome(NamedTuple):
    """What arms of a family are compared in: a task's score, say, or the mean forgetting.

    `parts` makes a contrast's parts of weights by arm, `sentences` the templates of an arm's tests.
    """

    family: str
    about: str
    parts: Callable[[dict[Arm, float]], Parts]
    sentences: Callable[[Arm], SentenceTemplates]
    items: Items | None

    def layout(self, arms: Sequence[Arm]) -> dict[Arm, np.ndarray]:
        """The scores of the arms on the seeds that all of them have."""
        return dict(zip(arms, weighted_scores(self.parts(dict.fromkeys(arms, 1)))))


class TestedContrast(NamedTuple):
    """A test that was made, and the sentences for its outcomes."""

    family: str
    arm: Arm | str
    about: str
    result: Contrast
    sentences: SentenceTemplates


def against_full(
    kind: str,
    question: str,
    outcomes: Sequence[Outcome],
    plan: Plan,
    other: str = FULL_TUNING,
    are_alike: bool = True,
) -> list[Finding]:
    """Every planned adapter minus full fine-tuning in every outcome, what could be seen first.

    One Holm correction: of confirmatory tests over all that are planned, also those that could not
    be made, else over those that were. The outcomes of a question share the check of their
    variances if they `are_alike`, and each pools the error of its arms (pooled_error.py).
    """
    made: list[tuple[Outcome, Arm]] = []
    few: dict[str, dict[Arm, int]] = {}
    for outcome, arm in product(outcomes, sorted({*GRID}.union(*plan.values()))):
        if not is_compared(arm, plan, outcome.family):
            continue
        seeds = len(shared_seeds(outcome.parts({arm: 1, FULL: -1})))
        if seeds >= MIN_SEEDS:
            made.append((outcome, arm))
        elif arm in plan[outcome.family]:
            of_family = few.setdefault(outcome.family, {})
            of_family[arm] = min(of_family.get(arm, seeds), seeds)
    planned = {(o.family, o.about, a) for o in outcomes for a in plan[o.family] if a.is_adapter}
    tested = {(o.family, o.about, arm) for o, arm in made}
    tests = len(planned | tested) if kind == CONFIRMATORY else len(tested)
    layouts = [o.layout([FULL, *(arm for other, arm in made if other is o)]) for o in outcomes]
    kinds = () if are_alike else [o.about for o in outcomes]
    errors = dict(zip(map(id, outcomes), pooled_errors(layouts, kinds)))
    contrasts = []
    for o, arm in made:
        parts = o.parts({arm: 1, FULL: -1})
        result = contrast(parts, o.items, 1 - ALPHA / tests, errors[id(o)])
        contrasts.append(TestedContrast(o.family, arm, o.about, result, o.sentences(arm)))
    results = corrected_findings(kind, question, contrasts, tests)
    if power := smallest_differences(contrasts, tests):
        results.insert(0, Finding(NOTE, question, power))
    for family, arms in few.items():
        nothing = not any(o.family == family for o, _ in made)
        results += too_few_seeds(question, family, arms, nothing, other)
    return results


def is_compared(arm: Arm, plan: Plan, family: str | None = None) -> bool:
    """Whether the arm is compared with full fine-tuning: an adapter of the plan, or of the grid.

    Of a family's plan, or of any family's.
    """
    plans = plan.values() if family is None else [plan[family]]
    return arm.is_adapter and (arm in GRID or any(arm in arms for arms in plans))


def too_few_seeds(
    question: str, family: str, few: dict[Arm, int], nothing: bool, other: str = FULL_TUNING
) -> list[Finding]:
    """Which arms share too few seeds with the other, if any; `few` holds how many they share."""
    if not few:
        return []
    sentence = few_seeds(family, few, nothing, other)
    return [Finding(MISSING, question, sentence, family, seeds=max(few.values()))]


def corrected_findings(
    kind: str, question: str, contrasts: Sequence[TestedContrast], tests: int | None = None
) -> list[Finding]:
    """The contrasts as findings, corrected over `tests`, of which the rest could not be made."""
    tests = len(contrasts) if tests is None else tests
    p_values = [tested.result.comparison.p_value for tested in contrasts]
    corrected = holm([*p_values, *[math.nan] * (tests - len(contrasts))])
    results = []
    for tested, p in zip(contrasts, map(float, corrected)):
        c, about = tested.result.comparison, (tested.family, str(tested.arm), tested.about)
        if math.isnan(c.p_value):
            results.append(Finding(MISSING, question, other_items(tested), *about))
            continue
        sentence, verdict = of_a_difference(tested, p, tests)
        numbers = (c.difference, c.low, c.high, c.p_value, p, c.detectable)
        seeds, over = len(tested.result.seeds), tested.result.over
        results.append(Finding(kind, question, sentence, *about, *numbers, seeds, over, verdict))
    return results
