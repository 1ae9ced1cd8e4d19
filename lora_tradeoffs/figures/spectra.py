"""Figures of the weights' spectra: singular values, similar directions, updates of two runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from config import INTRUDER_EPSILON, RANKS
from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.drift import MODULES, families_of
from lora_tradeoffs.figures.style import DENSE, GREY, style_of, styled
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.tables.frames import last_checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

QUANTILES = (0.1, 0.5, 0.9)
MOST_NUMBERED = 9  # runs up to which a cell of the phi matrix is wide enough for its number
SHOWN = 64  # leading vectors of a similarity matrix
SPECTRA: dict[str, dict[str, Any]] = {
    "base": {"label": "base $W_0$", "color": GREY, "linestyle": "-", "lw": 2.4, "alpha": 0.5},
    "tuned": {"label": "tuned $W$", "linestyle": (0, (2, 1.5)), "lw": 1.1},
    "update": {"label": "update $\\Delta W$", "linestyle": "-", "lw": 1.1},
}


@styled()
def singular_values(study: StudyRecords) -> Figure:
    """Base, tuned matrix and update, of the weakest and strongest rank and full fine-tuning."""
    from matplotlib.lines import Line2D

    frame = study.drift
    tables = {run: _spectra(study, run) for run in contrasted_runs(frame)}
    tables = {run: table for run, table in tables.items() if table is not None}
    if not tables:
        return panels.nothing(
            frame, "no spectra of a last checkpoint; python svd_analysis.py makes them"
        )
    arms = [run.arm for run in tables]
    figure, axes = panels.grid(MODULES.values(), arms, size=(2.3, 1.9))
    for run, table in tables.items():
        for module, letter in MODULES.items():
            of_module = table[table["module"] == module]
            _spectrum(axes[letter, run.arm], of_module, style_of(run.arm)["color"])
    sigma = "$\\sigma_i$ / $\\sigma_1(W_0)$"
    panels.label_edges(axes, "index of the singular value", lambda letter: f"{letter}: {sigma}")
    panels.place_legend(
        figure, [Line2D([], [], **{"color": "black"} | s) for s in SPECTRA.values()]
    )
    about = (
        "Median over the layers, band: from the 10th to the 90th percentile. Last checkpoints"
        f" of {', '.join(run.run for run in tables)}."
    )
    return panels.notes(figure, frame, [about])


def _spectrum(ax: Axes, table: DataFrame, colour: str) -> None:
    largest = table[table["index"] == 1].set_index("layer")["base"]
    scale = table["layer"].map(largest)
    for name, style in SPECTRA.items():
        values = (table[name] / scale).groupby(table["index"]).quantile(QUANTILES).unstack()
        values = values.dropna()
        if values.empty:
            continue
        style = {"color": colour} | style
        band = {"color": style["color"], "alpha": 0.15, "lw": 0}
        ax.fill_between(values.index, values[0.1], values[0.9], **band)
        marker = {"marker": "o", "markersize": 2.2} if len(values) < 20 else {}
        ax.plot(values.index, values[0.5], **style, **marker)
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 2))


@styled()
def similarity_matrices(study: StudyRecords) -> Figure:
    """|<u0_i, u_j>| of the matrix where the strongest rank has its least familiar vector."""
    frame = study.drift
    tables = {r: (_spectra(study, r), _similarities(study, r)) for r in contrasted_runs(frame)}
    tables = {run: pair for run, pair in tables.items() if pair[0] is not None and pair[1]}
    if not tables:
        missing = "no similarities of a last checkpoint; python svd_analysis.py makes them"
        return panels.nothing(frame, missing)
    spectra, _ = tables[max(tables, key=lambda run: run.rank)]
    layers = {module: _least_familiar_layer(spectra, module) for module in MODULES}
    layers = {module: layer for module, layer in layers.items() if layer is not None}
    rows = {f"{MODULES[m]}, layer {layer}\nbase, $i$": m for m, layer in layers.items()}
    arms = [run.arm for run in tables]
    figure, axes = panels.grid(rows, arms, size=(2.1, 2.1), share_x="none")
    for row, module in rows.items():
        for run, (spectra, similarities) in tables.items():
            matrix = next(
                matrix
                for name, matrix in similarities.items()
                if name.endswith(f".{module}") and f".{layers[module]}." in name
            )
            of_layer = spectra[spectra["module"] == module]
            of_layer = of_layer[of_layer["layer"] == layers[module]]
            image = _similarity(axes[row, run.arm], matrix, of_layer)
    panels.label_edges(axes, "tuned, $j$", str)
    label = "$|\\langle u^0_i, u_j\\rangle|$"
    figure.colorbar(image, ax=list(axes.values()), label=label, shrink=0.7, pad=0.01)
    about = (
        "Leading left singular vectors of base and tuned matrix. Triangles, where there are"
        " any: intruders, whose cosine with every base vector, also those beyond the picture,"
        f" is below {INTRUDER_EPSILON}."
        f" Last checkpoints of {', '.join(run.run for run in tables)}."
    )
    return panels.notes(figure, frame, [about])


def _similarity(ax: Axes, matrix: Any, spectra: DataFrame) -> Any:
    image = ax.imshow(matrix, cmap="magma", vmin=0, vmax=1, aspect="auto")
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
    return image


def _least_familiar_layer(spectra: DataFrame, module: str) -> int | None:
    """The layer with the lowest largest cosine among the vectors that are shown."""
    rows = spectra[(spectra["module"] == module) & (spectra["index"] <= SHOWN)]
    rows = rows.dropna(subset=["max_cosine"])
    return None if rows.empty else int(rows["layer"].iloc[rows["max_cosine"].argmin()])


@styled()
def phi_between_runs(study: StudyRecords) -> Figure:
    """Runs by runs: the similarity of their updates' subspaces, left above, right below."""
    frame = study.drift
    rows = frame[(frame["metric"] == "update_phi") & frame["module"].isin(MODULES)]
    if rows.empty:
        return panels.nothing(frame, "fewer than two runs with an update, so none to compare")
    kinds = {"all directions": "all", f"the first {min(RANKS)}": "leading"}
    runs = _run_labels(frame, {*rows["run"], *rows["other"]})
    side = max(2.2, 0.13 * len(runs))
    figure, axes = panels.grid(kinds, MODULES.values(), (side, side), "all", "all")
    for (kind, letter), ax in axes.items():
        of_kind = rows[rows["directions"] == kinds[kind]]
        image = _phi_matrix(ax, of_kind[of_kind["module"].map(MODULES) == letter], runs)
    panels.label_edges(axes, y=str)
    figure.colorbar(image, ax=list(axes.values()), label="$\\phi$", shrink=0.7, pad=0.01)
    expected = rows.groupby("module")["random"].agg(["min", "max"])
    chance = ", ".join(
        f"{MODULES[m]} {low:.3f} to {high:.3f}" for m, low, high in expected.itertuples()
    )
    about = (
        "Above the diagonal: left singular vectors of the updates; below it: right ones. Mean"
        f" over the layers, last checkpoints. Random subspaces have {chance}. Of a dense update"
        " as many directions are compared as the LoRA run has. LoRA runs of one seed and rank"
        " start from the same A, so their right vectors are alike for that reason, too."
    )
    return panels.notes(figure, frame, [about])


