"""Records of retention: what a model kept of its base, in paired comparisons with it.

Retention is the mean of the benchmarks' scores, forgetting the base's score minus the tuned
model's on the same items (Biderman et al. 2024, arXiv:2405.09673). Of a benchmark the score is
acc_norm where it has one, else acc. Benchmarks are different items, so the variance of a mean over
them is the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from config import FAMILIES
from lora_tradeoffs.records import TEXT, metric_scale
from lora_tradeoffs.retention.matched import Curve, matched_forgetting
from lora_tradeoffs.statistics.comparisons import (
    Comparison,
    compare_checkpoints,
    detectable_over_items,
    estimate,
)
from lora_tradeoffs.statistics.scores import Scores, mean

if TYPE_CHECKING:
    from lora_tradeoffs.measuring.results import Results

Record = dict[str, Any]
Key = tuple[str, int, float]  # run, step, scale of the update

BASE: Key = ("base", 0, 1.0)


class Measured(NamedTuple):
    """A unit on disk: its name, the record of its primary metric, and what was asked of it."""

    unit: str
    record: Record
    request: dict[str, Any]


PRIMARY = ("acc_norm", "acc", "log_likelihood")
Z = 1.959964  # of a normal 95 % interval


def primary(metrics: Mapping[str, Any] | Sequence[str]) -> str:
    """The metric that a task is known by: acc_norm where there is one, else acc."""
    return next((name for name in PRIMARY if name in metrics), min(metrics))


def item_scores(items: Mapping[str, np.ndarray]) -> list[Scores]:
    """Per-item values by metric as `Scores`; log-likelihoods over their `tokens`."""
    values = dict(items)
    counts = values.pop("tokens", None)
    if counts is None:
        return [Scores(m, np.stack([v, np.ones(len(v))], 1), mean) for m, v in values.items()]
    return [Scores("log_likelihood", np.stack([values["log_likelihood"], counts], 1), mean)]


def figures(scores: Scores) -> Record:
    """Value, standard error, interval and number of items of a metric."""
    e = estimate(scores)
    return {"value": e.value, "stderr": e.stderr, "low": e.low, "high": e.high, "n": e.n}


def benchmark_records(common: Record, result: Any) -> list[Record]:
    """A benchmark's metrics as lm-eval gives them, with intervals over its items.

    `result` is a `BenchmarkResult` of lm_eval_backend.
    """
    scores = {s.name: s for s in item_scores(result.items)}
    # a figure of the corpus alone (mcc) cannot be paired, nor held against guessing item by item
    chance = result.chance if primary(result.metrics) in scores else math.nan
    records = []
    for metric, value in result.metrics.items():
        found = estimate(scores[metric]) if metric in scores else None
        records.append(
            {
                **common,
                "task": result.task,
                "metric": metric,
                "value": value,
                "stderr": result.stderrs.get(metric, math.nan),
                "low": found.low if found else math.nan,
                "high": found.high if found else math.nan,
                "n": result.n,
                "chance": chance,
                "truncated": result.truncated,
            }
        )
    if "log_likelihood" in scores and "log_likelihood" not in result.metrics:  # perplexity tasks
        own = figures(scores["log_likelihood"]) | {"n": result.n}
        records.append({**records[0], "metric": "log_likelihood", **own})
    return records


def at_chance(record: Record) -> bool:
    """Whether a model's score is within two standard errors of guessing's.

    A base that guesses has nothing that a benchmark could show it to forget; nor does a single
    item, which has no standard error.
    """
    if record["stderr"] is None:
        return True
    return bool(abs(record["value"] - record["chance"]) <= 2 * record["stderr"])


# ------------------------------------------------------------------------ from unit to unit


def derived_records(results: Results) -> tuple[list[Record], list[str]]:
    """Forgetting of every task, and means over the benchmarks, from the units that are there.

    Benchmarks with other numbers of examples are other benchmarks: they are compared apart. Also
    the units that could not be compared with the base's, since they were measured otherwise.
    """
    found: dict[int, dict[Key, dict[str, Measured]]] = {}
    plain: list[tuple[Key, Measured]] = []
    for unit, document in results.units():
        records = [r for r in document["records"] if "layer" not in r and r["metric"] != "kl"]
        metrics = [r["metric"] for r in records if r["metric"] != "agreement"]
        if not metrics:
            continue
        record = next(r for r in records if r["metric"] == primary(metrics))
        key = (record["run"], record["step"], record["update_scale"])
        asked = {k: v for k, v in document["request"].items() if k != "weights"}
        measured = Measured(unit, record, asked)
        if _is_benchmark(record):
            own = found.setdefault(record["shots"], {})
            own.setdefault(key, {})[record["task"]] = measured
        else:
            plain.append((key, measured))
    found = found or {0: {}}
    for own in found.values():
        for key, measured in plain:
            own.setdefault(key, {})[measured.record["task"]] = measured
    records, others = [], []
    for number, shots in enumerate(sorted(found)):
        own = found[shots]
        base = own.get(BASE, {})
        for key, tasks in own.items():
            records += _mean_retention(tasks, base)
            records += [] if number else _mean_adaptation(tasks)
            if key != BASE:
                once = {t: m for t, m in tasks.items() if not number or _is_benchmark(m.record)}
                compared, uncompared = _forgetting(results, once, base)
                records += compared
                others += uncompared
        records += _matched(results, own)
    return records, others


def _benchmarks(tasks: Mapping[str, Any]) -> list[str]:
    return [task for task, measured in tasks.items() if _is_benchmark(measured.record)]


def _is_benchmark(record: Record) -> bool:
    """Whether the mean over benchmarks is over it, too: what nobody can guess has another scale."""
    return record.get("chance") is not None


def _is_retained(record: Record) -> bool:
    """Whether it says what is left of the base: a benchmark, a perplexity task, held-out text."""
    return "chance" in record or record["task"].startswith(TEXT)


def _mean_retention(tasks: Mapping[str, Any], base: Mapping[str, Any]) -> list[Record]:
    names = _benchmarks(tasks)
    if not names or set(names) != set(_benchmarks(base)):
        return []
    own = [tasks[name].record for name in names]
    value = float(np.mean([r["value"] for r in own]))
    return [_over(own, "retention", value, _error_of_mean([r["stderr"] for r in own]))]


def _mean_adaptation(tasks: Mapping[str, Any]) -> list[Record]:
    """The mean of each family's primary metrics on validation, BLEU in hundredths."""
    records = []
    for family in FAMILIES.values():
        if not all(task in tasks for task in family):
            continue
        own = [tasks[task].record for task in family]
        units = [metric_scale(r["metric"]) for r in own]
        value = float(np.mean([r["value"] / u for r, u in zip(own, units)]))
        errors = [r["stderr"] and r["stderr"] / u for r, u in zip(own, units)]
        records.append(_over(own, "adaptation", value, _error_of_mean(errors)))
    return records


