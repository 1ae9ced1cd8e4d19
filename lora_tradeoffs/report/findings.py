"""Findings: sentences made from the results of tests, in whichever direction they come out.

    found = findings(adaptation, retention, drift, transfer, preset)
    print(as_markdown(found))

Confirmatory is one family of tests, fixed beforehand: LoRA at each rank of the grid against full
fine-tuning, on each task's primary metric, last checkpoint, test; paired over at least three seeds,
corrected by Holm over all of them, also those that could not be made. All else is exploratory, and
corrected within its question. `detectable` is the difference that a test at the first, strictest
step of the correction finds with 80 % power. The demo has no findings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

from config import FAMILIES
from dataset_descriptions import DESCRIPTIONS
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
    EXPLORATORY,
    FORGETS,
    FULL_TESTED,
    GOES_WITH,
    MATCHED,
    MISSING,
    RANK,
    TRANSFER,
    Finding,
    Words,
    association,
    few_seeds,
    of_a_difference,
    other_items,
)
from lora_tradeoffs.statistics.comparisons import LEVEL, MIN_SEEDS, Comparison, holm
from lora_tradeoffs.statistics.contrasts import Contrast, Items, Part, contrast
from lora_tradeoffs.statistics.seed_intervals import BOTH, SEEDS, compare_over_seeds
from lora_tradeoffs.tables.arms import FULL, GRID, Arm, shared_words
from lora_tradeoffs.tables.predictors import PREDICTORS, across_runs, predictor_table, within_runs
from lora_tradeoffs.tables.retention import MEAN, at_chance, matched

if TYPE_CHECKING:
    from pandas import DataFrame

ALPHA = 1 - LEVEL


class Draft(NamedTuple):
    """A test that was made, and the words for it."""

    family: str
    arm: Arm | str
    about: str
    result: Contrast
    words: Words


def findings(
    adaptation: DataFrame | None,
    retention: DataFrame | None,
    drift: DataFrame | None,
    transfer: DataFrame | None,
    preset: str,
    adaptation_items: Items | None = None,
    retention_items: Items | None = None,
) -> list[Finding]:
    """All findings of a study, question by question; one that says why not under the demo preset.

    The frames are those of load_records, where learning rates were swept by way of
    learning_rate_tables.at_chosen_rates. Arms go by their plain labels, also where all runs differ
    from the grid's in the same fields, which is said first. `transfer` is
    transfer.transfer_table's; None is a stage that was not run. With the items
    (seed_contrasts.adaptation_items, retention_items) tests and intervals count seeds and items,
    without them seeds alone: those are about these test items.
    """
    if preset == "demo":
        return [Finding(MISSING, "", DEMO)]
    found = []
    words = shared_words(f for f in (adaptation, retention, drift) if f is not None)
    if words:
        found.append(Finding(MISSING, "", ALL_RUNS.format(" ".join(sorted(words)))))
        adaptation, retention, drift, transfer = (
            None if f is None else f.assign(arm=[arm.without(words) for arm in f["arm"]])
            for f in (adaptation, retention, drift, transfer)
        )
    if adaptation is None:
        found.append(_missing(ADAPTS, "adaptation is not measured (python eval.py)"))
    else:
        found += _adapts(adaptation, adaptation_items)
    if retention is None:
        found.append(_missing(FORGETS, "retention is not measured (python retention_eval.py)"))
    else:
        found += _forgets(retention, retention_items)
        found += _matched(retention)
    found += _rank(adaptation, retention, adaptation_items, retention_items)
    found += _transfer(transfer)
    if retention is not None:
        found += _goes_with(retention, drift, adaptation)
    return found


def as_table(found: Sequence[Finding]) -> DataFrame:
    """A row a finding, for CSV."""
    import pandas as pd

    return pd.DataFrame([asdict(finding) for finding in found])


def as_markdown(found: Sequence[Finding]) -> str:
    """The sentences as lists below their questions."""
    kinds = {f.question: f" ({f.kind})" for f in found if f.kind != MISSING}
    lines: list[str] = []
    for question in dict.fromkeys(finding.question for finding in found):
        lines += ["", f"**{question}**{kinds.get(question, '')}", ""] if question else [""]
        lines += [f"- {finding.sentence}" for finding in found if finding.question == question]
    return "\n".join(lines[1:])


# ----------------------------------------------------------------------------- the questions


def _adapts(adaptation: DataFrame, items: Items | None) -> list[Finding]:
    """The confirmatory family: arms by tasks of both families, tested or not."""
    rows = last_test_scores(adaptation)
    tests = len(GRID) * sum(map(len, FAMILIES.values()))
    drafts, found = [], []
    for family, tasks in FAMILIES.items():
        own = rows[rows["family"] == family]
        few: dict[Arm, int] = {}
        for arm in GRID:
            for task in tasks:
                on_task = own[own["task"] == task]
                parts = [Part(1, rows_of(on_task, arm)), Part(-1, rows_of(on_task, FULL))]
                shared = len(set(parts[0].rows) & set(parts[1].rows))
                if shared < MIN_SEEDS:
                    few[arm] = min(few.get(arm, shared), shared)
                    continue
                result = contrast([parts], items, 1 - ALPHA / tests)
                words = Words.scores(arm, task, DESCRIPTIONS[task].metrics[0])
                drafts.append(Draft(family, arm, task, result, words))
        if few:
            sentence = few_seeds(family, few, len(few) == len(GRID), FULL_TESTED)
            found.append(Finding(MISSING, ADAPTS, sentence, family, seeds=max(few.values())))
    return _corrected(CONFIRMATORY, ADAPTS, drafts, tests) + found


def _forgets(retention: DataFrame, items: Items | None) -> list[Finding]:
    """Forgetting of LoRA minus that of full fine-tuning, mean over benchmarks."""
    pairs: list[tuple[str, Arm, list[list[Part]]]] = []
    found = []
    for family in FAMILIES:
        few = {}
        for arm in GRID:
            tasks = forgetting_parts(retention, family, {arm: 1, FULL: -1}, items)
            shared = shared_seeds(tasks)
            if shared < MIN_SEEDS:
                few[arm] = shared
            else:
                pairs.append((family, arm, tasks))
        if few:
            sentence = few_seeds(family, few, nothing=len(few) == len(GRID))
            found.append(Finding(MISSING, FORGETS, sentence, family, seeds=max(few.values())))
    level = 1 - ALPHA / max(len(pairs), 1)
    drafts = [
        Draft(family, arm, MEAN, contrast(tasks, items, level), Words.forgets(arm))
        for family, arm, tasks in pairs
    ]
    guessed = at_chance(retention)
    if guessed and drafts:
        text = (
            f"On {', '.join(guessed)}, part of the mean, the base is at chance: nothing to forget."
        )
        found.append(Finding(MISSING, FORGETS, text))
    return _corrected(EXPLORATORY, FORGETS, drafts) + found


def _matched(retention: DataFrame) -> list[Finding]:
    """The same where the updates are scaled to the same validation score."""
    rows = matched(retention)
    if rows.empty:
        reason = "no updates were scaled (python retention_eval.py --scale-update)"
        return [_missing(MATCHED, reason)]
    rows = rows[(rows["other"] == FULL) & rows["arm"].isin(GRID)]
    there = [
        (f, a, rows[(rows["family"] == f) & (rows["arm"] == a)]) for f in FAMILIES for a in GRID
    ]
    groups = [group for group in there if len(group[2]) >= MIN_SEEDS]
    if not groups:
        reason = f"fewer than {MIN_SEEDS} seeds of each arm with scaled updates"
        return [_missing(MATCHED, reason)]
    drafts = []
    for family, arm, own in groups:
        # each seed's error over items stands for what the seeds share of it: never too narrow
        variance = float((own["stderr"] ** 2).fillna(0).mean())
        level = 1 - ALPHA / len(groups)
        c = compare_over_seeds(own["value"].to_numpy(), variance, level)
        result = Contrast(c, tuple(own["seed"]), BOTH if variance else SEEDS)
        drafts.append(Draft(family, arm, MEAN, result, Words.matched(arm)))
    return _corrected(EXPLORATORY, MATCHED, drafts)


def _rank(
    adaptation: DataFrame | None,
    retention: DataFrame | None,
    test_items: Items | None,
    benchmark_items: Items | None,
) -> list[Finding]:
    """The slope of mean score and mean forgetting over log2 of LoRA's rank, seed by seed."""
    trends = []
    for family in FAMILIES:
        if adaptation is not None:
            rows = last_test_scores(adaptation)
            own = [rows[(rows["family"] == family) & (rows["task"] == t)] for t in FAMILIES[family]]
            weights = slope_weights([grid_arms(part) for part in own])
            tasks = [[Part(w, rows_of(part, arm)) for arm, w in weights.items()] for part in own]
            trends.append((family, "score", tasks, test_items))
        if retention is not None:
            rows = mean_forgetting(retention, family)
            weights = slope_weights([grid_arms(rows)])
            tasks = forgetting_parts(retention, family, weights, benchmark_items)
            trends.append((family, "forgetting", tasks, benchmark_items))
    kept = [t for t in trends if shared_seeds(t[2]) >= MIN_SEEDS]
    if not kept:
        return [_missing(RANK, f"fewer than 3 ranks with {MIN_SEEDS} seeds in common")]
    drafts = []
    for family, about, tasks, own_items in kept:
        result = contrast(tasks, own_items, 1 - ALPHA / len(kept))
        drafts.append(Draft(family, "LoRA", about, result, Words.rank(about)))
    return _corrected(EXPLORATORY, RANK, drafts)


