"""Rank correlations of forgetting with measures of drift: by hand, known, none, too few."""

import itertools
import math
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr
from simulated_studies import CORRELATIONS, association_errors, exchange_errors
from synthetic_drift import checkpoint
from synthetic_records import kept, record, write_study

from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.predictors import (
    ENOUGH_FOR_P,
    across_runs,
    correlation_difference,
    predictor_table,
    within_runs,
)

ARM = {"method": "lora", "rank": 8}


def measured(x, y, family="similar", steps=None, arms=None):
    """A predictor table of runs with predictor x and forgetting y, (runs,) or (runs, steps)."""
    x, y = (np.asarray(v, dtype=float).reshape(len(v), -1) for v in (x, y))
    rows = [
        {
            **{"run": f"run{i}", "family": family, "arm": i if arms is None else arms[i]},
            **{"step": j, "fraction": (j + 1) / x.shape[1], "is_last": j + 1 == x.shape[1]},
            **{"size": x[i, j], "forgetting": y[i, j], "gain": np.nan, "seed": 42},
        }
        for i in range(x.shape[0])
        for j in range(x.shape[1])
    ]
    return pd.DataFrame(rows)


def the_row(found, outcome="forgetting"):
    (row,) = found[found["outcome"] == outcome].itertuples()
    return row


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -------------------------------------------------------------------------- across runs


def test_across_runs_it_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    x = rng.normal(size=15)
    y = np.round(x + rng.normal(size=15), 0)  # with ties
    row = the_row(across_runs(measured(x, y)))
    theirs = spearmanr(x, y)
    assert row.rho == pytest.approx(theirs.statistic)
    assert row.p_value == pytest.approx(theirs.pvalue, abs=0.01)
    assert row.low < row.rho < row.high
    assert (row.runs, row.checkpoints, row.reason) == (15, 1, "")


def test_by_hand():
    # ranks 1 to 6 against 2 1 4 3 6 5: 1 - 6 * 6 / (6 * 35) = .8286
    row = the_row(across_runs(measured([1, 2, 3, 4, 5, 6], [20, 10, 40, 30, 60, 50])))
    assert row.rho == pytest.approx(0.82857, abs=1e-5)


def test_only_last_checkpoints_count():
    x, y = np.random.default_rng(1).normal(size=(2, 9, 4))
    row = the_row(across_runs(measured(x, y)))
    assert row.rho == pytest.approx(spearmanr(x[:, -1], y[:, -1]).statistic)
    assert row.runs == 9


def test_a_strong_relation_is_found_in_either_direction_and_none_is_not():
    rng = np.random.default_rng(2)
    x, noise = rng.normal(size=(2, 18))
    for sign in (1, -1):
        row = the_row(across_runs(measured(x, sign * x + 0.3 * noise)))
        assert sign * row.rho > 0.8 and row.p_value < 0.001 and sign * row.low * 1.0 > 0
    none = the_row(across_runs(measured(x, noise)))
    assert none.p_value > 0.05 and none.low < 0 < none.high


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_seeds_of_an_arm_do_not_make_unrelated_measures_related(correlation, steps):
    p_values, missed, tests = association_errors(5, 8, correlation, steps, resamples=100)
    # 3.5 standard errors; with seeds as units .20 at a correlation of .8, .27 at .95
    bound = 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / tests)
    assert p_values < bound and missed < bound


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("correlation", CORRELATIONS)
def test_the_error_rate_is_five_percent_at_every_correlation_within_arms(correlation, steps):
    p_values, _, _ = association_errors(60, 8, correlation, steps)
    assert 0.03 < p_values < 0.07


def test_the_unit_is_the_arm_at_a_rate_and_its_seeds_are_averaged():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(2, 9, 3))
    arms = [Arm("lora", 8, learning_rate=rate) for rate in np.arange(1, 10) / 1e4]
    table = measured(x.ravel(), y.ravel(), arms=np.repeat(arms, 3))
    row = the_row(across_runs(table))
    assert row.rho == pytest.approx(spearmanr(x.mean(axis=1), y.mean(axis=1)).statistic)
    assert (row.runs, row.arms) == (27, 9)
    # a seed that is there twice is no evidence
    twice = pd.concat([table, table.assign(run=table["run"] + "again")])
    again = the_row(across_runs(twice))
    assert (again.p_value, again.low, again.arms) == (row.p_value, row.low, 9)
    six = the_row(across_runs(table[table["arm"].isin(arms[:6])]))
    assert (six.runs, six.arms) == (18, 6) and math.isnan(six.p_value)


