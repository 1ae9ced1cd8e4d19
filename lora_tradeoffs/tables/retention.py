"""What the figures of retention show, as tables: retained scores, and the points of the plane.

The plane's points pair what a checkpoint has gained on its tasks with what it has forgotten. The
gain comes from retention.json where it holds a validation score, else from adaptation.json.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config import BENCHMARKS, FAMILIES
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.records import HELD_OUT as TEXT
from lora_tradeoffs.records import INTRUDERS, MATCHED, MEAN, PRIMARY, metric_scale, primary
from lora_tradeoffs.statistics.comparisons import NORMAL
from lora_tradeoffs.tables.arms import FULL
from lora_tradeoffs.tables.frames import (
    gaps,
    is_trained,
    last_checkpoints,
    ordered,
    scores,
    summarise,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from pandas import DataFrame

NO_FAMILY = "all runs"
POINT = ["run", "family", "step", "update_scale"]
ESTIMATE = ["value", "stderr", "low", "high"]


def as_trained(frame: DataFrame) -> DataFrame:
    """The rows of checkpoints as they are, their updates not scaled."""
    return frame[frame["update_scale"] == 1].dropna(subset=["value"])


def retained(frame: DataFrame) -> DataFrame:
    """Rows of each benchmark's primary metric, of the benchmarks' means, and of the log-likelihood
    of held-out text and of perplexity tasks.
    """
    rows = as_trained(frame)
    is_score = rows["metric"].isin(PRIMARY)
    if "chance" in rows:
        is_score |= rows["chance"].notna()
    metrics = rows[is_score].groupby("task")["metric"].agg(primary)
    return rows[(rows["metric"] == rows["task"].map(metrics)) | (rows["metric"] == "retention")]


def forgotten(frame: DataFrame) -> DataFrame:
    """Rows of what was forgotten, base minus tuned, at the runs' last checkpoints."""
    rows = as_trained(frame)
    return last_checkpoints(rows[(rows["metric"] == "forgetting") & is_trained(rows)])


def mean_forgetting(frame: DataFrame, family: str | None = None, outcome: str = MEAN) -> DataFrame:
    """Rows of an outcome's mean of what was forgotten (MEAN: over the benchmarks, ABOVE_CHANCE,
    TEXT: on held-out text), with the fewest in-context examples of their family."""
    rows = forgotten(frame)
    rows = rows[(rows["task"] == outcome) & (family is None or rows["family"] == family)]
    return rows[rows["shots"] == rows.groupby("family")["shots"].transform("min")]


def at_chance(frame: DataFrame) -> list[str]:
    """Benchmarks on which the base guesses, so that forgetting cannot be measured."""
    if "at_chance" not in frame:
        return []
    return task_order(frame[frame["at_chance"].eq(True)]["task"])


def examples_sentence(rows: DataFrame) -> str:
    """Which benchmarks of the rows were asked with examples in the prompt, for captions."""
    fewest = rows.groupby("task")["shots"].min()
    parts = [f"{task} {n:.0f}" for task, n in fewest.items() if n and not task.startswith(MEAN)]
    return f" In-context examples: {', '.join(parts)}." if parts else ""


def task_order(tasks: Any) -> list[str]:
    """Benchmarks, their means, held-out text, the trained tasks."""
    names = [*BENCHMARKS, *ordered(set(tasks) & set(DESCRIPTIONS))]

    def sort_key(task: str) -> tuple[bool, bool, bool, int, str]:
        kinds = task in DESCRIPTIONS, task.startswith(TEXT), task.startswith(MEAN)
        return *kinds, names.index(task) if task in names else len(names), task

    return sorted(set(tasks), key=sort_key)


def in_panels(rows: DataFrame, labels: Mapping[str, str]) -> DataFrame:
    """Rows in the order of panels: `task` is the title of theirs, "family: task", and `label` that
    of the y axis.

    The base, and runs from elsewhere, are in the panels of every family.
    """
    import pandas as pd

    rows = rows[is_trained(rows) | ~rows.duplicated(["task", "run", "metric", "shots"])]
    rows = rows.sort_values("task", key=lambda s: s.map(task_order(s).index), kind="stable")
    family = rows["family"].where(rows["family"].isin(list(FAMILIES)) & is_trained(rows))
    families = [name for name in FAMILIES if (family == name).any()] or [NO_FAMILY]
    parts = [rows[family.isna() | (family == name)].assign(family=name) for name in families]
    rows = pd.concat(parts, ignore_index=True)
    in_nats = rows["task"].str.startswith(f"{TEXT}_")
    if "of" in rows:
        in_nats |= rows["of"] == "log_likelihood"
    unit = (in_nats & rows["metric"].str.endswith("forgetting")).map(
        {True: " (nats/token)", False: ""}
    )
    label = rows["metric"].map(lambda metric: labels.get(metric, metric)) + unit
    return rows.assign(task=rows["family"] + ": " + rows["task"], label=label)


