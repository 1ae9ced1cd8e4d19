"""The drift script on runs of a two-layer LLaMA, against dense decompositions."""

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, settings_for
from safetensors.torch import load_file, save_file

from multi_task_training import main as train
from svd_analysis import main

STUDY = "drifted"
RUN = "similar_lora_r4_limit16_fp32_checkpoints2_seed42"
FULL = "similar_full_limit16_fp32_checkpoints2_seed42"
K = ["--top-k", "4", "16"]


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny), "--study", STUDY]


@pytest.fixture(scope="module")
def folder(model):
    short = ["--limit", "16", "--dtype", "fp32", "--set", "checkpoints=2", *model]
    assert train(["--similar", "--lora", "4", "--full-finetune", *short]) == 0
    assert main([*model, *K]) == 0
    return settings_for(study=STUDY).output_dir / "drift_analysis_plots" / STUDY


def layers_in(folder):
    found = pd.read_parquet(folder / "drift_layers.parquet")
    return found.astype({"metric": str, "module": str, "run": str, "side": str})


def matrices(model, run, layer, module):
    """Base and tuned matrix of a last checkpoint, in fp64, merged by hand."""
    name = f"model.layers.{layer}.self_attn.{module}.weight"
    base = load_file(f"{model[1]}/model.safetensors")[name].double()
    checkpoint = settings_for(study=STUDY).runs_dir / run / "checkpoint-12"
    if run == FULL:
        return base, load_file(checkpoint / "model.safetensors")[name].double()
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    down, up = (adapter[f"{stem}.lora_{side}.weight"].double() for side in "AB")
    return base, base + 2 * up @ down


@pytest.mark.parametrize("run", [RUN, FULL])
@pytest.mark.parametrize("module", ["q_proj", "v_proj"])
def test_every_measure_is_that_of_dense_decompositions(folder, model, run, module):
    found = layers_in(folder).query("run == @run and step == 12 and module == @module")
    for layer in (0, 1):
        base, tuned = matrices(model, run, layer, module)
        update = torch.linalg.svdvals(tuned - base)
        left, values, _ = torch.linalg.svd(base)
        tuned_left = torch.linalg.svd(tuned)[0]
        ours = found[found.layer == layer]
        plain = ours[ours.k.isna()].set_index("metric").value
        assert plain["relative_frobenius"] == pytest.approx(
            float(update.norm() / values.norm()), rel=1e-5
        )
        assert plain["relative_spectral"] == pytest.approx(float(update[0] / values[0]), rel=1e-5)
        shares = update / update.sum()
        entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
        assert plain["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-3)
        for k in (4, 10, 16):
            of_k = ours[ours.k == k]
            rho = of_k[of_k.metric == "rho"].value.item()
            assert rho == pytest.approx(float(update[0] / values[k - 1]), rel=1e-5)
            phi = of_k[(of_k.metric == "phi") & (of_k.side == "left")].value.item()
            overlap = (left[:, :k].T @ tuned_left[:, :k]).square().sum() / k
            assert phi == pytest.approx(float(overlap), abs=1e-6)
            largest = (left.T @ tuned_left[:, :k]).abs().max(dim=0).values
            for epsilon in (0.3, 0.5, 0.9):
                counted = of_k[(of_k.metric == "intruders") & ((of_k.eps - epsilon).abs() < 1e-9)]
                assert counted.value.item() == int((largest < epsilon).sum())


def test_the_reference_path_finds_the_same(folder, model):
    copy = settings_for(study="dense")
    shutil.copytree(settings_for(study=STUDY).runs_dir, copy.runs_dir)
    assert main([*model[:2], "--study", "dense", *K, "--dense", "--workers", "1"]) == 0
    dense = layers_in(copy.output_dir / "drift_analysis_plots" / "dense")
    ours = layers_in(folder)
    keys = ["run", "step", "layer", "module", "metric", "k", "eps", "side"]
    both = ours.merge(dense, on=keys, suffixes=("", "_dense"))
    both = both[both.metric != "residual"]
    assert len(both) > 500
    assert (both.value - both.value_dense).abs().max() < 1e-6


def test_records_are_flat_and_tell_what_lies_outside_q_and_v(folder):
    records = pd.DataFrame(json.loads((folder / "drift.json").read_text())["records"])
    last = records[(records.step == 12) & records.metric.eq("relative_frobenius")]
    whole = last[(last.layer == -1) & (last.module == "all")].set_index("run").value
    assert set(whole.index) == {RUN, FULL} and (whole > 0).all()
    shares = records[(records.metric == "update_share") & (records.step == 12)]
    shares = shares[shares.module == "both"].set_index("run").value
    assert shares[RUN] == pytest.approx(1) and 0 < shares[FULL] < 0.9
    intruders = records[(records.metric == "intruders") & (records.layer == -1)]
    assert 10 in set(intruders.k) and 0.5 in set(intruders.eps)


def test_what_is_there_is_not_measured_again(folder, model, capsys):
    assert main([*model, *K]) == 0
    assert "4 checkpoints, 4 of them are there" in capsys.readouterr().out


def test_figures_are_drawn(folder):
    names = {p.stem for p in (folder / "figures").glob("*.png")}
    assert {"drift_over_training", "layers_over_training", "singular_values"} <= names
    assert {"intruders_by_threshold", "similarity_matrices", "phi_between_runs"} <= names


def test_a_broken_checkpoint_is_named_and_the_others_are_done(folder, model, tmp_path, capsys):
    run = settings_for(study=STUDY).runs_dir / RUN
    for name in ("whole", "nan", "torn"):
        shutil.copytree(run / "checkpoint-12", tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
    path = tmp_path / "nan" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.1" in name and "v_proj.lora_B" in name)
    weights[name][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    torn = tmp_path / "torn" / "adapter_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-9])
    argv = [*model[:2], "--study", "broken", *K, "--runs"]
    assert main([*argv, *(str(tmp_path / n) for n in ("nan", "torn", "whole"))]) == 1
    errors = capsys.readouterr().err
    assert "nan, step" in errors and "layer 1" in errors and "v_proj" in errors
    assert "torn" in errors and "corrupt" in errors
    place = settings_for().output_dir / "drift_analysis_plots" / "broken"
    assert set(layers_in(place).run) == {"whole"}


def test_bad_input_is_one_line(folder, model, script, tmp_path):
    def run(*argv):
        return script("svd_analysis.py", *model, *argv)

    nothing = script("svd_analysis.py", *model[:2], "--study", "nothing")
    assert_one_line_error(nothing, "has no run with a checkpoint", "multi_task_training.py")
    assert_one_line_error(run("--top-k", "0"), "--top-k takes numbers from 1 on")
    assert_one_line_error(run("--top-k", "9999"), "at most")
    assert_one_line_error(run("--epsilon", "2"), "--epsilon")
    assert_one_line_error(run("--workers", "0"), "--workers takes at least 1")
