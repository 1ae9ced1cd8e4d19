"""Results as data frames: records with their arms, last checkpoints, means over seeds.

    records = load_records(Path("performance_analysis/demo/adaptation.json"))
    print(score_table(records))

Every mean and interval comes from `summarise`: with one seed the interval is over items, as in the
record; with three seeds and more it counts seeds and items (seed_intervals.py); two seeds have a
mean alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_FAMILIES, FAMILIES, SPLITS, UserError
from dataset_descriptions import DESCRIPTIONS, learn, ordered
from lora_tradeoffs.files import read_head, read_records
from lora_tradeoffs.records import DOCUMENT, OVERALL, Record, metric_scale, read_run, updated
from lora_tradeoffs.tables.arms import FULL, GRID, arms_of, shared_words
from lora_tradeoffs.tables.documents import (
    NUMBERS,
    OPTIONAL,
    TEXTS,
    contradiction,
    meta_problem,
    record_problem,
)

if TYPE_CHECKING:
    from pandas import DataFrame, Series

SCRIPTS = {
    "adaptation.json": "eval.py",
    "retention.json": "retention_eval.py",
    "drift.json": "svd_analysis.py",
    "gradients.json": "gradient_conflict.py",
}
# The columns of `run_table`, by where run.json has them.
RUN_COLUMNS = {
    "base.name": "base",
    "steps": "steps",
    **{
        f"config.{name}": name
        for name in ("method", "rank", "alpha", "learning_rate", "epochs", "batch_size", "seed")
    },
    **{f"environment.{name}": name for name in ("device_name", "precision")},
    "environment.git_commit": "commit",
    **{f"environment.versions.{name}": name for name in ("torch", "transformers")},
}
PART = 20_000  # records that are Python objects at a time


def load_records(path: Path, keep: Callable[[Record], bool] | None = None) -> DataFrame:
    """The records of a results document, one a row, with their arm; only those that `keep` accepts.

    `attrs["meta"]` and the column `preset` hold where they come from. Raises UserError if the file
    is missing or holds what no script of this suite writes.
    """
    import pandas as pd

    script = SCRIPTS.get(path.name, "eval.py")
    command = f"python {script} --study {path.parent.name}"
    if not path.is_file():
        folders = path.parent.parent.glob("*")
        others = sorted(folder.name for folder in folders if (folder / path.name).is_file())
        raise UserError(
            f"no {path}; make it with: {command}"
            f" (studies that have one: {', '.join(others) or 'none'})"
        )
    remedy = f"{command} writes it anew"
    meta = read_head(path, {"meta": DOCUMENT["meta"]}, remedy)["meta"]
    learn(meta.get("own", {}))
    numbered = enumerate(read_records(path, DOCUMENT["records"][0], remedy))
    rows = (row for row in numbered if keep is None or keep(row[1]))
    parts, problem = [], meta_problem(meta)
    while not problem and (part := dict(itertools.islice(rows, PART))):
        frame = pd.DataFrame(part.values(), index=part)
        problem = record_problem(part, frame)
        if not problem and "variant" not in frame:
            frame = pd.DataFrame(map(updated, part.values()), index=part)
        parts.append(frame)
    if not problem:
        empty = pd.DataFrame(columns=[*TEXTS, *NUMBERS, "tasks", "variant"])
        frame = _joined(parts or [empty])
        problem = contradiction(frame)
    if problem:
        raise UserError(f"{path}: {problem}; edited by hand? {command} writes it anew")
    frame = _in_every_family(frame).reset_index(drop=True)
    for name, default in OPTIONAL.items():
        frame[name] = frame[name].fillna(default) if name in frame else default
    for name in (*NUMBERS, "low", "high", "stderr"):
        frame[name] = pd.to_numeric(frame[name])
    frame["arm"] = arms_of(frame)
    frame["preset"] = meta["preset"]
    frame.attrs["meta"] = meta
    return frame


def _joined(parts: list[DataFrame]) -> DataFrame:
    """The parts below each other, which are emptied: column by column takes half the memory.

    A column that is empty in some parts keeps the type that it has in the others.
    """
    import pandas as pd

    numbers, columns = [number for part in parts for number in part.index], {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part.pop(name) for part in parts if name in part]
        filled = [column for column in values if column.notna().any()] or values
        columns[name] = pd.concat(filled).reindex(numbers)
    return pd.DataFrame(columns, index=numbers)


def _in_every_family(frame: DataFrame) -> DataFrame:
    """The frame, base and baselines having a task in each family of the runs that has it."""
    import pandas as pd

    families = [f for f in FAMILIES if f in set(frame["family"][is_trained(frame)])]
    if {*families} <= {*BUILT_IN_FAMILIES}:
        return frame
    of_task = {task: [f for f in families if task in FAMILIES[f]] for task in DESCRIPTIONS}
    known = [task for task, having in of_task.items() if having]
    is_shared = ~is_trained(frame) & frame["task"].isin(known)
    shared = frame[is_shared]
    copies = shared.assign(family=shared["task"].map(of_task)).explode("family")
    return pd.concat([frame[~is_shared], copies]).astype({"family": frame["family"].dtype})


def is_demo(frame: DataFrame) -> bool:
    """Whether the records are the demo's, which every figure must say."""
    meta = frame.attrs.get("meta", {})
    return meta.get("preset") == "demo" or bool((frame.get("preset") == "demo").any())


