"""What is drawn in panels: curves with intervals, points by rank, levels, heat maps, log axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures.panels import Panels, is_of_arm
from lora_tradeoffs.figures.style import GREY, style_of
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

ZERO = {"color": GREY, "linestyle": "--", "lw": 1.0, "zorder": 1, "label": "base"}
X_LABELS = {"fraction": "fraction of training", "layer": "layer"}
LEAST = 1e-3  # that a diverging colour scale spans at each side


# -------------------------------------------------------------------- the rows of all panels


def curves(
    panels: Panels,
    x: str,
    start: tuple[float, float] | None = None,
    spread: float = 0.0,
    thin: bool = False,
) -> DataFrame:
    """The arms' means over seeds along a column, a line with intervals each; their summary.

    Over training base and baselines are levels, and lines begin at the base, without its records at
    `start`; arms lie within half the distance of two checkpoints, so that their bars do not
    overlap. Elsewhere `spread` is the distance from the first arm to the last, and with `thin`
    every arm marks and bars other points.
    """
    import pandas as pd

    rows = panels.rows
    over_training = x == "fraction"
    if over_training:
        at = rows[x].astype(float).round(4).where(is_of_arm(rows), 0.0)
        panels.rows = rows = rows.assign(fraction=at).dropna(subset=["fraction"])
        steps = sorted({0.0, *at.dropna()})
        spread = min([0.07, *(0.5 * (b - a) for a, b in pairwise(steps))])
    shift = offsets(rows["arm"][is_of_arm(rows)], spread)
    means = []
    for _, ax, part in panels:
        table = summarise(part.assign(task=""), by=(x,))
        means.append(table)
        bases = table[~is_of_arm(table) & over_training].set_index("arm")
        for arm, point in bases.iterrows():
            level(ax, arm, point)
        origins = {
            arm.shots: (0.0, value) for arm, value in bases["value"].items() if arm.method == "base"
        }
        for i, (arm, points) in enumerate(table[~table["arm"].isin(bases.index)].groupby("arm")):
            origin = origins.get(arm.shots, start)
            every = slice(2 * i % len(shift), None, len(shift)) if thin else slice(None)
            _curve(ax, arm, points[x] + shift.get(arm, 0.0), points, origin, every)
        if over_training:
            ax.set_xlim(-0.04, max(1.0, *steps) + 0.06)
        elif x == "layer":
            ax.xaxis.get_major_locator().set_params(integer=True)
    panels.label(X_LABELS.get(x, ""))
    return pd.concat(means)


def _curve(ax: Axes, arm: Arm, x: Any, points: DataFrame, start: Any, every: slice) -> None:
    """An arm's line from the point `start` on; markers and intervals at `every` point."""
    bars(ax, x[every], points[every], arm, alpha=0.6)
    line = [*([] if start is None else [start]), *zip(x, points["value"])]
    first = (every.start or 0) + (start is not None)
    ax.plot(*zip(*line), label=arm, markevery=slice(first, None, every.step), **style_of(arm))


def points_by_rank(panels: Panels) -> DataFrame:
    """The arms over LoRA's ranks, other adapters and full; beside a mean its seeds; their summary.

    Base and baselines are levels.
    """
    import pandas as pd

    arms = set(panels.rows["arm"][is_of_arm(panels.rows)])
    slots = sorted({Arm(arm.method, arm.rank) for arm in arms})
    x: dict[Arm, float] = {}
    for i, slot in enumerate(slots):
        at_slot = [arm for arm in arms if (arm.method, arm.rank) == (slot.method, slot.rank)]
        x |= {arm: i + offset for arm, offset in offsets(at_slot, 0.5).items()}
    has_number = {slot: slot.method == "lora" for slot in slots}
    names = [str(s.rank) if has_number[s] else s.kind.replace(" ", "\n") for s in slots]
    means = []
    for _, ax, rows in panels:
        table = summarise(rows.assign(task=""))
        means.append(table)
        for _, point in table.iterrows():
            arm, style = point["arm"], style_of(point["arm"])
            if not arm.is_trained:
                level(ax, arm, point)
                continue
            bars(ax, [x[arm]], point, arm)
            ax.plot([x[arm]], [point["value"]], label=arm, **style | {"linestyle": "none"})
            if point["seeds"] > 1:
                seeds = rows["value"][rows["arm"] == arm]
                small = {"marker": ".", "markersize": 3, "alpha": 0.7, "linestyle": "none"}
                small |= {"label": f"seeds of {arm}", "color": style["color"]}
                ax.plot([x[arm] - 0.2] * len(seeds), seeds, **small)
        ax.set_xticks(range(len(slots)), names)
        ax.set_xlim(-0.6, len(slots) - 0.4)
    panels.label("LoRA rank, full fine-tuning")
    return pd.concat(means)


