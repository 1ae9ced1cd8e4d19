"""A new task is one description and one entry in config.FAMILIES (docs/contributing.md)."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from support import DEMO, ROOT

from config import TASKS

CONTRIBUTING = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
DESCRIPTION = re.search(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)[1].rstrip() + ",\n"
COMMANDS = """
import sys
import data_preprocessing, eval, multi_task_training

flags = sys.argv[1:]
short = ["--max-steps", "2", "--set", "checkpoints=2", "--dtype", "fp32"]
assert data_preprocessing.main(["weather", *flags]) == 0
assert multi_task_training.main(["--tasks", "weather", "--lora", "4", *short, *flags]) == 0
assert eval.main(["--tasks", "weather", "--shots", "2", "--dtype", "fp32", *flags]) == 0
"""


def insert(path, anchor, text):
    source = path.read_text(encoding="utf-8")
    assert source.count(anchor) == 1
    path.write_text(source.replace(anchor, anchor + text), encoding="utf-8")


def write_rows(folder):
    """Three splits of short sentences, each of them another."""
    folder.mkdir(parents=True)
    skies = ("drops fall", "light is bright", "flakes drift")
    start = 0
    for split, count in {"train": 48, "validation": 12, "test": 12}.items():
        rows = [
            {"sentence": f"On day {n} {skies[n % 3]}.", "label": n % 3}
            for n in range(start, start + count)
        ]
        start += count
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


@pytest.fixture(scope="module")
def records(tiny, tmp_path_factory):
    """The adaptation records of a copy of the project that has one more task."""
    folder = tmp_path_factory.mktemp("with_a_new_task")
    project = folder / "project"
    shutil.copytree(ROOT / "lora_tradeoffs", project / "lora_tradeoffs")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, project)
    insert(project / "config.py", '"similar": ("sst2", "mnli", "qqp"', ', "weather"')
    insert(project / "dataset_descriptions.py", "    for d in (\n", DESCRIPTION)
    write_rows(folder / "rows" / "weather")
    flags = ["--model", str(tiny), "--data", str(folder / "rows"), "--study", "weather"]
    places = {"OUTPUT_DIR": str(folder), "DATA_DIR": str(folder / "data")}
    process = subprocess.run(
        [sys.executable, "-c", COMMANDS, *flags],
        cwd=project,
        env={**os.environ, **DEMO, **places},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    document = folder / "performance_analysis" / "weather" / "adaptation.json"
    return pd.DataFrame(json.loads(document.read_text())["records"])


def test_a_new_task_is_prepared_trained_and_evaluated(records):
    ours = records[(records.method == "lora") & (records.metric == "accuracy")]
    assert set(ours.task) == {"weather"} and set(ours.family) == {"similar"}
    assert set(ours.step) == {1, 2} and set(ours.n) == {12}
    assert set(records[records.method == "base"].shots) == {0, 2}


def test_a_new_task_has_macro_f1_class_shares_and_the_majority_as_baseline(records):
    assert {"accuracy", "f1", "loss", "share_rain", "share_sun", "share_snow"} == set(
        records.metric
    )
    baseline = records[(records.run == "majority_class") & (records.split == "test")]
    figures = baseline.set_index("metric").value
    assert figures.accuracy == pytest.approx(1 / 3) and figures.f1 == pytest.approx(1 / 6)


def named_tasks(source, names):
    """Where code names a task: (line, text). Docstrings do not count."""
    tree = ast.parse(source)
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, holders) and node.body and isinstance(node.body[0], ast.Expr)
    }
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) else None
        if isinstance(text, str) and id(node) not in docstrings and pattern.search(text):
            yield node.lineno, text


def test_no_other_file_names_a_task():
    grounds = {ROOT / "config.py", ROOT / "dataset_descriptions.py"}
    files = {*ROOT.glob("*.py"), *(ROOT / "lora_tradeoffs").rglob("*.py")} - grounds
    named = {path: list(named_tasks(path.read_text(encoding="utf-8"), TASKS)) for path in files}
    assert len(files) > 50 and {path: lines for path, lines in named.items() if lines} == {}


def test_a_task_that_is_named_is_seen():
    source = '"""About sst2."""\nif task == "mnli":\n    metric = "sst2_f1"\n'
    assert list(named_tasks(source, TASKS)) == [(2, "mnli")]
