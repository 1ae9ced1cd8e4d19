"""Figures of drift from its records: over training, by layer, intruders, against forgetting.

A figure is a function of the records (result_tables.load_records of drift.json) and of the folder
that they lie in. Those that read the tables beside the records are in spectrum_figures.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K, UserError
from lora_tradeoffs.figures.style import (
    bars,
    notes,
    nothing,
    place_legend,
    spread,
    style_of,
    styled,
)
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import last_checkpoints, load_records, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

MODULES = {"q_proj": "Q", "v_proj": "V"}
OVERALL = -1  # the layer of records over all layers
INTRUDERS = f"intruders among the\nfirst {INTRUDER_K}, a matrix"
SIZE = "$\\|\\Delta W\\|_F\\, /\\, \\|W_0\\|_F$"
MOST_ARMS = 8  # columns of a figure with a panel an arm
CELL = (1.75, 1.6)  # inches of a panel
LEAST_FORGETTING = 0.005  # that an axis shows


def drift_over_training(frame: DataFrame, folder: Path) -> Figure:
    """Size, rotation of the leading subspace, and intruders over training; all arms."""
    k = INTRUDER_K
    rotation = select(frame, "phi", k, side="left")
    measures = {
        SIZE + " (%)": percent(select(frame, "relative_frobenius")),
        f"rotation of the top {k}\n$1 - \\phi(U, U_0)$ (%)": percent(
            rotation.assign(value=1 - rotation["value"])
        ),
        INTRUDERS: select(frame, "intruders", k, INTRUDER_EPSILON),
    }
    columns = columns_of(select(frame, "relative_frobenius"))
    if not columns:
        return nothing(frame, "no drift of q_proj or v_proj")
    with styled():
        figure, axes = grid(list(measures), columns, share_y=True)
        arms: set[str] = set()
        for (measure, column), ax in axes.items():
            family, module = columns[column]
            rows = measures[measure]
            rows = rows[(rows["family"] == family) & (rows["module"] == module)]
            is_rotation = measure.startswith("rotation")
            arms |= _curves(ax, rows, "fraction", start=not is_rotation)
            if is_rotation and (measures[measure]["value"] > 0).any():
                ax.set_yscale("log")  # Q's is often a tenth of V's
            ax.set_xlim(-0.04, 1.06)
        floor_at_zero(axes, [m for m in measures if not m.startswith("rotation")])
        label_edges(axes, "fraction of training")
        legend(figure, arms)
        about = f"Mean over the layers; intruders at $\\epsilon$ = {INTRUDER_EPSILON}. Base: 0."
        return told(figure, frame, [about, *seeds_said(frame)])


def layers_over_training(frame: DataFrame, folder: Path) -> Figure:
    """A heat map an arm, layers by checkpoints: the size of the update."""
    import numpy as np
    from matplotlib.colors import LogNorm

    rows = frame[(frame["metric"] == "relative_frobenius") & (frame["layer"] != OVERALL)]
    rows = rows[(rows["value"] > 0) & rows["module"].isin(MODULES)]
    columns = columns_of(rows)
    if not columns:
        return nothing(frame, "no drift of a layer's q_proj or v_proj")
    arms = chosen_arms(rows["arm"])
    rows = rows[rows["arm"].isin(arms)]
    norm = LogNorm(*np.quantile(rows["value"], [0.01, 1]))
    with styled():
        figure, axes = grid(list(columns), {arm: (arm,) for arm in arms}, share_x=False)
        for (column, arm), ax in axes.items():
            family, module = columns[column]
            own = rows[(rows["family"] == family) & (rows["module"] == module)]
            own = own[own["arm"] == arm].assign(fraction=own["fraction"].round(3))
            table = own.pivot_table(index="layer", columns="fraction", values="value")
            if table.empty:
                ax.text(0.5, 0.5, "no such run", ha="center", transform=ax.transAxes, color="grey")
                ax.set(xticks=[], yticks=[])
                continue
            image = ax.pcolormesh(table.to_numpy(), norm=norm, cmap="magma", rasterized=True)
            places = sorted({0, len(table.columns) // 2, len(table.columns) - 1})
            ax.set_xticks([p + 0.5 for p in places], [f"{table.columns[p]:.2g}" for p in places])
            steps = range(0, len(table), max(1, len(table) // 5))
            ax.set_yticks([p + 0.5 for p in steps], [str(table.index[p]) for p in steps])
            ax.grid(False)
        label_edges(axes, "fraction of training", lambda column: f"{column}\nlayer")
        figure.colorbar(image, ax=list(axes.values()), label=SIZE, aspect=40, pad=0.01)
        return told(figure, frame, [f"Mean over seeds.{_left_out(rows, frame)}"])


def intruders_by_threshold(frame: DataFrame, folder: Path) -> Figure:
    """The last checkpoint: intruders over epsilon among the first k, and over k."""
    last = last_checkpoints(frame)
    by_epsilon = last[(last["metric"] == "intruders") & (last["k"] == INTRUDER_K)]
    by_k = last[(last["metric"] == "intruders") & (last["eps"] == INTRUDER_EPSILON)]
    shares = percent(by_k.assign(value=by_k["value"] / by_k["k"]))
    rows = {
        INTRUDERS: (by_epsilon, "eps"),
        f"intruders among the\nfirst $k$, $\\epsilon$ = {INTRUDER_EPSILON} (%)": (shares, "k"),
    }
    columns = columns_of(by_epsilon)
    if not columns:
        return nothing(frame, "no intruder count of a last checkpoint")
    with styled():
        figure, axes = grid(list(rows), columns, share_x=False, share_y=True)
        arms: set[str] = set()
        for (measure, column), ax in axes.items():
            table, x = rows[measure]
            family, module = columns[column]
            own = table[(table["family"] == family) & (table["module"] == module)]
            own = own[own["layer"] == OVERALL]
            arms |= _curves(ax, own, x)
            if x == "k":
                ks = sorted(own["k"].unique())
                ks = ks[::-2] if len(ks) > 4 else ks  # every other where they are many
                ax.set_xscale("log", base=2)
                ax.set_xticks(ks, [f"{k:.0f}" for k in ks], minor=False)
                ax.set_xlabel("$k$")
            else:
                ax.axvline(INTRUDER_EPSILON, color="#bbbbbb", lw=0.7, zorder=0)
                ax.set_xlabel("$\\epsilon$")
        floor_at_zero(axes, list(rows))
        label_edges(axes)
        legend(figure, arms)
        about = (
            "Intruder: a leading left singular vector of the tuned matrix whose cosine with every"
            " one of the base's is below $\\epsilon$. Last checkpoint, mean over the layers."
        )
        return told(figure, frame, [about, *seeds_said(frame)])


def drift_against_forgetting(frame: DataFrame, folder: Path) -> Figure:
    """Every checkpoint's forgetting over its drift, a line a run."""
    path = folder.parent.parent / "outputs" / folder.name / "retention.json"
    try:
        retention = load_records(path)
    except UserError as error:
        return nothing(frame, f"{error}".replace(str(folder.parent.parent) + "/", ""))
    lost = retention[(retention["metric"] == "forgetting") & (retention["task"] == "mean")]
    lost = lost.set_index(["run", "step"])["value"].rename("forgetting")
    size = select(frame, "relative_frobenius", modules=("both", "all"))
    rows = size.join(lost[~lost.index.duplicated()], on=["run", "step"]).dropna(
        subset=["forgetting"]
    )
    if rows.empty:
        return nothing(frame, f"{path.name} holds no forgetting of a checkpoint measured here")
    names = {"both": "drift of Q and V", "all": "drift of the whole model"}
    families = families_of(rows)
    with styled():
        figure, axes = grid(families, {text: (m,) for m, text in names.items()}, cell=(2.7, 2.2))
        for (family, text), ax in axes.items():
            own = rows[(rows["family"] == family) & (rows["module"].map(names) == text)]
            for _, points in own.groupby("run"):
                points = points.sort_values("step")
                style = style_of(points["arm"].iloc[0])
                ax.plot(points["value"], points["forgetting"], alpha=0.8, **style)
                ax.plot(
                    points["value"].iloc[-1:],
                    points["forgetting"].iloc[-1:],
                    **style | {"linestyle": "", "markersize": 6.5},
                )
            ax.axhline(0, color="#888888", lw=0.7, zorder=0)
            low, high = ax.get_ylim()  # else rounding errors of a zero fill the panel
            ax.set_ylim(min(low, -LEAST_FORGETTING), max(high, LEAST_FORGETTING))
            ax.set_xscale("log")
        label_edges(axes, SIZE, lambda family: f"{family}\nforgetting")
        legend(figure, rows["arm"])
        about = (
            "Forgetting: the base's score minus the tuned model's, mean of the retention"
            " benchmarks; below 0 it got better. A line is a run, its points checkpoints, the"
            " large one the last."
        )
        return told(figure, frame, [about])


