"""Figures of the tasks' gradients: pairs of tasks, and conflict over training and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.panels import (
    Panels,
    figure_of,
    interval_notes,
    most_arms,
    require,
    seeds_note,
)
from lora_tradeoffs.records import BOTH, MEAN, OVERALL
from lora_tradeoffs.tables.frames import last_checkpoints, ordered, unfinished

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

MAP, CURVES = (2.0, 1.85), (2.7, 2.0)  # inches of a panel
MEASURES = {
    "gradient_cosine": "cosine",
    "within_cosine": "cosine within a task",
    "gradient_conflict": "share of conflicts",
}
WITHIN = (
    "Within a task: between two halves of its batches, how much of its gradient is not noise; near"
    " 0, conflicts between tasks are chance, half of all pairs."
)
SPACES = (
    "LoRA: gradients of the adapter's parameters; base and full fine-tuning: of q_proj and v_proj."
)


@figure_of("gradients")
def cosine_between_tasks(study: StudyRecords, frame: DataFrame) -> Figure:
    """Heat maps of the tasks' pairwise cosines at the last checkpoint, a panel for each arm.

    The diagonal has the cosine between two halves of a task's own batches.
    """
    rows = frame[frame["metric"].isin(["gradient_cosine", "within_cosine"])]
    rows = rows[(rows["layer"] == OVERALL) & (rows["module"] == BOTH) & (rows["task"] != MEAN)]
    rows = last_checkpoints(rows.dropna(subset=["value"]))
    rows, left_out = most_arms(require(rows, "no gradients of a last checkpoint"))
    style = marks.diverging(rows["value"]) | {"annot": True, "fmt": "+.2f", "square": True}
    panels = Panels.grid(rows, "family", "arm", MAP, share_x="none")
    for (_, arm), ax, part in panels:
        tasks = ordered({*part["task"], *part["other"]})
        table = part.pivot_table(index="task", columns="other", values="value")
        table = table.reindex(index=tasks, columns=tasks)
        short = [task.split("_")[0] for task in tasks]
        table = table.fillna(table.T).set_axis(short).set_axis(short, axis=1)
        marks.heat_map(ax, table, annot_kws={"size": 7}, **style)
        ax.tick_params(labelsize=6, labelleft=arm == panels.rows["arm"].min())
    panels.label(y=str)
    panels.colour_bar("cosine", aspect=40)
    about = (
        "Last checkpoint, all layers, mean over batches; below 0 two tasks conflict. Diagonal:"
        " a task with itself, on two halves of its batches: how much of its gradient is not"
        f" noise. {SPACES}"
    )
    sentences = [about, seeds_note(rows), left_out, unfinished(frame)]
    return panels.finish(frame, sentences, kind=None)


@figure_of("gradients")
def conflict_over_training(study: StudyRecords, frame: DataFrame) -> Figure:
    """Mean cosine of the pairs and within tasks, and share of conflicts over training."""
    rows = _means_of_pairs(frame)
    rows = require(rows[rows["layer"] == OVERALL], "no gradients of two tasks")
    about = f"All layers, mean over the pairs of tasks; below 0 they conflict. {WITHIN}"
    return _means_along(frame, rows, "fraction", about)


@figure_of("gradients")
def conflict_by_layer(study: StudyRecords, frame: DataFrame) -> Figure:
    """Mean cosine of the pairs and within tasks, and share of conflicts by layer, at the end."""
    rows = _means_of_pairs(frame)
    rows = last_checkpoints(rows[rows["layer"] != OVERALL])
    require(rows, "no gradients of a last checkpoint's layer")
    about = f"Last checkpoint, mean over the pairs of tasks. {WITHIN}{unfinished(frame)}"
    return _means_along(frame, rows, "layer", about)


@figure_of("gradients")
def conflict_by_layer_over_training(study: StudyRecords, frame: DataFrame) -> Figure:
    """Heat maps, layers by checkpoints, of the mean cosine between and within tasks, by arm."""
    rows = _means_of_pairs(frame)
    kinds = rows["metric"].map({"gradient_cosine": "between", "within_cosine": "within"})
    rows = rows.assign(kind=rows["family"] + ", " + kinds)[rows["layer"] != OVERALL]
    rows, left_out = most_arms(require(rows.dropna(subset=["kind"]), "no gradients of a layer"))
    panels = Panels.grid(rows, "kind", "arm", MAP, share_x="none")
    marks.maps_over_training(panels, "cosine", **marks.diverging(rows["value"]))
    about = f"Mean over the pairs of tasks; below 0 (red) they conflict. {WITHIN}"
    return panels.finish(frame, [about, SPACES, seeds_note(rows), left_out], kind=None)


def _means_of_pairs(frame: DataFrame) -> DataFrame:
    """The records of the mean over the pairs, or within tasks, of both modules."""
    rows = frame[(frame["task"] == MEAN) & (frame["module"] == BOTH)]
    return rows[rows["metric"].isin(MEASURES)].dropna(subset=["value"])


def _means_along(frame: DataFrame, rows: DataFrame, x: str, about: str) -> Figure:
    """The measures, a row each, and the families, a column each, along fraction or layer."""
    rows = rows.assign(measure=rows["metric"].map(MEASURES))
    panels = Panels.grid(rows, "measure", "family", CURVES, share_y="row")
    for _, ax, _ in panels:
        ax.axhline(0.0, color="#bbbbbb", lw=0.7, zorder=0)
    means = marks.curves(panels, x, spread=0.25)
    for (measure, _), ax, _ in panels:
        if measure == MEASURES["gradient_conflict"]:  # without any the axis shows a tenth
            ax.set_ylim(-0.02, max(0.1, ax.get_ylim()[1]))
    panels.label(y=str)
    return panels.finish(frame, [about, SPACES, *interval_notes(means, "batches")])