def test_below_eight_arms_there_is_no_p_value():
    x = np.arange(ENOUGH_FOR_P, dtype=float)
    y = x + np.array([0, 3, 0, -3, 0, 3, 0, 0])
    assert the_row(across_runs(measured(x, y))).p_value < 0.05
    row = the_row(across_runs(measured(x[:7], y[:7])))
    assert math.isnan(row.p_value) and math.isnan(row.corrected) and math.isnan(row.detectable)
    assert row.low < row.rho and row.reason == "7 arms: no p-value below 8"


@pytest.mark.parametrize(
    "x, y, reason",
    [
        ([1, 2, 3, 4, 5], [1, 2, 3, 5, 4], "6 arms are needed, here 5"),
        ([2] * 9, range(9), "the predictor is the same in all arms"),
        (range(9), [0] * 9, "the outcome is the same in all arms"),
        ([math.nan] * 9, range(9), "6 arms are needed, here 0"),
        ([1, 2, 3, 4, 5, 6, math.nan], range(7), "6 arms: no p-value below 8"),
    ],
)
def test_what_cannot_be_correlated_says_why(x, y, reason):
    row = the_row(across_runs(measured(x, list(y))))
    assert reason in row.reason
    assert math.isnan(row.rho) == ("no p-value" not in row.reason)


def test_perfect_order_is_no_perfect_certainty():
    row = the_row(across_runs(measured(range(10), range(10))))
    assert row.rho == pytest.approx(1)
    assert math.isnan(row.low) and "resampling knows no other" in row.reason
    assert 0 < row.p_value < 0.01


def test_the_same_seed_gives_the_same_figures():
    table = measured(*np.random.default_rng(4).normal(size=(2, 12)))
    pd.testing.assert_frame_equal(across_runs(table), across_runs(table))
    assert not across_runs(table).equals(across_runs(table, seed=1))


def test_p_values_are_corrected_over_predictors_and_families():
    x, y = np.random.default_rng(5).normal(size=(2, 12))
    both = pd.concat([measured(x, y), measured(x, x + y, "dissimilar")])
    found = across_runs(both.assign(rho=both["size"] ** 2))
    found = found[found["outcome"] == "forgetting"].sort_values("p_value")
    assert len(found) == 4
    assert found["corrected"].iloc[0] == pytest.approx(min(1, 4 * found["p_value"].iloc[0]))
    # Fieller's error sqrt(1.06 / 9); 2.4977 is the normal's .05 / 8 point, .8416 its 80 %
    expected = math.tanh((2.4977 + 0.8416) * math.sqrt(1.06 / 9))
    assert found["detectable"].iloc[0] == pytest.approx(expected, abs=1e-4)


# -------------------------------------------------------------------------- within runs


def course(runs=9, steps=6, seed=6):
    """What rises with the step in every run, each run at a level of its own; and two noises."""
    rng = np.random.default_rng(seed)
    common = np.arange(steps) * 2.0
    level = rng.normal(0, 1, (runs, 1))
    return common + level, *rng.normal(size=(2, runs, steps))


def test_the_step_alone_is_no_relation_within_runs():
    trend, noise, other = course()
    pooled = np.corrcoef((trend + other).ravel(), (trend + noise).ravel())[0, 1]
    assert pooled > 0.9  # what all checkpoints as so many rows would say
    row = the_row(within_runs(measured(trend + noise, trend + other)))
    assert row.p_value > 0.05 and row.low < 0 < row.high


@pytest.mark.parametrize("sign", [1, -1])
def test_a_relation_beside_the_step_is_found(sign):
    trend, noise, other = course()
    row = the_row(within_runs(measured(trend + noise, trend + sign * noise + 0.3 * other)))
    assert sign * row.rho > 0.6 and row.p_value < 0.01
    assert (row.runs, row.checkpoints) == (9, 6)


def test_within_runs_it_is_the_correlation_of_ranks_at_a_checkpoint_less_the_runs_own():
    x, y = np.random.default_rng(7).normal(size=(2, 8, 5))
    table = measured(x, y)
    row = the_row(within_runs(table))
    # an independent version, by pandas
    ranks = table.groupby("step")[["size", "forgetting"]].rank()
    left = ranks - ranks.groupby(table["run"]).transform("mean")
    assert row.rho == pytest.approx(left.corr().iloc[0, 1])


