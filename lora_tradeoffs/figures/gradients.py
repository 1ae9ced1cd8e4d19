"""Figures of the tasks' gradients from their records: pairs of tasks, and conflict over training.

A figure is a function of the records (result_tables.load_records of gradients.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures.drift import chosen_arms, families_of, grid, label_edges, legend, told
from lora_tradeoffs.figures.style import GREY, bars, nothing, spread, style_of, styled
from lora_tradeoffs.records import BOTH, MEAN, OVERALL
from lora_tradeoffs.statistics.comparisons import MIN_SEEDS
from lora_tradeoffs.tables.arms import BASE
from lora_tradeoffs.tables.frames import (
    is_trained,
    last_checkpoints,
    ordered,
    summarise,
    unfinished,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

CELL = (2.0, 1.85)  # inches of a panel
MEASURES = {"gradient_cosine": "cosine", "gradient_conflict": "share of conflicts"}
SPACES = (
    "LoRA: gradients of the adapter's parameters; base and full fine-tuning: of q_proj and v_proj."
)


def cosine_between_tasks(frame: DataFrame) -> Figure:
    """Heat maps of the tasks' pairwise cosines at the last checkpoint, a panel an arm.

    On the diagonal stands what two halves of a task's own batch have.
    """
    rows = frame[frame["metric"].isin(["gradient_cosine", "within_cosine"])]
    rows = _overall(rows[rows["task"] != MEAN]).dropna(subset=["value"])
    rows = last_checkpoints(rows)
    if rows.empty:
        return nothing(frame, "no gradients of a last checkpoint")
    arms, families = chosen_arms(rows["arm"]), families_of(rows)
    limit = max(float(rows["value"].abs().max()), 1e-3)
    with styled():
        figure, axes = grid(families, {a: (a,) for a in arms}, CELL, share_x=False)
        for (family, arm), ax in axes.items():
            own = rows[(rows["family"] == family) & (rows["arm"] == arm)]
            if own.empty:
                _no_run(ax)
                continue
            image = _matrix(ax, own, limit)
        label_edges(axes)
        figure.colorbar(image, ax=list(axes.values()), label="cosine", aspect=40, pad=0.01)
        about = (
            "Last checkpoint, all layers, mean over batches; below 0 two tasks conflict. Diagonal:"
            " a task with itself, on two halves of its batches, so how much of its gradient is not"
            f" noise. {SPACES}"
        )
        return told(figure, frame, [about, *_means(rows), unfinished(frame).strip()])


def conflict_over_training(frame: DataFrame) -> Figure:
    """Mean cosine of the pairs and share of conflicts over training, the base dashed."""
    rows = _of_mean(frame)
    rows = rows[rows["layer"] == OVERALL]
    if rows.empty:
        return nothing(frame, "no gradients of two tasks")
    about = "All layers, mean over the pairs of tasks; below 0 they conflict."
    return _means_along(frame, rows, "fraction", about)


def conflict_by_layer(frame: DataFrame) -> Figure:
    """Mean cosine of the pairs and share of conflicts by layer, at the last checkpoint."""
    rows = _of_mean(frame)
    rows = last_checkpoints(rows[rows["layer"] != OVERALL])
    if rows.empty:
        return nothing(frame, "no gradients of a last checkpoint's layer")
    about = f"Last checkpoint, mean over the pairs of tasks.{unfinished(frame)}"
    return _means_along(frame, rows, "layer", about)


def _means_along(frame: DataFrame, rows: DataFrame, x: str, about: str) -> Figure:
    """Both measures, a row each, and the families, a column each, along fraction or layer."""
    with styled():
        columns = {family: (family,) for family in families_of(rows)}
        figure, axes = grid(list(MEASURES.values()), columns, (2.7, 2.0), share_y=True)
        arms: set[str] = set()
        for (measure, family), ax in axes.items():
            own = rows[(rows["family"] == family) & (rows["metric"].map(MEASURES) == measure)]
            arms |= _lines(ax, own, x)
            _limit_share(ax, measure)
            if x == "layer":
                ax.xaxis.get_major_locator().set_params(integer=True)
            else:
                ax.set_xlim(-0.04, 1.06)
        label_edges(axes, "layer" if x == "layer" else "fraction of training")
        legend(figure, arms)
        return told(figure, frame, [about, SPACES, *_seeds(rows)])


def layers_over_training(frame: DataFrame) -> Figure:
    """Heat maps, layers by checkpoints, of the pairs' mean cosine, a panel an arm."""
    rows = _of_mean(frame)
    rows = rows[(rows["layer"] != OVERALL) & (rows["metric"] == "gradient_cosine")]
    rows = rows.dropna(subset=["value"])
    families = families_of(rows)
    if not families:
        return nothing(frame, "no gradients of a layer")
    arms = chosen_arms(rows["arm"])
    rows = rows[rows["arm"].isin(arms)]
    limit = max(float(rows["value"].abs().max()), 1e-3)
    with styled():
        figure, axes = grid(families, {a: (a,) for a in arms}, CELL, share_x=False)
        for (family, arm), ax in axes.items():
            own = rows[(rows["family"] == family) & (rows["arm"] == arm)]
            if own.empty:
                _no_run(ax)
                continue
            own = own.assign(fraction=own["fraction"].round(3))
            cells = own.pivot_table(index="layer", columns="fraction", values="value")
            image = ax.pcolormesh(
                cells.to_numpy(), cmap="RdBu", vmin=-limit, vmax=limit, rasterized=True
            )
            places = sorted({0, len(cells.columns) // 2, len(cells.columns) - 1})
            ax.set_xticks([p + 0.5 for p in places], [f"{cells.columns[p]:.2g}" for p in places])
            steps = range(0, len(cells), max(1, len(cells) // 5))
            ax.set_yticks([p + 0.5 for p in steps], [f"{cells.index[p]:.0f}" for p in steps])
            ax.grid(False)
        label_edges(axes, "fraction of training", lambda family: f"{family}\nlayer")
        figure.colorbar(image, ax=list(axes.values()), label="cosine", aspect=40, pad=0.01)
        about = "Mean over the pairs of tasks; below 0 (red) they conflict."
        return told(figure, frame, [about, SPACES, *_means(rows)])


# ---------------------------------------------------------------------------------- helpers


def _overall(frame: DataFrame) -> DataFrame:
    return frame[(frame["layer"] == OVERALL) & (frame["module"] == BOTH)]


def _of_mean(frame: DataFrame) -> DataFrame:
    """Of both modules, the mean over the pairs, where there is one."""
    rows = frame[(frame["task"] == MEAN) & (frame["module"] == BOTH)]
    return rows[rows["metric"].isin(MEASURES)].dropna(subset=["value"])


def _matrix(ax: Axes, rows: DataFrame, limit: float) -> Any:
    """The symmetric matrix of the tasks' cosines, each written into its cell."""
    import numpy as np

    tasks = ordered({*rows["task"], *rows["other"]})
    cells = np.full((len(tasks), len(tasks)), np.nan)
    for pair, value in rows.groupby(["task", "other"])["value"].mean().items():
        i, j = map(tasks.index, pair)
        cells[i, j] = cells[j, i] = value
    image = ax.imshow(cells, cmap="RdBu", vmin=-limit, vmax=limit)
    for i, j in np.ndindex(cells.shape):
        if np.isfinite(cells[i, j]):
            dark = abs(cells[i, j]) > 0.6 * limit
            style = {"color": "white" if dark else "black", "size": 7, "ha": "center"}
            style |= {"va": "center", "style": "italic" if i == j else "normal"}
            ax.text(j, i, f"{cells[i, j]:+.2f}", **style)
    short = [task.split("_")[0] for task in tasks]
    ax.set_xticks(range(len(tasks)), short, size=6.5)
    ax.set_yticks(range(len(tasks)), short, size=6.5)
    ax.grid(False)
    return image


def _lines(ax: Axes, rows: DataFrame, x: str) -> set[str]:
    """A line an arm over `x` with its intervals; over training the base is a dashed level."""
    rows = rows.assign(task="", **{x: rows[x].astype(float).round(4)})
    table = summarise(rows, by=(x,))
    ax.axhline(0.0, color="#bbbbbb", lw=0.7, zorder=0)
    shift = spread(table["arm"], 0.02 if x == "fraction" else 0.25)
    for arm, points in table.groupby("arm"):
        style = style_of(arm)
        if arm == BASE and x == "fraction":
            level = points.iloc[0]
            ax.axhline(level["value"], label=arm, **style | {"marker": "", "lw": 1.0})
            ax.axhspan(level["low"], level["high"], color=GREY, alpha=0.15, lw=0, zorder=0)
            continue
        places = points[x] + shift[arm]
        bars(ax, places, points, arm, alpha=0.6)
        ax.plot(places, points["value"], label=arm, **style)
    return set(table["arm"])


def _limit_share(ax: Axes, measure: str) -> None:
    """A share's axis begins at 0 and shows at least a tenth: none at all is a flat line."""
    if measure == MEASURES["gradient_conflict"]:
        ax.set_ylim(-0.02, max(0.1, ax.get_ylim()[1]))


def _no_run(ax: Axes) -> None:
    ax.text(0.5, 0.5, "no such run", ha="center", transform=ax.transAxes, color="grey")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


def _seed_counts(rows: DataFrame) -> list[int]:
    """The fewest and the most seeds of an arm; none without runs."""
    seeds = rows[is_trained(rows)].groupby(["family", "arm"])["seed"].nunique()
    return sorted({int(seeds.min()), int(seeds.max())}) if len(seeds) else []


def _means(rows: DataFrame) -> list[str]:
    """What a cell of a heat map is the mean of."""
    counts = _seed_counts(rows)
    if not counts:
        return []
    if counts == [1]:
        return ["One seed an arm."]
    return [f"Mean over {' to '.join(map(str, counts))} seeds."]


def _seeds(rows: DataFrame) -> list[str]:
    """The same of a point, and what its bars are over (plotting.bars draws none of two seeds)."""
    counts = _seed_counts(rows)
    over = ["batches"] if not counts or counts[0] == 1 else []
    over += ["seeds and batches"] if counts and counts[-1] >= MIN_SEEDS else []
    who = " (of one seed over batches alone)" if len(over) > 1 else ""
    bars = [f"Bars: 95 % interval over {over[-1]}{who}."] if over else []
    return [*_means(rows), *bars]


FIGURES = (
    cosine_between_tasks,
    conflict_over_training,
    conflict_by_layer,
    layers_over_training,
)
