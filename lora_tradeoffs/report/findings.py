"""Findings: sentences made from the results of tests, in whichever direction they come out.

    print(as_markdown(findings(StudyRecords.load(settings))))

Confirmatory is one family of tests, fixed beforehand: the primary hypotheses of the study's file
(hypotheses.py); if it has none, LoRA at each rank of the study's plan against full fine-tuning, on
each task's primary metric, last checkpoint, test; paired over at least three seeds, corrected by
Holm over all of them, also those that could not be made. All else is exploratory, and corrected
within its question. Tests of several arms share one error where their variances allow it.
`detectable` is the difference that a test at the first, strictest step of the correction finds
with 80 % power. The demo has no findings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.records import CONTROL, HELD_OUT, LEARNED, MEAN
from lora_tradeoffs.report.arm_tests import (
    ALPHA,
    Outcome,
    Plan,
    TestedContrast,
    against_full,
    corrected_findings,
    is_compared,
    too_few_seeds,
)
from lora_tradeoffs.report.compared_rows import (
    forgetting_parts,
    grid_arms,
    last_test_scores,
    over_seeds,
    score_parts,
    slope_weights,
)
from lora_tradeoffs.report.hypotheses import PRIMARY, hypothesis_findings
from lora_tradeoffs.report.wording import (
    ADAPTS,
    ALL_RUNS,
    CONFIRMATORY,
    DEMO,
    EQUAL_SCORES,
    EXPLORATORY,
    FORGETS,
    FORGOTTEN,
    FULL_TESTED,
    GOES_WITH,
    MATCHED,
    MISSING,
    NOTE,
    RANK,
    SHRUNK,
    TRANSFER,
    Finding,
    SentenceTemplates,
    association,
)
from lora_tradeoffs.statistics.comparisons import MIN_SEEDS, Comparison
from lora_tradeoffs.statistics.contrasts import Contrast, Items, contrast, shared_seeds
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.tables.arms import FULL, Arm
from lora_tradeoffs.tables.learning_rates import searched_arm
from lora_tradeoffs.tables.predictors import PREDICTORS
from lora_tradeoffs.tables.retention import (
    at_chance,
    forgotten,
    matched,
    mean_forgetting,
    no_common_level,
    shrink_effects,
)

if TYPE_CHECKING:
    from pandas import DataFrame

# Names of runs stand in sentences, and Markdown takes HTML, links and formulas from them.
MARKUP, ESCAPED = re.compile(r"([\\`*$]|\](?=\()|<(?=\S)|&(?=\S))"), r"\\\1"


def findings(study: StudyRecords) -> list[Finding]:
    """All findings of a study, question by question; under the demo preset one that says why not.

    Arms go by their plain labels, also where all runs differ from the grid's in the same fields,
    which is said first. With per-item outcomes tests and intervals count seeds and items, without
    them seeds alone: those are about these test items.
    """
    if study.preset == "demo":
        return [Finding(MISSING, "", DEMO)]
    asked, words, plan = hypothesis_findings(study), study.shared_words, study.planned_arms
    results = list(asked)
    if words:
        results.append(Finding(NOTE, "", ALL_RUNS.format(" ".join(sorted(words)))))
        study = study.plain
    if study.adaptation is None:
        results.append(_missing(ADAPTS, "adaptation is not measured (python eval.py)"))
    else:
        # a study has one confirmatory family: its own hypotheses, if it has some
        is_primary = any(finding.question == PRIMARY for finding in asked)
        kind = EXPLORATORY if is_primary else CONFIRMATORY
        results += _adapts(study.adaptation, study.adaptation_items, plan, kind)
    if study.retention is None:
        results.append(_missing(FORGETS, "retention is not measured (python retention_eval.py)"))
    else:
        results += _forgets(study.retention, study.retention_items, plan)
        results += _matched(study.retention, plan)
        results += _shrunk(study.shrunk, study.retention)
    results += _rank(study, words)
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
    kinds = {f.question: f" ({f.kind})" for f in results if f.kind in (CONFIRMATORY, EXPLORATORY)}
    lines: list[str] = []
    for question in dict.fromkeys(finding.question for finding in results):
        lines += ["", f"**{question}**{kinds.get(question, '')}", ""] if question else [""]
        sentences = (finding.sentence for finding in results if finding.question == question)
        lines += [f"- {MARKUP.sub(ESCAPED, sentence)}" for sentence in sentences]
    return "\n".join(lines[1:])


# ----------------------------------------------------------------------------- the questions


def _adapts(
    adaptation: DataFrame, items: Items | None, plan: Plan, kind: str = CONFIRMATORY
) -> list[Finding]:
    """The plan's arms by the tasks of their family, tested or not."""
    rows = last_test_scores(adaptation)
    outcomes = []
    for family, task in ((name, task) for name in plan for task in FAMILIES[name]):
        metric = DESCRIPTIONS[task].metrics[0]
        sentences = partial(SentenceTemplates.scores, task=task, metric=metric)
        parts = partial(score_parts, rows, family, [task])
        outcomes.append(Outcome(family, task, parts, sentences, items))
    return against_full(kind, ADAPTS, outcomes, plan, FULL_TESTED)


