"""The drift script on checkpoints of a two-layer LLaMA, as a user would call it."""

import json
import shutil
import time
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from reference import random_similarity
from safetensors.torch import load_file
from support import assert_one_line_error, change_json, edited_tensors, moved, settings_for

from lora_tradeoffs.checkpoints import weights_key
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.models.base import load_base
from multi_task_training import main as train
from svd_analysis import main

STUDY = "drifted"
RUN = "similar_lora_r4_steps2_limit16_fp32_checkpoints2_seed42"
FULL = "similar_full_steps2_limit16_fp32_checkpoints2_seed42"
ADAPTER = "adapter_model.safetensors"
SIDES = {"left": lambda U, S, Vh: U, "right": lambda U, S, Vh: Vh.T}


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny)]


def results_folder(study):
    return settings_for().output_dir / "drift_analysis_plots" / study


@pytest.fixture(scope="module")
def folder(model):
    """A study with a LoRA and a full run, analysed."""
    short = ["--limit", "16", "--max-steps", "2", "--dtype", "fp32", "--set", "checkpoints=2"]
    argv = ["--similar", "--lora", "4", "--full-finetune", *short, *model, "--study", STUDY]
    assert train(argv) == 0
    assert main([*model, "--study", STUDY]) == 0
    return results_folder(STUDY)


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Figures are drawn once, in `folder`; here they would take most of the time."""
    monkeypatch.setattr("svd_analysis.draw", lambda *_: "not drawn")


def make_adapter(base, folder, seed=0, strength=1.0, **fields):
    """A PEFT folder with random A and B; its update by matrix, in fp64."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **fields}
    model = get_peft_model(load_base(base), LoraConfig(init_lora_weights=False, **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(strength)
    model.save_pretrained(folder, save_embedding_layers=False)
    model = model.double()
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def make_full(base, folder, noise=0.02):
    """A checkpoint of the whole model; the updates of its tensors, in fp64."""
    torch.manual_seed(3)
    model = moved(load_base(base), noise)
    model.save_pretrained(folder)
    start = dict(load_base(base).named_parameters())
    return {
        name.removesuffix(".weight"): (tuned.double() - start[name].double()).detach()
        for name, tuned in model.named_parameters()
    }


def analyse(model, study, *argv):
    """Run the script; the records and all layers' rows."""
    assert main([*model, "--study", study, *map(str, argv)]) == 0
    return records_in(results_folder(study)), layers_in(results_folder(study))


def records_in(folder):
    return pd.DataFrame(json.loads((folder / "drift.json").read_text())["records"])


def layers_in(folder):
    return pd.read_parquet(folder / "drift_layers.parquet")


def value(frame, metric, module, **where):
    """The one value of a record or row."""
    rows = frame[(frame.metric == metric) & (frame.module == module)]
    for name in ("k", "eps"):
        wanted = where.pop(name, None)
        rows = rows[rows[name].isna() if wanted is None else rows[name] == wanted]
    for name, wanted in where.items():
        rows = rows[rows[name] == wanted]
    assert len(rows) == 1, rows
    return rows.value.item()


# --------------------------------------------------------------------------- the reference


def reference(start, update, k, eps):
    """The measures of a matrix from dense decompositions of the merged weight, as a textbook."""
    U0, S0, V0h = torch.linalg.svd(start)
    U, S, Vh = torch.linalg.svd(start + update)
    D = torch.linalg.svdvals(update)
    p = D[D > 1e-13] / D.sum()
    mass = (D**2).cumsum(0) / (D**2).sum()
    signs = torch.sign((U[:, :k] * U0[:, :k]).sum(0))
    cosines = (U0[:, : len(S0)].T @ U[:, :k]).abs()
    return {
        ("relative_frobenius", ""): float(update.norm() / start.norm()),
        ("relative_spectral", ""): float(D[0] / S0[0]),
        ("stable_rank", ""): float((D**2).sum() / D[0] ** 2),
        ("effective_rank", ""): float(torch.exp(-(p * p.log()).sum())),
        ("rank90", ""): int((mass < 0.9 - 1e-12).sum()) + 1,
        ("rho", ""): float(D[0] / S0[k - 1]),
        ("phi", "left"): float((U0[:, :k].T @ U[:, :k]).square().sum() / k),
        ("phi", "right"): float((V0h[:k] @ Vh[:k].T).square().sum() / k),
        ("value_shift", ""): float((S[:k] - S0[:k]).norm() / S0[:k].norm()),
        ("legacy_drift", "left"): float((U[:, :k] * signs - U0[:, :k]).norm() / (2 * k**0.5)),
        ("intruders", ""): int((cosines.amax(0) < eps).sum()),
    }


def assert_equal_to_reference(layers, base, updates, run):
    start = {n: p.detach().double() for n, p in load_base(base).named_parameters()}
    rows = layers[layers.run == run]
    assert {f"{r.layer}.{r.module}" for r in rows.itertuples()} == {
        f"{name.split('.')[2]}.{name.split('.')[-1]}" for name in updates
    }
    for name, update in updates.items():
        matrix = dict(layer=int(name.split(".")[2]), module=name.split(".")[-1])
        for k, eps in ((4, 0.7), (8, 0.5), (10, 0.9)):
            expected = reference(start[f"{name}.weight"], update, k, eps)
            for (metric, side), wanted in expected.items():
                has_k = metric in ("rho", "phi", "value_shift", "legacy_drift", "intruders")
                keys = {"k": k} if has_k else {}
                keys |= {"eps": eps} if metric == "intruders" else {}
                measured = value(rows, metric, side=side, **matrix, **keys)
                assert measured == pytest.approx(wanted, rel=1e-8, abs=1e-9), (name, metric, k)


# ------------------------------------------------------------------------------------ values


def test_every_checkpoint_has_flat_records(folder):
    records = records_in(folder)
    assert set(records.run) == {RUN, FULL} and set(records.step) == {1, 2}
    ours = records[(records.run == RUN) & (records.step == 2) & (records.layer == -1)]
    assert set(ours["rank"]) == {4} and set(ours.method) == {"lora"} and set(ours.fraction) == {1}
    assert set(ours.metric) >= {
        *("relative_frobenius", "relative_spectral", "stable_rank", "effective_rank", "rank90"),
        *("intruders", "rho", "phi", "legacy_drift", "update_share"),
    }
    for module in ("q_proj", "v_proj", "both"):
        assert 0 <= value(ours, "intruders", module, k=10, eps=0.5) <= 10
        assert 0 < value(ours, "relative_frobenius", module) < 1
    each = records[(records.run == FULL) & (records.layer == 1) & (records.step == 1)]
    assert set(each.module) == {"q_proj", "v_proj"}
    assert set(each.k.dropna()) == {10} and set(each.eps.dropna()) == {0.5}
    meta = json.loads((folder / "drift.json").read_text())["meta"]
    assert "relative_frobenius" in meta["aggregation"] and meta["study"] == STUDY
    assert {p.name for p in (folder / "directions").iterdir()} == {
        f"{RUN}-2.safetensors",
        f"{FULL}-2.safetensors",
    }
    assert len(list((folder / "figures").glob("*.png"))) == 7


def test_values_are_those_of_dense_decompositions_of_the_merged_weights(base, model, tmp_path):
    fields = {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
    updates = make_adapter(base, tmp_path / "lora", use_rslora=True, **fields)
    other = make_adapter(
        base, tmp_path / "places", seed=4, target_modules=["o_proj", "down_proj", "up_proj"]
    )
    full = make_full(base, tmp_path / "full")
    runs = [tmp_path / name for name in ("lora", "places", "full")]
    records, layers = analyse(model, "values", "--runs", *runs)
    assert_equal_to_reference(layers, base, updates, "lora")
    assert_equal_to_reference(layers, base, other, "places")
    pair = {n: u for n, u in full.items() if n.endswith(("q_proj", "v_proj"))}
    assert_equal_to_reference(layers, base, pair, "full")
    assert set(records[records.run == "places"].module) == {
        *("all", "both", "o_proj", "up_proj", "down_proj")
    }
    rows = layers[(layers.run == "lora") & (layers.module == "v_proj") & (layers.metric == "rho")]
    mean = rows[rows.k == 8].value.mean()
    assert value(records, "rho", "v_proj", run="lora", layer=-1, k=8) == pytest.approx(mean)


def test_the_reference_path_finds_the_same(base, model, tmp_path):
    make_adapter(base, tmp_path / "lora", seed=5)
    make_full(base, tmp_path / "full")
    runs = ["--runs", tmp_path / "lora", tmp_path / "full"]
    fast = analyse(model, "fast", *runs, "--workers", 1)[1]
    dense = analyse(model, "dense", *runs, "--dense", "--workers", 3)[1]
    fast, dense = (
        t[t.metric != "residual"].drop(columns="decomposition").reset_index(drop=True)
        for t in (fast, dense)
    )
    assert fast.drop(columns="value").equals(dense.drop(columns="value"))
    assert np.allclose(fast.value, dense.value, rtol=1e-8, atol=1e-9)
    vectors = [
        load_file(results_folder(s) / "directions" / "lora-0.safetensors")
        for s in ("fast", "dense")
    ]
    assert vectors[0].keys() == vectors[1].keys()
    for name, basis in vectors[0].items():
        assert torch.allclose((basis * vectors[1][name]).sum(0).abs(), torch.ones(4), atol=1e-4)


def test_an_unchanged_model_has_not_moved(base, model, tmp_path):
    make_adapter(base, tmp_path / "lora", strength=0)
    shutil.copytree(base.folder, tmp_path / "full")
    records, layers = analyse(model, "unchanged", "--runs", tmp_path / "lora", tmp_path / "full")
    still = layers.metric.eq("phi")
    assert (layers[still].value == 1).all() and len(layers[still]) > 50
    assert layers[~still].value.abs().max() < 1e-12
    assert records[records.metric != "phi"].value.abs().max() < 1e-12
    assert "update_phi" not in set(records.metric)  # no direction to compare


def test_a_planted_intruder_is_found_in_its_layer(base, model, tmp_path):
    name = "model.layers.1.self_attn.q_proj"
    U0 = torch.linalg.svd(load_base(base).get_parameter(f"{name}.weight").detach().double()).U
    make_adapter(base, tmp_path / "lora", strength=0)
    key = f"base_model.model.{name}.lora_{{}}.weight".format
    with edited_tensors(tmp_path / "lora" / ADAPTER) as tensors:
        tensors[key("B")][:, 0] = 100 * U0.sum(1).float()  # equally far from all of the base's
    records, layers = analyse(model, "planted", "--runs", tmp_path / "lora")
    counts = layers[(layers.metric == "intruders") & (layers.eps == 0.5) & (layers.k == 10)]
    assert {(r.layer, r.module): r.value for r in counts.itertuples() if r.value} == {
        (1, "q_proj"): 1
    }
    assert value(records, "intruders", "q_proj", layer=-1, k=10, eps=0.5) == 0.5
    assert value(records, "intruders", "both", layer=-1, k=10, eps=0.5) == 0.25
    assert value(layers, "rho", "q_proj", layer=1, k=10) > 1


def test_a_planted_rotation_is_found_in_its_layer(base, model, tmp_path):
    """The second left singular vector turns by .3 towards the 13th: k - sin^2(.3) of k stay."""
    name, angle = "model.layers.1.self_attn.v_proj.weight", 0.3
    shutil.copytree(base.folder, tmp_path / "full")
    with edited_tensors(tmp_path / "full" / "model.safetensors") as tensors:
        U, S, Vh = torch.linalg.svd(tensors[name].double(), full_matrices=False)
        turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        U[:, [1, 12]] = U[:, [1, 12]] @ turn
        tensors[name] = (U * S @ Vh).float()
    _, layers = analyse(model, "rotated", "--runs", tmp_path / "full")
    phi = layers[layers.metric == "phi"]
    turned = (phi.layer == 1) & (phi.module == "v_proj")
    assert (phi[~turned].value == 1).all()
    for k in (4, 8, 10):
        for side, lost in (("left", np.sin(angle) ** 2), ("right", 0)):
            phi_k = value(layers, "phi", "v_proj", layer=1, k=k, side=side)
            assert phi_k == pytest.approx(1 - lost / k, abs=1e-6)
    assert value(layers, "value_shift", "v_proj", layer=1, k=10) < 1e-6


def test_full_fine_tuning_is_measured_over_the_whole_model(base, model, tmp_path):
    updates = make_full(base, tmp_path / "full")
    records, _ = analyse(model, "whole", "--runs", tmp_path / "full")
    squares = {name: float(update.square().sum()) for name, update in updates.items()}
    start = sum(float(p.detach().double().square().sum()) for p in load_base(base).parameters())
    total = sum(squares.values())
    relative = value(records, "relative_frobenius", "all")
    assert relative == pytest.approx((total / start) ** 0.5)
    pair = sum(s for name, s in squares.items() if name.endswith(("q_proj", "v_proj")))
    assert value(records, "update_share", "both") == pytest.approx(pair / total)
    norms = sum(s for name, s in squares.items() if "norm" in name)
    assert value(records, "update_share", "norms") == pytest.approx(norms / total)
    shares = records[(records.metric == "update_share") & (records.module != "both")]
    assert shares.value.sum() == pytest.approx(1) and shares.n.sum() == len(updates)


def test_phi_between_runs_is_that_of_their_updates(base, model, tmp_path):
    first = make_adapter(base, tmp_path / "first", seed=1)
    second = make_adapter(base, tmp_path / "second", seed=2, r=8)
    full = make_full(base, tmp_path / "whole")
    runs = [tmp_path / name for name in ("first", "second", "whole")]
    records, _ = analyse(model, "between", "--runs", *runs)
    similarities = records[records.metric == "update_phi"]
    assert len(similarities) == 3 * 3 * 2 * 2  # pairs, modules and both, sides, all and leading
    for run, other, sizes, updates in (
        ("first", "second", (4, 8), (first, second)),
        ("first", "whole", (4, 4), (first, full)),
        ("second", "whole", (8, 8), (second, full)),
    ):
        for module, side, kind in product(("q_proj", "v_proj"), SIDES, ("all", "leading")):
            i, j = sizes if kind == "all" else (4, 4)
            expected = []
            for layer in range(2):
                name = f"model.layers.{layer}.self_attn.{module}"
                bases = [SIDES[side](*torch.linalg.svd(u[name])) for u in updates]
                overlap = bases[0][:, :i].T @ bases[1][:, :j]
                expected.append(float(overlap.square().sum()) / min(i, j))
            row = dict(run=run, other=other, side=side, directions=kind, k=i, other_k=j)
            phi = value(similarities, "update_phi", module, **row)
            assert phi == pytest.approx(sum(expected) / 2, abs=1e-5)
            keys = (similarities.run == run) & (similarities.other == other)
            keys &= (similarities.module == module) & (similarities.side == side)
            rows = similarities[keys & (similarities.directions == kind)]
            assert rows.random.item() == random_similarity(i, j, len(bases[0]))


# ------------------------------------------------------------------------------ running again


def test_existing_results_are_reused_and_missing_ones_are_measured(folder, model, capsys):
    files = [p for p in folder.rglob("*") if p.parent.name in ("records", "layers", "directions")]
    before = {p: p.stat().st_mtime_ns for p in files}
    argv = [*model, "--study", STUDY]
    assert main(argv) == 0
    assert "4 measurements: 4 cached, 0 to run" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in files}
    (folder / "records" / f"{RUN}-1.json").unlink()
    (folder / "directions" / f"{FULL}-2.safetensors").unlink()
    assert main(argv) == 0
    assert "4 measurements: 2 cached, 2 to run" in capsys.readouterr().out
    changed = {p.name for p in files if p.stat().st_mtime_ns != before[p]}
    units = (f"{RUN}-1", f"{FULL}-2")
    assert {name.rsplit(".", 1)[0] for name in changed} == set(units)


def test_a_damaged_table_is_named_and_measured_again_once_it_is_deleted(folder, model, capsys):
    argv = [*model, "--study", STUDY]
    for path in (folder / "layers" / f"{RUN}-1.parquet", *(folder / "directions").glob("*")):
        (damaged := path.with_name("damaged")).write_bytes(path.read_bytes()[:99])
        damaged.rename(path)  # as a copy that was cut short
        assert main(argv) == 2
        (line,) = (n for n in capsys.readouterr().err.splitlines() if n.startswith("error: "))
        assert str(path) in line and line.endswith("; delete it and run the same command")
        path.unlink()
        assert main(argv) == 0


def test_other_weights_and_other_questions_are_measured_anew(base, model, tmp_path, capsys):
    make_adapter(base, tmp_path / "lora", seed=1)
    argv = ["--runs", tmp_path / "lora"]
    first = analyse(model, "remeasured", *argv)[0]
    make_adapter(base, tmp_path / "lora", seed=2, r=8)
    second = analyse(model, "remeasured", *argv)[0]
    assert set(first["rank"]) == {4} and set(second["rank"]) == {8}
    layers = analyse(model, "remeasured", *argv, "--top-k", 3, "--epsilon", 0.25)[1]
    assert set(layers.k.dropna()) == {3, 10} and set(layers.eps.dropna()) == {0.25, 0.5}
    place_alone = analyse(model, "remeasured", *argv, "--target-modules", "attention")[0]
    assert {"q_proj", "v_proj"} <= set(place_alone.module)
    capsys.readouterr()
    assert main([*model, "--study", "remeasured", *map(str, argv), "--target-modules", "mlp"]) == 1
    assert "has none of gate_proj" in capsys.readouterr().err


def test_a_foreign_folder_gives_what_our_run_gives(folder, model, tmp_path):
    run = settings_for(study=STUDY).runs_dir / RUN
    foreign = tmp_path / "mine"
    shutil.copytree(run / "checkpoint-2", foreign)
    for name in ("manifest.json", "trainer_state.json"):
        (foreign / name).unlink()
    layers = analyse(model, "foreign", "--runs", foreign)[1]
    ours = layers_in(folder).query("run == @RUN and step == 2").reset_index(drop=True)
    columns = ["layer", "module", "metric", "k", "eps", "side"]
    assert layers[columns].astype({"metric": str}).equals(ours[columns].astype({"metric": str}))
    # a decomposition that was read lies elsewhere in memory than a new one: rounding differs
    assert np.allclose(layers.value, ours.value, rtol=1e-12, atol=1e-13)


def test_a_trainers_folder_is_its_checkpoints_and_the_model_in_its_root(base, model, tmp_path):
    make_adapter(base, tmp_path / "out", seed=1)
    make_adapter(base, tmp_path / "out" / "checkpoint-20", seed=2)
    for name, path in (("final", "out"), ("checkpoint", "out/checkpoint-20")):
        shutil.copytree(tmp_path / path, tmp_path / "alone" / name)
    shutil.rmtree(tmp_path / "alone" / "final" / "checkpoint-20")
    argv = ["--top-k", 4, "--runs"]
    alone = analyse(model, "alone", *argv, *(tmp_path / "alone").iterdir())[0]
    together = analyse(model, "trainer", *argv, tmp_path / "out")[0]
    runs = together[["run", "step"]].drop_duplicates()
    assert set(map(tuple, runs.values)) == {("out", 20), ("out-final", 0)}
    for run, other in (("out", "checkpoint"), ("out-final", "final")):
        found, expected = (
            records.query("run == @name and metric == 'relative_frobenius'").value.to_numpy()
            for records, name in ((together, run), (alone, other))
        )
        assert len(found) and found == pytest.approx(expected)


def test_a_runs_name_is_no_pattern(base, model, tmp_path):
    phis = []
    for names in (("one", "two"), ("x[12]", "x1"), ("x*", "x?")):
        for seed, name in enumerate(names):
            make_adapter(base, tmp_path / name, seed=seed)
        runs = [tmp_path / name for name in names]
        records = analyse(model, f"names-{len(phis)}", "--top-k", 4, "--runs", *runs)[0]
        phis.append(records.query("metric == 'update_phi'").value.to_numpy())
    assert max(phis[0]) < 0.9 and len(phis[0])
    assert phis[1] == pytest.approx(phis[0]) and phis[2] == pytest.approx(phis[0])


# ----------------------------------------------------------------------------------- mistakes


def test_broken_checkpoints_are_named_and_the_others_are_done(base, model, tmp_path, capsys):
    for name in ("good", "cut", "nan", "later"):
        make_adapter(base, tmp_path / name, seed=1)
    cut = tmp_path / "cut" / ADAPTER
    cut.write_bytes(cut.read_bytes()[:-9])
    with edited_tensors(tmp_path / "nan" / ADAPTER) as tensors:
        name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
        tensors[name][2, 1] = float("nan")
    config = tmp_path / "later" / "adapter_config.json"
    config.write_text(config.read_text().replace("{", '{"of_tomorrow": 1,', 1))
    make_adapter(base, tmp_path / "dora", use_dora=True)
    make_full(base, tmp_path / "infinite")
    path = tmp_path / "infinite" / "model.safetensors"
    with edited_tensors(path) as tensors:
        tensors["model.norm.weight"][0] = float("inf")
    names = ("cut", "nan", "later", "infinite", "good", "dora")
    runs = [str(tmp_path / name) for name in names]
    assert main([*model, "--study", "broken", "--runs", *runs]) == 1
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 4
    for line, parts in zip(
        lines,
        (
            ("cut, step 0", ADAPTER, "is corrupt"),
            ("nan-0: layer 1 v_proj: B holds values that are not finite",),
            ("later, step 0", "of_tomorrow"),
            ("infinite-0: model.norm.weight: the tensor holds values that are not finite",),
        ),
    ):
        assert all(part in line for part in parts), line
    records = records_in(results_folder("broken")).set_index("run")
    assert set(records.index) == {"good", "dora"}
    whole = records.query("metric == 'relative_frobenius' and module == 'all'").value
    assert 0 < whole["good"] < whole["dora"]  # random factors turn the columns that DoRA scales


def test_a_checkpoint_that_its_manifest_does_not_confirm_is_named(folder, model, capsys):
    copy = settings_for(study="corrupt-drift")
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN, copy.runs_dir / RUN)
    path = copy.runs_dir / RUN / "checkpoint-1" / ADAPTER
    path.write_bytes(path.read_bytes()[:-8] + b"corrupt!")
    assert main([*model, "--study", "corrupt-drift"]) == 1
    assert "checkpoint-1/adapter_model.safetensors is corrupt" in capsys.readouterr().err
    assert set(records_in(results_folder("corrupt-drift")).step) == {2}
    (path.parent / "manifest.json").write_text("{")
    assert main([*model, "--study", "corrupt-drift"]) == 1
    assert "manifest.json is damaged" in capsys.readouterr().err


def test_a_base_that_is_not_finite_is_named(base, tiny, tmp_path, capsys):
    make_adapter(base, tmp_path / "lora")
    broken = tmp_path / "base"
    shutil.copytree(tiny, broken)
    with edited_tensors(broken / "model.safetensors") as tensors:
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    argv = ["--model", str(broken), "--study", "nan-base", "--runs", str(tmp_path / "lora")]
    assert main(argv) == 1
    assert "layer 0 q_proj: in the base, the matrix holds values" in capsys.readouterr().err


def test_an_adapter_of_another_base_or_kind_is_told(base, model, tmp_path, capsys):
    for name in ("own", "foreign", "other"):
        make_adapter(base, tmp_path / name)
    foreign, other = (tmp_path / name / "adapter_config.json" for name in ("foreign", "other"))
    change_json(foreign, base_model_name_or_path="someone/another-model")
    change_json(other, peft_type="PREFIX_TUNING", r=None, lora_alpha=None)
    runs = [str(tmp_path / name) for name in ("own", "foreign", "other")]
    assert main([*model, "--study", "kinds", "--runs", *runs]) == 1
    lines = capsys.readouterr().err.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert warnings == [
        f"warning: foreign names someone/another-model as its base and is measured against"
        f" {base.name}"
    ]
    (error,) = (line for line in lines if line.startswith("error: "))
    assert "other, step 0" in error and "PREFIX_TUNING" in error
    assert set(records_in(results_folder("kinds")).run) == {"own", "foreign"}


def test_results_of_two_checkpoints_under_one_name_are_told(base, model, tmp_path, capsys):
    """Measured by two commands: of one command the two folders are refused."""
    for folder, rank in (("a", 4), ("b", 8)):
        make_adapter(base, tmp_path / folder / "final", r=rank)
    request = {"weights": weights_key(tmp_path / "a" / "final")}
    record = {"run": "final", "step": 0, "metric": "f1", "value": 1.0}
    evaluated = Results(settings_for(study="twice").document("adaptation").parent)
    evaluated.write("final-0-sst2-test", request, [record])
    for folder, told in (("a", 0), ("b", 1)):
        argv = [*model, "--study", "twice", "--runs", str(tmp_path / folder / "final")]
        assert main(argv) == 0
        error = capsys.readouterr().err
        assert error.count("1 results, such as final-0-sst2-test, are of other weights") == told


def test_bad_input_is_one_line(folder, model, script, capsys):
    nothing = script("svd_analysis.py", *model, "--study", "nothing")
    assert_one_line_error(nothing, "has no run with a checkpoint", "multi_task_training.py", STUDY)
    for argv, message in (
        (("--top-k", "0"), "--top-k must be 1 or more"),
        (("--top-k", "33"), "--top-k 33: the base's matrices have 32 at most"),
        (("--epsilon", "1.5"), "--epsilon must be above 0 and at most 1"),
        (("--workers", "0"), "--workers must be 1 or more"),
        (("--checkpoints", "7"), "its steps are 1, 2"),
    ):
        assert main([*model, "--study", STUDY, *argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0]


def test_help_is_quick(script):
    start = time.monotonic()
    assert "--top-k" in script("svd_analysis.py", "--help").stdout
    assert time.monotonic() - start < 3
