"""Findings: sentences made from the results of tests, in whichever direction they come out.

    print(as_markdown(findings(StudyRecords.load(settings))))

Confirmatory is one family of tests, fixed beforehand: LoRA at each rank of the grid against full
fine-tuning, on each task's primary metric, last checkpoint, test; paired over at least three seeds,
corrected by Holm over all of them, also those that could not be made. All else is exploratory, and
corrected within its question. `detectable` is the difference that a test at the first, strictest
step of the correction finds with 80 % power. The demo has no findings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from config import FAMILIES
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.report.compared_rows import (
    forgetting_parts,
    grid_arms,
    last_test_scores,
    mean_forgetting,
    rows_of,
    shared_seeds,
    slope_weights,
)
from lora_tradeoffs.report.wording import (
    ADAPTS,
    ALL_RUNS,
    CONFIRMATORY,
    DEMO,
    EQUAL_SCORES,
    EXPLORATORY,
    FORGETS,
    FULL_TESTED,
    FULL_TUNING,
    GOES_WITH,
    MATCHED,
    MISSING,
    RANK,
    TRANSFER,
    Finding,
    SentenceTemplates,
    association,
    few_seeds,
    of_a_difference,
    other_items,
)
from lora_tradeoffs.statistics.comparisons import LEVEL, MIN_SEEDS, Comparison, holm
from lora_tradeoffs.statistics.contrasts import Contrast, Items, WeightedScores, contrast
from lora_tradeoffs.statistics.seed_intervals import BOTH, SEEDS, compare_over_seeds
from lora_tradeoffs.tables.arms import FULL, GRID, Arm
from lora_tradeoffs.tables.predictors import PREDICTORS
from lora_tradeoffs.tables.retention import MEAN, at_chance, matched

if TYPE_CHECKING:
    from pandas import DataFrame

ALPHA = 1 - LEVEL
# Names of runs stand in sentences, and Markdown takes HTML, links and formulas from them.
MARKUP, ESCAPED = re.compile(r"([\\`*$]|\](?=\()|<(?=\S)|&(?=\S))"), r"\\\1"


class TestedContrast(NamedTuple):
    """A test that was made, and the sentences for its outcomes."""

    family: str
    arm: Arm | str
    about: str
    result: Contrast
    sentences: SentenceTemplates


def findings(study: StudyRecords) -> list[Finding]:
    """All findings of a study, question by question; under the demo preset one that says why not.

    Arms go by their plain labels, also where all runs differ from the grid's in the same fields,
    which is said first. With per-item outcomes tests and intervals count seeds and items, without
    them seeds alone: those are about these test items.
    """
    if study.preset == "demo":
        return [Finding(MISSING, "", DEMO)]
    results = []
    if study.shared_words:
        words = " ".join(sorted(study.shared_words))
        results.append(Finding(MISSING, "", ALL_RUNS.format(words)))
        study = study.plain
    if study.adaptation is None:
        results.append(_missing(ADAPTS, "adaptation is not measured (python eval.py)"))
    else:
        results += _adapts(study.adaptation, study.adaptation_items)
    if study.retention is None:
        results.append(_missing(FORGETS, "retention is not measured (python retention_eval.py)"))
    else:
        results += _forgets(study.retention, study.retention_items)
        results += _matched(study.retention)
    results += _rank(study)
    results += _transfer(study.transfer)
    if study.retention is not None:
        results += _goes_with(study)
    return results


def as_table(results: Sequence[Finding]) -> DataFrame:
    """A row for each finding, for CSV."""
    import pandas as pd

    return pd.DataFrame([asdict(finding) for finding in results])


def as_markdown(results: Sequence[Finding]) -> str:
    """The sentences as lists below their questions."""
    kinds = {f.question: f" ({f.kind})" for f in results if f.kind != MISSING}
    lines: list[str] = []
    for question in dict.fromkeys(finding.question for finding in results):
        lines += ["", f"**{question}**{kinds.get(question, '')}", ""] if question else [""]
        sentences = (finding.sentence for finding in results if finding.question == question)
        lines += [f"- {MARKUP.sub(ESCAPED, sentence)}" for sentence in sentences]
    return "\n".join(lines[1:])


# ----------------------------------------------------------------------------- the questions


def _adapts(adaptation: DataFrame, items: Items | None) -> list[Finding]:
    """The confirmatory family: arms by tasks of both families, tested or not."""
    rows = last_test_scores(adaptation)
    tests = len(GRID) * sum(map(len, FAMILIES.values()))
    contrasts, results = [], []
    for family, tasks in FAMILIES.items():
        few: dict[Arm, int] = {}
        for arm, task in product(GRID, tasks):
            on_task = rows[(rows["family"] == family) & (rows["task"] == task)]
            parts = [
                WeightedScores(1, rows_of(on_task, arm)),
                WeightedScores(-1, rows_of(on_task, FULL)),
            ]
            seeds = shared_seeds([parts])
            if seeds < MIN_SEEDS:
                few[arm] = min(few.get(arm, seeds), seeds)
                continue
            result = contrast([parts], items, 1 - ALPHA / tests)
            sentences = SentenceTemplates.scores(arm, task, DESCRIPTIONS[task].metrics[0])
            contrasts.append(TestedContrast(family, arm, task, result, sentences))
        results += _few_seeds(ADAPTS, family, few, len(few) == len(GRID), FULL_TESTED)
    return _corrected(CONFIRMATORY, ADAPTS, contrasts, tests) + results


def _forgets(retention: DataFrame, items: Items | None) -> list[Finding]:
    """Forgetting of LoRA minus that of full fine-tuning, mean over benchmarks."""
    pairs: list[tuple[str, Arm, list[list[WeightedScores]]]] = []
    results = []
    for family in FAMILIES:
        few = {}
        for arm in GRID:
            tasks = forgetting_parts(retention, family, {arm: 1, FULL: -1}, items)
            seeds = shared_seeds(tasks)
            if seeds < MIN_SEEDS:
                few[arm] = seeds
            else:
                pairs.append((family, arm, tasks))
        results += _few_seeds(FORGETS, family, few, len(few) == len(GRID))
    level = 1 - ALPHA / max(len(pairs), 1)
    contrasts = []
    for family, arm, tasks in pairs:
        result, sentences = contrast(tasks, items, level), SentenceTemplates.forgets(arm)
        contrasts.append(TestedContrast(family, arm, MEAN, result, sentences))
    names = ", ".join(at_chance(retention))
    if names and contrasts:
        text = f"On {names}, part of the mean, the base is at chance: nothing to forget."
        results.append(Finding(MISSING, FORGETS, text))
    return _corrected(EXPLORATORY, FORGETS, contrasts) + results


def _matched(retention: DataFrame) -> list[Finding]:
    """The same where the updates are scaled to the same validation score."""
    rows = matched(retention)
    if rows.empty:
        reason = "no updates were scaled (python retention_eval.py --scale-update)"
        return [_missing(MATCHED, reason)]
    rows = rows[(rows["other"] == FULL) & rows["arm"].isin(GRID)]
    by_arm = dict(iter(rows.groupby(["family", "arm"])))
    groups = [key for key in product(FAMILIES, GRID) if len(by_arm.get(key, ())) >= MIN_SEEDS]
    if not groups:
        reason = f"fewer than {MIN_SEEDS} seeds of each arm with scaled updates"
        return [_missing(MATCHED, reason)]
    contrasts = []
    for family, arm in groups:
        differences = by_arm[family, arm]
        # each seed's error over items stands for what the seeds share of it: never too narrow
        variance = float((differences["stderr"] ** 2).fillna(0).mean())
        comparison = compare_over_seeds(
            differences["value"].to_numpy(), variance, 1 - ALPHA / len(groups)
        )
        result = Contrast(comparison, tuple(differences["seed"]), BOTH if variance else SEEDS)
        sentences = SentenceTemplates.forgets(arm, EQUAL_SCORES)
        contrasts.append(TestedContrast(family, arm, MEAN, result, sentences))
    return _corrected(EXPLORATORY, MATCHED, contrasts)


def _rank(study: StudyRecords) -> list[Finding]:
    """The slope of mean score and mean forgetting over log2 of LoRA's rank, seed by seed."""
    trends = []
    for family in FAMILIES:
        if study.adaptation is not None:
            rows = last_test_scores(study.adaptation)
            rows = rows[rows["family"] == family]
            by_task = [rows[rows["task"] == task] for task in FAMILIES[family]]
            weights = slope_weights([grid_arms(part) for part in by_task])
            tasks = [
                [WeightedScores(w, rows_of(rows, arm)) for arm, w in weights.items()]
                for rows in by_task
            ]
            trends.append((family, "score", tasks, study.adaptation_items))
        if study.retention is not None:
            weights = slope_weights([grid_arms(mean_forgetting(study.retention, family))])
            items = study.retention_items
            tasks = forgetting_parts(study.retention, family, weights, items)
            trends.append((family, "forgetting", tasks, items))
    trends = [trend for trend in trends if shared_seeds(trend[2]) >= MIN_SEEDS]
    if not trends:
        return [_missing(RANK, f"fewer than 3 ranks with {MIN_SEEDS} seeds in common")]
    contrasts = []
    for family, about, tasks, items in trends:
        result = contrast(tasks, items, 1 - ALPHA / len(trends))
        sentences = SentenceTemplates.rank(about)
        contrasts.append(TestedContrast(family, "LoRA", about, result, sentences))
    return _corrected(EXPLORATORY, RANK, contrasts)


