"""Figures of adaptation: scores over training, by rank, and validation against test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.figures.style import (
    METRIC_LABELS,
    curves,
    finish,
    interval_lengths,
    label_columns,
    nothing,
    panels,
    rank_axis,
    rank_points,
    references,
    style_of,
    styled,
    training_axis,
)
from lora_tradeoffs.tables.frames import (
    is_trained,
    last_checkpoints,
    ordered,
    scores,
    summarise,
    unfinished,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


def learning_curves(frame: DataFrame, split: str = "validation") -> Figure:
    """A panel a task: the primary metric over training, all arms, from the base on."""
    rows = _drawn(frame, split)
    trained = rows[is_trained(rows)].dropna(subset=["fraction"])
    if trained.empty:
        return nothing(frame, f"no primary metric of a checkpoint on the {split} split")
    table = summarise(trained.assign(fraction=trained["fraction"].round(4)), by=("fraction",))
    shift, limits = training_axis(table["fraction"], table["arm"])
    with styled():
        figure, axes = _task_panels(table["task"], sharex=True)
        for task, ax in axes.items():
            base = references(ax, rows[rows["task"] == task])
            curves(ax, table[table["task"] == task], shift, base)
            ax.set_xlim(*limits)
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
    ticks, place = rank_axis(table["arm"].unique())
    with styled():
        figure, axes = _task_panels(table["task"], sharex=True)
        for task, ax in axes.items():
            references(ax, rows[rows["task"] == task])
            own = (part[part["task"] == task] for part in (trained, table))
            rank_points(ax, *own, ticks, place)
        label_columns(axes, "LoRA rank, full fine-tuning")
        about = f"Split: {split}. Last checkpoint.{unfinished(frame)}"
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
        figure, axes = _task_panels(table["task"])
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
        about = f"Last checkpoint; on the line both splits agree.{unfinished(frame)}"
        return finish(figure, frame, rows, table, "points", about)


def _task_panels(tasks: Iterable[str], **shared: bool) -> Any:
    """A panel a task, in the suite's order, three a row."""
    metrics = {task: DESCRIPTIONS[task].metrics[0] for task in ordered(tasks)}
    return panels([{task: METRIC_LABELS.get(m, m) for task, m in metrics.items()}], **shared)


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


FIGURES = (learning_curves, last_by_rank, validation_against_test)