def _forgets(retention: DataFrame, items: Items | None, plan: Plan) -> list[Finding]:
    """Forgetting of LoRA minus that of full fine-tuning, over benchmarks and on held-out text."""
    outcomes, names = [], ", ".join(at_chance(retention))
    for family, outcome in product(plan, FORGOTTEN):
        if outcome != MEAN and mean_forgetting(retention, family, outcome).empty:
            continue
        parts = partial(forgetting_parts, retention, family, items=items, outcome=outcome)
        sentences = partial(SentenceTemplates.forgets, where=FORGOTTEN[outcome].format(names))
        outcomes.append(Outcome(family, outcome, parts, sentences, items))
    results = against_full(EXPLORATORY, FORGETS, outcomes, plan, are_alike=False)
    if names and any(finding.kind == EXPLORATORY for finding in results):
        text = f"On {names}, part of the mean, the base is at chance: nothing to forget."
        results.insert(0, Finding(NOTE, FORGETS, text))
    fewest, *more = sorted({*forgotten(retention).query("task == @MEAN")["shots"]}) or [0]
    if more:
        text = f"The mean is over the benchmarks with {fewest:g} examples in the prompt, not over"
        text += f" those with {' or '.join(map('{:g}'.format, more))}."
        results.insert(0, Finding(NOTE, FORGETS, text))
    return results


def _matched(retention: DataFrame, plan: Plan) -> list[Finding]:
    """The same where the updates are scaled to the same validation score."""
    rows = matched(retention)
    if rows.empty:
        reason = "no updates were scaled (python retention_eval.py --scale-update)"
        return [_missing(MATCHED, reason)]
    adapters = sorted(arm for arm in {*rows["arm"]} if is_compared(arm, plan))
    rows, names = rows[(rows["other"] == FULL) & rows["arm"].isin(adapters)], at_chance(retention)
    by_arm = dict(iter(rows.groupby(["family", "arm", "task"])))
    groups = product(FAMILIES, adapters, FORGOTTEN)
    groups = [key for key in groups if len(by_arm.get(key, ())) >= MIN_SEEDS]
    if not groups:
        reason = f"fewer than {MIN_SEEDS} seeds of each arm with scaled updates"
        return [_missing(MATCHED, reason)]
    where = {o: f"{FORGOTTEN[o].format(', '.join(names))} {EQUAL_SCORES}" for o in FORGOTTEN}
    apart = {key: reason for key in groups if (reason := no_common_level(by_arm[key]))}
    results = _over_seeds(
        MATCHED,
        {key: by_arm[key] for key in groups if key not in apart},
        lambda arm, outcome: SentenceTemplates.forgets(arm, where[outcome]),
    )
    for (family, arm, outcome), reason in apart.items():
        sentence = f"{family}: {arm}, {outcome}: not tested: {reason}."
        results.append(Finding(MISSING, MATCHED, sentence, family, str(arm), outcome))
    return results


