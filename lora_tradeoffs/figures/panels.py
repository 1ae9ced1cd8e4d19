"""What figures are put together from: panels, their labels, the legend and the small print.

@styled()
def drift_by_family(study):
    figure, axes = panels.grid(["size", "rotation"], ["similar", "dissimilar"])
    for (row, column), ax in axes.items():
        marks.curve(ax, arm, x, points)
    panels.label_edges(axes, "fraction of training", y=str)
    return panels.finish(figure, study.drift, arms, ["Mean over the layers."])
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.style import GREY, palette, style_of, styled
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import is_demo, is_trained

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

DEMO_NOTE = "demo: small instruct model, 4-bit weights, few rows: not evidence"
PANEL = (2.4, 2.05)  # inches; three panels fill a page of two columns
CELL = (1.75, 1.6)
MOST_ARMS = 8  # columns of a figure with a panel for each arm
# Are arms lines in the legend, and is the base?
LEGENDS = {
    "lines": (True, True),
    "points": (False, False),
    "lines over points": (False, True),
    "lines from a point": (True, False),
}

# ------------------------------------------------------------------------------------ panels


def titled(
    blocks: Iterable[Mapping[str, str]],
    columns: int = 3,
    size: tuple[float, float] = PANEL,
    share_x: str = "none",
    share_y: str = "none",
) -> tuple[Figure, dict[str, Axes]]:
    """Panels by title; a block holds their y labels and begins a row of its own."""
    labels = {title: label for block in blocks for title, label in block.items()}
    rows = [
        names[i : i + columns] for names in map(list, blocks) for i in range(0, len(names), columns)
    ]
    figure, axes = _subplots(rows, size, share_x, share_y)
    for title, ax in axes.items():
        ax.set_title(title, loc="left")
        ax.set_ylabel(labels[title])
    return figure, axes


def grid(
    rows: Iterable[str],
    columns: Iterable[Any],
    size: tuple[float, float] = CELL,
    share_x: str = "col",
    share_y: str = "none",
) -> tuple[Figure, dict[tuple[str, Any], Axes]]:
    """A panel for each row and column, the columns' names as titles above the first row."""
    keys = [[(row, column) for column in columns] for row in rows]
    figure, axes = _subplots(keys, size, share_x, share_y)
    for row, column in keys[0]:
        axes[row, column].set_title(str(column), loc="left")
    return figure, axes


def _subplots(
    keys: Sequence[Sequence[Any]], size: tuple[float, float], share_x: str, share_y: str
) -> tuple[Figure, dict[Any, Axes]]:
    from matplotlib.figure import Figure

    width = max(map(len, keys))
    inches = (max(size[0] * width + 0.5, 3.6), size[1] * len(keys) + 0.8)
    figure = Figure(figsize=inches, layout="constrained")
    axes = {}
    for row, cells in zip(
        keys, figure.subplots(len(keys), width, squeeze=False, sharex=share_x, sharey=share_y)
    ):
        axes |= dict(zip(row, cells))
        for ax in cells[len(row) :]:
            ax.remove()
    return figure, axes


def label_edges(
    axes: Mapping[Any, Axes], x: str = "", y: Callable[[str], str] | None = None
) -> None:
    """`x` and ticks below each column's lowest panel; `y` of the row's name at its left."""
    lowest = {}
    for key, ax in axes.items():
        column = ax.get_subplotspec().colspan.start
        lowest[column] = ax
        if y and column == 0:
            ax.set_ylabel(y(key[0]))
    for ax in lowest.values():
        ax.tick_params(labelbottom=True)
        if x:
            ax.set_xlabel(x)


def most_arms(arms: Iterable[Arm]) -> list[Arm]:
    """At most MOST_ARMS of the arms, the grid's first, in the order of legends."""
    return sorted(sorted(set(arms), key=lambda arm: (bool(arm.details), arm))[:MOST_ARMS])


# ----------------------------------------------------------- over training and by rank


def training_curves(axes: Mapping[str, Axes], rows: DataFrame, table: DataFrame) -> None:
    """The arms over the fraction of training in panels by task, from the base on.

    `rows` hold the base and the baselines, `table` is the summary. All arms lie within half the
    distance of two checkpoints, so that their bars do not overlap.
    """
    steps = [0.0, *sorted(set(table["fraction"]))]
    gap = min((b - a for a, b in pairwise(steps) if b > a), default=1.0)
    shift = marks.offsets(table["arm"], min(0.5 * gap, 0.07))
    for task, ax in axes.items():
        base = marks.references(ax, rows[rows["task"] == task])
        start = None if base is None else (0.0, base)
        for arm, points in table[table["task"] == task].groupby("arm"):
            marks.curve(ax, arm, points["fraction"] + shift[arm], points, start, alpha=0.5)
        ax.set_xlim(-0.02, steps[-1] + 0.06)
    label_edges(axes, "fraction of training")


