"""Figures of drift that need vectors and spectra: singular values, similarity, phi of runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import INTRUDER_EPSILON, RANKS
from lora_tradeoffs.figures.drift import MODULES, families_of, grid, label_edges, told
from lora_tradeoffs.figures.style import DENSE, GREY, nothing, style_of, styled
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.tables.frames import last_checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

QUANTILES = (0.1, 0.5, 0.9)
FEW = 9  # runs up to which a cell of the phi matrix is wide enough for its number


def singular_values(frame: DataFrame, folder: Path) -> Figure:
    """Base, tuned matrix and update, of the weakest and strongest rank and full fine-tuning."""
    runs = contrasted(frame)
    tables = {run: _spectra(folder, run) for run in runs.itertuples(index=False)}
    tables = {run: table for run, table in tables.items() if table is not None}
    if not tables:
        return nothing(frame, "no spectra of a last checkpoint; python svd_analysis.py makes them")
    with styled():
        figure, axes = grid(
            list(MODULES.values()), {run.arm: run for run in tables}, cell=(2.3, 1.9)
        )
        for run, table in tables.items():
            for module, letter in MODULES.items():
                own = table[table["module"] == module]
                _spectrum(axes[letter, run.arm], own, run.arm)
        label_edges(
            axes, "index of the singular value", lambda m: f"{m}: $\\sigma_i$ / $\\sigma_1(W_0)$"
        )
        figure.legend(handles=_spectrum_handles(), loc="outside upper center", ncols=3)
        about = (
            "Median over the layers, band: from the 10th to the 90th percentile. Last checkpoints"
            f" of {', '.join(run.run for run in tables)}."
        )
        return told(figure, frame, [about])


def _spectrum(ax: Axes, table: DataFrame, arm: str) -> None:
    first = table[table["index"] == 1].set_index("layer")["base"]
    scale = table["layer"].map(first)
    colour = style_of(arm)["color"]
    for name, style in SPECTRA.items():
        values = (table[name] / scale).groupby(table["index"]).quantile(QUANTILES).unstack()
        values = values.dropna()
        if values.empty:
            continue
        style = {"color": colour, **style}
        ax.fill_between(
            values.index, values[0.1], values[0.9], color=style["color"], alpha=0.15, lw=0
        )
        marker = {"marker": "o", "markersize": 2.2} if len(values) < 20 else {}
        ax.plot(values.index, values[0.5], **style, **marker)
    ax.set(xscale="log", yscale="log", ylim=(1e-5, 2))


SPECTRA: dict[str, dict[str, Any]] = {
    "base": {"color": GREY, "linestyle": "-", "lw": 2.4, "alpha": 0.5},
    "tuned": {"linestyle": (0, (2, 1.5)), "lw": 1.1},
    "update": {"linestyle": "-", "lw": 1.1},
}


def _spectrum_handles() -> list[Any]:
    from matplotlib.lines import Line2D

    names = {"base": "base $W_0$", "tuned": "tuned $W$", "update": "update $\\Delta W$"}
    return [
        Line2D([], [], label=names[name], **{"color": "black", **style})
        for name, style in SPECTRA.items()
    ]


# ------------------------------------------------------------------------ similarity matrices


def similarity_matrices(frame: DataFrame, folder: Path) -> Figure:
    """|<u0_i, u_j>| of the matrix where the strongest rank has the least familiar vector."""
    runs = [run for run in contrasted(frame).itertuples(index=False)]
    found = {run: (_spectra(folder, run), _similarities(folder, run)) for run in runs}
    found = {run: pair for run, pair in found.items() if pair[0] is not None and pair[1]}
    if not found:
        return nothing(
            frame, "no similarities of a last checkpoint; python svd_analysis.py makes them"
        )
    strongest = max(found, key=lambda run: run.rank)
    layers = {module: _strangest(found[strongest][0], module) for module in MODULES}
    layers = {module: layer for module, layer in layers.items() if layer is not None}
    with styled():
        figure, axes = grid(
            [MODULES[m] for m in layers],
            {run.arm: run for run in found},
            cell=(2.1, 2.1),
            share_x=False,
        )
        for module, layer in layers.items():
            for run, (spectra, similarities) in found.items():
                ax = axes[MODULES[module], run.arm]
                name = next(
                    n for n in similarities if n.endswith(f".{module}") and f".{layer}." in n
                )
                image = _similarity(ax, similarities[name], spectra, module, layer)
        named = {
            MODULES[m]: f"{MODULES[m]}, layer {layer}\nbase, $i$" for m, layer in layers.items()
        }
        label_edges(axes, "tuned, $j$", named.get)
        figure.colorbar(
            image,
            ax=list(axes.values()),
            label="$|\\langle u^0_i, u_j\\rangle|$",
            shrink=0.7,
            pad=0.01,
        )
        about = (
            "Leading left singular vectors of base and tuned matrix. Triangles, where there are"
            " any: intruders, whose cosine with every base vector, also those beyond the picture,"
            f" is below {INTRUDER_EPSILON}."
            f" Last checkpoints of {', '.join(run.run for run in found)}."
        )
        return told(figure, frame, [about])


def _similarity(ax: Axes, matrix: Any, spectra: DataFrame, module: str, layer: int) -> Any:
    image = ax.imshow(matrix, cmap="magma", vmin=0, vmax=1, aspect="auto")
    size = matrix.shape[1]
    own = spectra[(spectra["module"] == module) & (spectra["layer"] == layer)]
    own = own[own["index"] <= size]
    intruders = own[own["max_cosine"] < INTRUDER_EPSILON]["index"] - 1
    style = {"marker": "v", "linestyle": "", "color": DENSE["full"], "markersize": 3}
    for line in ax.plot(intruders, [-1.5 * size / 64] * len(intruders), clip_on=False, **style):
        line.set_in_layout(False)  # outside the axes, where it would shrink them
    ax.set(xlim=(-0.5, size - 0.5), ylim=(len(matrix) - 0.5, -0.5))
    ticks = [t for t in (1, 16, 32, 48, 64) if t <= size]
    ax.set_xticks([t - 1 for t in ticks], [str(t) for t in ticks])
    ax.set_yticks([t - 1 for t in ticks], [str(t) for t in ticks])
    ax.grid(False)
    return image


def _strangest(spectra: DataFrame, module: str) -> int | None:
    """The layer with the lowest largest cosine among the vectors that are shown."""
    own = spectra[(spectra["module"] == module) & (spectra["index"] <= 64)].dropna(
        subset=["max_cosine"]
    )
    return None if own.empty else int(own["layer"].iloc[own["max_cosine"].argmin()])


# ------------------------------------------------------------------------------ phi of runs


def phi_between_runs(frame: DataFrame, folder: Path) -> Figure:
    """Runs by runs: the similarity of their updates' subspaces, left above, right below."""
    rows = frame[(frame["metric"] == "update_phi") & frame["module"].isin(MODULES)]
    if rows.empty:
        return nothing(frame, "fewer than two runs with an update, so none to compare")
    kinds = {
        "all directions": rows[rows["directions"] == "all"],
        f"the first {min(RANKS)}": rows[rows["directions"] == "leading"],
    }
    runs = _ordered_runs(frame, set(rows["run"]) | set(rows["other"]))
    side = max(2.2, 0.13 * len(runs))
    with styled():
        figure, axes = grid(
            list(kinds),
            {letter: m for m, letter in MODULES.items()},
            cell=(side, side),
            share_y=True,
        )
        for (kind, letter), ax in axes.items():
            own = kinds[kind][kinds[kind]["module"].map(MODULES) == letter]
            image = _phi_matrix(ax, own, runs)
        label_edges(axes)
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
        return told(figure, frame, [about])


