"""Forgetting: a tuned model against its base on the same items, and means over them.

Forgetting is the base's score minus the tuned model's on the same items (Biderman et al. 2024,
arXiv:2405.09673). It has two outcomes of equal standing: the mean over benchmarks, of acc_norm
where there is one, else acc, and the mean over the sources of held-out text, in nats a token. A
second mean is over the benchmarks on which the base is above chance: on others it has nothing to
forget. Tasks have different items, so their errors are independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from config import FAMILIES
from lora_tradeoffs.records import (
    ABOVE_CHANCE,
    AS_MEASURED,
    CHECKPOINT,
    CONTROL,
    HELD_OUT,
    INTRUDERS,
    LEARNED,
    LOSS,
    MEAN,
    TEXT,
    metric_scale,
)
from lora_tradeoffs.retention.scores import Record, at_chance
from lora_tradeoffs.statistics.comparisons import (
    NORMAL,
    Comparison,
    compare_checkpoints,
    detectable_over_items,
)
from lora_tradeoffs.statistics.scores import Scores

if TYPE_CHECKING:
    from pandas import DataFrame, Series

    from lora_tradeoffs.measuring.results import Results

KEY = ["run", "step", *AS_MEASURED]  # a model: a checkpoint, or a variant of it
SHRINK_PAIRS = ((INTRUDERS, CONTROL), (INTRUDERS, CHECKPOINT), (CONTROL, CHECKPOINT))


def is_base(units: DataFrame) -> Series:
    return units["run"] == "base"


def outcomes_of(base: DataFrame, trained: str = "") -> dict[str, list[str]]:
    """The tasks that each outcome of forgetting is a mean over, by the base's units.

    `trained` are a run's tasks, as in its records: held-out text of one of them is no held-out text
    for it. Without tasks there is no outcome; nor is ABOVE_CHANCE where it would be MEAN.
    """
    benchmarks = base[base["is_benchmark"]]
    above = [record["task"] for record in benchmarks["record"] if not at_chance(record)]
    learned = {TEXT + task for task in FAMILIES.get(trained, trained.split("+"))}
    texts = base["task"][base["task"].str.startswith(TEXT) & ~base["task"].isin(learned)]
    outcomes = {MEAN: [*benchmarks["task"]], ABOVE_CHANCE: above, HELD_OUT: [*texts]}
    if len(above) == len(benchmarks):
        del outcomes[ABOVE_CHANCE]
    return {outcome: tasks for outcome, tasks in outcomes.items() if tasks}


def forgetting_records(results: Results, units: DataFrame) -> tuple[list[Record], list[str]]:
    """Every tuned model's score against the base's on the same items, and the outcomes' means.

    Also the names of the units that are not compared.
    """
    records, uncompared = [], []
    base, tuned = units[is_base(units)], units[~is_base(units)]
    of_base = base[["task", "unit", "record", "request"]]
    pairs = tuned.merge(of_base, on="task", suffixes=("", "_base"))
    for _, model in pairs.groupby(KEY):
        compared: dict[str, tuple[Record, Comparison]] = {}
        for pair in model.itertuples():
            if not _is_retained(pair.record):
                continue
            if not _are_comparable(pair.request, pair.request_base):
                uncompared.append(pair.unit)
                continue
            comparison, flips = _compare(results, pair)
            if comparison is None:
                continue
            compared[pair.task] = pair.record, comparison
            if pair.is_benchmark:
                flips["at_chance"] = at_chance(pair.record_base)
            figures = asdict(comparison)
            figures["value"] = figures.pop("difference")
            common = without_figures(pair.record) | {"of": pair.record["metric"]}
            records.append({**common, "metric": "forgetting", **figures, **flips})
        outcomes = outcomes_of(base, model.iloc[0]["record"].get("tasks", ""))
        records += [
            _mean_forgetting(outcome, [compared[task] for task in tasks])
            for outcome, tasks in outcomes.items()
            if compared.keys() >= set(tasks)
        ]
    return records, uncompared


def _compare(results: Results, pair: Any) -> tuple[Comparison | None, Record]:
    """The base minus the tuned model, and how many items flipped; None for a corpus's figure."""
    metric = pair.record["metric"]
    scores = results.items(pair.unit).get(metric)
    if scores is None:
        return None, {}
    base = _shared_items(results.items(pair.unit_base)[metric], pair.request_base, pair.request)
    flips = {}
    if scores.items is not None:
        flips = {
            "forgotten": int((base.items > scores.items).sum()),
            "gained": int((base.items < scores.items).sum()),
        }
    return compare_checkpoints(base, scores), flips


def _is_retained(record: Record) -> bool:
    """Whether it shows what is left of the base: a benchmark, a perplexity task, held-out text."""
    return "chance" in record or record["task"].startswith(TEXT)