# ---------------------------------------------------------------------------------- helpers


def select(
    frame: DataFrame,
    metric: str,
    k: int | None = None,
    eps: float | None = None,
    side: str = "",
    modules: Iterable[str] = tuple(MODULES),
) -> DataFrame:
    """The metric's records over all layers."""
    rows = frame[(frame["metric"] == metric) & (frame["layer"] == OVERALL)]
    rows = rows[rows["module"].isin(modules) & (rows["side"] == side)]
    for name, value in (("k", k), ("eps", eps)):
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows


def families_of(rows: DataFrame) -> list[str]:
    """The families in the rows, the suite's first; "" is what is of none."""
    found = set(rows["family"])
    return [f for f in FAMILIES if f in found] + sorted(found - set(FAMILIES))


def columns_of(rows: DataFrame) -> dict[str, tuple[str, str]]:
    """Titles of columns with the family and module of each, those that have rows."""
    return {
        f"{family or 'other runs'}, {letter}": (family, module)
        for family in families_of(rows)
        for module, letter in MODULES.items()
        if ((rows["family"] == family) & (rows["module"] == module)).any()
    }


def chosen_arms(arms: Iterable[Arm]) -> list[Arm]:
    """At most MOST_ARMS of the arms, the grid's own first, in the order of legends."""
    return sorted(sorted(set(arms), key=lambda arm: (bool(arm.details), arm))[:MOST_ARMS])


