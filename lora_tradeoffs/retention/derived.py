"""Records that compare units: forgetting, means, forgetting where both have learned as much."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

from config import FAMILIES
from lora_tradeoffs.records import AS_MEASURED, HELD_OUT, LOSS, MATCHED, primary
from lora_tradeoffs.retention.forgetting import (
    KEY,
    forgetting_records,
    is_base,
    mean_adaptation,
    mean_record,
    outcomes_of,
    shrink_effects,
    without_figures,
)
from lora_tradeoffs.retention.matched import Curve, matched_forgetting
from lora_tradeoffs.retention.scores import ANSWER_DRIFT, TEXT_DRIFT, Record

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.statistics.scores import Scores

# What tells records apart that compare a model with another one than the base.
COMPARED = ("metric", "run", "task", "other_run", "shrunk", "shrink", "against", "over")


def derived_records(results: Results) -> tuple[list[Record], list[str]]:
    """Forgetting of every task, means over benchmarks and over text, and matched forgetting.

    Benchmarks with different numbers of examples are different benchmarks: each number is compared
    with the base's and averaged apart. Where scaled updates match, those with the fewest count.
    Also the units that are not compared, since more than the weights differs from the base's.
    """
    import pandas as pd

    units = _primary_records(results)
    others = units[~units["is_benchmark"]].drop_duplicates([*KEY, "task"], keep="last")
    records = [record for _, model in others.groupby(KEY) for record in mean_adaptation(model)]
    more, uncompared = forgetting_records(results, others)
    records += more
    compared: dict[tuple, Record] = {}  # text and tasks are the same beside any benchmarks
    for shots in sorted({*units["shots"][units["is_benchmark"]]}) or [0]:
        benchmarks = units[units["is_benchmark"] & (units["shots"] == shots)]
        base = benchmarks[is_base(benchmarks)]
        for _, model in benchmarks.groupby(KEY):
            if set(model["task"]) == set(base["task"]):
                records += [
                    mean_record(model["record"][model["task"].isin(tasks)], "retention", outcome)
                    for outcome, tasks in outcomes_of(base).items()
                ]
        more, names = forgetting_records(results, benchmarks)
        every = pd.concat([benchmarks, others])
        records, uncompared = records + more, uncompared + names
        for record in _matched(results, every) + shrink_effects(results, every):
            compared.setdefault(tuple(map(record.get, COMPARED)), record)
    return [*records, *compared.values()], uncompared


def _primary_records(results: Results) -> DataFrame:
    """A row for every unit that has a score: its primary metric's record, and its request."""
    import pandas as pd

    fields, rows = [*KEY, "family", "task", "shots"], []
    for unit, document in results.units():
        scores = [
            record
            for record in document["records"]
            if "layer" not in record and record["metric"] not in (*TEXT_DRIFT, *ANSWER_DRIFT)
        ]
        if not scores:
            continue
        metric = primary([record["metric"] for record in scores])
        record = next(record for record in scores if record["metric"] == metric)
        request = {k: v for k, v in document["request"].items() if k != "weights"}
        # what cannot be guessed (text, perplexity tasks) has another scale: not in the mean
        is_benchmark = record.get("chance") is not None
        rows.append([*map((AS_MEASURED | record).get, fields), unit, record, request, is_benchmark])
    columns = [*fields, "unit", "record", "request", "is_benchmark"]
    return pd.DataFrame(rows, columns=columns).astype({"is_benchmark": bool})


# ------------------------------------------------------------------------ matched forgetting


def _matched(results: Results, units: DataFrame) -> list[Record]:
    """Forgetting of two runs of a family and seed where they have the same score, or loss, on
    validation, from scaled updates.

    The interval is over items: it is about these runs.
    """
    records = []
    units = units[units["shrunk"] == ""]
    base = units[is_base(units)]
    scaled = units[(units["update_scale"] != 1) & units["family"].isin(FAMILIES)]
    for family, of_family in scaled.groupby("family"):
        runs = []
        for run, points in of_family.groupby("run", sort=False):
            model = units[(units["run"] == run) & (units["step"] == points["step"].max())]
            if curves := _curves(results, base, model, family):
                runs.append((model[model["update_scale"] == 1].iloc[0]["record"], curves))
        for (record, one), (other_record, other) in combinations(runs, 2):
            if record["seed"] != other_record["seed"]:
                continue  # runs of one seed saw the same batches
            for equal, outcome in (key for key in one if key in other):
                m = matched_forgetting(one[equal, outcome], other[equal, outcome])
                is_text = outcome == HELD_OUT
                level = m.score if equal == "score" else -m.score
                records.append(
                    {
                        **without_figures(record),
                        **{"task": outcome, "split": "mixed", "metric": MATCHED[equal]},
                        **{"of": "log_likelihood" if is_text else None},
                        **{"shots": 0 if is_text else record["shots"]},
                        **{"other_run": other[equal, outcome].arm},
                        **{"value": m.difference, "stderr": m.stderr, "low": m.low, "high": m.high},
                        **{equal: level, "defined": m.defined, "reason": m.reason},
                        **{"scale": m.scales[0], "other_scale": m.scales[1]},
                    }
                )
    return records


def _curves(
    results: Results, base: DataFrame, model: DataFrame, family: str
) -> dict[tuple[str, str], Curve]:
    """A checkpoint's curves from the base through its scaled updates, by what is made equal (see
    MATCHED) and outcome.

    A scale counts where all parts were measured as the base's were, such as on the same items.
    """
    base = base.drop_duplicates("task", keep="last")
    requests = base.set_index("task")["request"].to_dict()
    scores: dict[float, dict[str, Scores]] = {}
    losses: dict[float, dict[str, Scores]] = {}
    for t, units in ((0.0, base), *model.groupby("update_scale")):
        scores[t], losses[t] = {}, {}
        for unit in units.itertuples():
            if unit.request != requests.get(unit.task):
                continue
            items, metric = results.items(unit.unit), unit.record["metric"]
            if metric in items and metric != LOSS:
                scores[t][unit.task] = items[metric]
            if LOSS in items:  # a curve rises to what is made equal
                of_items = items[LOSS].statistics * [-1, 1]
                losses[t][unit.task] = replace(items[LOSS], statistics=of_items)
    run, trained = model.iloc[0]["run"], model.iloc[0]["record"].get("tasks", "")
    curves = {}
    for outcome, tasks in outcomes_of(base, trained).items():
        for equal, learned in (("score", scores), ("loss", losses)):
            scales = [
                t
                for t in sorted(scores)
                if {*FAMILIES[family]} <= {*learned[t]} and {*tasks} <= {*scores[t]}
            ]
            if len(scales) > 2 and {0.0, 1.0} <= {*scales}:
                adaptation = {task: [learned[t][task] for t in scales] for task in FAMILIES[family]}
                retention = {task: [scores[t][task] for t in scales] for task in tasks}
                curves[equal, outcome] = Curve(run, scales, adaptation, retention)
    return curves