def in_order(table: DataFrame, *columns: str) -> DataFrame:
    """The table sorted by the columns: families and tasks in the suite's order, arms as in legends.

    What is equal in all of them stays as it was.
    """

    def sort_key(values: Series) -> Series:
        if values.name not in ("family", "task"):
            return values
        names = [*FAMILIES, *sorted(set(values))] if values.name == "family" else ordered(values)
        return values.map(names.index)

    return table.sort_values([*columns], key=sort_key, kind="stable", ignore_index=True)


def scores(frame: DataFrame) -> DataFrame:
    """Rows of the primary metric of each task (its description's first), on validation and test."""
    first = {task: description.metrics[0] for task, description in DESCRIPTIONS.items()}
    frame = frame[frame["split"].isin(SPLITS)]
    return frame[frame["metric"] == frame["task"].map(first)].dropna(subset=["value"])


def with_families(rows: DataFrame) -> DataFrame:
    """The rows, titled "family: task" where runs of several families that have a task are."""
    import numpy as np

    is_own = [task in FAMILIES.get(f, ()) for f, task in zip(rows["family"], rows["task"])]
    own = rows[np.array(is_own, dtype=bool)]  # of no row a list would choose columns
    counts = own[is_trained(own)].groupby("task")["family"].nunique()
    shared = own[own["task"].isin(counts.index[counts > 1])]
    titles = shared["family"] + ": " + shared["task"]
    return rows.assign(task=titles.reindex(rows.index).fillna(rows["task"]))


def is_trained(frame: DataFrame) -> Any:
    """A mask: the rows of runs, not of the base or a baseline."""
    return ~frame["method"].isin(["base", "baseline"])


def last_checkpoints(frame: DataFrame) -> DataFrame:
    """Rows of every run's last checkpoint, without runs that have not ended; base and baselines."""
    last = frame["step"] == frame.groupby("run")["step"].transform("max")
    ended = ~(frame["fraction"] < 0.999)  # an outside checkpoint has no fraction
    return frame[~is_trained(frame) | (last & ended)]


def update_sizes(drift: DataFrame) -> DataFrame:
    """Rows of the norms of the runs' last updates over those of the base's matrices, one a run: of
    q_proj and v_proj together, else (where they were not both trained) of all targets."""
    rows = drift[(drift["metric"] == "relative_frobenius") & (drift["layer"] == OVERALL)]
    rows = last_checkpoints(rows[rows["module"].isin(["both", "all"])])
    return rows.sort_values("module", ascending=False, kind="stable").drop_duplicates("run")


def unfinished(frame: DataFrame, prefix: str = "Left out") -> str:
    """A sentence for captions: the runs that `last_checkpoints` leaves out."""
    runs = set(frame[is_trained(frame)]["run"]) - set(last_checkpoints(frame)["run"])
    return f" {prefix}, not measured at its end: {', '.join(sorted(runs))}." if runs else ""


