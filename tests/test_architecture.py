"""What may import what, and which files lie at the root: docs/architecture.md, as a test."""

import ast
import subprocess
from graphlib import CycleError, TopologicalSorter

import pytest
from support import ROOT

GROUND = {"config", "dataset_descriptions", "training_configs"}
BELOW = {f"lora_tradeoffs.{name}" for name in ("command_line", "task_description", "task_yaml")}
COMMANDS = {
    *("data_preprocessing", "multi_task_training", "eval", "retention_eval", "svd_analysis"),
    *("gradient_conflict", "run_study"),
}
ROOT_FILES = {
    *(f"{name}.py" for name in (*GROUND, *COMMANDS, "checkpoint_utils")),
    *("plot_results.ipynb", "requirements.txt", "requirements-dev.txt", ".env.example"),
    *("README.md", "LICENSE", "CITATION.cff", "Makefile", "pyproject.toml", ".gitignore"),
}
ROOT_FOLDERS = {
    *("lora_tradeoffs", "docs", "tests", "benchmarks", "examples", ".ci"),
    *("data", "models", "logs", "outputs", "tokenizer", "drift_analysis_plots"),
    "performance_analysis",
}
# Lowest first; a subpackage imports those of lower floors alone.
FLOORS = (
    ("command_line", "shapes", "task_description"),
    ("task_yaml",),
    ("chat", "files", "hub", "hardware", "trackers"),
    ("checkpoints", "records"),
    ("scoring", "statistics"),
    ("data", "models", "tables"),
    ("training", "measuring"),
    ("adaptation", "drift", "gradients", "figures", "study"),
    ("report", "retention"),
    ("publish",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imports(source):
    """The modules that a file's code imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules():
    """Every module of root and package: its dotted name and what it imports of these."""
    files = [*ROOT.glob("*.py"), *(ROOT / "lora_tradeoffs").rglob("*.py")]
    names = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return {
        name: {m for m in imports(path.read_text(encoding="utf-8")) if m in names}
        for name, path in names.items()
    }


def wrong_arrows(graph):
    """Arrows that run up, or to where nothing may lead: (from, to)."""
    for name, imported in graph.items():
        inside = name.startswith("lora_tradeoffs.")
        for other in imported:
            into_package = other.startswith("lora_tradeoffs.")
            if name in GROUND:
                if other not in (*GROUND, *BELOW):
                    yield name, other
            elif other in COMMANDS or (inside and other == "checkpoint_utils"):
                yield name, other
            elif inside and into_package:
                ours, theirs = name.split(".")[1], other.split(".")[1]
                if ours != theirs and FLOOR_OF[ours] <= FLOOR_OF[theirs]:
                    yield name, other


def test_no_arrow_runs_up_and_nothing_imports_a_command():
    assert list(wrong_arrows(modules())) == []


def test_no_circle():
    list(TopologicalSorter(modules()).static_order())


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("lora_tradeoffs.tables.frames", "lora_tradeoffs.figures.style"),
        ("lora_tradeoffs.figures.drift", "lora_tradeoffs.drift.svd"),
        ("lora_tradeoffs.study.plan", "multi_task_training"),
        ("lora_tradeoffs.drift.analysis", "checkpoint_utils"),
        ("config", "lora_tradeoffs.files"),
        ("run_study", "eval"),
    ],
)
def test_a_wrong_arrow_is_seen(name, imported):
    assert list(wrong_arrows({name: {imported}})) == [(name, imported)]


def test_a_circle_is_seen():
    graph = modules()
    graph["lora_tradeoffs.files"] = {"lora_tradeoffs.models.base"}
    with pytest.raises(CycleError):
        list(TopologicalSorter(graph).static_order())


def test_every_subpackage_has_a_floor():
    names = {name.split(".")[1] for name in modules() if name.count(".") >= 1}
    assert names == set(FLOOR_OF)


def test_the_root_holds_what_its_list_says():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    files = {path for path in listed if "/" not in path}
    folders = {path.split("/")[0] for path in listed if "/" in path}
    assert files == ROOT_FILES
    assert folders <= ROOT_FOLDERS
