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
from drift_figures import grid, label_edges, legend
from plotting import GREY, bars, notes, nothing, panels, style_of, styled
from predictors import PREDICTORS, across_runs
from result_tables import arm_order, ordered, summarise
from retention_figures import ZERO
from seed_intervals import BOTH, ITEMS, NOTHING, SEEDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

WIDE = (2.9, 2.3)  # inches of a panel
SMALL = (1.75, 1.7)
COSTS = {"seconds": ("minutes of training", 60), "tokens": ("million tokens", 1e6)}
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
    columns = {label: (name, unit) for name, (label, unit) in COSTS.items()}
    with styled():
        figure, axes = grid(families, columns, cell=WIDE, share_x=False, share_y=True)
        for (family, label), ax in axes.items():
            name, unit = columns[label]
            own = points[points["family"] == family]
            _gain_curves(ax, own.assign(cost=own[name] / unit))
            ax.axhline(0.0, **ZERO)
            ax.set_title("")
            ax.set_xlabel(label)
        label_edges(axes, y=lambda family: f"{family}\ngain on validation")
        legend(figure, points["arm"])
        seeds = points.groupby(["family", "arm"])["seed"].nunique()
        about = (
            "Mean over the family's tasks of the validation score minus the base's (dashed)."
            " Minutes are of training alone, without validation."
        )
        count = " to ".join(dict.fromkeys((str(seeds.min()), str(seeds.max()))))
        told = "One seed an arm." if seeds.max() == 1 else f"Mean over {count} seeds."
        notes(figure, frame, [about, f"{told} Bars as in the tables; two seeds have none."])
        return figure


def _gain_curves(ax: Axes, points: DataFrame) -> None:
    """A line an arm through its checkpoints, from nothing on, with the intervals of the gain."""
    table = summarise(_as_records(points), by=("step",))
    places = points.groupby(["arm", "step"])["cost"].mean()
    for arm, own in table.groupby("arm"):
        x = [places[arm, step] for step in own["step"]]
        bars(ax, x, own, arm, alpha=0.5)
        line = [(0.0, 0.0), *zip(x, own["value"])]
        ax.plot(*zip(*line), label=arm, markevery=slice(1, None), **style_of(arm))


def _as_records(points: DataFrame) -> DataFrame:
    """The gains as summarise takes them."""
    half = 1.959964 * points["stderr"]
    low, high = points["gain"] - half, points["gain"] + half
    return points.assign(task=points["family"], value=points["gain"], low=low, high=high)


def predictors(table: DataFrame, frame: DataFrame, outcome: str = "forgetting") -> Figure:
    """Forgetting over each predictor at the last checkpoints, a point a run; a row a family.

    `outcome` may also be gain. The rank correlation stands over the panel.
    """
    last = table[table["is_last"]].dropna(subset=[outcome])
    found = across_runs(table)
    names = [n for n in PREDICTORS if n in last and last[n].notna().any()]
    families = [family for family in FAMILIES if (last["family"] == family).any()]
    if not names or not families:
        return nothing(frame, f"no last checkpoint with both {outcome} and a measure of drift")
    columns = {PREDICTORS[name]: (name,) for name in names}
    label = {"forgetting": "forgetting", "gain": "gain on validation"}[outcome]
    with styled():
        figure, axes = grid(families, columns, cell=SMALL, share_x=False, share_y=True)
        for (family, title), ax in axes.items():
            (name,) = columns[title]
            own = last[last["family"] == family].dropna(subset=[name])
            for arm, points in own.groupby("arm"):
                style = style_of(arm) | {"linestyle": "none"}
                ax.plot(points[name], points[outcome], label=arm, **style)
            ax.axhline(0.0, color=GREY, lw=0.6, zorder=0)
            if len(own) and (own[name] > 0).all() and own[name].max() > 20 * own[name].min():
                ax.set_xscale("log")
            elif len(own):
                ax.locator_params(axis="x", nbins=4)
            ax.set_title(_correlation(found, family, outcome, name), loc="left", weight="normal")
            ax.set_xlabel(title)
        label_edges(axes, y=lambda family: f"{family}\n{label}")
        legend(figure, last["arm"])
        about = (
            "A point is a run at its last checkpoint. Over the panels: Spearman's rank correlation"
            " with its 95 % interval over resampled runs. Correlations of one grid's runs show what"
            " goes together, not what causes what; runs of one arm lie close together."
        )
        notes(figure, frame, [about])
        return figure


def _correlation(found: DataFrame, family: str, outcome: str, name: str) -> str:
    rows = found[(found["family"] == family) & (found["outcome"] == outcome)]
    row = rows[rows["predictor"] == name].iloc[0]
    if math.isnan(row["rho"]):
        return "correlation: none"
    interval = f" ({row['low']:.2f}, {row['high']:.2f})" if math.isfinite(row["low"]) else ""
    return f"{row['rho']:.2f}{interval}"


def transfer(table: DataFrame, frame: DataFrame) -> Figure:
    """Multi-task minus single-task, a panel a task, an arm a line, with its interval."""
    if table.empty:
        missing = "no single-task control of a run (multi_task_training.py --tasks sst2 --lora 8)"
        return nothing(frame, missing)
    arms = sorted(set(table["arm"]), key=arm_order, reverse=True)
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
        arms = sorted(set(own["arm"]), key=arm_order)
        who = f" ({', '.join(arms)})" if table["over"].nunique() > 1 else ""
        count = " to ".join(dict.fromkeys((str(own["seeds"].min()), str(own["seeds"].max()))))
        if over == NOTHING:
            about += f" {count} seed(s){who}: no interval."
        else:
            about += f" Bars{who}: 95 % interval {INTERVALS[over]}"
            about += "." if over == ITEMS else f", {count} seeds."
    return about
