"""Figures of what concerns several analyses: learning rates, transfer, what goes with forgetting
and with learning, and gain against its cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.style import GREY, style_of, styled
from lora_tradeoffs.statistics.seed_intervals import BOTH, ITEMS, NOTHING, SEEDS
from lora_tradeoffs.tables.arms import FULL
from lora_tradeoffs.tables.frames import is_trained, ordered, summarise, unfinished
from lora_tradeoffs.tables.learning_rates import (
    NO_SWEEP,
    best_retaining,
    searched_arm,
    sweep_table,
    swept_arms,
)
from lora_tradeoffs.tables.predictors import PREDICTORS
from training_configs import rate_name

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

WIDE, SMALL = (3.4, 2.6), (1.9, 1.9)  # inches of a panel
SWEPT = {
    "loss": "validation loss",
    "score": "validation score",
    "forgetting": "forgetting",
    "drift": "drift of Q and V",
}
RING = {"marker": "o", "markersize": 8.5, "markerfacecolor": "none", "markeredgewidth": 0.9}
SQUARE = {"marker": "s", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 0.9}
BLACK = {"color": "black", "linestyle": "none"}
COSTS = {"seconds": ("minutes of training", 60), "tokens": ("million tokens", 1e6)}
INTERVALS = {
    BOTH: "over seeds and items",
    SEEDS: "over seeds, on these items",
    ITEMS: "over items, about these two runs alone (one seed)",
}

# ----------------------------------------------------------------------------- learning rates


@styled()
def learning_rate_curves(study: StudyRecords) -> Figure:
    """Validation, forgetting and drift over the learning rate, a line for each searched arm.

    Measures are those of `sweep_table`, and the validation loss by which the rates were chosen.
    Ringed: each arm's chosen rate; in a square: full fine-tuning's best-retaining one.
    """
    frames = [study.at_all_rates.get(name) for name in ("adaptation", "retention", "drift")]
    adaptation = frames[0]
    table = sweep_table(*frames, study.rates)
    swept = set(swept_arms(table))
    if not swept:
        return panels.nothing(adaptation, NO_SWEEP)
    table = _with_losses(table, study.rates)
    table = table[[key in swept for key in zip(table["family"], table["arm"])]]
    measures = [name for name in SWEPT if table[name].notna().any()]
    families = list(dict.fromkeys(table["family"]))
    figure, axes = panels.grid(measures, families, size=(3.1, 1.75))
    for (measure, family), ax in axes.items():
        of_family = table[table["family"] == family]
        _rate_curves(ax, of_family.dropna(subset=[measure]), measure, best_retaining(table, family))
        if measure == "forgetting":
            ax.axhline(0.0, **marks.ZERO)
        marks.log_axis(ax, table["learning_rate"], lambda rate: rate_name(rate).removeprefix("lr"))
    panels.label_edges(axes, "learning rate", SWEPT.get)
    about = _about_rates(table, adaptation)
    return panels.finish(figure, adaptation, table["arm"], [about], extra=_rate_marks(table))


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


def _rate_curves(ax: Axes, rows: DataFrame, measure: str, retaining: Any) -> None:
    for arm, points in rows.groupby("arm"):
        points, style = points.sort_values("learning_rate"), style_of(arm)
        x, y = points["learning_rate"], points[measure]
        ax.plot(x, y, label=arm, **style)
        errors = points[f"{measure}_stderr"].fillna(0)
        bars = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.8, "ecolor": style["color"]}
        ax.errorbar(x, y, yerr=errors, label=arm, **bars)
    chosen = rows[rows["chosen"]]
    ax.plot(chosen["learning_rate"], chosen[measure], label="chosen", **BLACK | RING)
    if retaining is not None and math.isfinite(retaining[measure]):
        at = [retaining["learning_rate"]], [retaining[measure]]
        ax.plot(*at, label="best-retaining", **BLACK | SQUARE)


def _rate_marks(table: DataFrame) -> list[Artist]:
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], label="chosen on validation", **BLACK | RING)]
    if FULL in set(table["arm"]):
        marks.append(Line2D([], [], label="full's best-retaining rate", **BLACK | SQUARE))
    return marks


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
    about += f" {_range(table['seeds'])} seed{plural} per point."
    return about + unfinished(adaptation[is_trained(adaptation)])


# ----------------------------------------------------------------------------------- transfer


@styled()
def transfer_by_task(study: StudyRecords) -> Figure:
    """Scores of multi-task minus single-task training, a panel for each task."""
    table, frame = study.transfer, study.adaptation
    if table.empty:
        missing = "no single-task control of a run (run_study.py --single-task-controls)"
        return panels.nothing(frame, missing)
    arms = sorted(set(table["arm"]), reverse=True)
    names = ordered(table["task"])
    metrics = {row.task: f"{row.metric}, {row.split}" for row in table.itertuples()}
    size = (2.4, 0.8 + 0.2 * len(arms))
    figure, axes = panels.titled([dict.fromkeys(names, "")], size=size, share_y="all")
    for task, ax in axes.items():
        ax.axvline(0.0, color=GREY, linestyle="--", lw=1.0, zorder=1)
        for row in table[table["task"] == task].itertuples():
            y, style = arms.index(row.arm), style_of(row.arm)
            if math.isfinite(row.low):
                interval = {"color": style["color"], "lw": 1.0, "label": "interval"}
                ax.plot([row.low, row.high], [y, y], **interval)
            point = style | {"linestyle": "none", "markersize": 5, "label": row.arm}
            ax.plot([row.value], [y], **point)
        ax.set_yticks(range(len(arms)), arms)
        ax.set_ylim(-0.6, len(arms) - 0.4)
        ax.grid(axis="x", visible=True)
        ax.set_xlabel(f"together − alone\n({metrics[task]})")
        ax.locator_params(axis="x", nbins=4)
    return panels.notes(figure, frame, [_about_transfer(table)])


def _about_transfer(table: DataFrame) -> str:
    about = (
        "Transfer: the run on all tasks of the family minus the run on the task alone, last"
        " checkpoint, same arm and seed; right of the dashed line the other tasks helped."
    )
    for over, rows in table.groupby("over"):
        arms = ", ".join(map(str, sorted(set(rows["arm"]))))
        who = f" ({arms})" if table["over"].nunique() > 1 else ""
        if over == NOTHING:
            about += f" {_range(rows['seeds'])} seed(s){who}: no interval."
        else:
            about += f" Bars{who}: 95 % interval {INTERVALS[over]}"
            about += "." if over == ITEMS else f", {_range(rows['seeds'])} seeds."
    return about


# ------------------------------------------------------------------------------- correlations


def predictors_of_forgetting(study: StudyRecords) -> Figure:
    """Forgetting over each measure at the last checkpoints, a point for each run."""
    return _predictors(study, "forgetting", "forgetting")


def predictors_of_gain(study: StudyRecords) -> Figure:
    """Gain on validation over each measure at the last checkpoints, a point for each run."""
    return _predictors(study, "gain", "gain on validation")


@styled()
def _predictors(study: StudyRecords, outcome: str, label: str) -> Figure:
    """A row for each family; the rank correlation stands over the panel."""
    table, frame = study.checkpoints, study.retention
    last = table[table["is_last"]].dropna(subset=[outcome])
    names = [n for n in PREDICTORS if n in last and last[n].notna().any()]
    families = [family for family in FAMILIES if (last["family"] == family).any()]
    if not names or not families:
        return panels.nothing(
            frame, f"no last checkpoint with both {outcome} and a measure of drift"
        )
    shown = {f"{f}: {PREDICTORS[name]}": (f, name) for f in families for name in names}
    rows = [{t: f"{f}\n{label}" for t in shown if shown[t][0] == f} for f in families]
    figure, axes = panels.titled(rows, columns=4, size=SMALL)
    for title, ax in axes.items():
        family, name = shown[title]
        points = last[last["family"] == family].dropna(subset=[name])
        _scatter(ax, points, name, outcome)
        correlation = _correlation(study.correlations, family, outcome, name)
        ax.set_title(correlation, loc="left", weight="normal")
        ax.set_xlabel(PREDICTORS[name])
    about = (
        "A point is a run at its last checkpoint. Over the panels: Spearman's rank correlation of"
        " the arms' means with its 95 % interval over resampled arms. Correlations of one grid's"
        " arms show what goes together, not what causes what."
    )
    return panels.finish(figure, frame, last["arm"], [about], "points")


def _scatter(ax: Axes, points: DataFrame, name: str, outcome: str) -> None:
    """A point for each run; the axis of a measure that spans more than a decade is logarithmic.

    A linear one is marked at its ends alone: in a small panel more labels would run together.
    """
    from matplotlib.ticker import NullFormatter

    for arm, of_arm in points.groupby("arm"):
        ax.plot(of_arm[name], of_arm[outcome], label=arm, **style_of(arm) | {"linestyle": "none"})
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


def _correlation(table: DataFrame, family: str, outcome: str, name: str) -> str:
    rows = table[(table["family"] == family) & (table["outcome"] == outcome)]
    row = rows[rows["predictor"] == name].iloc[0]
    if math.isnan(row["rho"]):
        return "no correlation"
    interval = f" ({row['low']:.2f}, {row['high']:.2f})" if math.isfinite(row["low"]) else ""
    return f"{row['rho']:.2f}{interval}"


# --------------------------------------------------------------------------------------- cost


@styled()
def gain_against_cost(study: StudyRecords) -> Figure:
    """Gain on validation after so many minutes and tokens of training; a row for each family."""
    points, frame = study.gains, study.first_frame
    if points.empty:
        return panels.nothing(
            frame, "no checkpoint with a validation score of a run with training.json"
        )
    half = 1.959964 * points["stderr"]
    bounds = {"low": points["gain"] - half, "high": points["gain"] + half}
    records = points.assign(task=points["family"], value=points["gain"], **bounds)
    table = summarise(records, by=("step",))
    families = [family for family in FAMILIES if (points["family"] == family).any()]
    shown = {f"{f}: {text}": (f, c) for f in families for c, (text, _) in COSTS.items()}
    rows = [{t: "gain on validation" for t in shown if shown[t][0] == f} for f in families]
    figure, axes = panels.titled(rows, columns=2, size=WIDE)
    for title, ax in axes.items():
        family, cost = shown[title]
        text, unit = COSTS[cost]
        costs = points[points["family"] == family].groupby(["arm", "step"])[cost].mean() / unit
        ax.axhline(0.0, **marks.ZERO)
        for arm, of_arm in table[table["task"] == family].groupby("arm"):
            x = [costs[arm, step] for step in of_arm["step"]]
            marks.curve(ax, arm, x, of_arm, start=(0.0, 0.0), alpha=0.5)
        ax.set_xlabel(text)
        ax.locator_params(axis="x", nbins=6)
    about = (
        "Mean over the family's tasks of the validation score minus the base's (dashed)."
        " Minutes are of training alone, without validating and saving."
    )
    return panels.finish(figure, frame, table["arm"], [about, *panels.interval_notes(table)])


def _range(numbers: Any) -> str:
    """The smallest and the largest, or the one that all are."""
    return " to ".join(dict.fromkeys((str(numbers.min()), str(numbers.max()))))
