"""The printed tables show the last checkpoints' values with their errors and marks."""

import pytest
from synthetic_records import kept, record

from lora_tradeoffs.tables.scores import (
    adaptation_table,
    drift_table,
    gradient_table,
    retention_table,
)

RUN = "similar_lora_r8_seed42"


def row(table, name):
    """The cells of the row that begins with the name."""
    line = next(line for line in table.splitlines() if line.startswith(name))
    return line.removeprefix(name).split()


def test_scores_are_of_the_last_checkpoint_on_test_and_the_highest_is_marked():
    base = record("base", "sst2", 0.6, method="base", step=0, split="test")
    records = [base, record(RUN, "sst2", 0.9, step=10), record(RUN, "sst2", 0.7, step=20)]
    records += [record(RUN, "sst2", 0.65, step=20, split="test"), record(RUN, "qqp", 0.55, step=20)]
    records += [record(RUN, "sst2", 0.1, step=20, split="test", prompt=n) for n in (1, 2)]
    table = adaptation_table([*records, base | {"shots": 4, "value": 0.62}])
    assert row(table, "base  ") == ["0.600", "+-", "0.012", "-"]
    single = adaptation_table([base | {"stderr": None}])  # of a single item
    assert row(single, "base") == ["0.600", "+-", "nan*"]
    assert row(table, "base (4 shots)") == ["0.620", "+-", "0.012", "-"]
    assert row(table, RUN) == ["0.650", "+-", "0.012*", "0.550", "+-", "0.012*", "v"]
    assert f"over 3 prompts: {RUN} sst2 test mean 0.283, sd 0.318" in table


def test_rouge_lsum_stands_beside_rouge_l():
    rouge = record(RUN, "cnn_dailymail", 0.21, step=20, split="test")
    records = [record(RUN, "qqp", 0.55, step=20), record(RUN, "qqp", 0.4, step=20, metric="f1")]
    for metric, value in (("rougeLsum", 0.26), ("rougeL", 0.21), ("rouge1", 0.3)):
        records += [
            rouge | {"metric": metric, "value": value + 0.01 * n, "prompt": n} for n in (0, 1)
        ]
    table = adaptation_table(records)
    assert table.splitlines()[0].split() == [
        *("qqp", "accuracy", "cnn_dailymail", "rougeL", "cnn_dailymail", "rougeLsum")
    ]
    shown = ["0.550", "+-", "0.012*", "v", "0.210", "+-", "0.012*", "0.260", "+-", "0.012*"]
    assert row(table, RUN) == shown
    assert "over 2 prompts: " in table and "mean 0.215" in table and "mean 0.265" not in table


def test_retention_shows_the_change_against_the_base_and_what_is_at_chance():
    weak = {"at_chance": True, "p_value": 0.2, "truncated": 3}
    records = [
        kept("base", "hellaswag", "acc_norm", 0.6, method="base", step=0),
        kept("base", "hellaswag", "acc", 0.5, method="base", step=0),
        kept(RUN, "hellaswag", "acc", 0.4),
        kept(RUN, "hellaswag", "acc_norm", 0.55),
        kept(RUN, "hellaswag", "forgetting", 0.05, p_value=0.01),
        kept(RUN, "winogrande", "acc", 0.5),
        kept(RUN, "winogrande", "forgetting", -0.02, **weak),
        kept(RUN, "hellaswag", "acc_norm", 0.1, update_scale=0.5),
    ]
    table = retention_table(records)
    assert row(table, "base") == ["0.600", "-"]
    shown = ["0.550", "(-0.050", "+-", "0.010*)", "0.500", "(+0.020", "+-", "0.010", ")"]
    assert row(table, RUN) == shown
    assert "at chance (not two standard errors above it) on winogrande" in table
    assert "cut from the left: 3 of winogrande" in table


def test_drift_has_a_line_for_each_module_and_gradients_a_column_for_each_pair():
    common = {"run": RUN, "family": "similar", "step": 20, "layer": -1, "k": None, "eps": None}
    drift = [
        common | {"module": "both", "metric": "relative_frobenius", "value": 0.0123},
        common | {"module": "both", "metric": "intruders", "value": 0.5, "k": 10, "eps": 0.5},
        common | {"module": "both", "metric": "intruders", "value": 0.9, "k": 10, "eps": 0.7},
        common | {"module": "both", "metric": "update_share", "value": 1.0},
    ]
    assert row(drift_table(drift), RUN) == ["both", "100.0%", "1.23e-02", "0.50"]
    pair = common | {"module": "both", "task": "mnli", "other": "qqp", "stderr": 0.011}
    same = pair | {"other": "mnli", "metric": "within_cosine"}
    gradients = [
        pair | {"metric": "gradient_cosine", "value": -0.014},
        pair | {"metric": "gradient_conflict", "value": 0.656},
        same | {"value": 0.1},
        same | {"value": 0.2, "task": "qqp", "other": "qqp"},
    ]
    shown = row(gradient_table(gradients), RUN)
    assert shown == ["-0.014", "+-", "0.011", "(", "66%)", "+0.150"]


@pytest.mark.parametrize("table", [drift_table, gradient_table])
def test_without_records_there_is_no_table(table):
    assert "no records" in table([])
