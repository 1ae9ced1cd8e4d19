"""What is drawn in panels: curves with intervals, levels, heat maps, logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures.style import GREY, style_of
from lora_tradeoffs.tables.arms import BASE, Arm
from lora_tradeoffs.tables.frames import is_trained, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

ZERO = {"color": GREY, "linestyle": "--", "lw": 1.0, "zorder": 1, "label": "base"}


def curve(
    ax: Axes, arm: Arm, x: Any, points: DataFrame, start: Any = None, alpha: float = 0.6
) -> None:
    """An arm's line through its points with their intervals, from the point `start` on."""
    bars(ax, x, points, arm, alpha)
    line = [*([] if start is None else [start]), *zip(x, points["value"])]
    marked = slice(int(start is not None), None)
    ax.plot(*zip(*line), label=arm, markevery=marked, **style_of(arm))


def mean_curves(
    ax: Axes, rows: DataFrame, x: str, start: Any = None, spread: float = 0.0, alpha: float = 0.8
) -> set[Arm]:
    """Means over seeds along the column `x`, a curve for each arm; over training the base is a
    level. `spread` is the distance from the first arm to the last; the arms are returned."""
    if rows.empty:
        return set()
    table = summarise(rows.assign(task="", **{x: rows[x].astype(float).round(4)}), by=(x,))
    shift = offsets(table["arm"], spread)
    for arm, points in table.groupby("arm"):
        if arm == BASE and x == "fraction":
            level(ax, arm, points.iloc[0])
        else:
            curve(ax, arm, points[x] + shift[arm], points, start, alpha)
    return set(table["arm"])


def bars(ax: Axes, x: Any, points: Any, arm: Arm, alpha: float = 0.8) -> None:
    """The intervals of an arm's points."""
    colour = style_of(arm)["color"]
    style = {"yerr": interval_lengths(points), "fmt": "none", "elinewidth": 0.7, "alpha": alpha}
    ax.errorbar(x, points["value"], ecolor=colour, label=arm, **style)


def interval_lengths(points: Any) -> Any:
    """Lengths (2 x points) below and above the value, 0 where an interval is missing."""
    import numpy as np

    low, value, high = (
        np.atleast_1d(points[name]).astype(float) for name in ("low", "value", "high")
    )
    return np.nan_to_num(np.clip([value - low, high - value], 0, None))


def references(ax: Axes, rows: DataFrame) -> float | None:
    """The base as a dashed line in its interval's band, baselines dotted; the base's value."""
    base = None
    for _, row in rows[~is_trained(rows)].iterrows():
        level(ax, row["arm"], row)
        if row["method"] == "base":
            base = row["value"]
        else:
            name = row["arm"].label.replace("_", " ")
            ax.set_title(name, loc="right", size=6.5, weight="normal", color=GREY)
    return base


def level(ax: Axes, arm: Arm, point: Any) -> None:
    """A horizontal line with the interval as a band."""
    ax.axhline(point["value"], label=arm, **style_of(arm) | {"marker": "", "lw": 1.0, "zorder": 1})
    if arm.method == "base" and math.isfinite(point["low"]) and math.isfinite(point["high"]):
        ax.axhspan(point["low"], point["high"], color=GREY, alpha=0.15, lw=0, zorder=0)


def offsets(arms: Iterable[Arm], width: float) -> dict[Arm, float]:
    """Offsets of the arms around 0, over `width` from first to last."""
    arms = sorted(set(arms))
    step = width / max(len(arms) - 1, 1)
    return {arm: step * (i - (len(arms) - 1) / 2) for i, arm in enumerate(arms)}


def heat_map(ax: Axes, table: DataFrame, **style: Any) -> Any:
    """seaborn's heat map of a table with its labels, without a colour bar of its own; its mesh."""
    import seaborn

    seaborn.heatmap(table, ax=ax, cbar=False, rasterized=True, **style)
    ax.set(xlabel="", ylabel="")
    ax.grid(False)
    ax.tick_params(length=0, labelrotation=0)
    return ax.collections[0]


def log_axis(
    ax: Axes, values: Iterable[float], text: Callable[[float], str] = "{:g}".format
) -> None:
    """A logarithmic x axis with a handful of labelled ticks, whatever the values span."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    is_wide = max(values) / min(values) > 30
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if is_wide else (1, 2, 5)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    ax.xaxis.set_minor_locator(NullLocator())


def empty_panel(ax: Axes, text: str = "no such run") -> None:
    ax.text(0.5, 0.5, text, ha="center", transform=ax.transAxes, color="grey")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
