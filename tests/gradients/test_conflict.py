"""Products and statistics of gradients, compared with autograd and with values by hand."""

import weakref

import numpy as np
import pytest
import torch

from lora_tradeoffs.data.collator import CompletionCollator
from lora_tradeoffs.gradients.conflict import (
    Products,
    conflict_records,
    gradient_products,
    layer_module_of,
    measured_parameters,
    micro_batches,
)
from lora_tradeoffs.models.base import store_frozen_linears_in_bf16

COLLATE = CompletionCollator(pad_token_id=0)


def load(folder, adapted=False, bf16=False):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if bf16:
        store_frozen_linears_in_bf16(model.requires_grad_(False))
    if adapted:
        from peft import LoraConfig, OFTConfig, get_peft_model

        torch.manual_seed(1)
        targets = ["q_proj", "v_proj"]
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        if adapted == "oft":
            config = OFTConfig(r=0, oft_block_size=8, target_modules=targets, init_weights=False)
        model = get_peft_model(model, config).eval()
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
        gradients = torch.autograd.grad(loss, parameters)
        total += torch.cat([g.flatten() for g in gradients]).double() / len(rows)
    return total


def record_of(records, metric, task, other, layer=-1, module="both"):
    for r in records:
        if (r["metric"], r["task"], r["other"]) == (metric, task, other) and (
            (r["layer"], r["module"]) == (layer, module)
        ):
            return r
    raise AssertionError((metric, task, other, layer, module))


@pytest.mark.parametrize("adapted", [False, "lora", "oft"])
def test_products_are_those_of_gradients_taken_one_row_at_a_time(tiny, adapted):
    model = load(tiny, adapted)
    label, parameters = measured_parameters(model)
    assert label == ("adapter" if adapted else "qv")
    assert len(parameters) == (8 if adapted == "lora" else 4)
    tasks = {"a": made_up(0), "b": made_up(1)}
    products = gradient_products(model, tasks, COLLATE)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    for layer, module in ((0, "q_proj"), (0, "v_proj"), (1, "q_proj"), (1, "v_proj")):
        index = products.layer_modules.index((layer, module))
        names = [name for name in parameters if layer_module_of(name) == (layer, module)]
        for batch in range(3):
            g, h = (by_hand(model, names, rows[batch]) for rows in tasks.values())
            expected = [[g @ g, g @ h], [h @ g, h @ h]]
            ours = products.between[batch, :, :, index]
            scale = float(g.norm() * h.norm())
            assert np.abs(ours - np.array(expected)).max() < 1e-5 * max(scale, float(ours.max()))
            halves = [by_hand(model, names, tasks["a"][batch][s]) for s in np.s_[:2, 2:]]
            first, second = (half / 2 for half in halves)
            expected = [first @ first, first @ second, second @ second]
            assert products.halves[batch, 0, :, index] == pytest.approx(
                np.array(expected), rel=1e-5, abs=1e-5 * scale
            )


def test_gradients_of_converted_pissa_are_those_of_what_was_trained(tiny, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    modules = ["q_proj", "v_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights="pissa")
    model = get_peft_model(load(tiny), config).eval()
    model.save_pretrained(tmp_path / "initial")
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    converted = PeftModel.from_pretrained(load(tiny), tmp_path / "converted").eval()
    tasks = {"a": made_up(0), "b": made_up(1)}
    expected = gradient_products(model, tasks, COLLATE)
    products = gradient_products(converted, tasks, COLLATE, trained_rank=4)
    for ours, theirs in ((products.between, expected.between), (products.halves, expected.halves)):
        assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()
    every = gradient_products(converted, tasks, COLLATE).between
    assert np.abs(every - expected.between).max() > 0.01 * np.abs(every).max()


@pytest.mark.parametrize("adapted", [False, True])
def test_linears_stored_in_bf16_change_nothing_under_autocast(tiny, adapted):
    tasks = {"a": made_up(0), "b": made_up(1)}
    first = gradient_products(load(tiny, adapted), tasks, COLLATE, bf16=True)
    second = gradient_products(load(tiny, adapted, bf16=True), tasks, COLLATE, bf16=True)
    assert (first.between == second.between).all() and (first.halves == second.halves).all()


def test_no_more_than_one_gradient_a_task_is_in_memory(tiny):
    model = load(tiny)
    _, parameters = measured_parameters(model)
    gradients, alive = [], []

    def note(parameter):
        gradients.append(weakref.ref(parameter.grad))
        alive.append(sum(reference() is not None for reference in gradients))

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
    assert record_of(records, "gradient_cosine", "a", "b")["value"] == pytest.approx(1, abs=1e-5)
    assert record_of(records, "magnitude_similarity", "a", "b")["value"] == pytest.approx(1)
    assert record_of(records, "gradient_conflict", "a", "b")["value"] == 0
    assert record_of(records, "within_cosine", "a", "a")["value"] < 0.99


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
    same = record_of(records, "gradient_cosine", "right", "again")
    other = record_of(records, "gradient_cosine", "right", "flipped")
    assert other["high"] < same["low"] - 0.2
    opposed = record_of(records, "gradient_cosine", "again", "flipped")
    assert opposed["value"] < -0.1
    assert record_of(records, "gradient_conflict", "again", "flipped")["value"] >= 0.75


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
    cosine = record_of(records, "gradient_cosine", "a", "b")
    assert cosine["value"] == pytest.approx(np.mean(values))
    assert cosine["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(2))
    assert (cosine["low"], cosine["high"]) == (-1, 1)  # 12.7 standard errors would be beyond
    assert cosine["n"] == 2
    norm = record_of(records, "gradient_norm", "b", "b")  # 2 and 4
    assert norm["value"] == 3 and norm["low"] == 0
    assert norm["high"] == pytest.approx(3 + 12.7062, rel=1e-4)  # t of 1 degree
    share = record_of(records, "gradient_conflict", "a", "b")
    assert share["value"] == 0.5 and share["low"] == pytest.approx(0.0945, abs=1e-4)
    similar = record_of(records, "magnitude_similarity", "a", "b")
    assert similar["value"] == pytest.approx((2 * 4 * 2 / 20 + 1) / 2)
    layer = record_of(records, "gradient_cosine", "a", "b", layer=0)
    assert layer["value"] == pytest.approx((3 / 3 + -6 / 6) / 2)
    assert record_of(records, "within_cosine", "a", "a")["value"] == pytest.approx(0.5)
    assert record_of(records, "gradient_norm", "b", "b")["value"] == pytest.approx(3)
    assert record_of(records, "gradient_cosine", "mean", "mean")["value"] == cosine["value"]


def test_a_gradient_of_zero_has_no_cosine():
    between, halves = np.zeros((2, 2, 2, 1)), np.ones((2, 2, 3, 1))
    between[0] = 1.0
    records = list(conflict_records(Products(("a", "b"), ((0, "q_proj"),), between, halves)))
    cosine = record_of(records, "gradient_cosine", "a", "b")
    assert (cosine["value"], cosine["n"]) == (1, 1) and np.isnan(cosine["stderr"])


def test_no_row_is_drawn_twice():
    drawn = micro_batches(20, 5, 4, seed=0)
    assert sorted(drawn.ravel()) == list(range(20))
    fewer = micro_batches(10, 5, 4, seed=0)
    assert fewer.shape == (2, 4) and len(set(fewer.ravel())) == 8
    with pytest.raises(ValueError, match="7 rows do not fill two batches of 4"):
        micro_batches(7, 5, 4, seed=0)
