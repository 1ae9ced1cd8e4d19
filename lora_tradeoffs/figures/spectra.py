"""Figures of the weights' spectra: singular values, similar directions, updates of two runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import INTRUDER_EPSILON, RANKS
from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.drift import MODULES
from lora_tradeoffs.figures.panels import NothingToDraw, Panels, figure_of, levels, require
from lora_tradeoffs.figures.style import DENSE, GREY, style_of
from lora_tradeoffs.files import intact
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.tables.frames import last_checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

QUANTILES = (0.1, 0.5, 0.9)
MOST_NUMBERED = 9  # runs up to which a cell of the phi matrix is wide enough for its number
LARGEST_PANEL = 8.0  # inches of the phi matrix: about 60 runs have a label each
SHOWN = 64  # leading vectors of a similarity matrix
SPECTRA: dict[str, dict[str, Any]] = {
    "base": {"label": "base $W_0$", "color": GREY, "linestyle": "-", "lw": 2.4, "alpha": 0.5},
    "tuned": {"label": "tuned $W$", "linestyle": (0, (2, 1.5)), "lw": 1.1},
    "update": {"label": "update $\\Delta W$", "linestyle": "-", "lw": 1.1},
}


@figure_of("drift")
def singular_values(study: StudyRecords, frame: DataFrame) -> Figure:
    """Base, tuned matrix and update, of the weakest and strongest rank and full fine-tuning."""
    import pandas as pd
    from matplotlib.lines import Line2D

    runs = contrasted_runs(frame)
    tables = {run: _spectra(study, run) for run in runs}
    tables = [t.assign(run=r.run, arm=r.arm) for r, t in tables.items() if t is not None]
    if not tables:
        raise NothingToDraw("no spectra of a last checkpoint; python svd_analysis.py makes them")
    rows = pd.concat(tables)
    largest = rows[rows["index"] == 1].set_index(["run", "module", "layer"])["base"]
    scale = largest.loc[pd.MultiIndex.from_frame(rows[largest.index.names])].to_numpy()
    rows[[*SPECTRA]] = rows[[*SPECTRA]].div(scale, axis=0)
    panels = Panels.grid(rows.assign(row=rows["module"].map(MODULES)), "row", "arm", (2.3, 1.9))
    for (_, arm), ax, table in panels:
        for name, style in SPECTRA.items():
            values = table.groupby("index")[name].quantile(QUANTILES).unstack().dropna()
            if values.empty:
                continue
            style = {"color": style_of(arm)["color"]} | style
            band = {"color": style["color"], "alpha": 0.15, "lw": 0}
            ax.fill_between(values.index, values[0.1], values[0.9], **band)
            marker = {"marker": "o", "markersize": 2.2} if len(values) < 20 else {}
            ax.plot(values.index, values[0.5], **style, **marker)
        ax.set(xscale="log", yscale="log", ylim=(1e-5, 2))
    sigma = "$\\sigma_i$ / $\\sigma_1(W_0)$"
    panels.label("index of the singular value", lambda letter: f"{letter}: {sigma}")
    about = (
        "Median over the layers, band: from the 10th to the 90th percentile. Last checkpoints"
        f" of {', '.join(rows['run'].unique())}."
    )
    legend = [Line2D([], [], **{"color": "black"} | style) for style in SPECTRA.values()]
    return panels.finish(frame, [about], kind=None, extra=legend)


@figure_of("drift")
def similarity_matrices(study: StudyRecords, frame: DataFrame) -> Figure:
    """|<u0_i, u_j>| of the matrix where the strongest rank has its least familiar vector."""
    import pandas as pd

    tables, layers = shown_similarities(study, frame)
    if not tables:
        missing = "no similarities of a last checkpoint; python svd_analysis.py makes them"
        raise NothingToDraw(missing)
    rows = []
    for run, (spectra, matrices) in tables.items():
        for module, layer in layers.items():
            if layer is None:
                continue
            of_layer = spectra[(spectra["module"] == module) & (spectra["layer"] == layer)]
            title = f"{MODULES[module]}, layer {layer}\nbase, $i$"
            name = next(n for n in matrices if _is_of(n, module, layer))
            rows.append(of_layer.assign(row=title, arm=run.arm, name=name, run=run.run))
    matrices = {run.run: matrices for run, (_, matrices) in tables.items()}
    panels = Panels.grid(pd.concat(rows), "row", "arm", size=(2.1, 2.1), share_x="none")
    for _, ax, spectra in panels:
        name, run = spectra[["name", "run"]].iloc[0]
        _similarity(ax, matrices[run][name], spectra)
    panels.label("tuned, $j$", str)
    panels.colour_bar("$|\\langle u^0_i, u_j\\rangle|$", shrink=0.7)
    about = (
        "Leading left singular vectors of base and tuned matrix. Triangles, where there are"
        " any: intruders, whose cosine with every base vector, also those beyond the picture,"
        f" is below {INTRUDER_EPSILON}. Last checkpoints of {', '.join(matrices)}."
    )
    return panels.finish(frame, [about], kind=None)


def shown_similarities(
    study: StudyRecords, frame: DataFrame
) -> tuple[dict[Any, tuple[DataFrame, dict[str, Any]]], dict[str, int | None]]:
    """The spectra and matrices of cosines of the contrasted runs, and the layer shown of each
    module; of the matrices those of these layers alone."""
    tables = {r: (_spectra(study, r), _similarities(study, r)) for r in contrasted_runs(frame)}
    tables = {run: pair for run, pair in tables.items() if pair[0] is not None and pair[1]}
    if not tables:
        return {}, {}
    strongest, _ = tables[max(tables, key=lambda run: run.rank)]
    layers = {module: _least_familiar_layer(strongest, module) for module in MODULES}
    for run, (spectra, matrices) in tables.items():
        shown = {n: m for n, m in matrices.items() if any(_is_of(n, *x) for x in layers.items())}
        tables[run] = spectra, shown
    return tables, layers


def _is_of(matrix: str, module: str, layer: int | None) -> bool:
    return matrix.endswith(f".{module}") and f".{layer}." in matrix


def _similarity(ax: Axes, matrix: Any, spectra: DataFrame) -> None:
    """The matrix of cosines, and a triangle above each intruder's column."""
    ax.imshow(matrix, cmap="magma", vmin=0, vmax=1, aspect="auto")
    size = matrix.shape[1]
    is_intruder = (spectra["index"] <= size) & (spectra["max_cosine"] < INTRUDER_EPSILON)
    intruders = spectra[is_intruder]["index"] - 1
    style = {"marker": "v", "linestyle": "", "color": DENSE["full"], "markersize": 3}
    for line in ax.plot(intruders, [-1.5 * size / 64] * len(intruders), clip_on=False, **style):
        line.set_in_layout(False)  # outside the axes, where it would shrink them
    ax.set(xlim=(-0.5, size - 0.5), ylim=(len(matrix) - 0.5, -0.5))
    ticks = [t for t in (1, 16, 32, 48, 64) if t <= size]
    ax.set_xticks([t - 1 for t in ticks], [str(t) for t in ticks])
    ax.set_yticks([t - 1 for t in ticks], [str(t) for t in ticks])
    ax.grid(False)