def _shrunk(shrunk: DataFrame | None, retention: DataFrame) -> list[Finding]:
    """What is lost more by shrinking the intruders than by the control, at the least factor."""
    if shrunk is None:
        reason = "no intruders were shrunk (python retention_eval.py --shrink-intruders)"
        return [_missing(SHRUNK, reason)]
    rows = shrink_effects(shrunk, CONTROL)
    if rows.empty:
        return [_missing(SHRUNK, "no last checkpoint has intruder dimensions")]
    factor, names = rows["shrink"].min(), ", ".join(at_chance(retention))
    where = {outcome: text.format(names) for outcome, text in FORGOTTEN.items()} | {LEARNED: ""}
    rows = rows[(rows["shrink"] == factor) & rows["task"].isin(where)]
    by_arm = dict(iter(rows.groupby(["family", "arm", "task"])))
    groups = {key: part for key, part in by_arm.items() if len(part) >= MIN_SEEDS}
    if not groups:
        reason = f"fewer than {MIN_SEEDS} seeds of each arm with intruders (the figure"
        return [_missing(SHRUNK, f"{reason} shrunk_intruders shows each checkpoint)")]
    return _over_seeds(
        SHRUNK,
        groups,
        lambda arm, outcome: SentenceTemplates.shrinks(arm, factor, where[outcome]),
    )


def _over_seeds(
    question: str,
    groups: Mapping[tuple[str, Arm, str], DataFrame],
    sentences: Callable[[Arm, str], SentenceTemplates],
) -> list[Finding]:
    """Tests over seeds of differences that are records already, by family, arm and outcome."""
    contrasts = []
    for (family, arm, outcome), differences in groups.items():
        result = over_seeds(differences, 1 - ALPHA / len(groups))
        contrasts.append(TestedContrast(family, arm, outcome, result, sentences(arm, outcome)))
    return corrected_findings(EXPLORATORY, question, contrasts)


def _rank(study: StudyRecords, words: set[str]) -> list[Finding]:
    """The slope of mean score and of both kinds of forgetting over log2 of LoRA's rank.

    Where a rank was not trained at a rate of its own search, the sentence says what that confounds.
    """
    searched = {(c["family"], searched_arm(c).without(words)) for c in study.rates if c["chosen"]}
    candidates: list[tuple[str, str, Any, Items | None, list[set[Arm]]]] = []
    for family, tasks in FAMILIES.items():
        if study.adaptation is not None:
            rows = last_test_scores(study.adaptation)
            rows = rows[rows["family"] == family]
            arms = [grid_arms(rows[rows["task"] == task]) for task in tasks]
            parts = partial(score_parts, rows, family, tasks)
            candidates.append((family, "score", parts, study.adaptation_items, arms))
        if study.retention is not None:
            items = study.retention_items
            for about, outcome in (("forgetting", MEAN), ("text lost", HELD_OUT)):
                arms = [grid_arms(mean_forgetting(study.retention, family, outcome))]
                parts = partial(
                    forgetting_parts, study.retention, family, items=items, outcome=outcome
                )
                candidates.append((family, about, parts, items, arms))
    trends: list[tuple[Outcome, dict[Arm, float]]] = []
    for family, about, parts, items, arms in candidates:
        weights = slope_weights(arms)
        if weights and len(shared_seeds(parts(weights))) >= MIN_SEEDS:
            defaults = [arm for arm in weights if (family, arm) not in searched]
            sentences = partial(SentenceTemplates.rank, about=about, defaults=defaults)
            trends.append((Outcome(family, about, parts, sentences, items), weights))
    if not trends:
        return [_missing(RANK, f"fewer than 3 ranks with {MIN_SEEDS} seeds in common")]
    layouts = [outcome.layout(list(weights)) for outcome, weights in trends]
    errors = pooled_errors(layouts, [outcome.about for outcome, _ in trends])
    contrasts = []
    for (outcome, weights), error in zip(trends, errors):
        parts = outcome.parts(weights)
        result = contrast(parts, outcome.items, 1 - ALPHA / len(trends), error)
        family, about = outcome.family, outcome.about
        contrasts.append(TestedContrast(family, "LoRA", about, result, outcome.sentences("LoRA")))
    return corrected_findings(EXPLORATORY, RANK, contrasts)


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
        results += too_few_seeds(TRANSFER, family, few, enough.empty, "the single-task control")
    return corrected_findings(EXPLORATORY, TRANSFER, contrasts, len(transfer)) + results


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
