"""What figures are put together from: panels of a frame's rows, their legend and small print.

@figure_of("drift")
def drift_by_family(study, frame):
    rows = require(frame[frame["metric"] == "relative_frobenius"], "no drift")
    panels = Panels.grid(rows, "module", "family")
    means = marks.curves(panels, "fraction")
    return panels.finish(frame, ["Mean over the layers.", *interval_notes(means)])
"""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.figures.style import GREY, style_of, styled
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import is_demo

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

DEMO_NOTE = "demo: small instruct model, 4-bit weights, few rows: not evidence"
PANEL = (2.4, 2.05)  # inches; three panels fill a page of two columns
TITLE_WIDTH = 28  # characters over such a panel
CELL = (1.75, 1.6)
MOST_ARMS = 8  # columns of a figure with a panel for each arm
# Are arms lines in the legend, and is the base?
LEGENDS = {
    "lines": (True, True),
    "points": (False, False),
    "lines over points": (False, True),
    "lines from a point": (True, False),
}


class NothingToDraw(Exception):
    """Says which records a figure lacks."""


def figure_of(analysis: str) -> Callable[[Callable[..., Figure]], Callable[[Any], Figure]]:
    """Turn a function of a study and its frame of the analysis into figure(study), in our style.

    Without the rows that the function requires, the figure says what is missing.
    """

    def decorate(draw: Callable[..., Figure]) -> Callable[[Any], Figure]:
        @functools.wraps(draw)
        def figure(study: StudyRecords) -> Figure:
            frame = getattr(study, analysis)
            with styled():
                try:
                    return draw(study, frame)
                except NothingToDraw as missing:
                    return _nothing(frame, f"Nothing to draw: {missing}.")

        return figure

    return decorate


def require(rows: DataFrame, missing: str) -> DataFrame:
    """The rows. Raises NothingToDraw if there are none."""
    if rows.empty:
        raise NothingToDraw(missing)
    return rows


def levels(values: Iterable[Any]) -> list[Any]:
    """Distinct values: arms as in legends, what begins with a family's name in the suite's order
    of families, the rest as they come."""
    families = [*FAMILIES]

    def sort_key(value: Any) -> Any:
        family = str(value).split(",")[0]
        return value if isinstance(value, Arm) else [*families, family].index(family)

    return sorted(dict.fromkeys(values), key=sort_key)


def most_arms(rows: DataFrame) -> tuple[DataFrame, str]:
    """The rows of at most MOST_ARMS arms, the grid's first, and a sentence on those left out."""
    arms = sorted(set(rows["arm"]), key=lambda arm: (bool(arm.details), arm))
    left_out = ", ".join(map(str, arms[MOST_ARMS:]))
    sentence = f"Left out: {left_out}." if left_out else ""
    return rows[rows["arm"].isin(arms[:MOST_ARMS])], sentence


