"""Transfer pairs a multi-task run with its own single-task control, over items and over seeds."""

import math
from itertools import count

import numpy as np
import pytest
from scipy.stats import ttest_rel
from synthetic_effects import Bench, arm_fields, write_scored
from synthetic_records import record, study, write_study

from config import FAMILIES
from lora_tradeoffs.measuring.results import Results, adaptation_unit, item_reader
from lora_tradeoffs.statistics.comparisons import compare_checkpoints
from lora_tradeoffs.statistics.scores import mean_scores
from lora_tradeoffs.statistics.seed_intervals import reach
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.transfer import transfer_table


def pair(bench, seed, together, alone, arm="lora_r8", task="sst2", **others):
    """The multi-task run's and the control's fields and answers on a task."""
    return [
        (arm_fields(arm, seed, tasks) | {"task": task} | others, bench.answers(ability))
        for tasks, ability in (("similar", together), (task, alone))
    ]


@pytest.fixture
def table(tmp_path):
    """The transfer table of runs with their answers."""
    numbers = count()

    def make(runs, items=True):
        path, results = write_scored(tmp_path / str(next(numbers)), runs)
        return transfer_table(
            load_records(path), item_reader(results, adaptation_unit) if items else None
        )

    return make


def test_without_controls_the_table_is_empty(tmp_path):
    frame = load_records(write_study(tmp_path, study(seeds=(42, 43, 44))))
    found = transfer_table(frame, item_reader(Results(tmp_path), adaptation_unit))
    assert found.empty
    assert {"family", "arm", "task", "value", "low", "high", "seeds"} <= set(found.columns)


def test_one_seed_is_the_paired_comparison_of_two_checkpoints(table):
    bench = Bench()
    runs = pair(bench, 42, 1.0, 0.7)
    (row,) = table(runs).itertuples()
    theirs = compare_checkpoints(*(mean_scores("accuracy", items) for _, items in runs))
    assert (row.value, row.low, row.high) == pytest.approx(
        (theirs.difference, theirs.low, theirs.high)
    )
    assert (row.family, str(row.arm), row.task, row.split) == (
        "similar",
        "LoRA r=8",
        "sst2",
        "test",
    )
    assert (row.seeds, row.over, row.test) == (1, "items", "exact McNemar")
    assert row.p_value == theirs.p_value


def test_a_run_on_the_only_task_of_its_family_is_not_its_own_control(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "sst2", ("sst2",))  # as a task file that names no family
    run = record("sst2_lora_r8_seed42", "sst2", 0.7, split="test") | {"family": "sst2"}
    assert transfer_table(load_records(write_study(tmp_path, [run]))).empty


def test_two_seeds_have_a_mean_and_no_interval(table):
    bench = Bench()
    runs = [run for seed in (42, 43) for run in pair(bench, seed, 1.0, 0.7)]
    (row,) = table(runs).itertuples()
    means = [items.mean() for _, items in runs]
    assert row.value == pytest.approx((means[0] - means[1] + means[2] - means[3]) / 2)
    assert (row.seeds, row.over) == (2, "")
    assert math.isnan(row.low) and math.isnan(row.p_value)


def test_three_seeds_count_seeds_and_items(table):
    bench = Bench(items=300, rest=0.1)  # mostly the same items turn right in every seed
    abilities = {42: (1.1, 0.7), 43: (1.0, 0.7), 44: (0.9, 0.7)}
    runs = [run for seed, pairs in abilities.items() for run in pair(bench, seed, *pairs)]
    (row,) = table(runs).itertuples()
    differences = np.array([a[1] - b[1] for a, b in zip(runs[::2], runs[1::2])])  # (seeds, items)
    means = differences.mean(axis=1)
    # by hand: the variance over seeds, and the mean covariance of two seeds' item differences
    shared = np.cov(differences)[np.triu_indices(3, 1)].mean() / 300
    assert shared > 0
    half = reach(means.var(ddof=1) / 3, 2, shared)
    assert (row.low, row.high) == pytest.approx((means.mean() - half, means.mean() + half))
    assert (row.seeds, row.over) == (3, "seeds and items")


def test_without_items_three_seeds_are_the_t_test_over_seeds(table):
    bench = Bench()
    runs = [run for s, a in ((42, 1.1), (43, 1.0), (44, 0.9)) for run in pair(bench, s, a, 0.7)]
    (row,) = table(runs, items=False).itertuples()
    sides = ({f["seed"]: items.mean() for f, items in runs[i::2]} for i in (0, 1))
    theirs = ttest_rel(*([side[seed] for seed in (42, 43, 44)] for side in sides))
    expected = theirs.confidence_interval().low, theirs.pvalue
    assert (row.low, row.p_value) == pytest.approx(expected, rel=1e-6)
    assert row.over == "seeds"