def _least_familiar_layer(spectra: DataFrame, module: str) -> int | None:
    """The layer with the lowest largest cosine among the vectors that are shown."""
    rows = spectra[(spectra["module"] == module) & (spectra["index"] <= SHOWN)]
    rows = rows.dropna(subset=["max_cosine"])
    return None if rows.empty else int(rows["layer"].iloc[rows["max_cosine"].argmin()])


@figure_of("drift")
def phi_between_runs(study: StudyRecords, frame: DataFrame) -> Figure:
    """Runs by runs: the similarity of their updates' subspaces, left above, right below."""
    rows = frame[(frame["metric"] == "update_phi") & frame["module"].isin(MODULES)]
    require(rows, "fewer than two runs with an update, so none to compare")
    labels = _run_labels(frame, {*rows["run"], *rows["other"]})
    names = [*labels]
    position = {name: i for i, name in enumerate(names)}
    pairs = [sorted(pair, key=position.get) for pair in zip(rows["run"], rows["other"])]
    pairs = [p if side == "left" else p[::-1] for p, side in zip(pairs, rows["side"])]
    kinds = {"all": "all directions", "leading": f"the first {min(RANKS)}"}
    rows = rows.assign(
        above=[above for above, _ in pairs],
        below=[below for _, below in pairs],
        row=rows["directions"].map(kinds),
        column=rows["module"].map(MODULES),
    )
    side = min(max(2.2, 0.13 * len(labels)), LARGEST_PANEL)
    every = math.ceil(0.13 * len(labels) / LARGEST_PANEL)  # else the labels are on each other
    panels = Panels.grid(rows, "row", "column", (side, side), "all", "all")
    style = {"annot": len(labels) <= MOST_NUMBERED, "fmt": ".2f", "annot_kws": {"size": 6}}
    style |= {"xticklabels": False, "yticklabels": False}  # seaborn would draw to place them
    for _, ax, part in panels:
        table = part.pivot_table(index="above", columns="below", values="value", aggfunc="last")
        table = table.reindex(index=names, columns=names)
        marks.heat_map(ax, table, cmap="magma", vmin=0, vmax=1, **style)
        ax.set_facecolor("#eeeeee")
        ticks, texts = [i + 0.5 for i in range(0, len(labels), every)], [*labels.values()][::every]
        ax.set_xticks(ticks, texts, rotation=90, size=5.5)
        ax.set_yticks(ticks, texts, rotation=0, size=5.5)
    panels.label(y=str)
    panels.colour_bar("$\\phi$", shrink=0.7)
    expected = rows.groupby("module")["random"].agg(["min", "max"])
    chance = ", ".join(
        f"{MODULES[m]} {low:.3f} to {high:.3f}" for m, low, high in expected.itertuples()
    )
    about = (
        "Above the diagonal: left singular vectors of the updates; below it: right ones. Mean"
        f" over the layers, last checkpoints. Random subspaces have {chance}. Of a dense update"
        " as many directions are compared as the LoRA run has. LoRA runs of one seed and rank"
        " start from the same A, so their right vectors are alike for that reason, too. Grey: not"
        " compared (different families are with --all-pairs)."
    )
    return panels.finish(frame, [about], kind=None)