def plane_points(retention: DataFrame, adaptation: DataFrame | None = None) -> DataFrame:
    """A row a measured point of a run: `gain` with its interval, and the forgetting as `value`.

    `task` is the family. The gain's interval is that of the validation score: the base's own error
    is common to all arms, and is left out. Single-task controls are left out beside runs of the
    whole family, since they were taught a part of what the mean is over.
    """
    forgetting = retention[(retention["metric"] == "forgetting") & (retention["task"] == MEAN)]
    forgetting = forgetting[is_trained(forgetting)].dropna(subset=["value"])
    gain = gains(retention, adaptation)
    names = {name: f"gain_{name}" for name in (*ESTIMATE, "n")} | {"value": "gain"}
    points = forgetting.drop(columns="family").merge(
        gain.rename(columns=names), on=[n for n in POINT if n != "family"]
    )
    control = _is_control(points)
    whole = points["family"].isin(points[~control]["family"])
    points = points[points["family"].isin(FAMILIES) & ~(control & whole)]
    at = points["fraction"].round(4).fillna(1.0)
    return points.assign(task=points["family"], fraction=at)


def gains(retention: DataFrame | None, adaptation: DataFrame | None) -> DataFrame:
    """Validation score minus the base's, by run, family, step and scale of the update.

    From either stage's records, retention's first.
    """
    import pandas as pd

    sources = [] if retention is None else [retention[retention["metric"] == "adaptation"]]
    if adaptation is not None:
        sources.append(family_means(adaptation))
    columns, parts = [*POINT, *ESTIMATE, "n"], []
    for levels in sources:
        base = levels[levels["method"] == "base"].drop_duplicates("family")
        start = levels["family"].map(dict(zip(base["family"], base["value"]))).astype(float)
        half = NORMAL * levels["stderr"]
        low = levels["low"].fillna(levels["value"] - half)
        high = levels["high"].fillna(levels["value"] + half)
        gain = levels.assign(value=levels["value"] - start, low=low - start, high=high - start)
        parts.append(gain[is_trained(gain)][columns].dropna(subset=["value"]))
    return pd.concat(parts or [pd.DataFrame(columns=columns)]).drop_duplicates(POINT)


def plane_table(points: DataFrame) -> DataFrame:
    """Means over seeds of gain and forgetting, for each family, arm, fraction and scale."""
    by = ("fraction", "update_scale")
    gains = points.drop(columns=[*ESTIMATE]).rename(columns={"gain": "value"})
    gains = gains.rename(columns={f"gain_{name}": name for name in ESTIMATE[1:]})
    gain, forgetting = summarise(gains, by=by), summarise(points, by=by)
    keys = ["task", "arm", *by]
    return forgetting.merge(gain[[*keys, *ESTIMATE]], on=keys, suffixes=("", "_gain"))


def pareto_front(gain: Sequence[float], forgetting: Sequence[float]) -> np.ndarray:
    """Indices of the points that no other beats (more gain and no more forgetting, or as much
    gain and less forgetting), by rising gain; of equal points one.
    """
    import numpy as np

    front, best = [], np.inf
    for i in np.lexsort((forgetting, -np.asarray(gain, dtype=float))):
        if forgetting[i] < best:
            front.append(i)
            best = forgetting[i]
    return np.array(front[::-1], dtype=int)


def matched(frame: DataFrame) -> DataFrame:
    """The rows of `matched_pairs` in which the other arm is the family's reference: full
    fine-tuning, else the last arm of the legend."""
    rows = matched_pairs(frame)
    if rows.empty:
        return rows
    others = rows.groupby("family")["other"].unique()
    references = {f: FULL if FULL in arms else max(arms) for f, arms in others.items()}
    reference = rows["family"].map(references)
    return rows[(rows["other"] == reference) & (rows["arm"] != reference)]


