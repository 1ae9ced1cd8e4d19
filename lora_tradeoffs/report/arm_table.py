"""The study in one table: what each arm scores, forgets, moves and costs."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from config import FAMILIES
from lora_tradeoffs.figures.drift import percent
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.tables.arms import arms_by_run
from lora_tradeoffs.tables.costs import cost_table
from lora_tradeoffs.tables.frames import (
    in_order,
    is_trained,
    last_checkpoints,
    summarise,
    update_sizes,
)
from lora_tradeoffs.tables.retention import TEXT, family_means, mean_forgetting

if TYPE_CHECKING:
    from pandas import DataFrame

FORMATS = {
    "score": ".3f",
    "ROUGE-Lsum": ".3f",
    "forgetting": "+.3f",
    "text lost (nats/token)": "+.3f",
    "drift (%)": ".2f",
    "minutes": ".1f",
    "trained (%)": ".2f",
}
COSTS = ("minutes", "trained (%)")  # shown without an error
FIELDS = ["family", "arm", "seed", "value", "stderr", "low", "high"]


def arm_table(study: StudyRecords) -> DataFrame:
    """A row for each arm of a family at its last checkpoint, the base first; "" where unknown.

    `score` is the mean over the family's tasks of the primary metric (BLEU in hundredths), on test
    for tasks that runs were tested on, else on validation, `ROUGE-Lsum` that of CNN/DailyMail;
    `forgetting` the mean over the benchmarks of base minus tuned, `text lost` that over held-out
    text of the log-likelihood a token; `drift` the norm of the update over that of the base's
    q_proj and v_proj; `minutes` and `trained` the time and the share of the parameters that were
    trained. ± is the standard error, over items for one seed, over seeds and items from three on. A
    cell says its number of seeds where it is of fewer than the row's.
    """
    import pandas as pd

    parts = [rows.assign(task=name) for name, rows in _costs(study).items()]
    for name, frame, measure in (
        ("score", study.adaptation, _scores),
        ("ROUGE-Lsum", study.adaptation, _rouge_lsum),
        ("forgetting", study.retention, mean_forgetting),
        ("text lost (nats/token)", study.retention, partial(mean_forgetting, outcome=TEXT)),
        ("drift (%)", study.drift, lambda drift: percent(update_sizes(drift))),
    ):
        if frame is not None:
            parts.append(measure(frame)[FIELDS].assign(task=name))
    if not any(map(len, parts)):
        return pd.DataFrame(columns=["family", "arm"])
    rows = pd.concat(parts)
    rows = rows[rows["family"].isin(FAMILIES) & rows["arm"].map(lambda arm: not arm.tasks)]
    table = summarise(rows, by=("family",))
    keys = ["family", "arm"]
    table["most"] = table.groupby(keys)["seeds"].transform("max")
    values = table[["task", "value", "stderr", "seeds", "most"]].itertuples(index=False)
    table["cell"] = [_cell(*value) for value in values]
    cells = table.pivot(index=keys, columns="task", values="cell")
    cells = cells.reindex(columns=[name for name in FORMATS if name in cells]).fillna("")
    cells.insert(0, "seeds", table.groupby(keys)["most"].max())
    cells = cells.rename_axis(columns=None).reset_index()
    is_trained_arm = cells["arm"].map(lambda arm: arm.is_trained)
    cells = in_order(cells.assign(trained=is_trained_arm), "family", "trained", "arm")
    return cells.drop(columns="trained")


def _scores(adaptation: DataFrame) -> DataFrame:
    """Each run's mean over its family's tasks, and the base's."""
    rows = _on_test(adaptation)
    means = family_means(rows.assign(split="validation"))
    arms = rows[(rows["shots"] == 0) & (rows["prompt"] == 0)].drop_duplicates("run")
    return means.merge(arms[["run", "arm", "seed"]], on="run")


def _rouge_lsum(adaptation: DataFrame) -> DataFrame:
    rows = _on_test(adaptation)
    rows = rows[(rows["metric"] == "rougeLsum") & (rows["shots"] == 0) & (rows["prompt"] == 0)]
    return rows[rows["method"] != "baseline"]


def _on_test(adaptation: DataFrame) -> DataFrame:
    """Last checkpoints' rows, on test of tasks that runs were tested on, else on validation."""
    rows = last_checkpoints(adaptation)
    rows = rows[rows["split"].isin(["validation", "test"])]
    is_test = rows["split"] == "test"
    return rows[is_test == rows["task"].isin(rows["task"][is_test & is_trained(rows)])]


def _costs(study: StudyRecords) -> dict[str, DataFrame]:
    """Minutes of training and share of trained parameters, the arms named as in the records; not of
    runs at a learning rate that a search did not choose."""
    costs = cost_table(study.settings.runs_dir)
    names = arms_by_run(study.adaptation, study.retention, study.drift)
    left_out = arms_by_run(*study.at_all_rates.values()).keys() - names.keys()
    costs = costs[~costs["run"].isin(left_out)]
    costs = costs.assign(arm=[names.get(run, arm) for run, arm in zip(costs["run"], costs["arm"])])
    missing = dict.fromkeys(("stderr", "low", "high"), math.nan)
    numbers = dict(zip(COSTS, (costs["seconds"] / 60, 100 * costs["trainable_share"])))
    return {
        name: costs.assign(value=values.astype(float), **missing)[FIELDS].dropna(subset="value")
        for name, values in numbers.items()
    }


def _cell(measure: str, value: float, error: float, seeds: int, most: int) -> str:
    text = format(value, FORMATS[measure])
    if not math.isnan(error) and measure not in COSTS:
        text += f" ± {error:{FORMATS[measure].removeprefix('+')}}"
    return text + (f" ({seeds} of {most} seeds)" if seeds < most else "")