def grid(
    rows: list[str],
    columns: dict[str, Any],
    cell: tuple[float, float] = CELL,
    share_x: bool = True,
    share_y: bool = False,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A figure with a panel for every row and titled column."""
    from matplotlib.figure import Figure

    size = (max(cell[0] * len(columns) + 0.5, 3.6), cell[1] * len(rows) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        sharex="col" if share_x else "none",
        sharey="row" if share_y else "none",
    )
    named = {
        (row, column): axes[i, j] for i, row in enumerate(rows) for j, column in enumerate(columns)
    }
    for j, column in enumerate(columns):
        axes[0, j].set_title(column, loc="left")
    return figure, named


def floor_at_zero(axes: dict[tuple[str, str], Axes], rows: list[str]) -> None:
    """Let the rows begin at 0; where all is 0, keep the line off the middle."""
    for (row, _), ax in axes.items():
        if row in rows:
            top = ax.get_ylim()[1]
            is_zero = all(
                (line.get_ydata() == 0).all()
                for r, a in axes.items()
                if r[0] == row
                for line in a.lines
                if len(line.get_ydata()) > 2
            )
            ax.set_ylim(-0.02 if is_zero else 0, 1 if is_zero else top)


def percent(rows: DataFrame) -> DataFrame:
    """The rows with value and interval in percent."""
    return rows.assign(**{name: 100 * rows[name] for name in ("value", "low", "high", "stderr")})


def label_edges(axes: dict[tuple[str, str], Axes], x: str = "", y: Any = str) -> None:
    """`x` under the lowest row, each row's name, or `y` of it, at its left."""
    rows = list(dict.fromkeys(row for row, _ in axes))
    first = next(column for _, column in axes)
    for (row, column), ax in axes.items():
        if column == first:
            ax.set_ylabel(y(row))
        if x and row == rows[-1]:
            ax.set_xlabel(x)


def _curves(ax: Axes, rows: DataFrame, x: str, start: bool = False) -> set[Arm]:
    """A line an arm over `x`, the mean over seeds with its interval; from 0 on with `start`."""
    if rows.empty:
        return set()
    rows = rows.assign(task="", **{x: rows[x].astype(float).round(4)})
    table = summarise(rows, by=(x,))
    shift = spread(table["arm"], 0.02) if x == "fraction" else dict.fromkeys(table["arm"], 0.0)
    for arm, points in table.groupby("arm"):
        places = points[x] + shift[arm]
        bars(ax, places, points, arm)
        line = [(0.0, 0.0)] * start + list(zip(places, points["value"]))
        ax.plot(*zip(*line), label=arm, markevery=slice(int(start), None), **style_of(arm))
    return set(table["arm"])


def legend(figure: Figure, arms: Iterable[Arm]) -> None:
    """The arms above the panels."""
    from matplotlib.lines import Line2D

    arms = sorted(set(arms))
    place_legend(figure, [Line2D([], [], label=arm, **style_of(arm)) for arm in arms], arms)


def seeds_said(frame: DataFrame) -> list[str]:
    """What a point is the mean of."""
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    seeds = frame[frame["method"] != "base"].groupby(["family", "arm"])["seed"].nunique()
    if seeds.max() == 1:
        return ["One seed an arm."]
    count = " to ".join(dict.fromkeys((str(seeds.min()), str(seeds.max()))))
    few = f" from {MIN_SEEDS} seeds on" if seeds.min() < MIN_SEEDS else ""
    return [f"Mean over {count} seeds, bars: 95 % t interval{few}."]


def told(figure: Figure, frame: DataFrame, sentences: list[str]) -> Figure:
    """The figure with its small print."""
    notes(figure, frame, sentences)
    return figure


def _left_out(rows: DataFrame, frame: DataFrame) -> str:
    left = sorted(set(frame["arm"]) - set(rows["arm"]))
    return f" Left out: {', '.join(map(str, left))}." if left else ""


FIGURES = (
    drift_over_training,
    layers_over_training,
    intruders_by_threshold,
    drift_against_forgetting,
)