def matched_pairs(frame: DataFrame, equal: str = "score") -> DataFrame:
    """Forgetting of every arm minus that of every `other` where both have the same validation
    score, or loss: over the benchmarks (task MEAN, ABOVE_CHANCE) and over held-out text (task
    TEXT); nan, with its `reason`, where their curves have nothing in common.

    Runs of different seeds are not compared (those of one seed saw the same batches), except for
    runs from elsewhere. Of several levels at which two runs were compared, the highest counts.
    """
    import pandas as pd

    rows = frame[frame["metric"] == MATCHED[equal]]
    if rows.empty:
        return rows
    known = frame.sort_values("shots", kind="stable").drop_duplicates("run").set_index("run")
    others = {"other": "arm", "other_seed": "seed", "other_tasks": "tasks"}
    rows = rows.assign(**{o: rows["other_run"].map(known[n]) for o, n in others.items()})
    rows = rows.dropna(subset=["other"])
    turned = rows.rename(columns=_both_ways("run", "arm", "seed", "tasks"))
    turned = turned.assign(value=-rows["value"], low=-rows["high"], high=-rows["low"])
    rows = pd.concat([rows, turned]).sort_values(equal, kind="stable")
    rows = rows.drop_duplicates(["family", "task", "run", "other_run"], keep="last")
    is_foreign = (rows["tasks"] == "") | (rows["other_tasks"] == "")
    return rows[(rows["seed"] == rows["other_seed"]) | is_foreign]


def no_common_level(rows: DataFrame, equal: str = "score") -> str:
    """Which seeds' curves have no level in common, among rows of `matched_pairs`; "" if all do.

    They are no random ones, so a mean over the other seeds is about those that happened to match.
    """
    apart = rows[rows["value"].isna()]
    reasons = "; ".join(f"seed {row.seed}: {row.reason}" for row in apart.itertuples())
    return reasons and f"the curves have no validation {equal} in common ({reasons})"


def shrink_effects(shrunk: DataFrame, *against: str) -> DataFrame:
    """Rows of what was lost by shrinking directions, of runs that have intruders."""
    counts = shrunk[shrunk["metric"] == INTRUDERS]
    have_intruders = set(counts[counts["directions"] > 0]["run"])
    rows = shrunk[(shrunk["metric"] == "shrink_effect") & shrunk["run"].isin(have_intruders)]
    return rows[rows["against"].isin(against)].dropna(subset=["value"])


def _both_ways(*names: str) -> dict[str, str]:
    """A renaming that swaps the columns of a run with those of the run it is compared with."""
    others = {name: "other" if name == "arm" else f"other_{name}" for name in names}
    return others | {other: name for name, other in others.items()}


def retention_gaps(retention: DataFrame, adaptation: DataFrame | None = None) -> list[str]:
    """What the records of retention lack, a sentence each."""
    rows = as_trained(retention)
    sentences = gaps(rows[rows["metric"] == "forgetting"], tested=False)
    if adaptation is not None:
        runs, measured = (set(f[is_trained(f)]["run"]) for f in (adaptation, rows))
        sentences += [
            f"adaptation is measured, retention is not: {run}" for run in sorted(runs - measured)
        ]
    points = plane_points(retention, adaptation)
    lacking = set(rows[is_trained(rows) & ~_is_control(rows)]["run"]) - set(points["run"])
    sentences += [f"retention is measured, no validation score: {run}" for run in sorted(lacking)]
    if retention[retention["update_scale"] != 1].empty:
        sentences.append("no scaled updates, so no forgetting at equal scores (--scale-update)")
    tasks = ", ".join(at_chance(retention))
    chance = f"the base is at chance, so forgetting cannot be measured: {tasks}"
    return sentences + [chance] * bool(tasks)


def _is_control(frame: DataFrame) -> Any:
    """A mask: the rows of runs that were trained on a part of a family."""
    return (frame["tasks"] != "") & (frame["tasks"] != frame["family"])


def family_means(adaptation: DataFrame) -> DataFrame:
    """Means over the family's tasks of the primary validation metric, 0 to 1, of all that have
    every task that the base has.
    """
    import numpy as np
    import pandas as pd

    rows = scores(adaptation)
    rows = rows[(rows["split"] == "validation") & (rows["shots"] == 0) & (rows["prompt"] == 0)]
    pairs = zip(rows["family"], rows["task"])
    is_own = pd.Series([task in FAMILIES.get(f, ()) for f, task in pairs], rows.index, bool)
    rows = rows[(rows["method"] != "baseline") & is_own].copy()
    rows[ESTIMATE] = rows[ESTIMATE].div(rows["metric"].map(metric_scale).astype(float), axis=0)
    tasks = rows[rows["method"] == "base"].groupby("family")["task"].nunique()
    groups = rows.groupby(["run", "family", "method", "step"])
    means = groups.agg(
        value=("value", "mean"),
        stderr=("stderr", lambda s: np.sqrt((s**2).sum(skipna=False)) / len(s)),
        tasks=("task", "nunique"),
        n=("n", "sum"),
    ).reset_index()
    means = means[means["tasks"] == means["family"].map(tasks)]
    return means.assign(update_scale=1.0, low=np.nan, high=np.nan)
