"""One style and one palette: an arm keeps its colour and marker in every figure.

An arm is a method, a rank and a place. LoRA's ranks are a ramp from light to dark, full fine-tuning
and full_qv stand outside it, the base is a dashed grey line with its interval as a band, baselines
are dotted. Figures are matplotlib's Figure objects, without pyplot: they draw on any machine.
"""

from __future__ import annotations

import math
import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.files import written_whole
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import is_demo, is_trained

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

DEMO_NOTE = "demo: small instruct model, 4-bit weights, few rows: not evidence"

METRIC_LABELS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "codexglue_bleu": "BLEU (0 to 100)",
    "rougeL": "ROUGE-L",
    "acc": "accuracy",
    "acc_norm": "accuracy (acc_norm)",
    "retention": "mean accuracy",
    "log_likelihood": "nats per token",
    "cka": "CKA with the base",
}

# Colours by log2(rank), interpolated between and held beyond: YlGnBu's darker two thirds, whose
# neighbours stay apart for all three colour deficiencies (tests/test_plotting.py).
RAMP = {
    0: "#d6efb3",
    2: "#a0dab8",
    3: "#46b8c3",
    4: "#1e83ba",
    5: "#24439b",
    6: "#081d58",
    9: "#000208",
}
DENSE = {"full_qv": "#f0a030", "full": "#b2182b"}
GREY = "#6e6e6e"
RANK_MARKERS = {4: "o", 8: "s", 16: "^", 32: "D", 64: "v"}
VARIANT_MARKERS = "os^Dv<>phd8"  # open ones, for what is not of the grid
PLACE_LINES = {"qv": "-", "attention": (0, (5, 1)), "mlp": (0, (3, 1, 1, 1)), "all": (0, (2, 1))}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text: journals refuse Type 3 fonts
}
# Are arms lines in the legend, and is the base?
LEGENDS = {
    "lines": (True, True),
    "points": (False, False),
    "lines over points": (False, True),
    "lines from a point": (True, False),
}
PANEL = (2.4, 2.05)  # inches; three panels fill a page of two columns


def style_of(arm: Arm) -> dict[str, Any]:
    """Colour, marker and line style of an arm, whichever other arms a figure holds."""
    if arm.method == "base":
        return {"color": GREY, "marker": "*", "linestyle": "--"}
    if arm.method == "baseline":
        return {"color": GREY, "marker": "x", "linestyle": ":"}
    style = {"color": DENSE.get(arm.method), "marker": "X", "linestyle": "-"}
    if arm.method == "lora":
        style = {
            "color": rank_colour(arm.rank),
            "marker": RANK_MARKERS.get(arm.rank, "h"),
            "linestyle": PLACE_LINES.get(arm.target_modules, "-"),
        }
    elif arm.method == "full_qv":
        style |= {"marker": "P", "linestyle": (0, (4, 1, 1, 1))}
    if arm.details:
        shape = VARIANT_MARKERS[zlib.crc32(arm.details.encode()) % len(VARIANT_MARKERS)]
        style |= {"marker": shape, "markerfacecolor": "white"}
    return style


def rank_colour(rank: int) -> str:
    """The ramp's colour at a rank."""
    import numpy as np
    from matplotlib.colors import to_hex, to_rgb

    colours = np.array([to_rgb(colour) for colour in RAMP.values()])
    return to_hex([np.interp(math.log2(max(rank, 1)), list(RAMP), column) for column in colours.T])


def palette(arms: Iterable[Arm]) -> dict[Arm, str]:
    """Colours by arm in the order of legends, as seaborn's `palette` takes them."""
    return {arm: style_of(arm)["color"] for arm in sorted(set(arms))}


def save(figure: Figure, path: Path, pdf: bool = False) -> Path:
    """Write the figure as PNG, with `pdf` also as PDF beside it, each whole or not at all."""
    for kind in ("png", "pdf")[: 1 + pdf]:
        target = path.with_suffix(f".{kind}")
        with written_whole(target) as temporary, styled():
            dates = {"CreationDate": None} if kind == "pdf" else None  # the same bytes every time
            figure.savefig(temporary, format=kind, dpi=200, metadata=dates)
            figure.set_layout_engine("none")  # its places are found, and finding them takes longest
    return path.with_suffix(".png")


def styled() -> Any:
    """A context in which figures are made and saved: seaborn's "ticks", and our sizes."""
    import matplotlib
    import seaborn

    return matplotlib.rc_context(seaborn.axes_style("ticks") | STYLE)