def _transfer(transfer: DataFrame | None) -> list[Finding]:
    """Multi-task minus single-task; one seed is no method."""
    if transfer is None or transfer.empty:
        reason = "no single-task controls (python run_study.py --single-task-controls)"
        return [_missing(TRANSFER, reason)]
    tested = transfer[transfer["seeds"] >= MIN_SEEDS]
    found, drafts = [], []
    for row in tested.itertuples():
        names = Comparison.__dataclass_fields__
        values = {n: getattr(row, n) for n in names if hasattr(row, n)}
        c = Comparison(**values | {"difference": row.value, "n": row.seeds})
        result = Contrast(c, (0,) * row.seeds, row.over)
        words = Words.transfer(row.arm, row.task, row.metric)
        drafts.append(Draft(row.family, row.arm, row.task, result, words))
    rest = transfer[transfer["seeds"] < MIN_SEEDS]
    for family, own in rest.groupby("family", sort=False):
        few = own.groupby("arm")["seeds"].max().to_dict()
        sentence = few_seeds(family, few, nothing=tested.empty, other="the single-task control")
        found.append(Finding(MISSING, TRANSFER, sentence, family, seeds=max(few.values())))
    return _corrected(EXPLORATORY, TRANSFER, drafts, len(transfer)) + found


def _goes_with(
    retention: DataFrame, drift: DataFrame | None, adaptation: DataFrame | None
) -> list[Finding]:
    """Rank correlations of forgetting and gain with what was measured of drift."""
    table = predictor_table(retention, drift, adaptation)
    across, within = across_runs(table), within_runs(table)
    found = []
    if drift is None:
        reason = "drift of the weights is not measured (python svd_analysis.py)"
        found.append(_missing(GOES_WITH["forgetting"], reason))
    for outcome, question in GOES_WITH.items():
        own = across[across["outcome"] == outcome].dropna(subset=["rho"])
        tests = int(own["p_value"].notna().sum())
        for row in own.itertuples():
            same = (within["family"] == row.family) & (within["predictor"] == row.predictor)
            inside = within[same & (within["outcome"] == outcome)].iloc[0]
            sentence, verdict = association(row, inside, tests)
            found.append(
                Finding(
                    *(EXPLORATORY, question, sentence, row.family, "", row.predictor),
                    *(row.rho, row.low, row.high, row.p_value, row.corrected, row.detectable),
                    **{"over": f"{row.runs} runs", "verdict": verdict},
                )
            )
        found += _not_correlated(across[across["outcome"] == outcome], question)
    return found


