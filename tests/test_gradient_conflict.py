"""The tasks' gradients, against autograd and by hand, and the script on a two-layer LLaMA."""

import json
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from figure_checks import notes
from support import assert_one_line_error, settings_for
from synthetic_records import record

from gradient_conflict import MatchedBatches, Unit, main
from lora_tradeoffs.data.collator import CompletionCollator
from lora_tradeoffs.figures.gradients import FIGURES
from lora_tradeoffs.files import Checkpoint, read_json
from lora_tradeoffs.gradients.conflict import (
    Products,
    conflict_records,
    gradient_products,
    measured_parameters,
    micro_batches,
    place_of,
)
from lora_tradeoffs.measuring.subjects import Subject, weights_of
from lora_tradeoffs.tables.frames import load_records
from multi_task_training import main as train

STUDY = "pulling"
RUN = "similar_lora_r4_limit64_fp32_checkpoints2_seed42"
FULL = "similar_full_limit64_fp32_checkpoints2_seed42"
FEW = ["--dtype", "fp32", "--batches", "3", "--batch-size", "4"]
COLLATE = CompletionCollator(pad_token_id=0)


def load(folder, adapted=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if adapted:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        targets = ["q_proj", "v_proj"]
        lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
    return model


def made_up(seed, batches=3, size=4):
    """Batches of random rows of unequal length, with completions of one to four tokens."""
    random = np.random.default_rng(seed)

    def row():
        length = int(random.integers(6, 14))
        start = length - int(random.integers(1, 5))
        return {"input_ids": random.integers(1, 900, length).tolist(), "prompt_length": start}

    return [[row() for _ in range(size)] for _ in range(batches)]


def by_hand(model, names, rows):
    """The mean over the rows of each row's gradient, one row at a time, from dense logits."""
    model.requires_grad_(False)
    parameters = [p.requires_grad_(True) for n, p in model.named_parameters() if n in names]
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for row in rows:
        ids, start = torch.tensor(row["input_ids"]), row["prompt_length"]
        logits = model(input_ids=ids[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[start - 1 : -1], ids[start:])
        found = torch.autograd.grad(loss, parameters)
        total += torch.cat([g.flatten() for g in found]).double() / len(rows)
    return total


def found_in(records, metric, task, other, layer=-1, module="both"):
    for r in records:
        if (r["metric"], r["task"], r["other"]) == (metric, task, other) and (
            (r["layer"], r["module"]) == (layer, module)
        ):
            return r
    raise AssertionError((metric, task, other, layer, module))


@pytest.mark.parametrize("adapted", [False, True])
def test_products_are_those_of_gradients_taken_one_row_at_a_time(tiny, adapted):
    model = load(tiny, adapted)
    of, parameters = measured_parameters(model)
    assert of == ("adapter" if adapted else "qv") and len(parameters) == (8 if adapted else 4)
    tasks = {"a": made_up(0), "b": made_up(1)}
    products = gradient_products(model, tasks, COLLATE)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for layer, module in ((0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")):
        place = products.places.index((layer, module))
        names = [name for name in parameters if place_of(name) == (layer, module)]
        for batch in range(3):
            g, h = (by_hand(model, names, rows[batch]) for rows in tasks.values())
            expected = [[g @ g, g @ h], [h @ g, h @ h]]
            ours = products.between[batch, :, :, place]
            scale = float(g.norm() * h.norm())
            assert np.abs(ours - np.array(expected)).max() < 1e-5 * max(scale, float(ours.max()))
            halves = [by_hand(model, names, tasks["a"][batch][s]) for s in np.s_[:2, 2:]]
            first, second = (half / 2 for half in halves)
            expected = [first @ first, first @ second, second @ second]
            assert products.halves[batch, 0, :, place] == pytest.approx(
                np.array(expected), rel=1e-5, abs=1e-5 * scale
            )


def test_no_more_than_one_gradient_a_task_is_in_memory(tiny):
    model = load(tiny)
    _, parameters = measured_parameters(model)
    gradients, alive = [], []

    def note(parameter):
        gradients.append(weakref.ref(parameter.grad))
        alive.append(sum(found() is not None for found in gradients))

    for parameter in parameters.values():
        parameter.register_post_accumulate_grad_hook(note)
    gradient_products(model, {name: made_up(i) for i, name in enumerate("abc")}, COLLATE)
    assert len(gradients) == 3 * 3 * 2 * len(parameters)  # batches, tasks, halves
    assert max(alive) == 3 * len(parameters) + 1  # the one beside them is a parameter's


def test_tasks_with_the_same_rows_have_cosine_one_and_no_conflict(tiny):
    rows = made_up(2)
    reversed_rows = [batch[::-1] for batch in rows]
    products = gradient_products(load(tiny), {"a": rows, "b": reversed_rows}, COLLATE)
    records = list(conflict_records(products))
    assert found_in(records, "gradient_cosine", "a", "b")["value"] == pytest.approx(1, abs=1e-5)
    assert found_in(records, "magnitude_similarity", "a", "b")["value"] == pytest.approx(1)
    assert found_in(records, "gradient_conflict", "a", "b")["value"] == 0
    assert found_in(records, "within_cosine", "a", "a")["value"] < 0.99


def labelled(seed, flipped=False, batches=4, size=8):
    """Rows whose answer, token 5 or 6, follows from their first token; `flipped`: the other."""
    random = np.random.default_rng(seed)

    def row():
        label = int(random.integers(2))
        prompt = [20 + label, *random.integers(100, 110, 3).tolist(), 7]
        return {"input_ids": [*prompt, 5 + (label ^ flipped)], "prompt_length": len(prompt)}

    return [[row() for _ in range(size)] for _ in range(batches)]


def test_a_task_with_flipped_labels_pulls_the_other_way(tiny):
    model = load(tiny)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # until the two answers have all probability: before, both tasks pull towards them
    for rows in labelled(0, batches=60):
        batch = COLLATE(rows)
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tasks = {"right": labelled(1), "again": labelled(2), "flipped": labelled(2, flipped=True)}
    records = list(conflict_records(gradient_products(model, tasks, COLLATE)))
    same = found_in(records, "gradient_cosine", "right", "again")
    other = found_in(records, "gradient_cosine", "right", "flipped")
    assert other["high"] < same["low"] - 0.2
    opposed = found_in(records, "gradient_cosine", "again", "flipped")
    assert opposed["value"] < -0.1
    assert found_in(records, "gradient_conflict", "again", "flipped")["value"] >= 0.75


def test_figures_by_hand():
    # two batches, two layers of one module: g.h, |g|^2 and |h|^2 of each
    between = np.array(
        [
            [[[9.0, 7.0], [3.0, -1.0]], [[3.0, -1.0], [1.0, 3.0]]],
            [[[4.0, 12.0], [-6.0, 2.0]], [[-6.0, 2.0], [9.0, 7.0]]],
        ]
    )
    halves = np.ones((2, 2, 3, 2))
    halves[:, :, 1] = 0.5
    products = Products(("a", "b"), ((0, "q_proj"), (1, "q_proj")), between, halves)
    records = list(conflict_records(products))
    values = [2 / 8, -4 / 16]  # |g|^2, |h|^2: 16 and 4, then 16 and 16
    found = found_in(records, "gradient_cosine", "a", "b")
    assert found["value"] == pytest.approx(np.mean(values))
    assert found["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    assert found["high"] == pytest.approx(12.7062 * found["stderr"], rel=1e-4)  # t of 1 degree
    assert found["n"] == 2
    share = found_in(records, "gradient_conflict", "a", "b")
    assert share["value"] == 0.5 and share["low"] == pytest.approx(0.0945, abs=1e-4)
    similar = found_in(records, "magnitude_similarity", "a", "b")
    assert similar["value"] == pytest.approx((2 * 4 * 2 / 20 + 1) / 2)
    layer = found_in(records, "gradient_cosine", "a", "b", layer=0)
    assert layer["value"] == pytest.approx((3 / 3 + -6 / 6) / 2)
    assert found_in(records, "within_cosine", "a", "a")["value"] == pytest.approx(0.5)
    assert found_in(records, "gradient_norm", "b", "b")["value"] == pytest.approx(3)
    assert found_in(records, "gradient_cosine", "mean", "mean")["value"] == found["value"]


def test_a_gradient_of_zero_has_no_cosine():
    between, halves = np.zeros((2, 2, 2, 1)), np.ones((2, 2, 3, 1))
    between[0] = 1.0
    records = list(conflict_records(Products(("a", "b"), ((0, "q_proj"),), between, halves)))
    found = found_in(records, "gradient_cosine", "a", "b")
    assert (found["value"], found["n"]) == (1, 1) and np.isnan(found["stderr"])


def test_no_row_is_drawn_twice():
    drawn = micro_batches(20, 5, 4, seed=0)
    assert sorted(drawn.ravel()) == list(range(20))
    fewer = micro_batches(10, 5, 4, seed=0)
    assert fewer.shape == (2, 4) and len(set(fewer.ravel())) == 8
    with pytest.raises(ValueError, match="7 rows do not fill two batches of 4"):
        micro_batches(7, 5, 4, seed=0)


@pytest.mark.parametrize(
    "seeds, bars, means",
    [
        ((42,), "Bars: 95 % interval over batches.", "One seed an arm."),
        ((42, 43), "", "Mean over 2 seeds."),
        ((42, 43, 44), "Bars: 95 % interval over seeds and batches.", "Mean over 3 seeds."),
    ],
)
def test_figures_say_what_is_averaged_and_what_bars_are_over(tmp_path, seeds, bars, means):
    random = np.random.default_rng(0)
    records = []
    for seed in seeds:
        own = record(f"similar_lora_r8_seed{seed}", "sst2", 0.0, seed=seed) | {"split": "train"}
        gradients = random.normal(0.3, 1, (8, 2, 40))
        between = np.einsum("bip,bjp->bij", gradients, gradients)[..., None]
        products = Products(("sst2", "mnli"), ((0, "q_proj"),), between, np.ones((8, 2, 3, 1)))
        records += [own | found for found in conflict_records(products)]
    for r in records:
        r |= {k: None for k, v in r.items() if isinstance(v, float) and math.isnan(v)}
    path = tmp_path / "gradients.json"
    path.write_text(json.dumps({"meta": {"preset": "study"}, "records": records}))
    for figure in FIGURES:
        said = notes(figure(load_records(path)))
        has_bars = figure.__name__ in ("conflict_over_training", "conflict_by_layer")
        assert means in said
        assert bars in said if has_bars and bars else "Bars" not in said


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
        *("conflict_by_layer", "layers_over_training"),
    }


def test_what_is_there_is_not_measured_again(folder, model, capsys):
    files = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    lost = folder / "records" / f"{RUN}-6.json"
    text = lost.read_text()
    lost.unlink()
    assert main([*model, *FEW]) == 0
    out = capsys.readouterr().out
    assert f"{len(files)} measurements, {len(files) - 1} of them are there" in out
    assert "of a single task" in out and "sst2_lora" in out and "the study's floor is 32" in out
    changed = [p for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [lost] and lost.read_text() == text


def test_a_run_that_was_trained_again_is_measured_again(tmp_path):
    subject = Subject("run", 6, Checkpoint("run", 6, tmp_path), {}, "similar", True, True)
    batches = MatchedBatches(None, None, 3, 4)
    batches.prepared = {task: SimpleNamespace(fingerprint=task) for task in ("sst2", "mnli")}
    requests = []
    for digest in ("a", "b", "b"):
        files = {"model.safetensors": {"sha256": digest}, "optimizer.pt": {"sha256": "c"}}
        (tmp_path / "manifest.json").write_text(json.dumps({"files": files}))
        asked = batches.request(Unit(subject, "similar", ("sst2", "mnli")))
        requests.append(asked | weights_of(subject, SimpleNamespace(digest="base")))
    assert requests[0] != requests[1] == requests[2]


def test_without_runs_the_base_is_measured_on_both_families(model):
    assert main([*model[:2], "--study", "only-base-pulls", *FEW]) == 0
    place = settings_for().output_dir / "performance_analysis" / "only-base-pulls" / "gradients"
    records = pd.DataFrame(read_json(place / "gradients.json")["records"])
    assert set(records.run) == {"base"} and set(records.family) == {"similar", "dissimilar"}


def test_bad_input_is_one_line(folder, model, inside):
    def run(*argv):
        return inside(main, *model, *argv)

    assert_one_line_error(run("--batches", "1"), "--batches takes at least 2")
    assert_one_line_error(run("--batch-size", "1"), "--batch-size takes at least 2")
    assert_one_line_error(run("--batch-size", "100000"), "sst2, train", "lower --batch-size")