def test_runs_that_part_at_their_own_rates_are_not_taken_for_a_relation():
    rates = np.linspace(1, 3, 9)[:, None] * np.arange(1, 7)
    _, noise, other = course()
    row = the_row(within_runs(measured(rates**2 + 3 * noise, rates + other)))
    assert abs(row.rho) < 0.4 and row.p_value > 0.05


def test_a_run_that_lacks_a_checkpoint_takes_it_from_all():
    x, y = np.random.default_rng(8).normal(size=(2, 8, 5))
    table = measured(x, y)
    row = the_row(within_runs(table[~((table["run"] == "run0") & (table["step"] == 2))]))
    whole = the_row(within_runs(table[table["step"] != 2]))
    assert (row.rho, row.checkpoints) == (pytest.approx(whole.rho), 4)


def test_runs_that_keep_their_order_say_nothing_within():
    x = np.arange(6)[None] + 10.0 * np.arange(8)[:, None]
    row = the_row(within_runs(measured(x, np.random.default_rng(9).normal(size=(8, 6)))))
    assert row.reason == "the predictor never changes the arms' order"
    one = the_row(within_runs(measured(range(8), range(8))))
    assert "all runs have are needed, here 1" in one.reason and math.isnan(one.rho)


# -------------------------------------------------------------------------- from the records


RUN = "similar_lora_r8_seed42"


@pytest.fixture
def frames(tmp_path):
    """Retention, drift and adaptation of one run with two checkpoints."""
    both = [dict(step=20 * i, fraction=i / 2, rank=8) for i in (1, 2)]
    base = dict(method="base", step=0, fraction=0.0)
    retention = [kept("base", "mean", "adaptation", 0.5, **base)]
    drift = []
    for i, at in enumerate(both, start=1):
        retention += [
            kept(RUN, "mean", "forgetting", 0.01 * i, **at),
            kept(RUN, "mean", "adaptation", 0.5 + 0.1 * i, **at),
            kept(RUN, "mean", "forgetting", 9.0, **at, **{"update_scale": 0.5}),
            kept(RUN, "text", "kl", 0.5 * i, **at),
            *(kept(RUN, task, "answer_kl", i + j, **at) for j, task in enumerate(("sst2", "mnli"))),
            *(kept(RUN, "text", "cka", 1 - 0.1 * layer, **at, layer=layer) for layer in (0, 1, 2)),
        ]
        rows = checkpoint("similar", "lora", 8, 42, at["step"], at["fraction"])
        common = {**rows[0], "module": "both", "layer": -1, "side": "", "eps": None}
        rows += [
            {**common, "metric": "rho", "value": v, "k": k} for v, k in ((0.7 * i, 10), (9, 4))
        ]
        drift += rows
    control = {"rank": 8, "step": 40, "fraction": 1.0}
    retention.append(kept("sst2_lora_r8_seed42", "mean", "forgetting", 5.0, **control))
    return [
        load_records(write_study(tmp_path, records, "study", script=name))
        for name, records in (("retention", retention), ("drift", drift))
    ]


def test_the_table_reads_each_measure_where_it_is_kept(frames):
    retention, drift = frames
    table = predictor_table(retention, drift)
    assert list(table["run"]) == [RUN, RUN]  # no scaled update, no control
    first, last = table.itertuples()
    assert (first.is_last, last.is_last, str(last.arm)) == (False, True, "LoRA r=8")
    assert (last.forgetting, last.gain) == (pytest.approx(0.02), pytest.approx(0.2))
    assert last.kl_text == pytest.approx(1.0)
    assert last.kl_tasks == pytest.approx((2 + 3) / 2)
    assert last.cka_loss == pytest.approx(0.1)
    assert (first.rho, last.rho) == pytest.approx((0.7, 1.4))
    rows = drift[(drift["layer"] == -1) & (drift["step"] == 40)]
    both = rows[rows["module"] == "both"]
    size = rows[(rows["metric"] == "relative_frobenius") & (rows["module"] == "all")]
    assert last.size == pytest.approx(size["value"].item())
    phi = both[(both["metric"] == "phi") & (both["side"] == "left")]
    assert last.rotation == pytest.approx(1 - phi["value"].item())
    count = both[(both["metric"] == "intruders") & (both["k"] == 10) & (both["eps"] == 0.5)]
    assert last.intruders == pytest.approx(count["value"].item())


def test_without_drift_or_gain_the_rest_is_there(frames):
    retention, _ = frames
    table = predictor_table(retention[retention["metric"] != "adaptation"])
    assert "size" not in table and table["gain"].isna().all()
    assert table["cka_loss"].notna().all()
    empty = predictor_table(retention[retention["metric"] != "forgetting"])
    assert empty.empty and across_runs(empty).empty and within_runs(empty).empty


