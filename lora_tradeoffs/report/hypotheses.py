"""The hypotheses of a study's file, tested as they were written down: two arms, outcome, test.

A test is paired over the seeds that both arms have, and over items where all runs have them. Its
error is pooled over the planned arms of the family where the variances allow it (pooled_error.py).
A margin is a shift of the difference: non-inferiority and superiority are one-sided, equivalence is
two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657). Primary hypotheses are
corrected by Holm over all of them, also those that could not be tested.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from config import FAMILIES
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.records import HELD_OUT, MEAN
from lora_tradeoffs.report.arm_tests import ALPHA, Parts
from lora_tradeoffs.report.compared_rows import (
    forgetting_parts,
    last_losses,
    last_test_scores,
    rows_of,
    score_parts,
)
from lora_tradeoffs.report.wording import (
    CONFIRMATORY,
    EXPLORATORY,
    INTERVAL,
    MISSING,
    Finding,
    after,
    p_text,
)
from lora_tradeoffs.statistics.comparisons import MIN_SEEDS, holm
from lora_tradeoffs.statistics.contrasts import (
    Contrast,
    WeightedScores,
    contrast,
    shared_seeds,
    weighted_scores,
)
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.statistics.seed_intervals import BOTH, SEEDS, compare_over_seeds
from lora_tradeoffs.study.study_file import OUTCOMES, StudyPlan, read_study_file
from lora_tradeoffs.tables.arms import Arm, arm_of_config
from lora_tradeoffs.tables.predictors import PREDICTORS
from lora_tradeoffs.tables.retention import matched_pairs
from lora_tradeoffs.training.arms import ArmSpec
from training_configs import default_config

if TYPE_CHECKING:
    from pandas import DataFrame

    from config import Settings
    from lora_tradeoffs.figures.study_records import StudyRecords

PRIMARY = "What the study was made to test"
OTHERS = "What else was written down before the study"
FORGOTTEN = {"forgetting": MEAN, "text lost": HELD_OUT}
SHOWN, NOT_SHOWN = "shown", "not shown"
Shifted = Callable[[float], Contrast]  # the contrast minus a shift


class Hypothesis(NamedTuple):
    """`first` minus `second` in an outcome of a family's runs."""

    name: str
    family: str
    first: Arm
    second: Arm
    outcome: str
    test: str
    margin: float
    is_primary: bool

    @property
    def claim(self) -> str:
        """What the test shows if it succeeds."""
        margin = f"{self.margin:g}"
        is_more_better = OUTCOMES.get(self.outcome, True)
        words = {
            "difference": "differ",
            "equivalence": f"differ by less than {margin}",
            "superiority": f"the first is better by more than {margin}",
            "non-inferiority": f"the first is worse by less than {margin}",
        }
        direction = (
            ""
            if self.test in ("difference", "equivalence")
            else (" (more is better)" if is_more_better else " (less is better)")
        )
        return f"{self.first} and {self.second} in {self.outcome}: {words[self.test]}{direction}"

    def p_value(self, at: Shifted) -> float:
        def above(limit: float) -> float:
            """One-sided, of the true difference being above the limit."""
            comparison = at(limit).comparison
            half = comparison.p_value / 2
            return half if comparison.difference > 0 else 1 - half

        if self.test == "difference":
            return at(0.0).comparison.p_value
        if self.test == "equivalence":
            return max(above(-self.margin), 1 - above(self.margin))
        limit = -self.margin if self.test == "non-inferiority" else self.margin
        return above(limit) if OUTCOMES.get(self.outcome, True) else 1 - above(-limit)


def hypotheses(study: StudyRecords) -> list[Hypothesis]:
    """Those of outputs/<study>/study.yaml, each in every family that it is about."""
    path = study.folder("study") / "study.yaml" if study.settings else None
    if path is None or not path.is_file():
        return []
    plan, found = StudyPlan.of(read_study_file(path), study.settings), []
    mixes = dict(zip(plan.arms, plan.mixes))
    for number, entry in enumerate(plan.hypotheses, 1):
        families = [entry["family"]] if "family" in entry else [*mixes]
        for family in families:
            tasks = mixes[family]
            arms = [arm_of_word(word, tasks, study.settings) for word in entry["contrast"]]
            arms = [arm.without(study.shared_words) for arm in arms]
            name = entry.get("name", f"H{number}") + f" ({family})" * (len(families) > 1)
            rest = entry["outcome"], entry["test"], entry.get("margin", 0.0)
            found.append(Hypothesis(name, family, *arms, *rest, entry.get("primary", True)))
    return found


def arm_of_word(word: str, tasks: tuple[str, ...], settings: Settings) -> Arm:
    """The arm by which records know what a study's file calls so."""
    spec = ArmSpec.parse(word)
    # the hidden size decides the default rate alone, and an arm is not known by that
    default = default_config(settings, tasks, spec.method, spec.rank, 0, hidden_size=2048)
    config = replace(default, **spec.values)
    return arm_of_config(config.run_name(default), config)


def hypothesis_findings(study: StudyRecords) -> list[Finding]:
    """A finding for every hypothesis: shown, not shown, or why it could not be tested."""
    known = hypotheses(study)
    results = [_tested(study.plain, h) for h in known]
    p_values = [math.nan if isinstance(at, str) else h.p_value(at) for h, at in zip(known, results)]
    primary = [i for i, h in enumerate(known) if h.is_primary]
    corrected = list(p_values)
    for i, p in zip(primary, holm([p_values[i] for i in primary]) if primary else ()):
        corrected[i] = float(p)
    return [
        _finding(h, at, p, adjusted, len(primary) if h.is_primary else 1)
        for h, at, p, adjusted in zip(known, results, p_values, corrected)
    ]


