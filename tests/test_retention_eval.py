"""The retention script on runs of a two-layer LLaMA, as a user would call it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, assert_one_line_error, settings_for
from safetensors.torch import load_file, save_file

from checkpoint_utils import read_json
from metrics import Scores, mean
from multi_task_training import main as train
from results import Results
from retention_eval import main
from retention_records import at_chance, derived_records

STUDY = "kept"
RUN = "similar_lora_r4_limit16_fp32_checkpoints2_seed42"
FULL = "similar_full_limit16_fp32_checkpoints2_seed42"
FEW = ["--dtype", "fp32", "--limit", "6"]


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny), "--study", STUDY]


@pytest.fixture(scope="module")
def folder(model):
    """A study with a LoRA and a full run, its updates scaled."""
    short = ["--limit", "16", "--dtype", "fp32", "--set", "checkpoints=2", *model]
    assert train(["--similar", "--lora", "4", "--full-finetune", *short]) == 0
    assert main([*model, *FEW, "--scale-update", "0", "0.5", "1", "1.5"]) == 0
    return settings_for(study=STUDY).output_dir / "outputs" / STUDY


def records_in(folder):
    return pd.DataFrame(read_json(folder / "retention.json")["records"])


def test_base_and_every_checkpoint_have_benchmarks_text_and_drift(folder):
    records = records_in(folder)
    for run, steps in (("base", {0}), (RUN, {6, 12}), (FULL, {6, 12})):
        own = records[(records.run == run) & (records.update_scale == 1)]
        assert set(own[own.metric == "acc"].task) == {"hellaswag", "arc_challenge", "winogrande"}
        assert set(own[own.metric == "acc_norm"].task) == {"hellaswag", "arc_challenge"}
        assert set(own[own.metric == "acc"].step) == steps
        texts = own[own.metric == "log_likelihood"]
        assert set(texts.task) == {"text_prose", "text_cnn_dailymail"} and (texts.value < 0).all()
    ours = records[(records.run == RUN) & (records.step == 12) & (records.update_scale == 1)]
    assert {"kl", "agreement", "cka", "forgetting", "retention"} <= set(ours.metric)
    assert set(ours[ours.metric == "kl"].task) == {"text", "sst2", "mnli", "qqp"}
    assert set(ours[ours.metric == "cka"].layer) == {0, 1, 2}
    assert (ours[ours.metric == "kl"].value > 0).all()


def test_the_mean_takes_acc_norm_where_there_is_one(folder):
    base = records_in(folder).query("run == 'base' and update_scale == 1")
    value = base.set_index(["task", "metric"]).value
    parts = [value["hellaswag", "acc_norm"], value["arc_challenge", "acc_norm"]]
    expected = np.mean([*parts, value["winogrande", "acc"]])
    assert value["mean", "retention"] == pytest.approx(expected)


def test_forgetting_is_paired_and_counts_what_flipped(folder):
    records = records_in(folder).query("run == @FULL and step == 12 and update_scale == 1")
    found = records[(records.task == "hellaswag") & (records.metric == "forgetting")].iloc[0]
    results = Results(folder)
    base, ours = (
        results.items(f"{unit}-hellaswag")["acc_norm"].items for unit in ("base-0", f"{FULL}-12")
    )
    assert found.value == pytest.approx((base - ours).mean())
    assert found.forgotten == ((base == 1) & (ours == 0)).sum()
    assert found.gained == ((base == 0) & (ours == 1)).sum()
    assert found.of == "acc_norm" and found.test == "exact McNemar"
    means = records[(records.task == "mean") & (records.metric == "forgetting")]
    each = records[(records.metric == "forgetting") & records.at_chance.notna()]
    assert len(each) == 3 and means.value.item() == pytest.approx(each.value.mean())
    assert means.stderr.item() == pytest.approx(np.sqrt((each.stderr**2).sum()) / 3)


def test_scaled_updates_lie_between_base_and_checkpoint(folder):
    records = records_in(folder)
    gains = records[records.metric == "adaptation"].set_index(["run", "update_scale"]).value
    assert set(gains[RUN].index) == {0.5, 1.0, 1.5} and set(gains["base"].index) == {1.0}
    assert set(records.update_scale) == {0.5, 1.0, 1.5}
    pairs = records[records.metric == "matched_forgetting"]
    assert set(pairs.run) | set(pairs.other_run) == {RUN, FULL}


def test_what_is_there_is_not_measured_again(folder, model, capsys):
    files = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    lost = folder / "records" / f"{RUN}-6-winogrande.json"
    text = lost.read_text()
    lost.unlink()
    assert main([*model, *FEW, "--scale-update", "0.5", "1.5"]) == 0
    assert f", {len(files) - 1} of them are there" in capsys.readouterr().out
    changed = [p for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [lost] and lost.read_text() == text


def test_an_adapter_of_zeros_forgets_exactly_nothing(folder, model, tmp_path):
    run = tmp_path / "zeros"
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN / "checkpoint-12", run)
    (run / "manifest.json").unlink()
    weights = load_file(run / "adapter_model.safetensors")
    weights = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in weights.items()}
    save_file(weights, run / "adapter_model.safetensors", metadata={"format": "pt"})
    argv = [*model[:2], "--study", "zeros", "--runs", str(run), *FEW]
    assert main(argv) == 0
    records = records_in(settings_for().output_dir / "outputs" / "zeros").query("run == 'zeros'")
    value = records[records.layer.isna()].set_index(["metric", "task"]).value
    assert set(value["forgetting"]) == {0} and set(value["kl"]) == {0}
    assert set(value["agreement"]) == {1}
    assert set(records[records.metric == "cka"].value) == {1}


def test_a_guess_is_told_from_knowledge():
    record = {"value": 0.29, "stderr": 0.03, "chance": 0.25}
    assert at_chance(record) and not at_chance({**record, "stderr": 0.019})


def test_forgetting_that_is_there_is_found_with_its_sign(tmp_path):
    results = Results(tmp_path)
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    tuned = base & (rng.random(400) < 0.8)
    for run, step, right in (("base", 0, base), ("tuned", 5, tuned)):
        stats = np.stack([right, np.ones(400)], 1).astype(float)
        record = {"run": run, "step": step, "update_scale": 1.0, "task": "quiz", "metric": "acc"}
        record |= {
            "value": right.mean(),
            "stderr": 0.024,
            "chance": 0.25,
            "n": 400,
            "split": "test",
        }
        record |= {"family": "similar", "method": "full", "low": 0.0, "high": 1.0}
        results.write(f"{run}-{step}-quiz", {}, [record], [Scores("acc", stats, mean)])
    found = {r["task"]: r for r in derived_records(results) if r["metric"] == "forgetting"}
    lost = (base & ~tuned).sum()
    assert found["quiz"]["forgotten"] == lost and found["quiz"]["gained"] == 0
    assert found["quiz"]["value"] == pytest.approx(lost / 400)
    assert found["quiz"]["p_value"] < 1e-6 and found["mean"]["p_value"] < 1e-6
    assert found["quiz"]["low"] > 0 and not found["quiz"]["at_chance"]


def test_without_runs_the_base_is_measured(model):
    assert main([*model[:2], "--study", "only-base", "--tasks", "winogrande", *FEW]) == 0
    records = records_in(settings_for().output_dir / "outputs" / "only-base")
    assert set(records.run) == {"base"}


def test_bad_input_is_one_line(folder, model, script):
    def run(*argv):
        return script("retention_eval.py", *model, *argv)

    assert_one_line_error(run("--tasks", "helaswag"), "hellaswag")
    assert_one_line_error(run("--limit", "0"), "--limit takes at least 1")
    assert_one_line_error(run("--scale-update", "nan"), "--scale-update")
    assert_one_line_error(run("--runs", "none"), "no run 'none'")
    empty = ["--data", str(ROOT / "tests")]
    assert_one_line_error(run(*empty), "hellaswag needs its split validation")


def test_results_are_strict_json(folder):
    def refuse(word):
        raise AssertionError(word)

    json.loads((folder / "retention.json").read_text(), parse_constant=refuse)
