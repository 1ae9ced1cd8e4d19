"""The report runs on any study, also on none, and is kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_drift import write_drift
from synthetic_records import GRID, retention_study, study, write_study

import drift_figures
import spectrum_figures
from retention_figures import FIGURES

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "plot_results.ipynb"


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the notebook on tmp_path as OUTPUT_DIR; the printed text and the pictures."""
    import config

    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / "jupyter"))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("PRESET", "demo")
    monkeypatch.setenv("DATA_SOURCE", "sample")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(config.ROOT)]))

    def run(study="demo"):
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells[1].source = notebook.cells[1].source.replace("demo", study)
        NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT)}}).execute()
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        text = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        return text, pictures

    return run


def test_notebook_is_valid_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.cells[1].source == 'STUDY = "demo"'
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_report_draws_the_figures_and_says_what_is_missing(report, tmp_path):
    grid = [arm for arm in GRID if arm != ("lora", 16)]
    write_study(tmp_path, study(grid=grid, families=("similar",)))
    folder = tmp_path / "models" / "demo" / "similar_full_seed42"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        '{"config": {"method": "full", "learning_rate": 5e-5}, "steps": 100,'
        ' "environment": {"device_name": "an abacus", "versions": {"torch": "9.9"}}}'
    )
    text, pictures = report()
    assert len(pictures) == 3
    assert "LoRA r=64" in text and "majority class" in text and "base (4-shot)" in text
    assert "an abacus" in text
    assert "similar: no LoRA r=16" in text
    assert "dissimilar: no run that is measured at its end" in text
    made = {p.name for p in (tmp_path / "performance_analysis/demo/figures").iterdir()}
    names = ("learning_curves", "last_by_rank", "validation_against_test")
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert "python retention_eval.py --study demo" in text


def test_report_draws_retention_beside_adaptation(report, tmp_path):
    grid = [("lora", 8), ("full", 0)]
    write_study(tmp_path, study(grid=grid, points=2, families=("similar",)))
    records = retention_study(grid=grid, points=2, families=("similar",))
    write_study(tmp_path, records, script="retention")
    text, pictures = report()
    names = [figure.__name__ for figure in FIGURES]
    assert len(pictures) == 3 + len(names)
    made = {p.name for p in (tmp_path / "outputs/demo/figures").iterdir()}
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert "the base is at chance, nothing can be forgotten: arc_challenge" in text


def test_report_of_retention_alone(report, tmp_path):
    records = retention_study(grid=GRID[:1], points=1, families=("similar",))
    write_study(tmp_path, records, script="retention")
    text, pictures = report()
    assert "python eval.py --study demo" in text
    assert len(pictures) == len(FIGURES)


def test_report_of_drift_alone(report, tmp_path):
    write_drift(tmp_path, [("lora", 8), ("lora", 64), ("full", 0)], families=("similar",), points=2)
    text, pictures = report()
    names = {f.__name__ for f in (*drift_figures.FIGURES, *spectrum_figures.FIGURES)}
    assert len(pictures) == len(names)
    made = {p.name for p in (tmp_path / "drift_analysis_plots/demo/figures").iterdir()}
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert "similar: no LoRA r=4, LoRA r=16" in text
    assert "python retention_eval.py --study demo" in text


def test_report_of_a_study_without_results_names_the_command(report, tmp_path):
    write_study(tmp_path, study(grid=GRID[:1], families=("similar",)), study="mine")
    text, pictures = report(study="other")
    adaptation, retention, drift = text.splitlines()
    assert "python eval.py --study other" in adaptation and "mine" in adaptation
    assert "python retention_eval.py --study other" in retention
    assert "python svd_analysis.py --study other" in drift
    assert not pictures