def points_by_rank(axes: Mapping[str, Axes], rows: DataFrame, table: DataFrame) -> None:
    """The arms over LoRA's ranks, full qv and full, in panels by task; beside a mean its seeds.

    `rows` are the records, `table` is their summary.
    """
    arms = set(table["arm"])
    slots = sorted({Arm(arm.method, arm.rank) for arm in arms})
    x: dict[Arm, float] = {}
    for i, slot in enumerate(slots):
        at_slot = [arm for arm in arms if (arm.method, arm.rank) == (slot.method, slot.rank)]
        x |= {arm: i + offset for arm, offset in marks.offsets(at_slot, 0.5).items()}
    for task, ax in axes.items():
        for arm, points in table[table["task"] == task].groupby("arm"):
            marks.bars(ax, [x[arm]], points, arm)
            style = style_of(arm) | {"linestyle": "none"}
            ax.plot([x[arm]], points["value"], label=arm, **style)
            if points["seeds"].iloc[0] > 1:
                seeds = rows[(rows["task"] == task) & (rows["arm"] == arm)]["value"]
                small = {"marker": ".", "markersize": 3, "alpha": 0.7, "linestyle": "none"}
                small |= {"label": f"seeds of {arm}", "color": style["color"]}
                ax.plot([x[arm] - 0.2] * len(seeds), seeds, **small)
        names = [str(slot.rank or slot.kind.replace(" ", "\n")) for slot in slots]
        ax.set_xticks(range(len(slots)), names)
        ax.set_xlim(-0.6, len(slots) - 0.4)
    label_edges(axes, "LoRA rank, full fine-tuning")


# ---------------------------------------------------------------------- legend and small print


def finish(
    figure: Figure,
    frame: DataFrame,
    arms: Iterable[Arm],
    sentences: Iterable[str],
    kind: str = "lines",
    extra: Sequence[Artist] = (),
) -> Figure:
    """The figure with its legend above (the arms, then `extra`) and its small print below."""
    arms = sorted(set(arms))
    place_legend(figure, [*_arm_handles(arms, kind), *extra], arms)
    return notes(figure, frame, sentences)


def place_legend(figure: Figure, handles: Sequence[Artist], arms: Iterable[Arm] = ()) -> None:
    """The legend above the panels; the figure grows by what it takes beyond two lines.

    What all trained arms have in their brackets is its title, and left out of the labels.
    """
    trained = {arm for arm in arms if arm.is_trained}
    details = {arm.details for arm in trained}
    common = details.pop() if len(trained) > 1 and len(details) == 1 else ""
    kinds = {arm.label: arm.kind for arm in trained} if common else {}
    labels = [kinds.get(handle.get_label(), handle.get_label()) for handle in handles]
    if not labels:
        return
    columns = max(1, int(figure.get_size_inches()[0] / (0.6 + 0.065 * max(map(len, labels)))))
    figure.legend(
        handles,
        labels,
        title=f"all runs: {common}" if common else None,
        title_fontsize=7,
        loc="outside upper center",
        ncols=min(columns, len(handles)),
    )
    lines = math.ceil(len(handles) / columns) + bool(common)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(lines - 2, 0))


def _arm_handles(arms: Iterable[Arm], kind: str) -> list[Artist]:
    from matplotlib.lines import Line2D

    arm_lines, base_line = LEGENDS[kind]
    handles = []
    for arm in arms:
        style = style_of(arm)
        if not (arm_lines if arm.is_trained else base_line):
            style["linestyle"] = "none"
        elif arm.method == "base":
            style["marker"] = ""
        handles.append(Line2D([], [], label=arm, **style))
    return handles


def dotted(label: str) -> Artist:
    """A legend's entry for grey dotted lines."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, color=GREY, linestyle=":", lw=1.0)


def notes(figure: Figure, frame: DataFrame, sentences: Iterable[str]) -> Figure:
    """The figure with small print below it, the demo's note last; its layout is then fixed."""
    sentences = filter(None, [*sentences, frame.attrs.get("note")])
    text = " ".join(map(str.strip, sentences)).replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(text, int(figure.get_size_inches()[0] * 19))
    if is_demo(frame):
        lines.append(DEMO_NOTE)
    figure.supxlabel("\n".join(lines), size=7, color="#444444")
    figure.get_layout_engine().execute(figure)  # ticks take their style here
    figure.set_layout_engine(None)  # else saving lays out again, which takes longer than drawing
    return figure


def interval_notes(table: DataFrame, small: str = "") -> list[str]:
    """What a summary's means and intervals are over, by the number of seeds."""
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    trained = table[[arm.is_trained for arm in table["arm"]]]
    groups = {key: palette(group["arm"]) for key, group in trained.groupby(["seeds", "over"])}
    sentences = []
    for (seeds, over), arms in sorted(groups.items(), reverse=True):
        who = f" ({', '.join(map(str, arms))})" if len(groups) > 1 else ""
        if seeds >= MIN_SEEDS:
            sentences.append(f"Mean of {seeds} seeds{who}, bars: 95 % interval over {over}{small}.")
        elif seeds > 1:
            sentences.append(f"Mean of {seeds} seeds{who}: too few for an interval{small}.")
        else:
            sentences.append(f"One seed{who}, bars: 95 % interval over items, not over seeds.")
    return sentences


def seeds_notes(rows: DataFrame, errors: str = "") -> list[str]:
    """Of how many seeds the rows' means are; with `errors`, what one seed's interval is over."""
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    seeds = rows[is_trained(rows)].groupby(["family", "arm"])["seed"].nunique()
    counts = sorted({seeds.min(), seeds.max()}) if len(seeds) else []
    sentences = [f"Mean over {' to '.join(map(str, counts))} seeds."] if counts else []
    if counts == [1]:
        sentences = ["One seed per arm."]
    over = [errors] if errors and (not counts or counts[0] == 1) else []
    if counts and counts[-1] >= MIN_SEEDS:
        over.append(f"seeds and {errors}" if errors else "seeds")
    if over:
        who = f" (with one seed over {errors} alone)" if len(over) > 1 else ""
        sentences.append(f"Bars: 95 % interval over {over[-1]}{who}.")
    return sentences


@styled()
def nothing(frame: DataFrame, missing: str) -> Figure:
    """A figure that says what is missing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 1.4), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    ax.text(0.5, 0.5, f"Nothing to draw: {missing}.", ha="center", va="center", wrap=True)
    return notes(figure, frame, [])