def panels(
    blocks: Iterable[Mapping[str, str]],
    columns: int = 3,
    size: tuple[float, float] = PANEL,
    **shared: bool,
) -> tuple[Figure, dict[str, Axes]]:
    """A figure of panels: a block holds their y labels by title and begins a row of its own."""
    from matplotlib.figure import Figure

    labels = {title: label for block in blocks for title, label in block.items()}
    rows = [
        names[i : i + columns] for names in map(list, blocks) for i in range(0, len(names), columns)
    ]
    width = max(map(len, rows))
    inches = (max(size[0] * width, 3.6), size[1] * len(rows) + 0.8)
    figure = Figure(figsize=inches, layout="constrained")
    mosaic = [row + ["."] * (width - len(row)) for row in rows]
    axes = figure.subplot_mosaic(mosaic, **shared)
    for title, ax in axes.items():
        ax.set_title(title, loc="left")
        ax.set_ylabel(labels[title])
    return figure, axes


def references(ax: Axes, rows: DataFrame) -> float | None:
    """The base as a dashed line in its interval's band, baselines dotted; the base's value."""
    base = None
    for _, row in rows[~is_trained(rows)].iterrows():
        style = style_of(row["arm"]) | {"marker": "", "lw": 1.0, "zorder": 1}
        ax.axhline(row["value"], label=row["arm"], **style)
        if row["method"] == "base":
            base = row["value"]
            if math.isfinite(row["low"]) and math.isfinite(row["high"]):
                ax.axhspan(row["low"], row["high"], color=GREY, alpha=0.15, lw=0, zorder=0)
        else:
            name = row["arm"].label.replace("_", " ")
            ax.set_title(name, loc="right", size=6.5, weight="normal", color=GREY)
    return base


def bars(ax: Axes, x: Any, points: DataFrame, arm: Arm, alpha: float = 0.8) -> None:
    """Intervals alone; the values are drawn as a line of their own."""
    colour = style_of(arm)["color"]
    style = {"yerr": interval_lengths(points), "fmt": "none", "elinewidth": 0.7, "alpha": alpha}
    ax.errorbar(x, points["value"], ecolor=colour, label=arm, **style)


def curves(ax: Axes, points: DataFrame, shift: Mapping[Arm, float], base: float | None) -> None:
    """A line an arm over the fraction of training, from the base on, with its intervals."""
    start = [] if base is None else [(0.0, base)]
    for arm, own in points.groupby("arm"):
        x = own["fraction"] + shift[arm]
        bars(ax, x, own, arm, alpha=0.5)
        line = [*start, *zip(x, own["value"])]
        ax.plot(*zip(*line), label=arm, markevery=slice(len(start), None), **style_of(arm))


def training_axis(fractions: Iterable[float], arms: Iterable[Arm]) -> tuple[dict[Arm, float], Any]:
    """Each arm's shift along the fraction of training, and the axis' limits.

    Arms stand less than half a checkpoint apart in all, so that their bars can be told apart.
    """
    steps = [0.0, *sorted(set(fractions))]
    gap = min((b - a for a, b in pairwise(steps) if b > a), default=1.0)
    return spread(arms, min(0.5 * gap, 0.07)), (-0.02, steps[-1] + 0.06)


def rank_axis(arms: Iterable[Arm]) -> tuple[list[str], dict[Arm, float]]:
    """Ticks of LoRA's ranks, full qv and full, and every arm's place among them."""
    slots = sorted({Arm(arm.method, arm.rank) for arm in arms})
    ticks = [str(slot.rank or slot.kind.replace(" ", "\n")) for slot in slots]
    place = {}
    for i, slot in enumerate(slots):
        inside = [arm for arm in arms if (arm.method, arm.rank) == (slot.method, slot.rank)]
        place |= {arm: i + x for arm, x in spread(inside, 0.5).items()}
    return ticks, place


def rank_points(
    ax: Axes, rows: DataFrame, table: DataFrame, ticks: Sequence[str], place: Mapping[Arm, float]
) -> None:
    """An arm's value and interval at its place on the rank axis; beside it those of its seeds."""
    for arm, points in table.groupby("arm"):
        style = style_of(arm) | {"linestyle": "none"}
        bars(ax, [place[arm]], points, arm)
        ax.plot([place[arm]], points["value"], label=arm, **style)
        if points["seeds"].iloc[0] > 1:
            seeds = rows[rows["arm"] == arm]["value"]
            small = {"marker": ".", "markersize": 3, "alpha": 0.7, "linestyle": "none"}
            x = [place[arm] - 0.2] * len(seeds)
            ax.plot(x, seeds, label=f"seeds of {arm}", color=style["color"], **small)
    ax.set_xticks(range(len(ticks)), ticks)
    ax.set_xlim(-0.6, len(ticks) - 0.4)


def interval_lengths(points: Mapping[str, Any]) -> Any:
    """Lengths (2 x points) below and above the value, 0 where an interval is missing."""
    import numpy as np

    low, value, high = (
        np.atleast_1d(points[name]).astype(float) for name in ("low", "value", "high")
    )
    return np.nan_to_num(np.clip([value - low, high - value], 0, None))