def summarise(frame: DataFrame, by: tuple[str, ...] = ()) -> DataFrame:
    """Mean, standard error, interval and number of seeds for each task, arm and `by`.

    Columns value, stderr, low, high (nan where there is none), seeds and `over`, what the interval
    counts, in the order of legends. A record holds its seed's error over items, not what all seeds
    share of it: so the interval over seeds and items errs to the wide side (seed_intervals.py).
    """
    import pandas as pd

    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS
    from lora_tradeoffs.statistics.seed_intervals import (
        BOTH,
        ITEMS,
        NOTHING,
        SEEDS,
        estimate_over_seeds,
    )

    keys, rows = ["task", "arm", *by], []
    for key, group in frame.groupby(keys):
        values = group["value"].to_numpy()
        seeds, mean = len(values), values.mean()
        stderr = low = high = math.nan
        over = NOTHING
        if seeds == 1:
            stderr, low, high = group[["stderr", "low", "high"]].iloc[0]
            over = ITEMS
        elif seeds >= MIN_SEEDS:
            item_variance = (group["stderr"] ** 2).mean()  # nan if no record has one
            over = BOTH if item_variance > 0 else SEEDS
            estimate = estimate_over_seeds(values, item_variance if over == BOTH else 0.0)
            stderr, low, high = estimate.stderr, estimate.low, estimate.high
        rows.append((*key, mean, stderr, low, high, seeds, over))
    columns = [*keys, "value", "stderr", "low", "high", "seeds", "over"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(keys)


def score_table(frame: DataFrame) -> DataFrame:
    """Arms by tasks: value ± standard error at the last checkpoint, on test if it was read.

    A cell of the validation split is marked "val"; the error is over items for one seed (the mean
    over three and more carries its error over seeds and items, and the seeds' number).
    """
    import pandas as pd

    cells: dict[Any, dict[str, str]] = {}
    rows = last_checkpoints(scores(frame))
    table = summarise(with_families(rows[rows["prompt"] == 0]), by=("split",))
    for row in table.sort_values("split").itertuples():  # test before validation
        task = row.task.rpartition(" ")[2]
        digits = 1 if metric_scale(DESCRIPTIONS[task].metrics[0]) == 100 else 3
        text = f"{row.value:.{digits}f}"
        text += "" if math.isnan(row.stderr) else f" ± {row.stderr:.{digits}f}"
        text += f" ({row.seeds} seeds)" if row.seeds > 1 else ""
        text += " val" if row.split != "test" else ""
        cells.setdefault(row.arm, {}).setdefault(row.task, text)
    arms = sorted(cells)
    return pd.DataFrame(cells, index=ordered(table["task"]), columns=arms).T.fillna("")


def run_table(runs_dir: Path) -> DataFrame:
    """What the study's run.json files say, a run a row; empty if there are none."""
    import pandas as pd

    folders = sorted(path.parent for path in runs_dir.glob("*/run.json"))
    records = {folder.name: read_run(folder) for folder in folders}
    table = pd.json_normalize([*records.values()]).set_axis([*records])
    return table.reindex(columns=[*RUN_COLUMNS]).rename(columns=RUN_COLUMNS)


def gaps(frame: DataFrame, tested: bool = True) -> list[str]:
    """What the study's grid lacks in the records, a sentence each; `tested`: also test scores.

    Of an arm at several learning rates the one with the most seeds counts.
    """
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    frame = frame.drop_duplicates(["run", "step", "split", "family", "arm"])
    sentences, runs = [], frame[is_trained(frame)]
    words = shared_words([frame])
    for family in (f for f in FAMILIES if f in BUILT_IN_FAMILIES or f in set(runs["family"])):
        ended = last_checkpoints(runs[runs["family"] == family])
        if ended.empty:
            sentences.append(f"{family}: no run that is measured at its end")
            continue
        plain = ended["arm"].map(lambda arm: arm.without_rate.without(words))
        missing = [arm for arm in (*GRID, FULL) if arm not in set(plain)]
        if missing:
            sentences.append(f"{family}: no {', '.join(map(str, missing))}")
        at_rates = ended.assign(plain=plain).groupby(["plain", "arm"])["seed"].nunique()
        seeds = at_rates.groupby("plain").max()
        few = sorted(seeds[seeds < MIN_SEEDS].index)
        if few:
            sentences.append(
                f"{family}: fewer than {MIN_SEEDS} seeds, so nothing about methods can be claimed:"
                f" {', '.join(map(str, few))}"
            )
        untested = set(plain) - set(plain[ended["split"] == "test"])
        if tested and untested:
            sentences.append(f"{family}: no test score of {', '.join(map(str, sorted(untested)))}")
    left = set(runs["run"]) - set(last_checkpoints(runs)["run"])
    return sentences + [f"not measured at its end: {run}" for run in sorted(left)]