def _transfer(transfer: DataFrame | None) -> list[Finding]:
    """Multi-task minus single-task; one seed is no method."""
    if transfer is None or transfer.empty:
        reason = "no single-task controls (python run_study.py --single-task-controls)"
        return [_missing(TRANSFER, reason)]
    enough = transfer[transfer["seeds"] >= MIN_SEEDS]
    contrasts, results = [], []
    for row in enough.itertuples():
        names = Comparison.__dataclass_fields__
        values = {n: getattr(row, n) for n in names if hasattr(row, n)}
        comparison = Comparison(**values | {"difference": row.value, "n": row.seeds})
        result = Contrast(comparison, (0,) * row.seeds, row.over)
        sentences = SentenceTemplates.transfer(row.arm, row.task, row.metric)
        contrasts.append(TestedContrast(row.family, row.arm, row.task, result, sentences))
    rest = transfer[transfer["seeds"] < MIN_SEEDS]
    for family, rows in rest.groupby("family", sort=False):
        few = rows.groupby("arm")["seeds"].max().to_dict()
        results += _few_seeds(TRANSFER, family, few, enough.empty, "the single-task control")
    return _corrected(EXPLORATORY, TRANSFER, contrasts, len(transfer)) + results


def _goes_with(study: StudyRecords) -> list[Finding]:
    """Rank correlations of forgetting and gain with what was measured of drift."""
    across, within = study.correlations, study.correlations_within
    keys = ["family", "outcome", "predictor"]
    within = {tuple(getattr(row, key) for key in keys): row for row in within.itertuples()}
    results = []
    if study.drift is None:
        reason = "drift of the weights is not measured (python svd_analysis.py)"
        results.append(_missing(GOES_WITH["forgetting"], reason))
    for outcome, question in GOES_WITH.items():
        correlations = across[across["outcome"] == outcome].dropna(subset=["rho"])
        tests = int(correlations["p_value"].notna().sum())
        for row in correlations.itertuples():
            inside = within[row.family, outcome, row.predictor]
            sentence, verdict = association(row, inside, tests)
            results.append(
                Finding(
                    *(EXPLORATORY, question, sentence, row.family, "", row.predictor),
                    *(row.rho, row.low, row.high, row.p_value, row.corrected, row.detectable),
                    **{"over": f"{row.arms} arms", "verdict": verdict},
                )
            )
        results += _not_correlated(across[across["outcome"] == outcome], question)
    return results


def _not_correlated(across: DataFrame, question: str) -> list[Finding]:
    """A sentence for each reason why predictors of a family have no correlation."""
    if across.empty:
        return [_missing(question, "no last checkpoint has both forgetting and a measure of drift")]
    results = []
    unknown = across[across["rho"].isna()]
    for (family, reason), rows in unknown.groupby(["family", "reason"], sort=False):
        names = ", ".join(PREDICTORS[name] for name in rows["predictor"])
        sentence = f"{family}: nothing can be said of {names}: {reason}."
        results.append(Finding(MISSING, question, sentence, family))
    return results


# ----------------------------------------------------------------------------------- helpers


def _missing(question: str, reason: str) -> Finding:
    return Finding(MISSING, question, f"Not answered: {reason}.")


def _few_seeds(
    question: str, family: str, few: dict[Arm, int], nothing: bool, other: str = FULL_TUNING
) -> list[Finding]:
    """Which arms share too few seeds with the other, if any; `few` holds how many they share."""
    if not few:
        return []
    sentence = few_seeds(family, few, nothing, other)
    return [Finding(MISSING, question, sentence, family, seeds=max(few.values()))]


def _corrected(
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