class Panels:
    """A figure of panels, each with its key and the rows that it shows: `for key, ax, rows in`."""

    def __init__(
        self,
        rows: DataFrame,
        by: str | list[str],
        keys: Sequence[Sequence[Any]],
        size: tuple[float, float],
        share_x: str = "none",
        share_y: str = "none",
    ) -> None:
        from matplotlib.figure import Figure

        width = max(map(len, keys))
        inches = (max(size[0] * width + 0.5, 3.6), size[1] * len(keys) + 0.8)
        self.figure = Figure(figsize=inches, layout="constrained")
        self.rows, self._by = rows, by
        self.axes: dict[Any, Axes] = {}
        cells = self.figure.subplots(
            len(keys), width, squeeze=False, sharex=share_x, sharey=share_y
        )
        for names, row in zip(keys, cells):
            self.axes |= dict(zip(names, row))
            for ax in row[len(names) :]:
                ax.remove()

    @classmethod
    def wrapped(
        cls, rows: DataFrame, columns: int = 3, size: tuple[float, float] = PANEL, **share: str
    ) -> Panels:
        """A panel for each `task` of the arms, its `label` at the y axis, so many in a row.

        Unless all fit into one, a family begins a row of its own.
        """
        titles = rows[is_of_arm(rows)].drop_duplicates("task")
        blocks = [list(block) for _, block in titles.groupby("family", sort=False)["task"]]
        if len(titles) <= columns:
            blocks = [list(titles["task"])]
        keys = [block[i : i + columns] for block in blocks for i in range(0, len(block), columns)]
        panels = cls(rows, "task", keys, size, **share)
        labels = dict(zip(titles["task"], titles["label"]))
        for title, ax in panels.axes.items():
            ax.set_title(textwrap.fill(title, TITLE_WIDTH), loc="left")
            ax.set_ylabel(labels[title])
        return panels

    @classmethod
    def grid(
        cls,
        rows: DataFrame,
        row: str,
        column: str,
        size: tuple[float, float] = CELL,
        share_x: str = "col",
        share_y: str = "none",
    ) -> Panels:
        """A panel for each value of the two columns, `column`'s as titles above the first row."""
        keys = [[(r, c) for c in levels(rows[column])] for r in levels(rows[row])]
        panels = cls(rows, [row, column], keys, size, share_x, share_y)
        for key in keys[0]:
            panels.axes[key].set_title(str(key[1]), loc="left")
        return panels

    def __iter__(self) -> Iterator[tuple[Any, Axes, DataFrame]]:
        parts = dict(iter(self.rows.groupby(self._by, sort=False)))
        for key, ax in self.axes.items():
            yield key, ax, parts.get(key, self.rows[:0])

    def label(self, x: str = "", y: Callable[[str], str] | None = None) -> None:
        """`x` and ticks below each column's lowest panel; `y` of the row's name at its left."""
        lowest = {}
        for key, ax in self.axes.items():
            column = ax.get_subplotspec().colspan.start
            lowest[column] = ax
            if y and column == 0:
                ax.set_ylabel(y(key[0]))
        for ax in lowest.values():
            ax.tick_params(labelbottom=True)
            ax.set_xlabel(x or ax.get_xlabel())

    def colour_bar(self, label: str, **style: Any) -> None:
        """One colour bar for the heat maps of all panels."""
        axes = [*self.axes.values()]
        mesh = next(mappable for ax in axes for mappable in (*ax.collections, *ax.images))
        self.figure.colorbar(mesh, ax=axes, label=label, pad=0.01, **style)

    def finish(
        self,
        frame: DataFrame,
        sentences: Iterable[str],
        kind: str | None = "lines",
        extra: Sequence[Artist] = (),
        arms: Iterable[Arm] = (),
    ) -> Figure:
        """The figure with its legend above and its small print below.

        The legend has the arms of the rows and `arms`, in the way of LEGENDS (None: no arm), then
        `extra`; `frame` are the records that the small print is about.
        """
        shown = sorted({*self.rows["arm"], *arms}) if kind else []
        baselines = [arm for arm in shown if arm.method == "baseline"]
        if baselines:
            extra = [dotted("baseline (its name over the panel)"), *extra]
        shown = [arm for arm in shown if arm not in baselines]
        place_legend(self.figure, [*_arm_handles(shown, kind), *extra], shown)
        return _with_notes(self.figure, frame, sentences)


def is_of_arm(rows: DataFrame) -> Any:
    """A mask: the rows of trained arms; for tables without a column of methods."""
    return rows["arm"].map(lambda arm: arm.is_trained).astype(bool)


# ---------------------------------------------------------------------- legend and small print


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


def _arm_handles(arms: Iterable[Arm], kind: str | None) -> list[Artist]:
    from matplotlib.lines import Line2D

    handles = []
    for arm in arms:
        style = style_of(arm)
        arm_lines, base_line = LEGENDS[kind]
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


def _with_notes(figure: Figure, frame: DataFrame, sentences: Iterable[str]) -> Figure:
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


def _nothing(frame: DataFrame, text: str) -> Figure:
    """A figure of a text alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 1.4), layout="constrained")
    ax = figure.subplots()
    ax.axis("off")
    ax.text(0.5, 0.5, text, ha="center", va="center", wrap=True)
    return _with_notes(figure, frame, [])


def interval_notes(means: DataFrame, errors: str = "items", small: str = "") -> list[str]:
    """What a summary's means and intervals are over, by the number of seeds.

    `errors` is what a single record's interval is over, "" if it has none.
    """
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    groups = dict(iter(means[is_of_arm(means)].groupby(["seeds", "over"])["arm"]))
    sentences = []
    for (seeds, over), arms in sorted(groups.items(), reverse=True):
        who = f" ({', '.join(map(str, sorted(set(arms))))})" if len(groups) > 1 else ""
        bars = f"bars: 95 % interval over {over.replace('items', errors)}"
        if seeds >= MIN_SEEDS:
            sentences.append(f"Mean of {seeds} seeds{who}, {bars}{small}.")
        elif seeds > 1:
            sentences.append(f"Mean of {seeds} seeds{who}: too few for an interval{small}.")
        elif errors:
            sentences.append(f"One seed{who}, {bars}, not over seeds.")
        else:
            sentences.append(f"One seed{who}.")
    return sentences


def seeds_note(rows: DataFrame) -> str:
    """Of how many seeds the means of the arms in the rows are."""
    seeds = rows[is_of_arm(rows)].groupby(["family", "arm"])["seed"].nunique()
    if seeds.empty:
        return ""
    return "One seed per arm." if seeds.max() == 1 else f"Mean over {range_of(seeds)} seeds."


def range_of(numbers: Any) -> str:
    """The smallest to the largest number, or the one that all are."""
    return " to ".join(dict.fromkeys((str(numbers.min()), str(numbers.max()))))
