"""Transfer: what training on a family's tasks together gives a task, or takes from it.

    transfer_table(load_records(path), item_reader(Results(path.parent), adaptation_unit))

Transfer is the score of the multi-task run minus that of its single-task control (a run such as
sst2_lora_r8_seed42) on the same items, at their last checkpoints. A control is the same arm in all
its fields (method, rank, scaling, target modules, learning rate, whatever else its name says beside
the steps), has the same seed, and has seen as many rows of the task: with more of them it would
show what more data gives, not what the other tasks take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.statistics.comparisons import LEVEL, holm
from lora_tradeoffs.statistics.contrasts import WeightedScores, by_seed, contrast
from lora_tradeoffs.tables.frames import in_order, is_trained, last_checkpoints, scores

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_tradeoffs.statistics.contrasts import Items

ARM_FIELDS = ("method", "rank", "scaling", "target_modules", "learning_rate", "variant")
STEPS = r"(?:^|_)steps\d+"  # what a variant says of --max-steps
COLUMNS = (
    *("family", "arm", "task", "metric", "split", "value", "stderr", "low", "high"),
    *("p_value", "corrected", "detectable", "seeds", "over", "test"),
)


def transfer_table(adaptation: DataFrame, items: Items | None = None) -> DataFrame:
    """A row for each family, arm and task that has a control; empty if there is none.

    `items` reads eval.py's per-item outcomes (results.item_reader), which pair the two runs.
    The interval is: of three seeds and more, over seeds and the items that they share
    (seed_intervals.py), without `items` over seeds alone; of one seed, the paired interval over
    items, which is about these two runs; of two seeds there is none. `over` says which. Test is
    read where both have it, else validation. `corrected` is Holm's over the table; `detectable`
    holds for the first, strictest step of it.
    """
    import pandas as pd

    pairs, rows = list(_pairs(adaptation)), []
    level = 1 - (1 - LEVEL) / max(len(pairs), 1)
    for keys, multi, single in pairs:
        c, seeds, over, _ = contrast(
            [[WeightedScores(1, multi), WeightedScores(-1, single)]], items, level
        )
        figures = (c.difference, c.stderr, c.low, c.high, c.p_value, math.nan, c.detectable)
        rows.append((*keys, *figures, len(seeds), over, c.test))
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    table["corrected"] = holm(table["p_value"])
    return in_order(table, "family", "task", "arm")


def _pairs(adaptation: DataFrame) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Family, arm, task, metric and split, with the rows by seed of both sides."""
    rows = scores(adaptation)
    rows = rows[is_trained(rows) & (rows["shots"] == 0) & (rows["prompt"] == 0)]
    rows = last_checkpoints(rows)
    for name in ARM_FIELDS:  # two empty fields are the same field
        rows[name] = rows[name].astype(str) if name in rows else ""
    rows["alike"] = rows["variant"].str.replace(STEPS, "", regex=True)
    # a run on the only task of its family is not its own control
    together = rows[(rows["tasks"] == rows["family"]) & (rows["tasks"] != rows["task"])]
    alone = rows[rows["tasks"] == rows["task"]]
    fields = ["family", "task", *ARM_FIELDS[:-1], "alike"]
    for _, multi in together.groupby([*fields, "variant"], sort=False):
        first = multi.iloc[0]
        single = alone[(alone[fields] == first[fields]).all(axis=1)]
        for split in ("test", "validation"):
            parts = [part[part["split"] == split] for part in (multi, single)]
            parts[1] = _of_equal_data(*parts)
            if len(parts[1]):
                names = (first["family"], first["arm"], first["task"], first["metric"], split)
                yield names, by_seed(parts[0]), by_seed(parts[1])
                break


def _of_equal_data(multi: DataFrame, single: DataFrame) -> DataFrame:
    """Of each seed the control that has seen as many rows as the mixed run, if there is one.

    To within one of its batches, or 2 %. Records of earlier versions do not say how many: of those,
    controls with a number of steps of their own are left out.
    """
    if "rows_seen" not in single or single["rows_seen"].isna().any():
        equal = single[~single["variant"].str.contains(STEPS) & single["seed"].isin(multi["seed"])]
        return equal[equal["variant"] == multi["variant"].iloc[0]] if len(multi) else equal
    seen = single["seed"].map(multi.set_index("seed")["rows_seen"])
    gap, batch = (single["rows_seen"] - seen).abs(), single["rows_seen"] / single["step"]
    close = gap[gap <= batch.clip(lower=0.02 * seen)].sort_values().index
    return single.loc[close].drop_duplicates("seed")
