"""Figures of adaptation: scores over training, by rank, and validation against test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.panels import Panels, figure_of, interval_notes, require
from lora_tradeoffs.figures.style import METRIC_LABELS, style_of
from lora_tradeoffs.tables.frames import (
    in_order,
    is_trained,
    last_checkpoints,
    scores,
    summarise,
    unfinished,
    with_families,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords


@figure_of("adaptation")
def learning_curves(study: StudyRecords, frame: DataFrame) -> Figure:
    """A panel for each task: the primary metric on validation over training, from the base on."""
    rows = _primary_scores(frame)
    rows = rows[rows["split"] == "validation"]
    trained = rows[is_trained(rows)].dropna(subset=["fraction"])
    require(trained, "no primary metric of a checkpoint on the validation split")
    panels = Panels.wrapped(rows[rows["task"].isin(trained["task"])], share_x="all")
    means = marks.curves(panels, "fraction")
    about = "Split: validation. Arms are shifted sideways at a checkpoint."
    return panels.finish(frame, [about, *interval_notes(means)])


@figure_of("adaptation")
def last_by_rank(study: StudyRecords, frame: DataFrame) -> Figure:
    """A panel for each task: the last checkpoint by LoRA rank, then full qv and full.

    The split is test if any arm has been measured on it. Small points beside a mean are its seeds.
    """
    rows = last_checkpoints(_primary_scores(frame))
    is_tested = (is_trained(rows) & (rows["split"] == "test")).any()
    split = "test" if is_tested else "validation"
    rows = rows[rows["split"] == split]
    require(rows[is_trained(rows)], f"no last checkpoint's primary metric on the {split} split")
    panels = Panels.wrapped(rows, share_x="all")
    means = marks.points_by_rank(panels)
    about = f"Split: {split}. Last checkpoint.{unfinished(frame)}"
    sentences = [about, *interval_notes(means, small="; small points: single seeds")]
    return panels.finish(frame, sentences, "lines over points")


@figure_of("adaptation")
def validation_against_test(study: StudyRecords, frame: DataFrame) -> Figure:
    """A panel for each task: the last checkpoint on test over validation; equal on the line."""
    rows = last_checkpoints(_primary_scores(frame))
    rows = rows[is_trained(rows)]
    rows = rows[rows.groupby(["run", "task"])["split"].transform("nunique") == 2]
    require(rows, "no last checkpoint measured on both validation and test")
    panels = Panels.wrapped(rows)
    means = summarise(rows, by=("split",))
    test, validation = (means[means["split"] == split] for split in ("test", "validation"))
    points = test.merge(validation, on=["task", "arm"], suffixes=("", "_validation"))
    for task, ax in panels.axes.items():
        for _, point in points[points["task"] == task].iterrows():
            style = style_of(point["arm"]) | {"linestyle": "none", "elinewidth": 0.7}
            marks.cross(ax, point, "_validation", point["arm"], **style)
        low = min(ax.get_xlim()[0], ax.get_ylim()[0])
        high = max(ax.get_xlim()[1], ax.get_ylim()[1])
        ax.plot([low, high], [low, high], color="#b0b0b0", lw=0.7, zorder=0, label="identity")
        ax.set(xlim=(low, high), ylim=(low, high), aspect="equal", xlabel="validation")
        ax.locator_params(nbins=4)
        ax.set_ylabel(f"test {ax.get_ylabel()}")
    about = f"Last checkpoint; on the line both splits agree.{unfinished(frame)}"
    return panels.finish(frame, [about, *interval_notes(points)], "points")


def _primary_scores(frame: DataFrame) -> DataFrame:
    """Primary metrics with the description's own prompt and no in-context examples, by task in the
    suite's order, with the labels of their axes."""
    rows = scores(frame)
    rows = with_families(rows[(rows["shots"] == 0) & (rows["prompt"] == 0)])
    labels = rows["metric"].map(lambda metric: METRIC_LABELS.get(metric, metric))
    return in_order(rows.assign(label=labels), "task")