def _error_of_mean(errors: Sequence[float | None]) -> float:
    """Standard error of a mean of independent figures; nan if one of them has none."""
    if None in errors:
        return math.nan
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def _matched(results: Results, found: Mapping[Key, Mapping[str, Any]]) -> list[Record]:
    """Forgetting of two runs of a family at equal validation score, where updates were scaled.

    The interval is over items: it is about these runs.
    """
    ends: dict[str, dict[str, list[tuple[float, int]]]] = {}
    for (run, step, scale), tasks in found.items():
        families = {m.record["family"] for m in tasks.values()} & set(FAMILIES)
        if scale != 1 and len(families) == 1:
            ends.setdefault(families.pop(), {}).setdefault(run, []).append((scale, step))
    records = []
    for family, runs in ends.items():
        curves = [_curve(results, found, family, run, sorted(ends)) for run, ends in runs.items()]
        for one, other in combinations([c for c in curves if c], 2):
            m = matched_forgetting(one, other)
            step = runs[one.arm][0][1]
            common = next(iter(found[one.arm, step, 1.0].values())).record
            records.append(
                {
                    **_without_figures(common),
                    **{"task": "mean", "split": "mixed", "metric": "matched_forgetting"},
                    **{"other_run": other.arm, "value": m.difference, "stderr": m.stderr},
                    **{"low": m.low, "high": m.high, "score": m.score, "defined": m.defined},
                    **{"scale": m.scales[0], "other_scale": m.scales[1], "reason": m.reason},
                }
            )
    return records


def _curve(
    results: Results,
    found: Mapping[Key, Mapping[str, Any]],
    family: str,
    run: str,
    ends: Sequence[tuple[float, int]],
) -> Curve | None:
    """The run's curve from the base through its scaled updates.

    None if a part is missing, or was not measured as the base was: on other items, say.
    """
    step = ends[0][1]
    keys = {0.0: BASE, 1.0: (run, step, 1.0)} | {t: (run, step, t) for t, _ in ends}
    scales = sorted(keys)
    there = [found.get(keys[t], {}) for t in scales]
    benchmarks = [b for b in _benchmarks(there[0]) if all(b in tasks for tasks in there)]
    if not benchmarks or not all(task in tasks for task in FAMILIES[family] for tasks in there):
        return None
    for task in (*benchmarks, *FAMILIES[family]):
        if any(tasks[task].request != there[0][task].request for tasks in there):
            return None

    def scores(task: str) -> list[Scores]:
        own = (tasks[task] for tasks in there)
        return [results.items(m.unit)[m.record["metric"]] for m in own]

    adaptation = {task: scores(task) for task in FAMILIES[family]}
    return Curve(run, scales, adaptation, {name: scores(name) for name in benchmarks})


