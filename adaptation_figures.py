"""Figures of adaptation: scores over training, by rank, and validation against test."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from plotting import (
    bars,
    finish,
    interval_lengths,
    label_columns,
    nothing,
    panels,
    references,
    spread,
    style_of,
    styled,
)
from result_tables import (
    KINDS,
    arm_order,
    is_trained,
    last_checkpoints,
    scores,
    summarise,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def learning_curves(frame: DataFrame, split: str = "validation") -> Figure:
    """A panel a task: the primary metric over training, all arms, from the base on.

    Arms are shifted sideways by less than half a checkpoint, so that their bars stand apart.
    """
    rows = _drawn(frame, split)
    trained = rows[is_trained(rows)].dropna(subset=["fraction"])
    if trained.empty:
        return nothing(frame, f"no primary metric of a checkpoint on the {split} split")
    table = summarise(trained.assign(fraction=trained["fraction"].round(4)), by=("fraction",))
    steps = [0.0, *sorted(table["fraction"].unique())]
    gap = min((b - a for a, b in pairwise(steps) if b > a), default=1.0)
    shift = spread(table["arm"], min(0.5 * gap, 0.07))
    with styled():
        figure, axes = panels(table["task"], sharex=True)
        for task, ax in axes.items():
            base = references(ax, rows[rows["task"] == task])
            start = [] if base is None else [(0.0, base)]
            for arm, points in table[table["task"] == task].groupby("arm"):
                x = points["fraction"] + shift[arm]
                bars(ax, x, points, arm)
                line = [*start, *zip(x, points["value"])]
                shown = slice(len(start), None)
                ax.plot(*zip(*line), label=arm, markevery=shown, **style_of(arm))
            ax.set_xlim(-0.02, steps[-1] + 0.06)
        label_columns(axes, "fraction of training")
        about = f"Split: {split}. Arms stand side by side at a checkpoint."
        return finish(figure, frame, rows, table, "lines", about)


def last_by_rank(frame: DataFrame, split: str | None = None) -> Figure:
    """A panel a task: the last checkpoint by LoRA rank, then full qv and full.

    `split` is test where any arm has it. Small points beside a mean are its seeds.
    """
    rows, split = _last_rows(frame, split)
    trained = rows[is_trained(rows)]
    if trained.empty:
        return nothing(frame, f"no last checkpoint's primary metric on the {split} split")
    table = summarise(trained)
    slots = sorted({arm_order(arm)[:2] for arm in table["arm"]})
    ticks = [str(rank) if rank else KINDS[kind].replace(" ", "\n") for kind, rank in slots]
    place = {}
    for i, slot in enumerate(slots):
        inside = [arm for arm in table["arm"].unique() if arm_order(arm)[:2] == slot]
        place |= {arm: i + x for arm, x in spread(inside, 0.5).items()}
    with styled():
        figure, axes = panels(table["task"], sharex=True)
        for task, ax in axes.items():
            references(ax, rows[rows["task"] == task])
            for arm, points in table[table["task"] == task].groupby("arm"):
                style = style_of(arm) | {"linestyle": "none"}
                bars(ax, [place[arm]], points, arm)
                ax.plot([place[arm]], points["value"], label=arm, **style)
                if points["seeds"].iloc[0] > 1:
                    seeds = trained[(trained["task"] == task) & (trained["arm"] == arm)]["value"]
                    small = {"marker": ".", "markersize": 3, "alpha": 0.7, "linestyle": "none"}
                    x = [place[arm] - 0.2] * len(seeds)
                    ax.plot(x, seeds, label=f"seeds of {arm}", color=style["color"], **small)
            ax.set_xticks(range(len(slots)), ticks)
            ax.set_xlim(-0.6, len(slots) - 0.4)
        label_columns(axes, "LoRA rank, full fine-tuning")
        about = f"Split: {split}. Last checkpoint.{_unfinished(frame)}"
        return finish(figure, frame, rows, table, "lines over points", about)


def validation_against_test(frame: DataFrame) -> Figure:
    """A panel a task: the last checkpoint on test over validation; on the line they agree."""
    rows = last_checkpoints(_drawn(frame, None))
    rows = rows[is_trained(rows)]
    both = rows.groupby(["run", "task"])["split"].transform("nunique") == 2
    rows = rows[both]
    if rows.empty:
        return nothing(frame, "no last checkpoint measured on both validation and test")
    tables = [summarise(rows[rows["split"] == split]) for split in ("validation", "test")]
    table = tables[0].merge(tables[1], on=["task", "arm"], suffixes=("", "_test"))
    with styled():
        figure, axes = panels(table["task"])
        for task, ax in axes.items():
            for _, point in table[table["task"] == task].iterrows():
                style = style_of(point["arm"]) | {"linestyle": "none"}
                on_test = {name: point[f"{name}_test"] for name in ("value", "low", "high")}
                ax.errorbar(
                    [point["value"]],
                    [on_test["value"]],
                    xerr=interval_lengths(point),
                    yerr=interval_lengths(on_test),
                    label=point["arm"],
                    elinewidth=0.7,
                    **style,
                )
            low = min(ax.get_xlim()[0], ax.get_ylim()[0])
            high = max(ax.get_xlim()[1], ax.get_ylim()[1])
            ax.plot([low, high], [low, high], color="#b0b0b0", lw=0.7, zorder=0, label="identity")
            ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="validation")
            ax.locator_params(nbins=4)
            ax.set_ylabel(f"test {ax.get_ylabel()}")
        about = f"Last checkpoint; on the line both splits agree.{_unfinished(frame)}"
        return finish(figure, frame, rows, table, "points", about)


def _drawn(frame: DataFrame, split: str | None) -> DataFrame:
    """Primary metrics with the description's own prompt, of one split or all."""
    rows = scores(frame)
    rows = rows[(rows["shots"] == 0) & (rows["prompt"] == 0)]
    return rows if split is None else rows[rows["split"] == split]


def _last_rows(frame: DataFrame, split: str | None) -> tuple[DataFrame, str]:
    rows = last_checkpoints(_drawn(frame, None))
    if split is None:
        tested = (is_trained(rows) & (rows["split"] == "test")).any()
        split = "test" if tested else "validation"
    return rows[rows["split"] == split], split


def _unfinished(frame: DataFrame) -> str:
    runs = set(frame[is_trained(frame)]["run"])
    runs -= set(last_checkpoints(frame)["run"])
    return f" Left out, not measured at its end: {', '.join(sorted(runs))}." if runs else ""


FIGURES = (learning_curves, last_by_rank, validation_against_test)