def _not_correlated(across: DataFrame, question: str) -> list[Finding]:
    """A sentence for each reason why predictors of a family have no correlation."""
    if across.empty:
        return [_missing(question, "no last checkpoint has both forgetting and a measure of drift")]
    found = []
    without = across[across["rho"].isna()]
    for (family, reason), own in without.groupby(["family", "reason"], sort=False):
        names = ", ".join(PREDICTORS[name] for name in own["predictor"])
        sentence = f"{family}: nothing can be said of {names}: {reason}."
        found.append(Finding(MISSING, question, sentence, family))
    return found


# ----------------------------------------------------------------------------------- helpers


def _missing(question: str, reason: str) -> Finding:
    return Finding(MISSING, question, f"Not answered: {reason}.")


def _corrected(
    kind: str, question: str, drafts: Sequence[Draft], tests: int | None = None
) -> list[Finding]:
    """The drafts as findings, corrected over `tests`, of which the rest could not be made."""
    tests = len(drafts) if tests is None else tests
    p_values = [draft.result.found.p_value for draft in drafts]
    corrected = holm([*p_values, *[math.nan] * (tests - len(drafts))])
    found = []
    for draft, p in zip(drafts, corrected):
        c = draft.result.found
        if math.isnan(c.p_value):
            sentence = other_items(draft)
            about = draft.family, str(draft.arm), draft.about
            found.append(Finding(MISSING, question, sentence, *about))
            continue
        sentence, verdict = of_a_difference(draft, float(p), tests)
        found.append(
            Finding(
                *(kind, question, sentence, draft.family, str(draft.arm), draft.about),
                *(c.difference, c.low, c.high, c.p_value, float(p), c.detectable),
                *(len(draft.result.seeds), draft.result.over, verdict),
            )
        )
    return found