def _are_comparable(request: Record, base: Record) -> bool:
    """Whether a unit was measured as the base's was, at most on its first items.

    A limit takes the first items and changes the digest of the requests, so with another limit the
    rows themselves cannot be compared; definition, examples and precision still can.
    """
    limit, most = request["limit"], base["limit"]
    if limit == most:
        return request == base
    return (limit < most if most else limit > 0) and _without_rows(request) == _without_rows(base)


def _without_rows(request: Record) -> Record:
    benchmarks = {
        name: {k: v for k, v in identity.items() if k not in ("requests", "items")}
        for name, identity in request.get("benchmark", {}).items()
    }
    return {**request, "limit": 0, "benchmark": benchmarks}


def _shared_items(scores: Scores, base: Record, request: Record) -> Scores:
    """The base's items that a smaller limit leaves: the first of each task of a benchmark."""
    if request["limit"] == base["limit"]:
        return scores
    rows: list[int] = []
    start = 0
    for name, identity in base["benchmark"].items():
        rows += range(start, start + request["benchmark"][name]["items"])
        start += identity["items"]
    return Scores(scores.name, scores.statistics[rows], scores.aggregate)


# ---------------------------------------------------------------------------- means of tasks


def mean_adaptation(model: DataFrame) -> list[Record]:
    """A run's mean score over its family's tasks, the base's over those of each; BLEU in
    hundredths."""
    by_task = {r["task"]: r for r in model["record"] if r["metric"] != LOSS}
    run, own = model.iloc[0][["run", "family"]]
    return [
        mean_record([by_task[task] for task in tasks], "adaptation") | {"family": family}
        for family, tasks in FAMILIES.items()
        if (run == "base" or family == own) and set(tasks) <= by_task.keys()
    ]


def _mean_forgetting(outcome: str, compared: Sequence[tuple[Record, Comparison]]) -> Record:
    from scipy.stats import norm

    parts = [r | {"value": c.difference, "stderr": c.stderr} for r, c in compared]
    record = mean_record(parts, "forgetting", outcome)
    value, stderr = record["value"], record["stderr"]
    return record | {
        "of": compared[0][0]["metric"] if outcome == HELD_OUT else None,
        "test": "paired, normal, variances of the tasks added",
        "p_value": float(2 * norm.sf(abs(value) / stderr)) if stderr else float(value == 0),
        "detectable": detectable_over_items(stderr) or math.nan,
    }


def mean_record(records: Iterable[Record], metric: str, task: str = MEAN) -> Record:
    """The mean of independent figures, BLEU in hundredths; its error is nan if one has none."""
    records = list(records)
    scales = [metric_scale(r["metric"]) for r in records]
    value = float(np.mean([r["value"] / scale for r, scale in zip(records, scales)]))
    stderr = math.nan
    if all(r["stderr"] is not None for r in records):
        variances = ((r["stderr"] / scale) ** 2 for r, scale in zip(records, scales))
        stderr = math.sqrt(sum(variances)) / len(records)
    dropped = ("chance", "truncated", "split")
    splits = {r["split"] for r in records}
    return {name: v for name, v in records[0].items() if name not in dropped} | {
        "split": splits.pop() if len(splits) == 1 else "mixed",
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "low": value - NORMAL * stderr,
        "high": value + NORMAL * stderr,
        "n": sum(r["n"] for r in records),
        "over": ",".join(r["task"] for r in records),
    }


def without_figures(record: Record) -> Record:
    dropped = ("metric", "value", "stderr", "low", "high", "n", "truncated", "chance")
    return {name: v for name, v in record.items() if name not in dropped}


def shrink_effects(results: Results, units: DataFrame) -> list[Record]:
    """What is lost by shrinking the intruders, against their control, and what by shrinking either,
    against the checkpoint: what is forgotten more, and scores on the trained tasks (LEARNED)."""
    records = []
    base = units[is_base(units)].drop_duplicates("task", keep="last")
    for (run, step, _), at in units[units["shrunk"] != ""].groupby(["run", "step", "shrink"]):
        own = units[(units["run"] == run) & (units["step"] == step) & (units["shrunk"] == "")]
        models = dict(iter(at.groupby("shrunk"))) | {CHECKPOINT: own[own["update_scale"] == 1]}
        about = at.iloc[0]["record"]
        outcomes = outcomes_of(base, about["tasks"]) | {LEARNED: FAMILIES.get(about["family"], ())}
        for kind, other in SHRINK_PAIRS:
            pairs = models.get(kind, at[:0]).merge(
                models.get(other, at[:0]), on="task", suffixes=("", "_base")
            )
            pairs = [pair for pair in pairs.itertuples() if pair.request == pair.request_base]
            compared = {pair.task: (pair.record, _compare(results, pair)[0]) for pair in pairs}
            compared = {task: parts for task, parts in compared.items() if parts[1]}
            for outcome, tasks in outcomes.items():
                if tasks and compared.keys() >= set(tasks):
                    lost = _mean_forgetting(outcome, [compared[task] for task in tasks])
                    records.append(lost | {"metric": "shrink_effect", "against": other})
    return records