def _over(own: Sequence[Record], metric: str, value: float, stderr: float) -> Record:
    dropped = ("chance", "truncated", "split")
    common = {name: v for name, v in own[0].items() if name not in dropped}
    splits = {r["split"] for r in own}
    reach = Z * stderr
    return common | {
        "split": splits.pop() if len(splits) == 1 else "mixed",
        "task": "mean",
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "low": value - reach,
        "high": value + reach,
        "n": sum(r["n"] for r in own),
        "over": ",".join(r["task"] for r in own),
    }


def _forgetting(
    results: Results, tasks: Mapping[str, Measured], base: Mapping[str, Measured]
) -> tuple[list[Record], list[str]]:
    """The base minus this model on the same items: every task, then the benchmarks' mean.

    Also the units that were not measured as the base's were, and are not compared.
    """
    records, compared, others = [], {}, []
    for task, (unit, record, request) in tasks.items():
        if task not in base or not _is_retained(record):
            continue
        if not _comparable(request, base[task].request):
            others.append(unit)
            continue
        metric = record["metric"]
        ours = results.items(unit).get(metric)
        if ours is None:
            continue
        theirs = _shared(results.items(base[task].unit)[metric], base[task].request, request)
        found = compare_checkpoints(theirs, ours)
        flips = {}
        if ours.items is not None:
            flips = {
                "forgotten": int((theirs.items > ours.items).sum()),
                "gained": int((theirs.items < ours.items).sum()),
            }
        if _is_benchmark(record):
            compared[task] = found
            flips["at_chance"] = at_chance(base[task].record)
        records.append({**_without_figures(record), "of": metric, **_figures(found), **flips})
    if set(compared) == set(_benchmarks(base)) and compared:
        own = [tasks[task].record for task in compared]
        records.append(_mean_forgetting(own, list(compared.values())))
    return records, others


def _comparable(request: Mapping[str, Any], base: Mapping[str, Any]) -> bool:
    """Whether a unit was measured as the base's was, at most on its first items.

    A limit takes the first items and changes the digest of the requests, so with another limit the
    rows themselves cannot be told apart; definition, examples and precision still can.
    """
    limit, most = request["limit"], base["limit"]
    if limit == most:
        return request == base
    return (limit < most if most else limit > 0) and _without_rows(request) == _without_rows(base)


def _without_rows(request: Mapping[str, Any]) -> dict[str, Any]:
    benchmarks = {
        name: {k: v for k, v in identity.items() if k not in ("requests", "items")}
        for name, identity in request.get("benchmark", {}).items()
    }
    return {**request, "limit": 0, "benchmark": benchmarks}


def _shared(scores: Scores, base: Mapping[str, Any], request: Mapping[str, Any]) -> Scores:
    """The base's items that a smaller limit leaves: the first of each task of a benchmark."""
    if request["limit"] == base["limit"]:
        return scores
    kept: list[int] = []
    start = 0
    for name, identity in base["benchmark"].items():
        kept += range(start, start + request["benchmark"][name]["items"])
        start += identity["items"]
    return Scores(scores.name, scores.statistics[kept], scores.aggregate)


def _without_figures(record: Record) -> Record:
    dropped = ("metric", "value", "stderr", "low", "high", "n", "truncated", "chance")
    return {name: v for name, v in record.items() if name not in dropped}


def _figures(found: Comparison) -> Record:
    figures = asdict(found)
    figures["value"] = figures.pop("difference")
    return {"metric": "forgetting", **figures}


def _mean_forgetting(own: Sequence[Record], found: Sequence[Comparison]) -> Record:
    from scipy.stats import norm

    value = float(np.mean([c.difference for c in found]))
    stderr = math.sqrt(sum(c.stderr**2 for c in found)) / len(found)
    p_value = float(2 * norm.sf(abs(value) / stderr)) if stderr else float(value == 0)
    return _over(own, "forgetting", value, stderr) | {
        "test": "paired, normal, benchmarks' variances added",
        "p_value": p_value,
        "detectable": detectable_over_items(stderr) or math.nan,
    }