def test_items_of_another_number_do_not_pair(table):
    few, many = Bench(items=100), Bench(items=200)
    (together, _), (_, alone) = pair(many, 42, 1.0, 0.7), pair(few, 42, 1.0, 0.7)
    (row,) = table([together, alone]).itertuples()
    assert row.over == "" and math.isnan(row.low) and not math.isnan(row.value)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 43, "run": "sst2_lora_r8_seed43"},
        {"rank": 16, "run": "sst2_lora_r16_seed42"},
        {"learning_rate": 1e-3, "run": "sst2_lora_r8_lr1e-3_seed42"},
        {"scaling": "rslora", "run": "sst2_lora_r8_rslora_seed42"},
        {"target_modules": "all", "run": "sst2_lora_r8_all_seed42"},
        {"run": "sst2_lora_r8_epochs3_seed42"},
        {"run": "sst2+mnli_lora_r8_seed42"},
    ],
)
def test_a_control_is_the_same_arm_of_the_same_seed(table, other):
    bench = Bench()
    together, (fields, items) = pair(bench, 42, 1.0, 0.7)
    assert len(table([together, (fields, items)])) == 1
    assert table([together, (fields | other, items)]).empty


def test_a_control_has_seen_as_many_rows_of_the_task(table):
    """40 steps of 16: the mixed run has seen 213 rows of each task, 40 steps on one task 640."""
    bench = Bench()
    together, (fields, items) = pair(bench, 42, 1.0, 0.7)
    mixed = {"run": "similar_lora_r8_steps40_seed42", "step": 40, "rows_seen": 213}
    together = together[0] | mixed, together[1]

    def rows(steps, seen, name=""):
        run = f"sst2_lora_r8_{name or f'steps{steps}'}_seed42"
        return fields | {"run": run, "step": steps, "rows_seen": seen}, items

    assert table([together, rows(40, 640)]).empty
    assert len(table([together, rows(13, 208)])) == 1
    assert len(table([together, rows(13, 208), rows(40, 640)])) == 1
    assert table([together, rows(13, 208, "cosine_steps13")]).empty
    unknown = {"rows_seen": math.nan}  # of records that do not say it
    assert table([(together[0] | unknown, items), rows(40, math.nan)]).empty


def test_a_control_counts_on_its_own_task_alone(table):
    bench = Bench()
    runs = [*pair(bench, 42, 1.0, 0.7), *pair(bench, 42, 1.0, 0.2, task="mnli")]
    runs[3][0]["run"] = "sst2_lora_r8_seed42"  # the sentiment run, asked about inference
    assert list(table(runs)["task"]) == ["sst2"]


def test_validation_is_read_where_test_is_not_there(table, tmp_path):
    bench = Bench()
    runs = pair(bench, 42, 1.0, 0.7, split="validation")
    runs += pair(bench, 42, 1.0, 0.7, task="mnli", split="validation")
    runs += pair(bench, 42, 1.0, 0.7, task="mnli")
    found = table(runs).set_index("task")
    assert dict(found["split"]) == {"sst2": "validation", "mnli": "test"}


def test_only_the_last_checkpoint_counts(table):
    bench = Bench()
    early = [(f | {"step": 50, "fraction": 0.5}, 1 - i) for f, i in pair(bench, 42, 2.0, -2.0)]
    late = pair(bench, 42, 1.0, 0.7)
    (row,) = table([*early, *late]).itertuples()
    assert row.value == pytest.approx(late[0][1].mean() - late[1][1].mean())


def test_p_values_are_corrected_over_the_table(table):
    bench = Bench()
    runs = [*pair(bench, 42, 1.0, 0.6), *pair(bench, 42, 0.7, 0.7, task="mnli")]
    found = table(runs).sort_values("p_value")
    assert found["corrected"].iloc[0] == pytest.approx(min(1, 2 * found["p_value"].iloc[0]))


def test_a_baseline_or_a_prompt_of_another_wording_is_no_run(tmp_path):
    records = [record("majority_class", "sst2", 0.5, method="baseline", rank=0)]
    records += [record("similar_lora_r8_seed42", "sst2", 0.9, prompt=1)]
    records += [record("sst2_lora_r8_seed42", "sst2", 0.8)]
    assert transfer_table(load_records(write_study(tmp_path, records))).empty


def test_of_one_seed_the_detectable_difference_is_that_of_the_strictest_step(table):
    bench = Bench()
    one = pair(bench, 42, 1.0, 0.7)
    (alone,) = table(one).itertuples()
    assert alone.detectable == pytest.approx(
        compare_checkpoints(*(mean_scores("accuracy", items) for _, items in one)).detectable
    )
    both = table([*one, *pair(bench, 42, 0.7, 0.7, task="mnli")]).set_index("task")
    # z(.9875) + z(.8) = 2.2414 + .8416 errors, of one test 2.8016
    assert both.loc["sst2", "detectable"] == pytest.approx(alone.detectable * 3.0830 / 2.8016, 1e-4)


def test_three_seeds_on_other_items_have_a_mean_and_no_interval(table):
    few, many = Bench(items=100), Bench(items=200)
    runs = []
    for seed in (42, 43, 44):
        runs += [pair(many, seed, 1.0, 0.7)[0], pair(few, seed, 1.0, 0.7)[1]]
    (row,) = table(runs).itertuples()
    assert (row.seeds, row.over) == (3, "") and not math.isnan(row.value)
    assert math.isnan(row.low) and math.isnan(row.p_value)