def spread(arms: Iterable[Arm], width: float) -> dict[Arm, float]:
    """Offsets of the arms around 0, over `width` from first to last."""
    names = sorted(set(arms))
    step = width / max(len(names) - 1, 1)
    return {arm: step * (i - (len(names) - 1) / 2) for i, arm in enumerate(names)}


def label_columns(axes: Mapping[str, Axes], text: str) -> None:
    """The x label and ticks under the lowest panel of each column."""
    lowest = {}
    for ax in axes.values():
        lowest[ax.get_subplotspec().colspan.start] = ax
    for ax in lowest.values():
        ax.set_xlabel(text)
        ax.tick_params(labelbottom=True)


def finish(
    figure: Figure,
    frame: DataFrame,
    rows: DataFrame,
    table: DataFrame,
    kind: str,
    about: str,
    extra: Sequence[Artist] = (),
) -> Figure:
    """Legend above (the arms, the base, `extra`); below, what the bars are over.

    `kind` is a key of LEGENDS: are arms lines there, and is the base?
    """
    arms = {*table["arm"], *rows["arm"][rows["method"] == "base"]}
    handles = _arm_handles(arms, kind)
    if (rows["method"] == "baseline").any():
        handles.append(dotted("baseline (its name over the panel)"))
    handles += extra
    place_legend(figure, handles, arms, lines=2)
    small = "; small points: single seeds" if kind == "lines over points" else ""
    notes(figure, frame, [about, *_interval_notes(table, small)])
    return figure


def place_legend(
    figure: Figure, handles: Sequence[Artist], arms: Iterable[Arm] = (), lines: int = 0
) -> None:
    """The legend above the panels; the figure grows by the lines that it was not planned with.

    What all arms have in common in their brackets is said once.
    """
    trained = {arm for arm in arms if arm.is_trained}
    details = {arm.details for arm in trained}
    common = details.pop() if len(trained) > 1 and len(details) == 1 else ""
    kinds = {arm.label: arm.kind for arm in trained} if common else {}
    labels = [kinds.get(handle.get_label(), handle.get_label()) for handle in handles]
    columns = max(1, int(figure.get_size_inches()[0] / (0.6 + 0.065 * max(map(len, labels)))))
    figure.legend(
        handles,
        labels,
        title=f"all runs: {common}" if common else None,
        title_fontsize=7,
        loc="outside upper center",
        ncols=min(columns, len(handles)),
    )
    beyond = math.ceil(len(handles) / columns) + bool(common) - lines
    figure.set_figheight(figure.get_figheight() + 0.18 * max(beyond, 0))  # not the panels'


def _arm_handles(arms: Iterable[Arm], kind: str) -> list[Artist]:
    from matplotlib.lines import Line2D

    arm_lines, base_line = LEGENDS[kind]
    handles = []
    for arm in sorted(arms):
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


def _interval_notes(table: DataFrame, small: str) -> list[str]:
    """What the bars are over, by number of seeds."""
    trained = table[[arm.is_trained for arm in table["arm"]]]
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    arms = {key: palette(group["arm"]) for key, group in trained.groupby(["seeds", "over"])}
    said = []
    for (seeds, over), names in sorted(arms.items(), reverse=True):
        who = f" ({', '.join(map(str, names))})" if len(arms) > 1 else ""
        if seeds >= MIN_SEEDS:
            said.append(f"Mean of {seeds} seeds{who}, bars: 95 % interval over {over}{small}.")
        elif seeds > 1:
            said.append(f"Mean of {seeds} seeds{who}: too few for an interval{small}.")
        else:
            said.append(f"One seed{who}, bars: 95 % interval over items, not over seeds.")
    return said


def notes(figure: Figure, frame: DataFrame, sentences: list[str]) -> None:
    """Small print under the figure, the demo's note last; then the layout is fixed."""
    sentences = [*sentences, *filter(None, [frame.attrs.get("note")])]
    text = " ".join(sentences).replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.wrap(text, int(figure.get_size_inches()[0] * 19))
    if is_demo(frame):
        lines.append(DEMO_NOTE)
    figure.supxlabel("\n".join(lines), size=7, color="#444444")
    figure.draw_without_rendering()  # ticks take their style when they are first laid out


def nothing(frame: DataFrame, missing: str) -> Figure:
    """A figure that says what is missing."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.8, 1.4), layout="constrained")
        ax = figure.subplots()
        ax.axis("off")
        ax.text(0.5, 0.5, f"Nothing to draw: {missing}.", ha="center", va="center", wrap=True)
        notes(figure, frame, [])
    return figure
