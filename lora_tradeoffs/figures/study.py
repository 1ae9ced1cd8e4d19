"""Figures of what concerns several analyses: learning rates, transfer, what goes with forgetting
and with learning, and gain against its cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.panels import Panels, figure_of, interval_notes, range_of, require
from lora_tradeoffs.figures.style import GREY, style_of
from lora_tradeoffs.statistics.comparisons import NORMAL
from lora_tradeoffs.statistics.seed_intervals import BOTH, ITEMS, NOTHING, SEEDS
from lora_tradeoffs.tables.frames import in_order, is_trained, unfinished
from lora_tradeoffs.tables.learning_rates import (
    NO_SWEEP,
    best_retaining,
    searched_arm,
    sweep_table,
    swept_arms,
)
from lora_tradeoffs.tables.predictors import OUTCOMES, PREDICTORS
from training_configs import rate_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

    from lora_tradeoffs.figures.study_records import StudyRecords

WIDE, SMALL = (3.4, 2.6), (1.9, 1.9)  # inches of a panel
SWEPT = {
    "loss": "validation loss",
    "score": "validation score",
    "forgetting": "forgetting",
    "drift": "drift of Q and V",
}
MARK = {"color": "black", "linestyle": "none", "markerfacecolor": "none", "markeredgewidth": 0.9}
RING, SQUARE = MARK | {"marker": "o", "ms": 8.5}, MARK | {"marker": "s", "ms": 10}
COSTS = {"minutes of training": ("seconds", 60), "million tokens": ("tokens", 1e6)}
INTERVALS = {
    BOTH: "over seeds and items",
    SEEDS: "over seeds, on these items",
    ITEMS: "over items, about these two runs alone (one seed)",
}

# ----------------------------------------------------------------------------- learning rates


@figure_of("adaptation_at_all_rates")
def learning_rate_curves(study: StudyRecords, frame: DataFrame) -> Figure:
    """Validation, forgetting and drift over the learning rate, a line for each searched arm.

    Measures are those of `sweep_table`, and the validation loss by which the rates were chosen.
    Ringed: each arm's chosen rate; in a square: its best-retaining one.
    """
    import pandas as pd
    from matplotlib.lines import Line2D

    retention, drift = (study.at_all_rates.get(name) for name in ("retention", "drift"))
    table = _with_losses(sweep_table(frame, retention, drift, study.rates), study.rates)
    swept = set(swept_arms(table))
    table = table[[key in swept for key in zip(table["family"], table["arm"])]]
    require(table, NO_SWEEP)
    arms = table[["family", "arm"]].drop_duplicates().itertuples(index=False)
    retaining = [best_retaining(table, family, arm) for family, arm in arms]
    table["best-retaining"] = table.index.isin([row.name for row in retaining if row is not None])
    rows = []
    for name, label in SWEPT.items():
        values, errors = table[name], table[f"{name}_stderr"]
        bounds = {"stderr": errors, "low": values - errors, "high": values + errors}
        rows.append(table.assign(measure=label, value=values, **bounds))
    rows = pd.concat(rows).dropna(subset=["value"])
    panels = Panels.grid(rows, "measure", "family", size=(3.1, 1.75))
    marks.curves(panels, "learning_rate")
    for (measure, family), ax, part in panels:
        for label, style in (("chosen", RING), ("best-retaining", SQUARE)):
            points = part[part[label]]
            if len(points):
                ax.plot(points["learning_rate"], points["value"], label=label, **style)
        if measure == "forgetting":
            ax.axhline(0.0, **marks.ZERO)
        rates = rows["learning_rate"][rows["family"] == family]
        marks.log_axis(ax, rates, lambda rate: rate_name(rate).removeprefix("lr"))
    panels.label("learning rate", str)
    extra = [Line2D([], [], label="chosen on validation", **RING)]
    if table["best-retaining"].any():
        extra.append(Line2D([], [], label="best-retaining rate", **SQUARE))
    return panels.finish(frame, [_about_rates(table, frame)], extra=extra)


def _with_losses(table: DataFrame, choices: Iterable[Mapping[str, Any]]) -> DataFrame:
    """The table with the validation loss of the sweep at each rate."""
    losses = {
        (c["family"], searched_arm(c), f"{c['learning_rate']:.3g}"): c["loss"]
        for c in choices
        if c["loss"] is not None
    }
    keys = zip(table["family"], table["arm"], table["learning_rate"])
    at_rates = [losses.get((family, arm, f"{rate:.3g}"), math.nan) for family, arm, rate in keys]
    return table.assign(loss=at_rates, loss_stderr=math.nan)


def _about_rates(table: DataFrame, adaptation: DataFrame) -> str:
    about = "Last checkpoints. Score: mean of the primary metrics over the tasks, validation."
    if table["forgetting"].notna().any():
        about += (
            " Forgetting: base minus tuned, mean over the benchmarks. Best-retaining: of the rates"
            " whose score is within one standard error of the best, the one that forgets least."
        )
    if table["drift"].notna().any():
        about += " Drift: the norm of the update over that of the base's matrices."
    about += " Bars: one standard error, over items with fewer than three seeds."
    if table["loss"].notna().any():
        about += " The loss, by which rates are chosen, has no error."
    plural = "s" if table["seeds"].max() > 1 else ""
    about += f" {range_of(table['seeds'])} seed{plural} per point."
    return about + unfinished(adaptation[is_trained(adaptation)])


# ----------------------------------------------------------------------------------- transfer


@figure_of("adaptation")
def transfer_by_task(study: StudyRecords, frame: DataFrame) -> Figure:
    """Scores of multi-task minus single-task training, a panel for each task."""
    table = study.transfer
    require(table, "no single-task control of a run (run_study.py --single-task-controls)")
    arms = sorted(set(table["arm"]), reverse=True)
    size = (2.4, 0.8 + 0.2 * len(arms))
    panels = Panels.wrapped(table.assign(label=""), size=size, share_y="all")
    for _, ax, rows in panels:
        ax.axvline(0.0, color=GREY, linestyle="--", lw=1.0, zorder=1)
        for row in rows.itertuples():
            y, style = arms.index(row.arm), style_of(row.arm)
            if math.isfinite(row.low):
                interval = {"color": style["color"], "lw": 1.0, "label": "interval"}
                ax.plot([row.low, row.high], [y, y], **interval)
            point = style | {"linestyle": "none", "markersize": 5, "label": row.arm}
            ax.plot([row.value], [y], **point)
        ax.set_yticks(range(len(arms)), arms)
        ax.set_ylim(-0.6, len(arms) - 0.4)
        ax.grid(axis="x", visible=True)
        ax.set_xlabel(f"together − alone\n({row.metric}, {row.split})")
        ax.locator_params(axis="x", nbins=4)
    return panels.finish(frame, [_about_transfer(table)], kind=None)


def _about_transfer(table: DataFrame) -> str:
    about = (
        "Transfer: the run on all tasks of the family minus the run on the task alone, last"
        " checkpoint, same arm and seed; right of the dashed line the other tasks helped."
    )
    for over, rows in table.groupby("over"):
        arms = ", ".join(map(str, sorted(set(rows["arm"]))))
        who = f" ({arms})" if table["over"].nunique() > 1 else ""
        if over == NOTHING:
            about += f" {range_of(rows['seeds'])} seed(s){who}: no interval."
        else:
            about += f" Bars{who}: 95 % interval {INTERVALS[over]}"
            about += "." if over == ITEMS else f", {range_of(rows['seeds'])} seeds."
    return about


# ------------------------------------------------------------------------------- correlations


@figure_of("retention")
def predictors_of_forgetting(study: StudyRecords, frame: DataFrame) -> Figure:
    """Forgetting over each measure at the last checkpoints, a point for each run."""
    return _predictors(study, frame, "forgetting")


@figure_of("retention")
def predictors_of_gain(study: StudyRecords, frame: DataFrame) -> Figure:
    """Gain on validation over each measure at the last checkpoints, a point for each run."""
    return _predictors(study, frame, "gain")


def _predictors(study: StudyRecords, frame: DataFrame, outcome: str) -> Figure:
    """A row for each family; the rank correlation stands over the panel."""
    last = study.checkpoints[study.checkpoints["is_last"]]
    names = [name for name in PREDICTORS if name in last]
    rows = last.melt(["family", "arm", outcome], names, "predictor", "x").dropna()
    require(rows, f"no last checkpoint with both {outcome} and a measure of drift")
    keys = rows["family"] + ": " + rows["predictor"]
    rows = rows.assign(task=keys, label=rows["family"] + f"\n{OUTCOMES[outcome]}")
    panels = Panels.wrapped(in_order(rows, "family"), columns=4, size=SMALL)
    for _, ax, points in panels:
        family, name = points[["family", "predictor"]].iloc[0]
        _scatter(ax, points["arm"], points["x"], points[outcome])
        correlation = _correlation(study.correlations, family, outcome, name)
        ax.set_title(correlation, loc="left", weight="normal")
        ax.set_xlabel(PREDICTORS[name])
    about = (
        "A point is a run at its last checkpoint. Over the panels: Spearman's rank correlation of"
        " the arms' means with its 95 % interval over resampled arms. Correlations of one grid's"
        " arms show what goes together, not what causes what."
    )
    return panels.finish(frame, [about], "points")


def _scatter(ax: Axes, arms: Series, x: Series, y: Series) -> None:
    """A point for each run; the axis of a measure that spans more than a decade is logarithmic.

    A linear one is marked at its ends alone: in a small panel more labels would run together.
    """
    from matplotlib.ticker import NullFormatter

    for arm in sorted(set(arms)):
        ax.plot(x[arms == arm], y[arms == arm], label=arm, **style_of(arm) | {"linestyle": "none"})
    ax.axhline(0.0, color=GREY, lw=0.6, zorder=0)
    if x.min() > 0 and x.max() > 20 * x.min():
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ends = {f"{value:.2g}": value for value in (x.min(), x.max())}
        ax.set_xticks(list(ends.values()), list(ends))
    if ax.get_ylim()[1] - ax.get_ylim()[0] < 1e-6:  # nothing forgotten, but for rounding
        ax.set_ylim(-0.01, 0.01)


def _correlation(table: DataFrame, family: str, outcome: str, name: str) -> str:
    rows = table[(table["family"] == family) & (table["outcome"] == outcome)]
    row = rows[rows["predictor"] == name].iloc[0]
    if math.isnan(row["rho"]):
        return "no correlation"
    interval = f" ({row['low']:.2f}, {row['high']:.2f})" if math.isfinite(row["low"]) else ""
    return f"{row['rho']:.2f}{interval}"


# --------------------------------------------------------------------------------------- cost


@figure_of("first_frame")
def gain_against_cost(study: StudyRecords, frame: DataFrame) -> Figure:
    """Gain on validation after so many minutes and tokens of training; a row for each family."""
    import pandas as pd

    points = study.gains
    require(points, "no checkpoint with a validation score of a run with training.json")
    half = NORMAL * points["stderr"]
    points = points.assign(
        value=points["gain"], low=points["gain"] - half, high=points["gain"] + half
    )
    costs = points.groupby(["family", "arm", "step"])[["seconds", "tokens"]].transform("mean")
    rows = [points.assign(cost=text, x=costs[name] / unit) for text, (name, unit) in COSTS.items()]
    panels = Panels.grid(pd.concat(rows), "family", "cost", WIDE)
    for ax in panels.axes.values():
        ax.axhline(0.0, **marks.ZERO)
    means = marks.curves(panels, "x", start=(0.0, 0.0))
    panels.label(y=lambda family: f"{family}\ngain on validation")
    for ax in panels.axes.values():
        ax.locator_params(axis="x", nbins=6)
    about = (
        "Mean over the family's tasks of the validation score minus the base's (dashed)."
        " Minutes are of training alone, without validating and saving."
    )
    return panels.finish(frame, [about, *interval_notes(means)])
