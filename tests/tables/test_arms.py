"""An arm says what sets it apart from the grid's, and what all runs share is said once."""

import math
from dataclasses import replace

import pandas as pd

from lora_tradeoffs.records import updated
from lora_tradeoffs.tables.arms import Arm, arm_of, shared_sentence, with_plain_arms


def arm(run, **fields):
    record = {"run": run, "method": "lora", "rank": 8, "target_modules": "qv", "seed": 42}
    record |= {"learning_rate": 1e-3}
    return arm_of(updated(record | fields))


def label(run, **fields):
    return str(arm(run, **fields))


def test_label_says_what_parts_a_run_from_the_grid():
    assert label("similar_lora_r8_seed42") == "LoRA r=8"
    assert label("similar_lora_r8_seed43", seed=43) == "LoRA r=8"
    assert label("similar_full_qv_seed42", method="full_qv") == "full qv"
    assert label("similar_lora_r8_all_seed42", target_modules="all") == "LoRA r=8 (all)"
    assert label("similar_lora_r8_lr1e-3_all_seed42", target_modules="all") == (
        "LoRA r=8 (all, lr1e-3)"
    )
    assert label("sst2_lora_r8_seed42") == "LoRA r=8 (sst2 alone)"
    assert label("someone/adapter", target_modules="") == "LoRA r=8 (someone/adapter)"
    assert label("similar_lora_r8_seed42", family="similar", task="squad_v2") == (
        "LoRA r=8 (trained on similar)"
    )
    assert label("base", method="base", shots=4) == "base (4-shot)"
    assert label("base", method="base", shots=math.nan, prompt=None) == "base"
    assert label("lead-3", method="baseline") == "lead-3"


def test_an_arm_without_its_rate_is_the_one_whose_rates_are_compared():
    assert arm("similar_lora_r8_lr1e-3_seed42").without_rate == Arm("lora", 8)
    fields = {"target_modules": "all", "learning_rate": 2.45e-5}
    with_rate = arm("similar_lora_r8_all_rslora_lr2.45e-5_steps120_seed42", **fields)
    assert str(with_rate) == "LoRA r=8 (all, rslora steps120, lr2.45e-5)"
    assert str(with_rate.without_rate) == "LoRA r=8 (all, rslora steps120)"
    alone = arm("sst2_full_qv_lr4.9e-5_seed42", method="full_qv", learning_rate=4.9e-5)
    assert str(alone.without_rate) == "full qv (sst2 alone)"
    # names of outside runs are left alone
    outside = arm("someone/x-lr1e-3", method="full")
    assert str(outside.without_rate) == "full (someone/x-lr1e-3)"


def test_rates_stand_in_their_order_in_legends():
    rates = [Arm("full", learning_rate=rate) for rate in (1e-3, 2.5e-4, 5e-5)]
    arms = [*rates, Arm("lora", 8, learning_rate=1e-2), Arm("lora", 8)]
    assert list(map(str, sorted(arms))) == [
        *("LoRA r=8", "LoRA r=8 (lr1e-2)", "full (lr5e-5)", "full (lr2.5e-4)", "full (lr1e-3)")
    ]


def test_what_all_runs_have_in_common_is_in_the_note_and_not_in_every_label():
    def frame(*names):
        runs = [f"similar_{name}_seed42" for name in names] + ["base"]
        methods = [name.partition("_")[0] for name in names] + ["base"]
        table = pd.DataFrame({"run": runs, "method": methods, "rank": 8})
        table["arm"] = [arm(**row) for row in table.to_dict("records")]
        return table

    first = frame("lora_r8_steps40", "lora_r8_steps40_dropout0.1", "full_steps40")
    first.attrs["note"] = "From elsewhere."
    plain, none, second = with_plain_arms(first, None, frame("full_steps40"))
    assert list(plain["arm"].map(str)) == ["LoRA r=8", "LoRA r=8 (dropout0.1)", "full", "base"]
    assert list(second["arm"].map(str)) == ["full", "base"] and none is None
    assert plain.attrs["note"] == f"From elsewhere. {shared_sentence({'steps40'})}"
    assert "steps40" in str(first["arm"][0]) and first.attrs["note"] == "From elsewhere."

    # controls whose steps are their share of the mixed run's do not take the word from the others
    control = frame("lora_r8_steps13").iloc[:1]
    control["arm"] = [replace(control["arm"][0], tasks="sst2")]
    plain, beside = with_plain_arms(first, control)
    assert list(plain["arm"].map(str)) == ["LoRA r=8", "LoRA r=8 (dropout0.1)", "full", "base"]
    assert list(beside["arm"].map(str)) == ["LoRA r=8 (steps13, sst2 alone)"]

    unlike = frame("lora_r8_steps40", "full_steps80")
    assert with_plain_arms(unlike)[0] is unlike
