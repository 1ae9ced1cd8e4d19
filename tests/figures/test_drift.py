"""The figures of drift show what the records and tables hold, and say what is missing."""

import json

import matplotlib.colors
import numpy as np
import pytest
from support import settings_for
from synthetic_drift import LAYERS, write_drift, write_retention

from config import RANKS
from lora_tradeoffs.figures import drift as drift_figures
from lora_tradeoffs.figures import spectra as spectrum_figures
from lora_tradeoffs.figures.draw import FIGURES as ALL
from lora_tradeoffs.figures.panels import DEMO_NOTE
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.figures.style import save, style_of
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import load_records

GRID = (*(("lora", rank) for rank in RANKS), ("full", 0))
FIGURES = ALL["drift"]


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    return settings_for(study="demo")


@pytest.fixture
def drawn(tmp_path, settings):
    """Draw a figure of a made-up study."""

    def draw(figure, grid=GRID, change=None, **study):
        path = write_drift(tmp_path, grid, **study)
        if change:
            document = json.loads(path.read_text())
            document["records"] = [r for r in document["records"] if change(r)]
            path.write_text(json.dumps(document))
        return figure(StudyRecords.load(settings))

    return draw


def panels(figure):
    """The panels with data by column title and row, colour bars left out."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    return axes


def line(ax, label):
    return next(found for found in ax.lines if found.get_label() == label)


def small_print(figure):
    return " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f.__name__)
def test_every_figure_is_drawn_of_one_arm_and_of_the_whole_grid(figure, drawn, tmp_path):
    for study in (
        dict(grid=[("lora", 8)], families=("similar",), points=1),
        dict(grid=GRID, seeds=(42, 43, 44)),
    ):
        made = drawn(figure, **study)
        path = save(made, tmp_path / "figure.png")
        assert path.stat().st_size > 4000
        assert DEMO_NOTE in small_print(made)


def test_drift_over_training_begins_at_the_base_and_shows_the_mean_over_seeds(drawn, tmp_path):
    figure = drawn(drift_figures.drift_over_training, seeds=(42, 43, 44))
    ax = next(a for a in figure.axes if a.get_title(loc="left") == "similar, V")
    shown = line(ax, "LoRA r=16")
    frame = load_records(tmp_path / "drift_analysis_plots/demo/drift.json")
    rows = frame.assign(arm=frame["arm"].map(str)).query(
        "family == 'similar' and arm == 'LoRA r=16' and module == 'v_proj' and layer == -1"
        " and metric == 'relative_frobenius'"
    )
    means = 100 * rows.groupby("fraction").value.mean()
    assert shown.get_ydata()[0] == 0
    assert np.allclose(shown.get_ydata()[1:], means)
    assert shown.get_color() == style_of(Arm("lora", 16))["color"]
    assert "Mean of 3 seeds, bars: 95 % interval over seeds." in small_print(figure)


def test_the_heat_map_has_a_cell_a_layer_and_checkpoint(drawn):
    figure = drawn(drift_figures.drift_by_layer_over_training, points=5)
    meshes = [c for ax in figure.axes for c in ax.collections if hasattr(c, "get_coordinates")]
    meshes = [c for c in meshes if c.get_array().shape == (LAYERS, 5)]
    assert len(meshes) == 4 * len(GRID)  # two families, Q and V
    norms = {id(c.norm) for c in meshes}
    assert len(norms) == 1  # one scale for all
    assert isinstance(meshes[0].norm, matplotlib.colors.LogNorm)


def test_more_arms_than_fit_are_left_out_by_name(drawn):
    many = [("lora", rank) for rank in range(1, 11)]
    figure = drawn(drift_figures.drift_by_layer_over_training, grid=many, families=("similar",))
    assert "Left out: LoRA r=9, LoRA r=10" in small_print(figure)


def test_intruders_rise_with_the_threshold(drawn):
    figure = drawn(drift_figures.intruders_by_threshold)
    shown = line(panels(figure)[0], "LoRA r=64")
    assert list(shown.get_xdata()) == [0.3, 0.5, 0.7, 0.9]
    assert (np.diff(shown.get_ydata()) > 0).all()
    ks = line(panels(figure)[4], "LoRA r=64").get_xdata()
    assert list(ks) == [4, 10, 64]


def test_singular_values_are_of_the_weakest_and_strongest_rank_and_full(drawn):
    figure = drawn(spectrum_figures.singular_values)
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert titles == ["LoRA r=4", "LoRA r=64", "full"]
    update = panels(figure)[0].lines[2]
    assert list(update.get_xdata()) == [1, 2, 3, 4]
    assert np.allclose(update.get_ydata(), [0.1, 0.05, 0.1 / 3, 0.025])


def test_the_similarity_matrix_marks_the_intruder_of_the_strangest_layer(drawn):
    figure = drawn(spectrum_figures.similarity_matrices)
    ax = panels(figure)[1]
    assert ax.get_title(loc="left") == "LoRA r=64"
    assert list(ax.lines[0].get_xdata()) == [2]  # the third vector
    assert ax.images[0].get_array()[2, 2] == pytest.approx(0.2, abs=1e-3)
    assert "layer 1" in panels(figure)[0].get_ylabel()
    assert len(panels(figure)[2].lines[0].get_xdata()) == 0  # full has none


def test_phi_has_left_above_and_right_below_the_diagonal(drawn):
    grid = [("lora", 4), ("lora", 64)]

    def only(record):
        return record["metric"] != "update_phi" or record["side"] == "left"

    figure = drawn(spectrum_figures.phi_between_runs, grid, only, families=("similar",))
    for ax in panels(figure):
        matrix = np.ma.filled(ax.collections[0].get_array(), np.nan)
        assert matrix[0, 1] == 0.6 and np.isnan(matrix[[0, 1, 1], [0, 0, 1]]).all()
    assert "Random subspaces have Q 0.007 to 0.111" in small_print(figure)


def test_drift_against_forgetting_joins_run_and_step(settings, tmp_path):
    path = write_drift(tmp_path, GRID)
    document = json.loads(path.read_text())
    for record in document["records"]:  # the columns' axes have nothing in common
        if record["metric"] == "relative_frobenius":
            of_all = record["module"] == "all"
            record["value"] = (1 + record["step"] / 100) * (5e-3 if of_all else 1e-3)
    path.write_text(json.dumps(document))
    write_retention(tmp_path, path, lambda r: r["step"] / 1000)
    figure = drift_figures.drift_against_forgetting(StudyRecords.load(settings))
    whole = next(a for a in figure.axes if a.get_title(loc="left") == "drift of the whole model")
    lines = [found for found in whole.lines if len(found.get_xdata()) == 4]
    assert len(lines) == len(GRID)
    assert list(lines[0].get_ydata()) == [0.02, 0.04, 0.06, 0.08]
    for ax in figure.axes:
        low, high = ax.get_xlim()
        assert sum(low <= tick <= high for tick in ax.get_xticks()) >= 2, ax.get_title(loc="left")


def test_what_is_missing_is_said(drawn):
    def words(figure):
        return " ".join(text.get_text() for ax in figure.axes for text in ax.texts)

    figure = drawn(drift_figures.drift_against_forgetting)
    assert "python retention_eval.py --study demo" in words(figure).replace("\n", " ")
    one = [("lora", 8)]
    figure = drawn(spectrum_figures.phi_between_runs, one, families=("similar",))
    assert "fewer than two runs" in words(figure)
    nothing = drawn(drift_figures.drift_over_training, one, change=lambda r: r["layer"] >= 0)
    assert "no drift of q_proj or v_proj" in words(nothing)
