"""Records of one model's retention: scores of benchmarks and texts, and drift, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_tradeoffs.records import primary
from lora_tradeoffs.statistics.comparisons import estimate
from lora_tradeoffs.statistics.scores import Scores, mean

if TYPE_CHECKING:
    from lora_tradeoffs.retention.benchmarks import BenchmarkResult
    from lora_tradeoffs.retention.representation import Drift

Record = dict[str, Any]

# KL(base || tuned) in nats, and the share of positions with the same most likely token, each a mean
# over the tokens of all passages: of held-out text all but the first, of a task those of the answer
# (with its EOS). Records "kl" of a task, of an earlier definition, had the answer's first token.
TEXT_DRIFT, ANSWER_DRIFT = ("kl", "agreement"), ("answer_kl", "answer_agreement")


def item_scores(items: Mapping[str, np.ndarray]) -> list[Scores]:
    """Per-item values by metric as `Scores`; log-likelihoods over their `tokens`."""
    values = dict(items)
    counts = values.pop("tokens", None)
    if counts is None:
        return [Scores(m, np.stack([v, np.ones(len(v))], 1), mean) for m, v in values.items()]
    return [Scores("log_likelihood", np.stack([values["log_likelihood"], counts], 1), mean)]


def figures(scores: Scores, groups: np.ndarray | None = None) -> Record:
    """Value, standard error, interval and number of items of a metric."""
    return asdict(estimate(scores, groups=groups))


def benchmark_records(common: Record, result: BenchmarkResult) -> list[Record]:
    """A benchmark's metrics as lm-eval gives them, with intervals over its items."""
    scores = {s.name: s for s in item_scores(result.items)}
    # a score of the corpus alone (mcc) can be neither paired nor compared with chance by item
    chance = result.chance if primary(result.metrics) in scores else math.nan
    records = []
    for metric, value in result.metrics.items():
        interval = estimate(scores[metric]) if metric in scores else None
        records.append(
            {
                **common,
                "task": result.task,
                "metric": metric,
                "value": value,
                "stderr": result.stderrs.get(metric, math.nan),
                "low": interval.low if interval else math.nan,
                "high": interval.high if interval else math.nan,
                "n": result.n,
                "chance": chance,
                "truncated": result.truncated,
            }
        )
    if "log_likelihood" in scores and "log_likelihood" not in result.metrics:  # perplexity tasks
        likelihood = figures(scores["log_likelihood"]) | {"n": result.n}
        records.append({**records[0], "metric": "log_likelihood", **likelihood})
    return records


def at_chance(record: Record) -> bool:
    """Whether a model's score is no more than two standard errors above guessing's.

    A base that guesses, or is misled, has nothing that a benchmark could show it to forget; nor
    does a single item, which has no standard error.
    """
    if record["stderr"] is None:
        return True
    return bool(record["value"] - record["chance"] <= 2 * record["stderr"])


def drift_records(common: Record, drift: Drift, of_text: bool) -> list[Record]:
    """KL and agreement with intervals over passages; `of_text` also has every layer's CKA."""
    records = []
    metrics = TEXT_DRIFT if of_text else ANSWER_DRIFT
    for metric, sums in zip(metrics, (drift.kl, drift.agreed)):
        found = figures(Scores(metric, np.stack([sums, drift.tokens], 1), mean))
        if metric.endswith("kl") and not sums.any():  # the interval of a share is none of nats
            found |= {"low": math.nan, "high": math.nan}
        records.append({**common, "metric": metric, **found})
    if of_text:
        common = common | {"metric": "cka", "n": len(drift.terms)}
        records += [
            {**common, "value": float(value), "layer": layer, "of": name}
            for layer, (name, value) in enumerate(zip(drift.layers, drift.cka))
        ]
    return records
