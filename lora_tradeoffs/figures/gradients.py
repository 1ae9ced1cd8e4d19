"""Figures of the tasks' gradients: pairs of tasks, and conflict over training and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.drift import families_of, layers_by_checkpoints
from lora_tradeoffs.figures.style import styled
from lora_tradeoffs.records import BOTH, MEAN, OVERALL
from lora_tradeoffs.tables.frames import last_checkpoints, ordered, unfinished

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

CELL = (2.0, 1.85)  # inches of a panel
MEASURES = {"gradient_cosine": "cosine", "gradient_conflict": "share of conflicts"}
SPACES = (
    "LoRA: gradients of the adapter's parameters; base and full fine-tuning: of q_proj and v_proj."
)


@styled()
def cosine_between_tasks(study: StudyRecords) -> Figure:
    """Heat maps of the tasks' pairwise cosines at the last checkpoint, a panel for each arm.

    The diagonal has the cosine between two halves of a task's own batches.
    """
    frame = study.gradients
    rows = frame[frame["metric"].isin(["gradient_cosine", "within_cosine"])]
    rows = rows[(rows["layer"] == OVERALL) & (rows["module"] == BOTH) & (rows["task"] != MEAN)]
    rows = last_checkpoints(rows.dropna(subset=["value"]))
    if rows.empty:
        return panels.nothing(frame, "no gradients of a last checkpoint")
    limit = max(float(rows["value"].abs().max()), 1e-3)
    arms = panels.most_arms(rows["arm"])
    figure, axes = panels.grid(families_of(rows), arms, CELL, share_x="none")
    image = None
    for (family, arm), ax in axes.items():
        in_panel = rows[(rows["family"] == family) & (rows["arm"] == arm)]
        image = _cosines(ax, in_panel, limit) or image
        ax.tick_params(labelsize=6, labelleft=arm == arms[0])
    panels.label_edges(axes, y=str)
    figure.colorbar(image, ax=list(axes.values()), label="cosine", aspect=40, pad=0.01)
    about = (
        "Last checkpoint, all layers, mean over batches; below 0 two tasks conflict. Diagonal:"
        " a task with itself, on two halves of its batches: how much of its gradient is not"
        f" noise. {SPACES}"
    )
    return panels.notes(figure, frame, [about, *panels.seeds_notes(rows)[:1], unfinished(frame)])


def conflict_over_training(study: StudyRecords) -> Figure:
    """Mean cosine of the pairs and share of conflicts over training, the base dashed."""
    rows = _means_of_pairs(study.gradients)
    rows = rows[rows["layer"] == OVERALL]
    if rows.empty:
        return panels.nothing(study.gradients, "no gradients of two tasks")
    about = "All layers, mean over the pairs of tasks; below 0 they conflict."
    return _means_along(study.gradients, rows, "fraction", about)


def conflict_by_layer(study: StudyRecords) -> Figure:
    """Mean cosine of the pairs and share of conflicts by layer, at the last checkpoint."""
    frame = study.gradients
    rows = _means_of_pairs(frame)
    rows = last_checkpoints(rows[rows["layer"] != OVERALL])
    if rows.empty:
        return panels.nothing(frame, "no gradients of a last checkpoint's layer")
    about = f"Last checkpoint, mean over the pairs of tasks.{unfinished(frame)}"
    return _means_along(frame, rows, "layer", about)


@styled()
def conflict_by_layer_over_training(study: StudyRecords) -> Figure:
    """Heat maps, layers by checkpoints, of the pairs' mean cosine, a panel for each arm."""
    frame = study.gradients
    rows = _means_of_pairs(frame)
    rows = rows[(rows["layer"] != OVERALL) & (rows["metric"] == "gradient_cosine")]
    if rows.empty:
        return panels.nothing(frame, "no gradients of a layer")
    arms = panels.most_arms(rows["arm"])
    rows = rows[rows["arm"].isin(arms)]
    limit = max(float(rows["value"].abs().max()), 1e-3)
    colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit}
    figure, axes = panels.grid(families_of(rows), arms, CELL, share_x="none")
    image = None
    for (family, arm), ax in axes.items():
        in_panel = rows[(rows["family"] == family) & (rows["arm"] == arm)]
        image = layers_by_checkpoints(ax, in_panel, **colours) or image
    panels.label_edges(axes, "fraction of training", lambda family: f"{family}\nlayer")
    figure.colorbar(image, ax=list(axes.values()), label="cosine", aspect=40, pad=0.01)
    about = "Mean over the pairs of tasks; below 0 (red) they conflict."
    return panels.notes(figure, frame, [about, SPACES, *panels.seeds_notes(rows)[:1]])


def _means_of_pairs(frame: DataFrame) -> DataFrame:
    """The records of the mean over the pairs, of both modules."""
    rows = frame[(frame["task"] == MEAN) & (frame["module"] == BOTH)]
    return rows[rows["metric"].isin(MEASURES)].dropna(subset=["value"])


@styled()
def _means_along(frame: DataFrame, rows: DataFrame, x: str, about: str) -> Figure:
    """Both measures, a row each, and the families, a column each, along fraction or layer."""
    families = families_of(rows)
    figure, axes = panels.grid(MEASURES.values(), families, (2.7, 2.0), share_y="row")
    for (measure, family), ax in axes.items():
        in_panel = rows[(rows["family"] == family) & (rows["metric"].map(MEASURES) == measure)]
        ax.axhline(0.0, color="#bbbbbb", lw=0.7, zorder=0)
        spread = 0.02 if x == "fraction" else 0.25
        marks.mean_curves(ax, in_panel, x, spread=spread, alpha=0.6)
        if measure == MEASURES["gradient_conflict"]:  # without any the axis shows a tenth
            ax.set_ylim(-0.02, max(0.1, ax.get_ylim()[1]))
        if x == "layer":
            ax.xaxis.get_major_locator().set_params(integer=True)
        else:
            ax.set_xlim(-0.04, 1.06)
    panels.label_edges(axes, "layer" if x == "layer" else "fraction of training", str)
    return panels.finish(
        figure, frame, rows["arm"], [about, SPACES, *panels.seeds_notes(rows, "batches")]
    )


def _cosines(ax: Axes, rows: DataFrame, limit: float) -> Any:
    """The symmetric matrix of the tasks' cosines, each written into its cell; None if empty."""
    if rows.empty:
        marks.empty_panel(ax)
        return None
    tasks = ordered({*rows["task"], *rows["other"]})
    table = rows.pivot_table(index="task", columns="other", values="value")
    table = table.reindex(index=tasks, columns=tasks)
    short = [task.split("_")[0] for task in tasks]
    table = table.fillna(table.T).set_axis(short).set_axis(short, axis=1)
    colours = {"cmap": "RdBu", "vmin": -limit, "vmax": limit, "square": True}
    return marks.heat_map(ax, table, annot=True, fmt="+.2f", annot_kws={"size": 7}, **colours)
