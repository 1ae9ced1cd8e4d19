"""Figures of drift from its records: over training, by layer, intruders, against forgetting.

Those that read the tables beside the records (singular values, similarities) are in spectra.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K
from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.style import style_of, styled
from lora_tradeoffs.records import OVERALL
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import last_checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

MODULES = {"q_proj": "Q", "v_proj": "V"}
INTRUDERS = f"intruders among the\nfirst {INTRUDER_K}, per matrix"
SIZE = "$\\|\\Delta W\\|_F\\, /\\, \\|W_0\\|_F$"
LEAST_FORGETTING = 0.005  # that an axis shows


@styled()
def drift_over_training(study: StudyRecords) -> Figure:
    """Size, rotation of the leading subspace, and intruders over training; all arms."""
    frame, k = study.drift, INTRUDER_K
    rotation = select(frame, "phi", k, side="left")
    rotation_label = f"rotation of the top {k}\n$1 - \\phi(U, U_0)$ (%)"
    measures = {
        SIZE + " (%)": percent(select(frame, "relative_frobenius")),
        rotation_label: percent(rotation.assign(value=1 - rotation["value"])),
        INTRUDERS: select(frame, "intruders", k, INTRUDER_EPSILON),
    }
    columns = columns_of(select(frame, "relative_frobenius"))
    if not columns:
        return panels.nothing(frame, "no drift of q_proj or v_proj")
    figure, axes = panels.grid(measures, columns, share_y="row")
    arms: set[Arm] = set()
    for (measure, column), ax in axes.items():
        rows = of_column(measures[measure], columns[column])
        is_rotation = measure == rotation_label
        start = None if is_rotation else (0.0, 0.0)
        arms |= marks.mean_curves(ax, rows, "fraction", start, spread=0.02)
        if is_rotation and (measures[measure]["value"] > 0).any():
            ax.set_yscale("log")  # Q's is often a tenth of V's
        ax.set_xlim(-0.04, 1.06)
    floor_at_zero(axes, [m for m in measures if m != rotation_label])
    panels.label_edges(axes, "fraction of training", str)
    about = f"Mean over the layers; intruders at $\\epsilon$ = {INTRUDER_EPSILON}. Base: 0."
    return panels.finish(figure, frame, arms, [about, *panels.seeds_notes(frame)])


@styled()
def drift_by_layer_over_training(study: StudyRecords) -> Figure:
    """Heat maps, layers by checkpoints, of the size of the update, a panel for each arm."""
    import numpy as np
    from matplotlib.colors import LogNorm

    frame = study.drift
    rows = frame[(frame["metric"] == "relative_frobenius") & (frame["layer"] != OVERALL)]
    rows = rows[(rows["value"] > 0) & rows["module"].isin(MODULES)]
    columns = columns_of(rows)
    if not columns:
        return panels.nothing(frame, "no drift of a layer's q_proj or v_proj")
    arms = panels.most_arms(rows["arm"])
    rows = rows[rows["arm"].isin(arms)]
    norm = LogNorm(*np.quantile(rows["value"], [0.01, 1]))
    figure, axes = panels.grid(columns, arms, share_x="none")
    image = None
    for (column, arm), ax in axes.items():
        cells = of_column(rows[rows["arm"] == arm], columns[column])
        image = layers_by_checkpoints(ax, cells, norm=norm, cmap="magma") or image
    panels.label_edges(axes, "fraction of training", lambda column: f"{column}\nlayer")
    figure.colorbar(image, ax=list(axes.values()), label=SIZE, aspect=40, pad=0.01)
    left_out = sorted(set(frame["arm"]) - set(arms))
    sentence = f"Left out: {', '.join(map(str, left_out))}." if left_out else ""
    return panels.notes(figure, frame, ["Mean over seeds.", sentence])


@styled()
def intruders_by_threshold(study: StudyRecords) -> Figure:
    """The last checkpoint: intruders over epsilon among the first k, and over k."""
    frame = study.drift
    last = last_checkpoints(frame)
    last = last[(last["metric"] == "intruders") & (last["layer"] == OVERALL)]
    by_epsilon, by_k = last[last["k"] == INTRUDER_K], last[last["eps"] == INTRUDER_EPSILON]
    rows = {
        INTRUDERS: (by_epsilon, "eps"),
        f"intruders among the\nfirst $k$, $\\epsilon$ = {INTRUDER_EPSILON} (%)": (
            percent(by_k.assign(value=by_k["value"] / by_k["k"])),
            "k",
        ),
    }
    columns = columns_of(by_epsilon)
    if not columns:
        return panels.nothing(frame, "no intruder count of a last checkpoint")
    figure, axes = panels.grid(rows, columns, share_x="none", share_y="row")
    arms: set[Arm] = set()
    for (measure, column), ax in axes.items():
        table, x = rows[measure]
        in_panel = of_column(table, columns[column])
        arms |= marks.mean_curves(ax, in_panel, x)
        if x == "k":
            ks = sorted(in_panel["k"].unique())
            ks = ks[::-2] if len(ks) > 4 else ks  # every other where they are many
            ax.set_xscale("log", base=2)
            ax.set_xticks(ks, [f"{k:.0f}" for k in ks], minor=False)
            ax.set_xlabel("$k$")
        else:
            ax.axvline(INTRUDER_EPSILON, color="#bbbbbb", lw=0.7, zorder=0)
            ax.set_xlabel("$\\epsilon$")
    floor_at_zero(axes, rows)
    panels.label_edges(axes, y=str)
    about = (
        "Intruder: a leading left singular vector of the tuned matrix whose cosine with every"
        " one of the base's is below $\\epsilon$. Last checkpoint, mean over the layers."
    )
    return panels.finish(figure, frame, arms, [about, *panels.seeds_notes(frame)])


@styled()
def drift_against_forgetting(study: StudyRecords) -> Figure:
    """Every checkpoint's forgetting over its drift, a line for each run."""
    frame, retention = study.drift, study.retention
    if retention is None:
        return panels.nothing(
            frame, f"no records of retention; make them with: {study.command('retention')}"
        )
    lost = retention[(retention["metric"] == "forgetting") & (retention["task"] == "mean")]
    lost = lost.set_index(["run", "step"])["value"].rename("forgetting")
    rows = select(frame, "relative_frobenius", modules=("both", "all"))
    rows = rows.join(lost[~lost.index.duplicated()], on=["run", "step"])
    rows = rows.dropna(subset=["forgetting"]).sort_values("step")
    if rows.empty:
        return panels.nothing(frame, "no forgetting of a checkpoint whose drift is measured")
    names = {"both": "drift of Q and V", "all": "drift of the whole model"}
    figure, axes = panels.grid(families_of(rows), names.values(), size=(2.7, 2.2))
    for (family, text), ax in axes.items():
        in_panel = rows[(rows["family"] == family) & (rows["module"].map(names) == text)]
        for _, points in in_panel.groupby("run"):
            style = style_of(points["arm"].iloc[0])
            ax.plot(points["value"], points["forgetting"], alpha=0.8, **style)
            last = points.iloc[-1:]
            large = style | {"linestyle": "", "markersize": 6.5}
            ax.plot(last["value"], last["forgetting"], **large)
        ax.axhline(0, color="#888888", lw=0.7, zorder=0)
        low, high = ax.get_ylim()  # else rounding errors of a zero fill the panel
        ax.set_ylim(min(low, -LEAST_FORGETTING), max(high, LEAST_FORGETTING))
        marks.log_axis(ax, rows["value"])
    panels.label_edges(axes, SIZE, lambda family: f"{family}\nforgetting")
    about = (
        "Forgetting: the base's score minus the tuned model's, mean of the retention"
        " benchmarks; below 0 it got better. A line is a run, its points checkpoints, the"
        " large one the last."
    )
    return panels.finish(figure, frame, rows["arm"], [about])


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
    """The families in the rows, the suite's first; "" stands for runs of no family."""
    families = set(rows["family"])
    return [f for f in FAMILIES if f in families] + sorted(families - set(FAMILIES))


