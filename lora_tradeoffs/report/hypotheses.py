"""The hypotheses of a study's file, answered as they were written down: contrast, outcome, test.

hypothesis_tests.py makes the tests. A margin is a shift of the difference: non-inferiority and
superiority are one-sided, equivalence is two one-sided tests (Schuirmann 1987, J. Pharmacokinet.
Biopharm. 15:657). Primary hypotheses are corrected by Holm over all of them, also those that could
not be tested.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from dataset_descriptions import family_of
from lora_tradeoffs.figures.study_records import FRAMES
from lora_tradeoffs.report.arm_tests import ALPHA
from lora_tradeoffs.report.hypothesis_tests import Hypothesis, Tested, tested
from lora_tradeoffs.report.wording import (
    CONFIRMATORY,
    EXPLORATORY,
    INTERVAL,
    MISSING,
    Finding,
    after,
    p_text,
)
from lora_tradeoffs.statistics.comparisons import holm
from lora_tradeoffs.statistics.seed_intervals import SEEDS
from lora_tradeoffs.study.hypotheses import is_of_predictors
from lora_tradeoffs.study.study_file import StudyPlan, read_study_file
from lora_tradeoffs.tables.arms import Arm, arm_of_config
from lora_tradeoffs.training.arms import ArmSpec
from training_configs import default_config

if TYPE_CHECKING:
    from config import Settings
    from lora_tradeoffs.figures.study_records import StudyRecords

PRIMARY = "What the study was made to test"
OTHERS = "What else was written down before the study"
SHOWN, NOT_SHOWN = "shown", "not shown"


def hypotheses(study: StudyRecords) -> list[Hypothesis]:
    """Those of outputs/<study>/study.yaml, each in every family that it is about."""
    path = study.folder("study") / "study.yaml" if study.settings else None
    if path is None or not path.is_file():
        return []
    plan, found = StudyPlan.of(read_study_file(path), study.settings), []
    for number, entry in enumerate(plan.hypotheses, 1):
        families = plan.families_of(entry) or dict(zip(plan.arms, plan.mixes))
        for key, tasks in families.items():
            # runs of a part of a family are of that family
            family, pair = key if plan.families else family_of(tasks), entry["contrast"]
            if not is_of_predictors(pair):
                pair = [_arm_of_word(word, study, plan, family, tasks) for word in pair]
            name = entry.get("name", f"H{number}") + f" ({key})" * (len(families) > 1)
            rest = entry["outcome"], entry["test"], entry.get("margin", 0.0)
            rest += entry.get("primary", True), entry.get("seed"), tasks
            found.append(Hypothesis(name, family, *[*pair, None][:2], *rest))
    return found


def _arm_of_word(
    word: str, study: StudyRecords, plan: StudyPlan, family: str, tasks: tuple[str, ...]
) -> Arm:
    """The arm by which the study's plain records know what its file calls so."""
    spec = ArmSpec.parse(word)
    values = spec.own(plan.values, plan.mixes[tasks])
    rate = values.pop("learning_rate", None)
    settings = cast("Settings", study.settings)
    # the hidden size decides the default rate alone
    default = default_config(settings, tasks, spec.method, spec.rank, 0, 2048, family=family)
    config = replace(default, **values)
    arm = arm_of_config(config.run_name(default), config).without(study.shared_words)
    if rate is None:
        return arm
    # a run's name holds its rate unless that is the default of its model
    for frame in (getattr(study.plain, name) for name in FRAMES):
        for known in () if frame is None else frame["arm"][frame["learning_rate"] == rate].unique():
            if known.without_rate == arm:
                return known
    return replace(arm, learning_rate=rate)


def hypothesis_findings(study: StudyRecords) -> list[Finding]:
    """A finding for every hypothesis: shown, not shown, or why it could not be tested."""
    known = hypotheses(study)
    primary = [i for i, h in enumerate(known) if h.is_primary]
    tests = [len(primary) if h.is_primary else 1 for h in known]
    results = [tested(study.plain, h, n) for h, n in zip(known, tests)]
    p_values = [math.nan if isinstance(r, str) else h.p_value(r.at) for h, r in zip(known, results)]
    corrected = list(p_values)
    for i, p in zip(primary, holm([p_values[i] for i in primary]) if primary else ()):
        corrected[i] = float(p)
    return list(map(_finding, known, results, p_values, corrected, tests))


def _finding(
    h: Hypothesis, result: Tested | str, p: float, corrected: float, tests: int
) -> Finding:
    question = PRIMARY if h.is_primary else OTHERS
    about = h.family, h.about, h.outcome
    if isinstance(result, str):
        sentence = f"{h.name}: {h.claim}? Not answered: {result}."
        return Finding(MISSING, question, sentence, *about)
    contrast = result.at(0.0)
    c, verdict = contrast.comparison, SHOWN if corrected < ALPHA else NOT_SHOWN
    numbers = f"difference {c.difference:+.4f}"
    if math.isfinite(c.low):
        over = "seeds, on these items" if contrast.over == SEEDS else contrast.over
        numbers += f", {INTERVAL} {c.low:+.4f} to {c.high:+.4f} over {over}"
    if math.isfinite(p):
        numbers += f"; {p_text(p)}" + f", {p_text(corrected)}{after(tests)}" * (tests > 1)
    numbers += f"; {result.sample}"
    detectable = h.detectable(result.at)
    if math.isfinite(detectable):
        numbers += f"; smallest detectable difference {detectable:.4f}"
    kind = CONFIRMATORY if h.is_primary else EXPLORATORY
    figures = (c.difference, c.low, c.high, p, corrected, detectable)
    limits = "" if h.seed is None else ", which says nothing about other seeds"
    sentence = f"{h.name}: {h.claim}? {verdict.capitalize()}{limits} ({numbers})."
    seeds = len(contrast.seeds)
    return Finding(kind, question, sentence, *about, *figures, seeds, contrast.over, verdict)
