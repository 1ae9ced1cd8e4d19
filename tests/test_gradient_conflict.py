"""The command for gradient conflict on a two-layer LLaMA, as a user would call it."""

import pandas as pd
import pytest
from support import assert_one_line_error, settings_for

from gradient_conflict import main
from lora_tradeoffs.files import read_json
from multi_task_training import main as train

STUDY = "pulling"
RUN = "similar_lora_r4_limit64_fp32_checkpoints2_seed42"
FULL = "similar_full_limit64_fp32_checkpoints2_seed42"
FEW = ["--dtype", "fp32", "--batches", "3", "--batch-size", "4"]


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny), "--study", STUDY]


@pytest.fixture(scope="module")
def folder(model):
    """A study with a LoRA run, a full one and a single-task control, measured."""
    short = ["--limit", "64", "--dtype", "fp32", "--set", "checkpoints=2", *model]
    assert train(["--similar", "--lora", "4", "--full-finetune", *short]) == 0
    assert train(["--tasks", "sst2", "--lora", "4", *short]) == 0
    assert main([*model, *FEW]) == 0
    return settings_for(study=STUDY).output_dir / "performance_analysis" / STUDY / "gradients"


def test_base_and_every_checkpoint_of_several_tasks_are_measured(folder):
    records = pd.DataFrame(read_json(folder / "gradients.json")["records"])
    assert set(records.run) == {"base", RUN, FULL}
    assert records.groupby("run").step.unique().map(set).to_dict() == {
        "base": {0},
        RUN: {3, 6},
        FULL: {3, 6},
    }
    spaces = records.groupby("run").of.unique().map(list).to_dict()
    assert spaces == {"base": ["qv"], RUN: ["adapter"], FULL: ["qv"]}
    cosines = records[(records.metric == "gradient_cosine") & (records.layer == -1)]
    cosines = cosines[(cosines.module == "both") & (cosines.run == FULL) & (cosines.step == 6)]
    pairs = {("sst2", "mnli"), ("sst2", "qqp"), ("mnli", "qqp"), ("mean", "mean")}
    assert set(zip(cosines.task, cosines.other)) == pairs and set(cosines.n) == {3}
    assert cosines.value.between(-1, 1).all() and (cosines.low < cosines.high).all()
    assert set(records.layer) == {-1, 0, 1}
    assert set(records.module) == {"both", "q_proj", "v_proj"}
    figures = {p.stem for p in (folder / "figures").glob("*.png")}
    assert figures == {
        *("cosine_between_tasks", "conflict_over_training"),
        *("conflict_by_layer", "conflict_by_layer_over_training"),
    }


def test_existing_results_are_reused(folder, model, capsys):
    files = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    lost = folder / "records" / f"{RUN}-6.json"
    text = lost.read_text()
    lost.unlink()
    assert main([*model, *FEW]) == 0
    out = capsys.readouterr().out
    assert f"{len(files)} measurements: {len(files) - 1} cached, 1 to run" in out
    (line,) = (line for line in out.splitlines() if "skipping single-task runs" in line)
    assert "sst2_lora" in line and "below the study's minimum of 32: preliminary" in out
    changed = [p for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [lost] and lost.read_text() == text


def test_without_runs_the_base_is_measured_on_both_families(model):
    assert main([*model[:2], "--study", "only-base-pulls", *FEW]) == 0
    folder = settings_for().output_dir / "performance_analysis" / "only-base-pulls" / "gradients"
    records = pd.DataFrame(read_json(folder / "gradients.json")["records"])
    assert set(records.run) == {"base"} and set(records.family) == {"similar", "dissimilar"}


def test_bad_input_is_one_line(folder, model, inside):
    def run(*argv):
        return inside(main, *model, *argv)

    assert_one_line_error(run("--batches", "1"), "--batches must be 2 or more")
    assert_one_line_error(run("--batch-size", "1"), "--batch-size must be 2 or more")
    assert_one_line_error(run("--batch-size", "100000"), "sst2, train", "lower --batch-size")