def _run_labels(frame: DataFrame, names: set[str]) -> dict[str, str]:
    """The runs with their labels, by family, arm and seed."""
    runs = frame[frame["run"].isin(names)].drop_duplicates("run")
    families = levels(runs["family"])
    several = runs["seed"].nunique() > 1
    rows = sorted(runs.itertuples(), key=lambda r: (families.index(r.family), r.arm, r.seed))
    parts = {r.run: (r.family, str(r.arm), f"s{int(r.seed)}" if several else "") for r in rows}
    return {run: " ".join(filter(None, words)) for run, words in parts.items()}


def contrasted_runs(frame: DataFrame) -> list[Any]:
    """Last checkpoints of the weakest and strongest LoRA and full fine-tuning with Q and V, of one
    family and seed: the first family that has the most of them. With run, step, arm and rank."""
    last = last_checkpoints(frame)
    last = last[(last["module"] == "both") & (last["metric"] == "relative_frobenius")]
    is_plain = last["arm"].map(lambda arm: not arm.details).astype(bool)
    last = last[is_plain] if is_plain.any() else last
    best: list[Any] = []
    for family in levels(last["family"]):
        of_family = last[last["family"] == family].sort_values("seed").drop_duplicates("arm")
        of_lora = of_family["method"] == "lora"
        if not of_lora.any():
            of_lora = of_family["arm"].map(lambda arm: arm.is_adapter)
        lora = of_family[of_lora].sort_values("rank")
        picked = [*lora.iloc[[0, -1]].index.unique()] if len(lora) else []
        picked += list(of_family[of_family["method"] == "full"].index)
        if len(picked) > len(best):
            best = picked
    return list(last.loc[best, ["run", "step", "arm", "rank"]].itertuples(index=False))


def spectra_file(folder: Path, run: Any) -> Path:
    return folder / "spectra" / f"{unit_name(run.run, run.step)}.parquet"


def similarities_file(folder: Path, run: Any) -> Path:
    return folder / "similarities" / f"{unit_name(run.run, run.step)}.safetensors"


def _spectra(study: StudyRecords, run: Any) -> DataFrame | None:
    import pandas as pd

    path = spectra_file(study.folder("drift"), run)
    with intact(path):
        return pd.read_parquet(path) if path.is_file() else None


def _similarities(study: StudyRecords, run: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    path = similarities_file(study.folder("drift"), run)
    with intact(path):
        return {n: m.astype(float) for n, m in load_file(path).items()} if path.is_file() else {}