def columns_of(rows: DataFrame) -> dict[str, tuple[str, str]]:
    """Family and module by the title of their column, for those that have rows."""
    measured = set(zip(rows["family"], rows["module"]))
    return {
        f"{family or 'other runs'}, {letter}": (family, module)
        for family in families_of(rows)
        for module, letter in MODULES.items()
        if (family, module) in measured
    }


def of_column(rows: DataFrame, column: tuple[str, str]) -> DataFrame:
    """The rows of a column's family and module."""
    family, module = column
    return rows[(rows["family"] == family) & (rows["module"] == module)]


def floor_at_zero(axes: dict[tuple[str, str], Axes], rows: Iterable[str]) -> None:
    """Let the rows begin at 0; where all is 0, keep the line off the middle."""
    for row in rows:
        in_row = [ax for (name, _), ax in axes.items() if name == row]
        curves = [line for ax in in_row for line in ax.lines if len(line.get_ydata()) > 2]
        is_zero = all((line.get_ydata() == 0).all() for line in curves)
        for ax in in_row:
            ax.set_ylim(-0.02 if is_zero else 0, 1 if is_zero else ax.get_ylim()[1])


def percent(rows: DataFrame) -> DataFrame:
    """The rows with value and interval in percent."""
    return rows.assign(**{name: 100 * rows[name] for name in ("value", "low", "high", "stderr")})


def layers_by_checkpoints(ax: Axes, rows: DataFrame, **style: Any) -> Any:
    """A heat map of values by layer, the first lowest, and fraction of training; None if empty."""
    rows = rows.assign(fraction=rows["fraction"].round(3), layer=rows["layer"].astype(int))
    table = rows.pivot_table(index="layer", columns="fraction", values="value")
    if table.empty:
        marks.empty_panel(ax)
        return None
    mesh = marks.heat_map(ax, table, xticklabels=False, yticklabels=False, **style)
    ax.invert_yaxis()
    columns = sorted({0, len(table.columns) // 2, len(table.columns) - 1})
    ax.set_xticks([i + 0.5 for i in columns], [f"{table.columns[i]:.2g}" for i in columns])
    layers = range(0, len(table), max(1, len(table) // 5))
    ax.set_yticks([i + 0.5 for i in layers], [str(table.index[i]) for i in layers])
    return mesh
