"""Figures of adaptation: scores over training, by rank, and validation against test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.style import METRIC_LABELS, style_of, styled
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

    from lora_tradeoffs.figures.study_records import StudyRecords


@styled()
def learning_curves(study: StudyRecords) -> Figure:
    """A panel for each task: the primary metric on validation over training, from the base on."""
    frame = study.adaptation
    rows = _primary_scores(frame)
    rows = rows[rows["split"] == "validation"]
    trained = rows[is_trained(rows)].dropna(subset=["fraction"])
    if trained.empty:
        return panels.nothing(frame, "no primary metric of a checkpoint on the validation split")
    table = summarise(trained.assign(fraction=trained["fraction"].round(4)), by=("fraction",))
    figure, axes = _task_panels(table["task"], share_x="all")
    panels.training_curves(axes, rows, table)
    about = "Split: validation. Arms are shifted sideways at a checkpoint."
    return _finish(figure, frame, rows, table, about, "lines")


@styled()
def last_by_rank(study: StudyRecords) -> Figure:
    """A panel for each task: the last checkpoint by LoRA rank, then full qv and full.

    The split is test if any arm has been measured on it. Small points beside a mean are its seeds.
    """
    frame = study.adaptation
    rows = last_checkpoints(_primary_scores(frame))
    is_tested = (is_trained(rows) & (rows["split"] == "test")).any()
    split = "test" if is_tested else "validation"
    rows = rows[rows["split"] == split]
    trained = rows[is_trained(rows)]
    if trained.empty:
        return panels.nothing(frame, f"no last checkpoint's primary metric on the {split} split")
    table = summarise(trained)
    figure, axes = _task_panels(table["task"], share_x="all")
    for task, ax in axes.items():
        marks.references(ax, rows[rows["task"] == task])
    panels.points_by_rank(axes, trained, table)
    about = f"Split: {split}. Last checkpoint.{unfinished(frame)}"
    return _finish(figure, frame, rows, table, about, "lines over points")


@styled()
def validation_against_test(study: StudyRecords) -> Figure:
    """A panel for each task: the last checkpoint on test over validation; equal on the line."""
    frame = study.adaptation
    rows = last_checkpoints(_primary_scores(frame))
    rows = rows[is_trained(rows)]
    rows = rows[rows.groupby(["run", "task"])["split"].transform("nunique") == 2]
    if rows.empty:
        return panels.nothing(frame, "no last checkpoint measured on both validation and test")
    tables = [summarise(rows[rows["split"] == split]) for split in ("validation", "test")]
    table = tables[0].merge(tables[1], on=["task", "arm"], suffixes=("", "_test"))
    figure, axes = _task_panels(table["task"])
    for task, ax in axes.items():
        for _, point in table[table["task"] == task].iterrows():
            on_test = {name: point[f"{name}_test"] for name in ("value", "low", "high")}
            ax.errorbar(
                [point["value"]],
                [on_test["value"]],
                xerr=marks.interval_lengths(point),
                yerr=marks.interval_lengths(on_test),
                label=point["arm"],
                elinewidth=0.7,
                **style_of(point["arm"]) | {"linestyle": "none"},
            )
        low = min(ax.get_xlim()[0], ax.get_ylim()[0])
        high = max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([low, high], [low, high], color="#b0b0b0", lw=0.7, zorder=0, label="identity")
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="validation")
        ax.locator_params(nbins=4)
        ax.set_ylabel(f"test {ax.get_ylabel()}")
    about = f"Last checkpoint; on the line both splits agree.{unfinished(frame)}"
    return _finish(figure, frame, rows, table, about, "points")


def _task_panels(tasks: Iterable[str], **share: str) -> Any:
    """A panel for each task, in the suite's order, three in a row."""
    metrics = {task: DESCRIPTIONS[task].metrics[0] for task in ordered(tasks)}
    return panels.titled([{task: METRIC_LABELS.get(m, m) for task, m in metrics.items()}], **share)


def _primary_scores(frame: DataFrame) -> DataFrame:
    """Primary metrics with the description's own prompt and no in-context examples."""
    rows = scores(frame)
    return rows[(rows["shots"] == 0) & (rows["prompt"] == 0)]


def _finish(
    figure: Figure, frame: DataFrame, rows: DataFrame, table: DataFrame, about: str, kind: str
) -> Figure:
    arms = {*table["arm"], *rows["arm"][rows["method"] == "base"]}
    is_baseline = (rows["method"] == "baseline").any()
    extra = [panels.dotted("baseline (its name over the panel)")] if is_baseline else []
    small = "; small points: single seeds" if kind == "lines over points" else ""
    sentences = [about, *panels.interval_notes(table, small)]
    return panels.finish(figure, frame, arms, sentences, kind, extra)