def _phi_matrix(ax: Axes, rows: DataFrame, runs: dict[str, str]) -> Any:
    """Both sides in one square."""
    import numpy as np
    import pandas as pd

    position = {run: i for i, run in enumerate(runs)}
    matrix = np.full((len(runs), len(runs)), np.nan)
    for row in rows.itertuples():
        i, j = sorted((position[row.run], position[row.other]))
        matrix[(i, j) if row.side == "left" else (j, i)] = row.value
    table = pd.DataFrame(matrix, [*runs.values()], [*runs.values()])
    numbers = {"annot": len(runs) <= MOST_NUMBERED, "fmt": ".2f", "annot_kws": {"size": 6}}
    image = marks.heat_map(ax, table, cmap="magma", vmin=0, vmax=1, **numbers)
    ax.set_facecolor("#eeeeee")
    ax.set_xticks([i + 0.5 for i in range(len(runs))], runs.values(), rotation=90, size=5.5)
    ax.set_yticks([i + 0.5 for i in range(len(runs))], runs.values(), rotation=0, size=5.5)
    return image


def _run_labels(frame: DataFrame, names: set[str]) -> dict[str, str]:
    """The runs with their labels, by family, arm and seed."""
    runs = frame[frame["run"].isin(names)].drop_duplicates("run")
    families = families_of(runs)
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
    for family in families_of(last):
        of_family = last[last["family"] == family].sort_values("seed").drop_duplicates("arm")
        lora = of_family[of_family["method"] == "lora"].sort_values("rank")
        picked = [*lora.iloc[[0, -1]].index.unique()] if len(lora) else []
        picked += list(of_family[of_family["method"] == "full"].index)
        if len(picked) > len(best):
            best = picked
    return list(last.loc[best, ["run", "step", "arm", "rank"]].itertuples(index=False))


def _spectra(study: StudyRecords, run: Any) -> DataFrame | None:
    import pandas as pd

    path = study.folder("drift") / "spectra" / f"{unit_name(run.run, run.step)}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _similarities(study: StudyRecords, run: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    path = study.folder("drift") / "similarities" / f"{unit_name(run.run, run.step)}.safetensors"
    return {n: m.astype(float) for n, m in load_file(path).items()} if path.is_file() else {}
