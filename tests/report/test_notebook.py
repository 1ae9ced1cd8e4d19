"""The report runs on any study, also on none, and is kept without outputs."""

import csv
import functools
import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from synthetic_drift import write_drift
from synthetic_effects import CONFIG, write_run
from synthetic_records import GRID, retention_study, study, write_study

import config
from lora_tradeoffs.figures.draw import FIGURES
from lora_tradeoffs.files import write_json
from lora_tradeoffs.report.wording import DEMO

ROOT = Path(__file__).resolve().parent.parent.parent
NOTEBOOK = ROOT / "plot_results.ipynb"


def run_notebook(folder, patch, study="demo", pdf=False):
    """Run the notebook on the folder as OUTPUT_DIR; the printed text and the pictures."""
    for variable in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        patch.setenv(variable, str(folder / "jupyter"))
    patch.setenv("OUTPUT_DIR", str(folder))
    patch.setenv("PRESET", "demo")
    patch.setenv("DATA_SOURCE", "sample")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(config.ROOT)]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[1].source = f"STUDY, PDF = {study!r}, {pdf}"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    shown = [o.get("data", {}) for o in outputs]
    text = "".join(o.get("text", "") for o in outputs)
    text += "".join(d.get("text/markdown", d.get("text/html", "")) for d in shown)
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    return text, pictures


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the notebook on tmp_path."""
    return functools.partial(run_notebook, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """The report of a study with all records but gradients and one run: text, pictures, folder."""
    folder = tmp_path_factory.mktemp("whole")
    grid = [("lora", 8), ("lora", 64), ("full", 0)]
    write_study(folder, study(grid=grid, points=2, families=("similar",)))
    records = retention_study(grid=grid, points=2, families=("similar",))
    write_study(folder, records, script="retention")
    write_drift(folder, grid, families=("similar",), points=2)
    settings = {"family": "similar", "method": "lora", "rank": 8, "seed": 42}
    write_run(folder / "models" / "demo", "similar_lora_r8_seed42", settings, seconds=90.0)
    with pytest.MonkeyPatch.context() as patch:
        return *run_notebook(folder, patch, pdf=True), folder


def test_notebook_is_valid_and_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert notebook.cells[1].source == 'STUDY, PDF = "demo", False'
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def figures_in(folder, pdf=False):
    """Names of the figures in all folders of the study, each as PNG and, if asked, as PDF."""
    made = {path.name for path in folder.glob("**/figures/*")}
    names = {name.rpartition(".")[0] for name in made}
    kinds = ("png", "pdf") if pdf else ("png",)
    assert made == {f"{name}.{kind}" for name in names for kind in kinds}
    return names


def names_of(*groups):
    return {figure.__name__ for group in groups for figure in FIGURES[group]}


def test_report_draws_adaptation_and_says_what_is_missing(report, tmp_path):
    grid = [arm for arm in GRID if arm != ("lora", 16)]
    write_study(tmp_path, study(grid=grid, families=("similar",)))
    folder = tmp_path / "models" / "demo" / "similar_full_seed42"
    folder.mkdir(parents=True)
    environment = {"device_name": "an abacus", "versions": {"torch": "9.9"}}
    write_json(folder / "run.json", {"config": CONFIG, "steps": 100, "environment": environment})
    text, pictures = report()
    assert names_of("adaptation") < figures_in(tmp_path)
    assert not figures_in(tmp_path) & names_of("retention", "drift")
    assert len(pictures) == len(figures_in(tmp_path))
    assert "LoRA r=64" in text and "majority class" in text and "base (4-shot)" in text
    assert "an abacus" in text
    assert "similar: no LoRA r=16" in text
    assert "dissimilar: no run that is measured at its end" in text
    for script in ("retention_eval", "svd_analysis", "gradient_conflict"):
        assert f"python {script}.py --study demo" in text
    tables = {p.name for p in (tmp_path / "outputs/demo/tables").iterdir()}
    assert {"runs", "arms", "scores", "transfer", "costs", "findings"} <= {t[:-4] for t in tables}


def test_report_of_a_whole_study(whole):
    text, pictures, folder = whole
    together = ("retention", "transfer", "predictors", "costs")
    drawn = names_of("adaptation", "drift", *together)
    assert figures_in(folder, pdf=True) == drawn and len(pictures) == len(drawn)
    for part, groups in (  # each beside the records that it shows
        ("performance_analysis", ("adaptation",)),
        ("drift_analysis_plots", ("drift",)),
        ("outputs", together),
    ):
        paths = (folder / part / "demo" / "figures").glob("*.png")
        assert {path.stem for path in paths} == names_of(*groups)
    assert "the base is at chance, so forgetting cannot be measured: arc_challenge" in text
    assert DEMO in text
    across = (folder / "outputs/demo/tables/across_runs.csv").read_text()
    assert "forgetting" in across


def test_findings_are_made_of_a_study_on_its_own_preset(report, tmp_path):
    grid = [("lora", 8), ("full", 0)]
    records = study(grid=grid, points=1, families=("similar",), seeds=(42,))
    write_study(tmp_path, records, preset="study")
    text, _ = report()
    assert DEMO not in text and "share 1 seed" in text
    assert len((tmp_path / "outputs/demo/tables/findings.csv").read_text().splitlines()) > 1


def test_report_of_a_study_that_was_only_trained_shows_its_runs_and_costs(report, tmp_path):
    settings = {"family": "similar", "method": "lora", "rank": 8, "seed": 42, "learning_rate": 5e-5}
    write_run(tmp_path / "models" / "demo", "similar_lora_r8_seed42", settings)
    text, pictures = report()
    assert not pictures
    for script in ("eval", "retention_eval", "svd_analysis", "gradient_conflict"):
        # at the top, and where it says what is missing
        assert text.count(f"python {script}.py --study demo") >= 2
    tables = tmp_path / "outputs" / "demo" / "tables"
    assert {p.name for p in tables.iterdir()} == {
        *("runs.csv", "arms.csv", "costs.csv", "findings.csv")
    }
    assert "5e-05" in (tables / "runs.csv").read_text()
    assert "an abacus" in (tables / "costs.csv").read_text()


def test_report_of_a_study_without_results_names_the_commands(report, tmp_path):
    write_study(tmp_path, study(grid=GRID[:1], families=("similar",)), study="mine")
    text, pictures = report(study="other")
    for script in ("eval", "retention_eval", "svd_analysis", "gradient_conflict"):
        assert f"python {script}.py --study other" in text
    assert not pictures


def test_the_report_begins_with_what_was_found_and_a_row_for_each_arm(whole):
    text, _, folder = whole
    headings = [line for line in NOTEBOOK.read_text().splitlines() if '"## ' in line]
    assert "What was found" in headings[0] and "The arms" in headings[1]
    assert text.index(DEMO) < text.index("<table")
    with (folder / "outputs/demo/tables/arms.csv").open(encoding="utf-8") as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["base", "LoRA r=8", "LoRA r=64", "full"]
    lora, full = rows["LoRA r=8"], rows["full"]
    assert all("±" in row["score"] and "±" in row["forgetting"] for row in (lora, full))
    assert lora["minutes"] == "1.5" and full["minutes"] == "" and float(lora["drift (%)"]) > 0
    records = json.loads((folder / "outputs/demo/retention.json").read_text())["records"]
    (value,) = [
        r["value"]
        for r in records
        if (r["metric"], r["task"], r["step"]) == ("forgetting", "mean", 40)
        and (r["method"], r["update_scale"]) == ("full", 1)
    ]
    assert full["forgetting"].startswith(f"{value:+.3f} ± ")
