"""The figure of a sweep of the learning rates: validation, forgetting and drift over the rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures.drift import grid, label_edges, told
from lora_tradeoffs.figures.style import GREY, nothing, place_legend, style_of, styled
from lora_tradeoffs.tables.arms import FULL, Arm
from lora_tradeoffs.tables.frames import is_trained, unfinished
from lora_tradeoffs.tables.learning_rates import (
    NO_SWEEP,
    best_retaining,
    searched_arm,
    sweep_table,
    swept_arms,
)
from training_configs import rate_name

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

LABELS = {
    "loss": "validation loss",
    "score": "validation score",
    "forgetting": "forgetting",
    "drift": "drift of Q and V",
}
CHOSEN = {"marker": "o", "markersize": 8.5, "markerfacecolor": "none", "markeredgewidth": 0.9}
RETAINING = {"marker": "s", "markersize": 10, "markerfacecolor": "none", "markeredgewidth": 0.9}
BLACK = {"color": "black", "linestyle": "none"}


def learning_rate_curves(
    adaptation: DataFrame,
    retention: DataFrame | None = None,
    drift: DataFrame | None = None,
    choices: Sequence[Mapping[str, Any]] = (),
) -> Figure:
    """A column a family, a row a measure, over the learning rate; an arm a line.

    Measures are those of `sweep_table`, and of `choices` (the records of learning_rates.json) the
    validation loss, by which the rates were chosen. Ringed: each arm's chosen rate; in a square:
    full fine-tuning's best-retaining one.
    """
    table = sweep_table(adaptation, retention, drift, choices)
    swept = set(swept_arms(table))
    if not swept:
        return nothing(adaptation, NO_SWEEP)
    table = _with_losses(table, choices)
    table = table[[key in swept for key in zip(table["family"], table["arm"])]]
    measures = [name for name in LABELS if table[name].notna().any()]
    families = list(dict.fromkeys(table["family"]))
    with styled():
        columns = {family: (family,) for family in families}
        figure, axes = grid(measures, columns, cell=(3.1, 1.75))
        for (measure, family), ax in axes.items():
            own = table[table["family"] == family]
            _curves(ax, own, measure)
            _marks(ax, own, measure, best_retaining(table, family))
            if measure == "forgetting":
                ax.axhline(0.0, color=GREY, linestyle="--", lw=1.0, zorder=1)
            _rate_axis(ax, table["learning_rate"])
        label_edges(axes, "learning rate", LABELS.get)
        _legend(figure, table["arm"])
        return told(figure, adaptation, [_about(table, adaptation)])


def _with_losses(table: DataFrame, choices: Iterable[Mapping[str, Any]]) -> DataFrame:
    """The table with the validation loss of the sweep at each rate."""
    losses = {
        (c["family"], searched_arm(c), f"{c['learning_rate']:.3g}"): c["loss"]
        for c in choices
        if c["loss"] is not None
    }
    keys = zip(table["family"], table["arm"], table["learning_rate"])
    found = [losses.get((family, arm, f"{rate:.3g}"), math.nan) for family, arm, rate in keys]
    return table.assign(loss=found, loss_stderr=math.nan)


def _rate_axis(ax: Axes, rates: Any) -> None:
    """A logarithmic axis with a handful of ticks, whatever it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    wide = max(rates) / min(rates) > 30
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: rate_name(x).removeprefix("lr")))
    ax.xaxis.set_minor_locator(NullLocator())


def _curves(ax: Axes, rows: DataFrame, measure: str) -> None:
    for arm, points in rows.dropna(subset=[measure]).groupby("arm"):
        points, style = points.sort_values("learning_rate"), style_of(arm)
        x, y = points["learning_rate"], points[measure]
        ax.plot(x, y, label=arm, **style)
        errors = points[f"{measure}_stderr"].fillna(0)
        bars = {"fmt": "none", "elinewidth": 0.7, "alpha": 0.8, "ecolor": style["color"]}
        ax.errorbar(x, y, yerr=errors, label=arm, **bars)


def _marks(ax: Axes, rows: DataFrame, measure: str, kept: Any) -> None:
    chosen = rows[rows["chosen"]].dropna(subset=[measure])
    ax.plot(chosen["learning_rate"], chosen[measure], label="chosen", **BLACK | CHOSEN)
    if kept is not None and measure in kept and math.isfinite(kept[measure]):
        at = [kept["learning_rate"]], [kept[measure]]
        ax.plot(*at, label="best-retaining", **BLACK | RETAINING)


def _legend(figure: Figure, arms: Iterable[Arm]) -> None:
    from matplotlib.lines import Line2D

    names = sorted(set(arms))
    handles: list[Artist] = [Line2D([], [], label=arm, **style_of(arm)) for arm in names]
    handles.append(Line2D([], [], label="chosen on validation", **BLACK | CHOSEN))
    if FULL in names:
        label = "full's best-retaining rate"
        handles.append(Line2D([], [], label=label, **BLACK | RETAINING))
    place_legend(figure, handles, names)


def _about(table: DataFrame, adaptation: DataFrame) -> str:
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
    seeds = sorted(set(table["seeds"]))
    about += f" {' to '.join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))} seed"
    about += "s a point." if seeds[-1] > 1 else " a point."
    return about + unfinished(adaptation[is_trained(adaptation)])