def maps_over_training(panels: Panels, label: str, **style: Any) -> None:
    """A heat map of values by layer, the first lowest, and checkpoint in every panel."""
    for _, ax, rows in panels:
        rows = rows.assign(fraction=rows["fraction"].round(3), layer=rows["layer"].astype(int))
        table = rows.pivot_table(index="layer", columns="fraction", values="value")
        table = table.sort_index(ascending=False)
        if not heat_map(ax, table, xticklabels=False, yticklabels=False, **style):
            continue
        columns = sorted({0, len(table.columns) // 2, len(table.columns) - 1})
        ax.set_xticks([i + 0.5 for i in columns], [f"{table.columns[i]:.2g}" for i in columns])
        layers = range(len(table) - 1, -1, -max(1, len(table) // 5))
        ax.set_yticks([i + 0.5 for i in layers], [str(table.index[i]) for i in layers])
    panels.label(X_LABELS["fraction"], lambda row: f"{row}\nlayer")
    panels.colour_bar(label, aspect=40)


# ---------------------------------------------------------------------------- in one panel


def bars(ax: Axes, x: Any, points: Any, arm: Arm, alpha: float = 0.8) -> None:
    """The intervals of an arm's points."""
    style = {"yerr": interval_lengths(points), "fmt": "none", "elinewidth": 0.7, "alpha": alpha}
    ax.errorbar(x, points["value"], ecolor=style_of(arm)["color"], label=arm, **style)


def cross(ax: Axes, point: Any, suffix: str, arm: Arm, **style: Any) -> None:
    """Both intervals of a point whose x has its value, low and high in columns with the suffix."""
    x = {name: point[name + suffix] for name in ("value", "low", "high")}
    lengths = {"xerr": interval_lengths(x), "yerr": interval_lengths(point)}
    ax.errorbar([x["value"]], [point["value"]], **lengths, label=arm, **style)


def interval_lengths(points: Any) -> Any:
    """Lengths (2 x points) below and above the value, 0 where an interval is missing."""
    import numpy as np

    low, value, high = (
        np.atleast_1d(points[name]).astype(float) for name in ("low", "value", "high")
    )
    return np.nan_to_num(np.clip([value - low, high - value], 0, None))


def level(ax: Axes, arm: Arm, point: Any) -> None:
    """A line across: of the base, with its interval as a band, or of a baseline, with its name."""
    ax.axhline(point["value"], label=arm, **style_of(arm) | {"marker": "", "lw": 1.0, "zorder": 1})
    if arm.method == "baseline":
        name = arm.label.replace("_", " ")
        ax.set_title(name, loc="right", size=6.5, weight="normal", color=GREY)
    elif math.isfinite(point["low"]) and math.isfinite(point["high"]):
        ax.axhspan(point["low"], point["high"], color=GREY, alpha=0.15, lw=0, zorder=0)


def offsets(arms: Iterable[Arm], width: float) -> dict[Arm, float]:
    """Offsets of the arms around 0, over `width` from first to last."""
    arms = sorted(set(arms))
    step = width / max(len(arms) - 1, 1)
    return {arm: step * (i - (len(arms) - 1) / 2) for i, arm in enumerate(arms)}


def heat_map(ax: Axes, table: DataFrame, **style: Any) -> bool:
    """seaborn's heat map of a table with its labels; False for an empty table, and the panel says
    that there is no such run."""
    import seaborn

    ax.grid(False)
    if table.empty:
        ax.text(0.5, 0.5, "no such run", ha="center", transform=ax.transAxes, color="grey")
        ax.set(xticks=[], yticks=[])
        return False
    seaborn.heatmap(table, ax=ax, cbar=False, rasterized=True, **style)
    ax.set(xlabel="", ylabel="")
    ax.tick_params(length=0, labelrotation=0)
    return True


def diverging(values: Any) -> dict[str, Any]:
    """Colours of values around 0, red below, for `heat_map`."""
    limit = max(float(abs(values).max()), LEAST)
    return {"cmap": "RdBu", "vmin": -limit, "vmax": limit}


def log_axis(
    ax: Axes, values: Iterable[float], text: Callable[[float], str] = "{:g}".format
) -> None:
    """A logarithmic x axis with a handful of labelled ticks, whatever the values span."""
    import numpy as np
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log")
    low, high = min(values), max(values)
    if high < 10 * low:  # LogLocator would mark it as closely as a linear axis
        digits = 2 if high == low else max(2, 1 + math.ceil(-math.log10(1 - low / high)))
        ticks = {float(f"{x:.{digits}g}") for x in np.geomspace(low, high, 3)}
        ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    else:
        subs = (1, 2, 5) if high < 30 * low else (1, 3) if high < 1000 * low else (1,)
        ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: text(x)))
    ax.xaxis.set_minor_locator(NullLocator())
