"""The study in examples/ can be read by the code beside it, and its pages say what it found."""

import math
import re
import subprocess
from functools import cache

import pandas as pd
import pytest
from support import ROOT

from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.files import read_json
from lora_tradeoffs.report.hypotheses import hypothesis_findings
from lora_tradeoffs.report.pack import packed_settings
from lora_tradeoffs.report.wording import MISSING, p_text
from lora_tradeoffs.study.study_file import read_study_file
from lora_tradeoffs.tables.frames import is_trained

EXAMPLE = ROOT / "examples" / "study"
RESULTS = EXAMPLE / "RESULTS.md"
FILES = {"main": "study.yaml", "ranks": "ranks.yaml", "rates": "rates.yaml"}
PLAN = "examples/study/PLAN.md"


@cache
def studies():
    return {s.study: StudyRecords.load(s) for s in packed_settings(EXAMPLE)}


def runs(name):
    return {path.parent: read_json(path) for path in EXAMPLE.glob(f"models/{name}/*/run.json")}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("analysis", ["adaptation", "retention", "drift"])
def test_every_run_of_the_study_was_measured(name, analysis):
    records = studies()[name].at_all_rates[analysis]
    assert set(records["run"][is_trained(records)]) == {folder.name for folder in runs(name)}


@pytest.mark.parametrize("name, file", FILES.items())
def test_what_was_run_is_what_the_study_file_says(name, file):
    ran, planned = (read_study_file(EXAMPLE / p) for p in (f"outputs/{name}/study.yaml", file))
    del planned["data"]  # a folder of the machine that ran it
    assert {field: ran[field] for field in planned} == planned


def test_it_names_no_place_of_the_machine_that_made_it():
    for path in (p for suffix in ("json", "yaml") for p in EXAMPLE.rglob(f"*.{suffix}")):
        assert not re.search(r"(^|[\s\"'])/\w", path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("name", FILES)
def test_the_page_of_results_has_the_numbers_of_the_findings(name):
    lines = RESULTS.read_text(encoding="utf-8").splitlines()
    for finding in hypothesis_findings(studies()[name]):
        hypothesis = finding.sentence.split(":")[0]
        (row,) = (line for line in lines if line.startswith(f"| {hypothesis} |"))
        expected = ["not answered"]
        if finding.kind != MISSING:
            numbers = {
                f"{finding.effect:+.4f}": finding.effect,
                f"{finding.low:+.4f} to {finding.high:+.4f}": finding.low,
                p_text(finding.corrected): finding.corrected,
                f"{finding.detectable:.4f}": finding.detectable,
            }
            expected = [text for text, number in numbers.items() if math.isfinite(number)]
            expected.append(f"**{finding.verdict}**")
        assert [text for text in expected if text not in row] == [], finding.sentence


def test_the_table_of_arms_has_the_means_of_the_records():
    study, tasks = studies()["main"], ["sst2", "mnli", "qqp"]
    accuracies = study.adaptation.query("split == 'test' and metric == 'accuracy'")
    kept = study.retention.query("update_scale == 1 and metric in ('acc_norm', 'log_likelihood')")
    base = kept[kept["run"] == "base"].set_index("task")["value"]
    lost = kept.assign(value=kept["task"].map(base) - kept["value"])
    sizes = study.drift.query("metric == 'relative_frobenius' and layer == -1 and module == 'all'")
    rows = pd.concat([accuracies, lost, sizes.assign(task="size")])
    for arm, of_arm in rows[is_trained(rows)].groupby("arm"):
        assert set(of_arm.groupby("task").size()) == {8}  # seeds
        means = of_arm.groupby("task")["value"].mean()
        text = means[["text_cnn_dailymail", "text_wikitext"]].mean()
        expected = [*means[tasks], text, *means[["hellaswag", "piqa", "size"]]]
        name = {"LoRA r=8": "LoRA", "full qv": "full_qv"}.get(arm.kind, arm.kind)
        name += " (all)" if arm.target_modules == "all" else ""
        assert_page_has_row(name, expected)
    of_none = accuracies[accuracies["run"].isin(["base", "majority_class"])]
    table = of_none.pivot(index="run", columns="task", values="value")[tasks]
    assert_page_has_row("base; majority class", table.to_numpy().ravel())


def assert_page_has_row(name, expected):
    page = RESULTS.read_text(encoding="utf-8")
    (cells,) = re.findall(rf"^\| {re.escape(name)} \|( \..*)\|$", page, re.MULTILINE)
    for text, value in zip(re.findall(r"\.\d+", cells), expected, strict=True):
        assert abs(float(text) - value) < 0.5001 * 10 ** (1 - len(text)), (name, text, value)


def test_the_readme_has_no_number_that_the_page_of_results_lacks():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    answer = readme.split("examples/study/RESULTS.md")[0].rpartition("\n\n")[2]
    numbers = set(re.findall(r"[-+]?\d*\.\d+", answer))
    assert numbers
    assert numbers <= set(re.findall(r"[-+]?\d*\.\d+", RESULTS.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", FILES)
def test_the_plan_is_older_than_the_runs(name):
    """Every run was trained from a commit that holds the plan as it stands."""
    plan = (ROOT / PLAN).read_text(encoding="utf-8")
    for commit in {run["environment"]["git_commit"] for run in runs(name).values()}:
        git = ["git", "-C", str(ROOT), "show", f"{commit}:{PLAN}"]
        shown = subprocess.run(git, capture_output=True, text=True, encoding="utf-8")
        if shown.returncode:
            pytest.skip("needs the repository's history")
        assert shown.stdout == plan
