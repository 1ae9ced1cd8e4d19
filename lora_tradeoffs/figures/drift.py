"""Figures of drift from its records: over training, by layer, intruders, against forgetting.

Those that read the tables beside the records (singular values, similarities) are in spectra.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from config import INTRUDER_EPSILON, INTRUDER_K
from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.panels import (
    NothingToDraw,
    Panels,
    figure_of,
    interval_notes,
    most_arms,
    require,
    seeds_note,
)
from lora_tradeoffs.figures.style import style_of
from lora_tradeoffs.records import MEAN, OVERALL
from lora_tradeoffs.tables.frames import last_checkpoints
from lora_tradeoffs.tables.retention import as_trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

MODULES = {"q_proj": "Q", "v_proj": "V"}
SIZE = "$\\|\\Delta W\\|_F\\, /\\, \\|W_0\\|_F$"
ROTATION = f"rotation of the top {INTRUDER_K}\n$1 - \\phi(U, U_0)$ (%)"
INTRUDERS = f"intruders among the\nfirst {INTRUDER_K}, per matrix"
INTRUDERS_OF_K = f"intruders among the\nfirst $k$, $\\epsilon$ = {INTRUDER_EPSILON} (%)"
LEAST_FORGETTING = 0.005  # that an axis shows


@figure_of("drift")
def drift_over_training(study: StudyRecords, frame: DataFrame) -> Figure:
    """Size, rotation of the leading subspace, and intruders over training; all arms."""
    import pandas as pd

    sizes, phi = select(frame, "relative_frobenius"), select(frame, "phi", INTRUDER_K, side="left")
    measures = {
        f"{SIZE} (%)": percent(require(sizes, "no drift of q_proj or v_proj")),
        ROTATION: percent(phi.assign(value=1 - phi["value"])),
        INTRUDERS: select(frame, "intruders", INTRUDER_K, INTRUDER_EPSILON),
    }
    rows = pd.concat(part.assign(measure=name) for name, part in measures.items())
    panels = Panels.grid(by_module(rows), "measure", "column", share_y="row")
    means = marks.curves(panels, "fraction", start=(0.0, 0.0))
    for (measure, _), ax in panels.axes.items():
        if measure == ROTATION and (measures[ROTATION]["value"] > 0).any():
            ax.set_yscale("log", nonpositive="mask")  # Q's is often a tenth of V's
    floor_at_zero(panels)
    panels.label(y=str)
    about = f"Mean over the layers; intruders at $\\epsilon$ = {INTRUDER_EPSILON}. Base: 0."
    return panels.finish(frame, [about, *interval_notes(means, "")])


@figure_of("drift")
def drift_by_layer_over_training(study: StudyRecords, frame: DataFrame) -> Figure:
    """Heat maps, layers by checkpoints, of the size of the update, a panel for each arm."""
    import numpy as np
    from matplotlib.colors import LogNorm

    rows = frame[(frame["metric"] == "relative_frobenius") & (frame["layer"] != OVERALL)]
    rows = by_module(rows[rows["value"] > 0])
    rows, left_out = most_arms(require(rows, "no drift of a layer's q_proj or v_proj"))
    panels = Panels.grid(rows, "column", "arm", share_x="none")
    norm = LogNorm(*np.quantile(rows["value"], [0.01, 1]))
    marks.maps_over_training(panels, SIZE, norm=norm, cmap="magma")
    return panels.finish(frame, [seeds_note(rows), left_out], kind=None)


@figure_of("drift")
def intruders_by_threshold(study: StudyRecords, frame: DataFrame) -> Figure:
    """The last checkpoint: intruders over epsilon among the first k, and over k."""
    import pandas as pd

    last = last_checkpoints(frame)
    last = last[(last["metric"] == "intruders") & (last["layer"] == OVERALL)]
    last = by_module(last)
    by_k = last[last["eps"] == INTRUDER_EPSILON]
    by_k = percent(by_k.assign(value=by_k["value"] / by_k["k"]))
    by_epsilon = last[last["k"] == INTRUDER_K]
    require(by_epsilon, "no intruder count of a last checkpoint")
    rows = {INTRUDERS: by_epsilon.assign(x=by_epsilon["eps"])}
    rows[INTRUDERS_OF_K] = by_k.assign(x=by_k["k"])
    rows = pd.concat(part.assign(measure=name) for name, part in rows.items())
    panels = Panels.grid(rows, "measure", "column", share_x="none", share_y="row")
    means = marks.curves(panels, "x")
    floor_at_zero(panels)
    for (measure, _), ax, part in panels:
        if measure == INTRUDERS:
            ax.axvline(INTRUDER_EPSILON, color="#bbbbbb", lw=0.7, zorder=0)
            ax.set_xlabel("$\\epsilon$")
            continue
        ks = sorted(part["x"].unique())
        ks = ks[::-2] if len(ks) > 4 else ks  # every other where they are many
        ax.set_xscale("log", base=2)
        ax.set_xticks(ks, [f"{k:.0f}" for k in ks], minor=False)
        ax.set_xlabel("$k$")
    panels.label(y=str)
    about = (
        "Intruder: a leading left singular vector of the tuned matrix whose cosine with every"
        " one of the base's is below $\\epsilon$. Last checkpoint, mean over the layers."
    )
    return panels.finish(frame, [about, *interval_notes(means, "")])


@figure_of("drift")
def drift_against_forgetting(study: StudyRecords, frame: DataFrame) -> Figure:
    """Every checkpoint's forgetting over its drift, a line for each run."""
    retention = study.retention
    if retention is None:
        command = study.command("retention")
        raise NothingToDraw(f"no records of retention; make them with: {command}")
    retention = as_trained(retention)
    lost = retention[(retention["metric"] == "forgetting") & (retention["task"] == MEAN)]
    lost = lost.set_index(["run", "step"])["value"].rename("forgetting")
    names = {"both": "drift of Q and V", "all": "drift of the whole model"}
    rows = select(frame, "relative_frobenius", modules=names)
    rows = rows.join(lost[~lost.index.duplicated()], on=["run", "step"])
    rows = rows.dropna(subset=["forgetting"]).sort_values(
        ["module", "step"], ascending=[False, True]
    )
    require(rows, "no forgetting of a checkpoint whose drift is measured")
    rows = rows.assign(column=rows["module"].map(names))
    panels = Panels.grid(rows, "family", "column", size=(2.7, 2.2))
    for (_, column), ax, part in panels:
        for _, points in part.groupby("run"):
            style = style_of(points["arm"].iloc[0])
            ax.plot(points["value"], points["forgetting"], alpha=0.8, **style)
            last = points.iloc[-1:]
            large = style | {"linestyle": "", "markersize": 6.5}
            ax.plot(last["value"], last["forgetting"], **large)
        ax.axhline(0, color="#888888", lw=0.7, zorder=0)
        low, high = ax.get_ylim()  # else rounding errors of a zero fill the panel
        ax.set_ylim(min(low, -LEAST_FORGETTING), max(high, LEAST_FORGETTING))
        # the axis is shared within a column alone
        marks.log_axis(ax, rows["value"][rows["column"] == column])
    panels.label(SIZE, lambda family: f"{family}\nforgetting")
    about = (
        "Forgetting: the base's score minus the tuned model's, mean of the retention"
        " benchmarks; below 0 it got better. A line is a run, its points checkpoints, the"
        " large one the last."
    )
    return panels.finish(frame, [about])


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
    rows = rows[rows["module"].isin(list(modules)) & (rows["side"] == side)]
    for name, value in (("k", k), ("eps", eps)):
        rows = rows[rows[name].isna() if value is None else rows[name] == value]
    return rows


def by_module(rows: DataFrame) -> DataFrame:
    """The rows of Q and V, with their family and module as `column`."""
    rows = rows[rows["module"].isin(MODULES)].sort_values("module", kind="stable")
    family = rows["family"].replace("", "other runs")
    return rows.assign(column=family + ", " + rows["module"].map(MODULES))


def floor_at_zero(panels: Panels) -> None:
    """Let linear axes begin at 0; in a row where all is 0, keep the line off the middle."""
    is_zero = (panels.rows["value"] == 0).groupby(panels.rows["measure"]).all()
    for (row, _), ax in panels.axes.items():
        if ax.get_yscale() == "linear":
            ax.set_ylim(-0.02 if is_zero[row] else 0, 1 if is_zero[row] else ax.get_ylim()[1])


def percent(rows: DataFrame) -> DataFrame:
    """The rows with value and interval in percent."""
    return rows.assign(**{name: 100 * rows[name] for name in ("value", "low", "high", "stderr")})
