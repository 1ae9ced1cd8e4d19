"""The report runs on any study, also on none, and is kept without outputs."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_drift import write_drift
from synthetic_effects import write_run
from synthetic_records import GRID, retention_study, study, write_study

from lora_tradeoffs.figures import adaptation as adaptation_figures
from lora_tradeoffs.figures import drift as drift_figures
from lora_tradeoffs.figures import retention as retention_figures
from lora_tradeoffs.figures import spectra as spectrum_figures
from lora_tradeoffs.report.wording import DEMO

ROOT = Path(__file__).resolve().parent.parent.parent
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
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        shown = [o.get("data", {}) for o in outputs]
        text = "".join(o.get("text", "") for o in outputs)
        text += "".join(d.get("text/markdown", d.get("text/html", "")) for d in shown)
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


def figures_in(folder):
    """Names of the report's figures, each as PNG and PDF."""
    made = {p.name for p in (folder / "outputs/demo/figures").iterdir()}
    names = {name.rpartition(".")[0] for name in made}
    assert made == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}
    return names


def names_of(*modules):
    return {figure.__name__ for module in modules for figure in module.FIGURES}


def test_report_draws_adaptation_and_says_what_is_missing(report, tmp_path):
    grid = [arm for arm in GRID if arm != ("lora", 16)]
    write_study(tmp_path, study(grid=grid, families=("similar",)))
    folder = tmp_path / "models" / "demo" / "similar_full_seed42"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        '{"config": {"method": "full", "learning_rate": 5e-5}, "steps": 100,'
        ' "environment": {"device_name": "an abacus", "versions": {"torch": "9.9"}}}'
    )
    text, pictures = report()
    assert names_of(adaptation_figures) < figures_in(tmp_path)
    assert not figures_in(tmp_path) & names_of(retention_figures, drift_figures)
    assert len(pictures) == len(figures_in(tmp_path))
    assert "LoRA r=64" in text and "majority class" in text and "base (4-shot)" in text
    assert "an abacus" in text
    assert "similar: no LoRA r=16" in text
    assert "dissimilar: no run that is measured at its end" in text
    for script in ("retention_eval", "svd_analysis", "gradient_conflict"):
        assert f"python {script}.py --study demo" in text
    tables = {p.name for p in (tmp_path / "outputs/demo/tables").iterdir()}
    assert {"runs.csv", "scores.csv", "transfer.csv", "costs.csv", "findings.csv"} <= tables


def test_report_of_a_whole_study(report, tmp_path):
    grid = [("lora", 8), ("lora", 64), ("full", 0)]
    write_study(tmp_path, study(grid=grid, points=2, families=("similar",)))
    records = retention_study(grid=grid, points=2, families=("similar",))
    write_study(tmp_path, records, script="retention")
    write_drift(tmp_path, grid, families=("similar",), points=2)
    text, pictures = report()
    drawn = names_of(adaptation_figures, retention_figures, drift_figures, spectrum_figures)
    drawn |= {"transfer", "gain_against_cost", "predictors_of_forgetting", "predictors_of_gain"}
    assert figures_in(tmp_path) == drawn and len(pictures) == len(drawn)
    for place, modules in (
        ("performance_analysis", (adaptation_figures,)),
        ("drift_analysis_plots", (drift_figures, spectrum_figures)),
    ):  # and beside the records that they show
        found = (tmp_path / place / "demo" / "figures").glob("*.png")
        assert {path.stem for path in found} == names_of(*modules)
    assert "the base is at chance, nothing can be forgotten: arc_challenge" in text
    assert DEMO in text
    across = (tmp_path / "outputs/demo/tables/across_runs.csv").read_text()
    assert "forgetting" in across


def test_findings_are_made_of_a_study_on_its_own_preset(report, tmp_path):
    grid = [("lora", 8), ("full", 0)]
    records = study(grid=grid, points=1, families=("similar",), seeds=(42,))
    write_study(tmp_path, records, preset="study")
    text, _ = report()
    assert DEMO not in text and "share 1 seed" in text
    assert len((tmp_path / "outputs/demo/tables/findings.csv").read_text().splitlines()) > 1


def test_report_of_a_study_that_was_only_trained_shows_its_runs_and_costs(report, tmp_path):
    config = {"family": "similar", "method": "lora", "rank": 8, "seed": 42, "learning_rate": 5e-5}
    write_run(tmp_path / "models" / "demo", "similar_lora_r8_seed42", config)
    text, pictures = report()
    assert not pictures
    for script in ("eval", "retention_eval", "svd_analysis", "gradient_conflict"):
        # at the top, and where it says what is missing
        assert text.count(f"python {script}.py --study demo") >= 2
    tables = tmp_path / "outputs" / "demo" / "tables"
    assert {p.name for p in tables.iterdir()} == {"runs.csv", "costs.csv", "findings.csv"}
    assert "5e-05" in (tables / "runs.csv").read_text()
    assert "an abacus" in (tables / "costs.csv").read_text()


def test_report_of_a_study_without_results_names_the_commands(report, tmp_path):
    write_study(tmp_path, study(grid=GRID[:1], families=("similar",)), study="mine")
    text, pictures = report(study="other")
    for script in ("eval", "retention_eval", "svd_analysis", "gradient_conflict"):
        assert f"python {script}.py --study other" in text
    assert not pictures