def test_gains_may_come_from_adaptation(frames, tmp_path):
    retention, _ = frames
    tasks = {"sst2": 0.7, "mnli": 0.6, "qqp": 0.8}
    rows = [
        record(run, task, value - lower, step=step, **others)
        for task, value in tasks.items()
        for run, step, lower, others in (
            ("base", 0, 0.3, {"method": "base", "fraction": 0.0}),
            (RUN, 40, 0.0, {}),
        )
    ]
    adaptation = load_records(write_study(tmp_path, rows, "study"))
    table = predictor_table(retention[retention["metric"] != "adaptation"], None, adaptation)
    assert table["gain"].iloc[1] == pytest.approx(0.3)


def test_sizes_of_two_kinds_are_not_compared(frames):
    retention, drift = frames
    other = drift[drift["module"] != "all"].assign(run="similar_lora_r8_seed43", seed=43)
    lost = retention[retention["metric"] == "forgetting"]
    lost = pd.concat([lost, lost.assign(run="similar_lora_r8_seed43", seed=43)])
    table = predictor_table(lost, pd.concat([drift, other]))
    both = drift[(drift["module"] == "both") & (drift["metric"] == "relative_frobenius")]
    sizes = table[table["run"] == RUN]["size"]
    assert list(sizes) == pytest.approx(list(both["value"]))


def test_what_could_not_be_tested_is_no_test_of_the_correction():
    x, y = np.random.default_rng(5).normal(size=(2, 12))
    found = across_runs(measured(x, y).assign(rho=1.0, intruders=np.nan))
    (row,) = found[(found["outcome"] == "forgetting") & found["p_value"].notna()].itertuples()
    assert row.corrected == row.p_value  # one test of three predictors


# -------------------------------------------------------------------- two predictors compared


def compared(values, **options):
    table = pd.DataFrame(values, columns=["kl_tasks", "size", "text_lost"])
    table = table.assign(arm=np.arange(len(table)), is_last=True)
    return correlation_difference(table, ("kl_tasks", "size"), "text_lost", **options)


def test_two_predictors_are_compared_by_exchanging_their_ranks():
    rng = np.random.default_rng(4)
    y = rng.normal(size=8)
    first, second = y + 0.2 * rng.normal(size=8), y + 2 * rng.normal(size=8)
    found = compared(np.stack([first, second, y], 1))
    assert found["each"] == pytest.approx([spearmanr(x, y).statistic for x in (first, second)])
    assert found["rho"] == pytest.approx(found["each"][0] - found["each"][1])
    assert found["low"] < found["rho"] < found["high"] and found["arms"] == 8
    # every exchange of 8 arms, with SciPy's correlation
    ranks = np.stack([rankdata(first), rankdata(second)], 1)
    far = []
    for turned in itertools.product([0, 1], repeat=8):
        a, b = (ranks[range(8), np.array(turned) ^ side] for side in (0, 1))
        rhos = [spearmanr(x, y).statistic for x in (a, b)]
        far.append(abs(rhos[0] - rhos[1]) >= abs(found["rho"]) - 1e-12)
    assert found["p_value"] == pytest.approx(np.mean(far), abs=0.015)
    turned = compared(np.stack([second, first, y], 1))
    assert turned["rho"] == pytest.approx(-found["rho"])
    assert turned["p_value"] == pytest.approx(found["p_value"], abs=0.015)


def test_two_predictors_of_too_few_arms_have_no_p_value_and_then_no_interval():
    values = np.random.default_rng(6).normal(size=(8, 3))
    assert compared(values, resamples=200)["p_value"] > 0
    seven = compared(values[:7], resamples=200)
    assert math.isnan(seven["p_value"]) and seven["low"] < seven["high"]
    assert seven["reason"] == "7 arms: no p-value below 8"
    five = compared(values[:5])
    assert math.isnan(five["rho"]) and five["reason"] == "6 arms are needed, here 5"
    same = compared(np.column_stack([values[:, 0], np.ones(8), values[:, 2]]))
    assert math.isnan(same["rho"]) and "the same in all arms" in same["reason"]


def test_equal_predictors_seldom_differ():
    p_values, missed = exchange_errors(60, 10, each=0.6, between=0.5, resamples=199)
    bound = 0.05 + 3.5 * math.sqrt(0.05 * 0.95 / 60)
    assert p_values < bound and missed < bound