def _finding(h: Hypothesis, at: Shifted | str, p: float, corrected: float, tests: int) -> Finding:
    question = PRIMARY if h.is_primary else OTHERS
    about = h.family, f"{h.first} minus {h.second}", h.outcome
    if isinstance(at, str):
        sentence = f"{h.name}: {h.claim}? Not answered: {at}."
        return Finding(MISSING, question, sentence, *about)
    result = at(0.0)
    c, verdict = result.comparison, SHOWN if corrected < ALPHA else NOT_SHOWN
    numbers = f"difference {c.difference:+.4f}"
    if math.isfinite(c.low):
        over = "seeds, on these items" if result.over == SEEDS else result.over
        numbers += f", {INTERVAL} {c.low:+.4f} to {c.high:+.4f} over {over}"
    numbers += f"; {p_text(p)}" + f", {p_text(corrected)}{after(tests)}" * (tests > 1)
    numbers += f"; {len(result.seeds)} seeds"
    if math.isfinite(c.detectable):
        numbers += f"; smallest detectable difference {c.detectable:.4f}"
    kind = CONFIRMATORY if h.is_primary else EXPLORATORY
    figures = (c.difference, c.low, c.high, p, corrected, c.detectable)
    sentence = f"{h.name}: {h.claim}? {verdict.capitalize()} ({numbers})."
    return Finding(
        kind, question, sentence, *about, *figures, len(result.seeds), result.over, verdict
    )


def _tested(study: StudyRecords, h: Hypothesis) -> Shifted | str:
    """The hypothesis' contrast, less a shift; or why there is none."""
    if " at equal " in h.outcome:
        return _matched(study, h)
    outcome = _parts(study, h)
    if isinstance(outcome, str):
        return outcome
    parts, items = outcome
    made = parts({h.first: 1, h.second: -1})
    if problem := _too_few(h, shared_seeds(made)):
        return problem
    others = study.planned_arms.get(h.family, set()) - {h.first, h.second}
    arms = [h.first, h.second]
    arms += [a for a in sorted(others) if len(shared_seeds(parts({h.first: 1, a: 1}))) >= MIN_SEEDS]
    layout = dict(zip(arms, weighted_scores(parts(dict.fromkeys(arms, 1)))))
    error = pooled_errors([layout])[0]

    def at(shift: float) -> Contrast:
        return contrast(made, items, 1 - ALPHA, error, shift)

    if math.isnan(at(0.0).comparison.p_value):
        return "its runs were measured on different numbers of items"
    return at


def _too_few(h: Hypothesis, seeds: Sequence[int]) -> str:
    if len(seeds) >= MIN_SEEDS:
        return ""
    return f"{h.first} and {h.second} share {len(seeds)} seeds, and at least {MIN_SEEDS} are needed"


def _parts(study: StudyRecords, h: Hypothesis) -> tuple[Callable[..., Parts], object] | str:
    """What makes a contrast's parts of weights by arm, and its items; or why nothing does."""
    if h.outcome in ("score", "validation loss", *DESCRIPTIONS):
        if study.adaptation is None:
            return "adaptation is not measured (python eval.py)"
        tasks = [h.outcome] if h.outcome in DESCRIPTIONS else FAMILIES[h.family]
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
        return f"{PREDICTORS[h.outcome]} is not measured (python svd_analysis.py)"
    rows = rows[rows["is_last"] & (rows["family"] == h.family)].dropna(subset=[h.outcome])
    return partial(_by_arm, rows.assign(value=rows[h.outcome], metric=h.outcome)), None


def _by_arm(rows: DataFrame, weights: dict[Arm, float]) -> Parts:
    return [[WeightedScores(weight, rows_of(rows, arm)) for arm, weight in weights.items()]]


def _matched(study: StudyRecords, h: Hypothesis) -> Shifted | str:
    """Forgetting where both have the same score or loss on validation, from scaled updates.

    Seeds at which the curves do not meet are no random ones: without them nothing is tested.
    """
    outcome, _, equal = h.outcome.partition(" at equal ")
    rows = None if study.retention is None else matched_pairs(study.retention, equal)
    if rows is None or rows.empty:
        reason = f"no {equal} of scaled updates is measured"
        return f"{reason} (python retention_eval.py --scale-update --overwrite)"
    rows = rows[(rows["family"] == h.family) & (rows["arm"] == h.first)]
    rows = rows[(rows["other"] == h.second) & (rows["task"] == FORGOTTEN[outcome])]
    if problem := _too_few(h, list(rows["seed"])):
        return problem
    apart = rows[rows["value"].isna()]
    if len(apart):
        reasons = "; ".join(f"seed {row.seed}: {row.reason}" for row in apart.itertuples())
        return f"the curves have no validation {equal} in common ({reasons})"
    # each seed's error over items stands for what the seeds share of it: never too narrow
    variance = float((rows["stderr"] ** 2).fillna(0).mean())
    over = BOTH if variance else SEEDS

    def at(shift: float) -> Contrast:
        values = rows["value"].to_numpy() - shift
        return Contrast(compare_over_seeds(values, variance, 1 - ALPHA), tuple(rows["seed"]), over)

    return at
