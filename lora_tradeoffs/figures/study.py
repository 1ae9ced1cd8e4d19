"""Figures of the study's questions: gain against its cost, what goes with forgetting, transfer.

    save(gain_against_cost(gain_costs(...)), folder / "gain_against_cost.png")
    save(predictors(predictor_table(...), frame), folder / "predictors.png")
    save(transfer(transfer_table(...), frame), folder / "transfer.png")

`frame` is any of the study's frames of records (result_tables.load_records): the figure takes from
it whether it is the demo's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.figures.drift import legend
from lora_tradeoffs.figures.retention import ZERO
from lora_tradeoffs.figures.style import (
    GREY,
    bars,
    finish,
    notes,
    nothing,
    panels,
    style_of,
    styled,
)
from lora_tradeoffs.statistics.seed_intervals import BOTH, ITEMS, NOTHING, SEEDS
from lora_tradeoffs.tables.frames import ordered, summarise
from lora_tradeoffs.tables.predictors import PREDICTORS, across_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

WIDE, SMALL = (3.4, 2.6), (1.9, 1.9)  # inches of a panel
COSTS = {"seconds": "minutes of training", "tokens": "million tokens"}
UNITS = {"seconds": 60, "tokens": 1e6}
INTERVALS = {
    BOTH: "over seeds and items",
    SEEDS: "over seeds, on these items",
    ITEMS: "over items, about these two runs alone (one seed)",
}


def gain_against_cost(points: DataFrame, frame: DataFrame) -> Figure:
    """What an arm has gained on validation after so many minutes and tokens; a row a family."""
    if points.empty:
        return nothing(frame, "no checkpoint with a validation score of a run with training.json")
    families = [family for family in FAMILIES if (points["family"] == family).any()]
    shown = {f"{family}: {said}": (family, c) for family in families for c, said in COSTS.items()}
    table = summarise(_as_records(points), by=("step",))
    with styled():
        rows = [{t: "gain on validation" for t in shown if shown[t][0] == f} for f in families]
        figure, axes = panels(rows, columns=2, size=WIDE)
        for title, ax in axes.items():
            family, column = shown[title]
            costs = points.groupby(["family", "arm", "step"])[column].mean() / UNITS[column]
            ax.axhline(0.0, **ZERO)
            _gain_curves(ax, table[table["task"] == family], costs[family])
            ax.set_xlabel(title.split(": ")[1])
        about = (
            "Mean over the family's tasks of the validation score minus the base's (dashed)."
            " Minutes are of training alone, without validating and saving."
        )
        return finish(figure, frame, frame[:0], table, "lines", about)


def _gain_curves(ax: Axes, table: DataFrame, costs: Any) -> None:
    """A line an arm through its checkpoints, from nothing on, with the intervals of the gain."""
    for arm, own in table.groupby("arm"):
        x = [costs[arm, step] for step in own["step"]]
        bars(ax, x, own, arm, alpha=0.5)
        line = [(0.0, 0.0), *zip(x, own["value"])]
        ax.plot(*zip(*line), label=arm, markevery=slice(1, None), **style_of(arm))


def _as_records(points: DataFrame) -> DataFrame:
    """The gains as summarise takes them."""
    half = 1.959964 * points["stderr"]
    low, high = points["gain"] - half, points["gain"] + half
    return points.assign(task=points["family"], value=points["gain"], low=low, high=high)


def predictors(table: DataFrame, frame: DataFrame, outcome: str = "forgetting") -> Figure:
    """What was forgotten, or gained, over each measure at the last checkpoints, a point a run.

    A row a family; `outcome` is forgetting or gain. The rank correlation stands over the panel.
    """
    last = table[table["is_last"]].dropna(subset=[outcome])
    found = across_runs(table)
    names = [n for n in PREDICTORS if n in last and last[n].notna().any()]
    families = [family for family in FAMILIES if (last["family"] == family).any()]
    if not names or not families:
        return nothing(frame, f"no last checkpoint with both {outcome} and a measure of drift")
    label = {"forgetting": "forgetting", "gain": "gain on validation"}[outcome]
    shown = {f"{f}: {PREDICTORS[name]}": (f, name) for f in families for name in names}
    with styled():
        rows = [{t: f"{f}\n{label}" for t in shown if shown[t][0] == f} for f in families]
        figure, axes = panels(rows, columns=4, size=SMALL)
        for title, ax in axes.items():
            family, name = shown[title]
            own = last[last["family"] == family].dropna(subset=[name])
            _scatter(ax, own, name, outcome)
            correlation = _correlation(found, family, outcome, name)
            ax.set_title(correlation, loc="left", weight="normal")
            ax.set_xlabel(PREDICTORS[name])
        about = (
            "A point is a run at its last checkpoint. Over the panels: Spearman's rank correlation"
            " with its 95 % interval over resampled runs. Correlations of one grid's runs show what"
            " goes together, not what causes what; runs of one arm lie close together."
        )
        legend(figure, last["arm"])
        notes(figure, frame, [about])
        return figure


def _scatter(ax: Axes, points: DataFrame, name: str, outcome: str) -> None:
    """A point a run; the axis of a measure that spans more than a decade is logarithmic.

    A linear one is marked at its ends alone: in a small panel more labels would run together.
    """
    from matplotlib.ticker import NullFormatter

    for arm, own in points.groupby("arm"):
        ax.plot(own[name], own[outcome], label=arm, **style_of(arm) | {"linestyle": "none"})
    ax.axhline(0.0, color=GREY, lw=0.6, zorder=0)
    if points.empty:
        return
    if points[name].min() > 0 and points[name].max() > 20 * points[name].min():
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ends = {f"{value:.2g}": value for value in (points[name].min(), points[name].max())}
        ax.set_xticks(list(ends.values()), list(ends))
    if ax.get_ylim()[1] - ax.get_ylim()[0] < 1e-6:  # nothing forgotten, but for rounding
        ax.set_ylim(-0.01, 0.01)


def _correlation(found: DataFrame, family: str, outcome: str, name: str) -> str:
    rows = found[(found["family"] == family) & (found["outcome"] == outcome)]
    row = rows[rows["predictor"] == name].iloc[0]
    if math.isnan(row["rho"]):
        return "no correlation"
    interval = f" ({row['low']:.2f}, {row['high']:.2f})" if math.isfinite(row["low"]) else ""
    return f"{row['rho']:.2f}{interval}"


def transfer(table: DataFrame, frame: DataFrame) -> Figure:
    """Multi-task minus single-task, a panel a task, an arm a line, with its interval."""
    if table.empty:
        missing = "no single-task control of a run (run_study.py --single-task-controls)"
        return nothing(frame, missing)
    arms = sorted(set(table["arm"]), reverse=True)
    names = ordered(table["task"])
    metrics = {row.task: f"{row.metric}, {row.split}" for row in table.itertuples()}
    height = 0.8 + 0.2 * len(arms)
    with styled():
        figure, axes = panels([dict.fromkeys(names, "")], size=(2.4, height), sharey=True)
        for task, ax in axes.items():
            ax.axvline(0.0, color=GREY, linestyle="--", lw=1.0, zorder=1)
            for row in table[table["task"] == task].itertuples():
                _dot(ax, row, arms.index(row.arm))
            ax.set_yticks(range(len(arms)), arms)
            ax.set_ylim(-0.6, len(arms) - 0.4)
            ax.grid(axis="x", visible=True)
            ax.set_xlabel(f"together − alone\n({metrics[task]})")
            ax.locator_params(axis="x", nbins=4)
        notes(figure, frame, [_about_transfer(table)])
        return figure


def _dot(ax: Axes, row: Any, place: int) -> None:
    style = style_of(row.arm) | {"linestyle": "none", "markersize": 5}
    if math.isfinite(row.low):
        ax.plot([row.low, row.high], [place, place], color=style["color"], lw=1.0, label="interval")
    ax.plot([row.value], [place], label=row.arm, **style)


def _about_transfer(table: DataFrame) -> str:
    about = (
        "Transfer: the run on all tasks of the family minus the run on the task alone, last"
        " checkpoint, same arm and seed; right of the dashed line the other tasks helped."
    )
    for over, own in table.groupby("over"):
        arms = sorted(set(own["arm"]))
        who = f" ({', '.join(map(str, arms))})" if table["over"].nunique() > 1 else ""
        count = " to ".join(dict.fromkeys((str(own["seeds"].min()), str(own["seeds"].max()))))
        if over == NOTHING:
            about += f" {count} seed(s){who}: no interval."
        else:
            about += f" Bars{who}: 95 % interval {INTERVALS[over]}"
            about += "." if over == ITEMS else f", {count} seeds."
    return about