def _phi_matrix(ax: Axes, rows: DataFrame, runs: dict[str, str]) -> Any:
    """Both sides in one square."""
    import numpy as np

    place = {run: i for i, run in enumerate(runs)}
    matrix = np.full((len(runs), len(runs)), np.nan)
    for row in rows.itertuples():
        i, j = sorted((place[row.run], place[row.other]))
        matrix[(i, j) if row.side == "left" else (j, i)] = row.value
    image = ax.imshow(matrix, cmap="magma", vmin=0, vmax=1, aspect="auto")
    ax.set_facecolor("#eeeeee")
    if len(runs) <= FEW:
        for (i, j), value in np.ndenumerate(matrix):
            if value == value:
                colour = "black" if value > 0.6 else "white"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, size=6)
    ax.set_xticks(range(len(runs)), runs.values(), rotation=90, size=5.5)
    ax.set_yticks(range(len(runs)), runs.values(), size=5.5)
    ax.grid(False)
    return image


def _ordered_runs(frame: DataFrame, names: set[str]) -> dict[str, str]:
    """The runs and their labels: by family, arm, seed."""
    found = frame[frame["run"].isin(names)].drop_duplicates("run")
    families = families_of(found)
    seeds = found["seed"].nunique() > 1
    rows = sorted(found.itertuples(), key=lambda r: (families.index(r.family), r.arm, r.seed))
    return {
        r.run: " ".join(
            part for part in (r.family, str(r.arm), f"s{int(r.seed)}" if seeds else "") if part
        )
        for r in rows
    }


# ---------------------------------------------------------------------------------- reading


def contrasted(frame: DataFrame) -> DataFrame:
    """Last checkpoints of the weakest and strongest LoRA and full fine-tuning with Q and V, of one
    family and seed: the first family that has the most of them. Columns run, step, arm, rank."""
    last = last_checkpoints(frame)
    last = last[(last["module"] == "both") & (last["metric"] == "relative_frobenius")]
    plain = last["arm"].map(lambda arm: not arm.details)
    last = last[plain] if plain.any() else last
    best: list[Any] = []
    for family in families_of(last):
        own = last[last["family"] == family].sort_values("seed").drop_duplicates("arm")
        lora = own[own["method"] == "lora"].sort_values("rank")
        picked = [*lora.iloc[[0, -1]].index.unique()] if len(lora) else []
        picked += list(own[own["method"] == "full"].index)
        if len(picked) > len(best):
            best = picked
    return last.loc[best, ["run", "step", "arm", "rank"]]


def _spectra(folder: Path, run: Any) -> DataFrame | None:
    import pandas as pd

    path = folder / "spectra" / f"{unit_name(run.run, run.step)}.parquet"
    return pd.read_parquet(path) if path.is_file() else None


def _similarities(folder: Path, run: Any) -> dict[str, Any]:
    from safetensors.numpy import load_file

    path = folder / "similarities" / f"{unit_name(run.run, run.step)}.safetensors"
    return {n: m.astype(float) for n, m in load_file(path).items()} if path.is_file() else {}


FIGURES = (singular_values, similarity_matrices, phi_between_runs)
