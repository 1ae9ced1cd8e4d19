"""Findings on made-up studies: a known effect of either sign, none, too few seeds, the demo."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t, ttest_rel
from support import settings_for
from synthetic_effects import ARMS, Bench, arm_fields, write_scored
from synthetic_records import kept, record, shrunk_study, write_study

from config import FAMILIES
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.measuring.results import adaptation_unit, item_reader, retention_unit
from lora_tradeoffs.report import findings as report_findings
from lora_tradeoffs.report.findings import as_markdown, as_table
from lora_tradeoffs.report.wording import (
    ADAPTS,
    FORGETS,
    GOES_WITH,
    MATCHED,
    RANK,
    SHRUNK,
    TRANSFER,
)
from lora_tradeoffs.statistics.contrasts import WeightedScores, by_seed, contrast
from lora_tradeoffs.tables.arms import FULL, Arm
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.learning_rates import at_chosen_rates
from lora_tradeoffs.tables.transfer import transfer_table

SEEDS = (42, 43, 44)
SURE = 0.0005  # spread of the seeds, at which three of them tell .05 after Holm over 30
VAGUE = 0.02


def findings(adaptation, retention, drift, transfer, preset, test_items=None, items=None):
    """The findings of a study of these records, transfer and per-item outcomes."""
    study = StudyRecords(adaptation, retention, drift)
    study.transfer, study.preset = transfer, preset
    study.adaptation_items, study.retention_items = test_items, items
    return report_findings.findings(study)


@pytest.fixture
def adapted(tmp_path):
    """Records of adaptation where LoRA scores `effect(rank)` above full fine-tuning."""

    def make(effect, spread=SURE, seeds=SEEDS, arms=tuple(ARMS), families=tuple(FAMILIES)):
        rng, records = np.random.default_rng(0), []
        for family in families:
            for task in FAMILIES[family]:
                unit = 100 if task == "codexglue" else 1
                for arm in arms:
                    method, rank = ARMS[arm]
                    for seed in seeds:
                        value = 0.6 + (effect(rank) if rank else 0) + rng.normal(0, spread)
                        own = dict(method=method, rank=rank, seed=seed, split="test")
                        run = f"{family}_{arm}_seed{seed}"
                        records.append(record(run, task, unit * value, **own))
        return load_records(write_study(tmp_path, records, "study"))

    return make


@pytest.fixture
def kept_frame(tmp_path):
    """Records of retention where an arm's mean forgetting is `lost(rank)` (rank 0: full)."""

    def make(lost, spread=SURE, seeds=SEEDS, matched=None, shots=0):
        rng, records = np.random.default_rng(1), []
        for family in FAMILIES:
            for arm, (method, rank) in ARMS.items():
                for seed in seeds:
                    run = f"{family}_{arm}_seed{seed}"
                    own = dict(method=method, rank=rank, seed=seed, shots=shots)
                    value = lost(rank) + rng.normal(0, spread)
                    records.append(kept(run, "mean", "forgetting", value, family, **own))
                    if matched and rank:
                        own |= {"other_run": f"{family}_full_seed{seed}", "score": 0.6}
                        value = matched(rank) + rng.normal(0, spread)
                        one = kept(run, "mean", "matched_forgetting", value, family, 2e-3, **own)
                        records.append(one)
        path = write_study(tmp_path, records, "study", script="retention")
        return load_records(path)

    return make


def asked(found, question):
    """The findings of a question, without its notes."""
    return [f for f in found if f.question == question and f.kind != "note"]


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d*\.\d+", text)]


# --------------------------------------------------------------------- the confirmatory family


@pytest.mark.parametrize("effect, word", [(0.05, "higher"), (-0.05, "lower")])
def test_a_known_effect_is_found_in_its_direction(adapted, effect, word):
    tests = asked(findings(adapted(lambda rank: effect), None, None, None, "study"), ADAPTS)
    assert len(tests) == 30
    for f in tests:
        assert (f.kind, f.verdict, f.seeds) == ("confirmatory", word, 3)
        assert f"{f.arm} scores" in f.sentence and f"{word} than full fine-tuning" in f.sentence
        assert "after Holm over 30 tests, 3 seeds, 10 degrees of freedom" in f.sentence
        unit = 100 if f.about == "codexglue" else 1
        assert f.effect == pytest.approx(unit * effect, abs=unit * 0.002)
        assert f.low < f.effect < f.high and f.corrected < 0.05
        assert f.detectable > abs(f.high - f.effect)  # stricter than one test's interval


def test_fields_that_all_runs_share_part_no_arms(adapted, kept_frame):
    frames = [adapted(lambda rank: 0.05), kept_frame(lambda rank: 0.1 + 0.01 * rank)]
    plain = findings(*frames, None, None, "study")
    named = [
        f.assign(
            run=f["run"].str.replace("_seed", "_steps40_seed"),
            arm=[replace(arm, variant="steps40") if arm.is_trained else arm for arm in f["arm"]],
        )
        for f in frames
    ]
    first, *others = findings(*named, None, None, "study")
    assert first.sentence.startswith("All runs were made with steps40")
    assert as_markdown(others) == as_markdown(plain)
    # one run of the grid itself: now the words part the arms, and the other arms are not the grid's
    mixed = pd.concat([named[0], frames[0].query("method == 'full'")])
    found = findings(mixed, named[1], None, None, "study")
    assert not any("All runs" in f.sentence for f in found)
    assert not any(f.verdict for f in asked(found, ADAPTS))


def test_the_figures_are_those_of_the_test_over_seeds(adapted):
    frame = adapted(lambda rank: 0.01, VAGUE)
    found = asked(findings(frame, None, None, None, "study"), ADAPTS)
    f = next(f for f in found if (f.arm, f.about) == ("LoRA r=16", "mnli"))
    rows = frame[frame["task"] == "mnli"]
    arms = Arm("lora", 16), FULL
    sides = [rows[rows["arm"] == arm].set_index("seed")["value"] for arm in arms]
    # the residuals of arms and seeds, by hand
    table = rows.assign(arm=rows["arm"].map(str)).pivot(index="arm", columns="seed", values="value")
    rest = table.sub(table.mean(axis=1), axis=0) - table.mean(axis=0) + table.to_numpy().mean()
    stderr = math.sqrt(2 * (rest**2).to_numpy().sum() / 10 / 3)
    effect, half = (sides[0] - sides[1]).mean(), t.ppf(0.975, 10) * stderr
    assert (f.effect, f.low, f.high) == pytest.approx((effect, effect - half, effect + half))
    assert f.p_value == pytest.approx(2 * t.sf(abs(effect) / stderr, 10), rel=1e-6)
    smallest = min(test.p_value for test in found)
    assert min(test.corrected for test in found) == pytest.approx(min(1, 30 * smallest))


def test_what_could_be_seen_is_said_first(adapted):
    note, first, *_ = findings(adapted(lambda rank: 0.0, VAGUE), None, None, None, "study")
    assert (note.kind, note.question) == ("note", ADAPTS)
    assert note.sentence.startswith(
        "Smallest detectable differences (80 % power after Holm over 30"
    )
    assert f"similar: sst2 {first.detectable:.3f}, mnli" in note.sentence
    assert "(10 degrees of freedom: the error is pooled over the arms)" in note.sentence


def test_an_arm_that_differs_more_from_seed_to_seed_is_tested_with_its_own_error(adapted):
    frame = adapted(lambda rank: 0.0, VAGUE)
    noisy = frame["arm"] == FULL
    frame.loc[noisy, "value"] += 9 * (frame.loc[noisy, "value"] - 0.6)
    note, *found = findings(frame, None, None, None, "study")
    assert "kept their errors apart" in note.sentence
    f = next(f for f in found if (f.arm, f.about) == ("LoRA r=16", "mnli"))
    rows = frame[frame["task"] == "mnli"]
    arms = Arm("lora", 16), FULL
    sides = [rows[rows["arm"] == arm].sort_values("seed")["value"] for arm in arms]
    assert f.p_value == pytest.approx(ttest_rel(*sides).pvalue, rel=1e-6)


def test_the_family_of_tests_is_that_of_the_plan(adapted, tmp_path):
    frame = adapted(lambda rank: -0.05, families=("similar",), arms=("lora_r8", "lora_r64", "full"))
    settings = settings_for(study="planned")
    study = StudyRecords(frame, settings=replace(settings, output_dir=tmp_path))
    study.adaptation_items = None
    plan = tmp_path / "outputs/planned/study.json"
    plan.parent.mkdir(parents=True)
    arms = [{"method": "lora", "rank": rank} for rank in (8, 32, 64)]
    arms = {"similar": [{"method": "full", "rank": 0}, *arms], "dissimilar": []}
    plan.write_text(json.dumps(dict.fromkeys(("preset", "model", "data"), "") | {"arms": arms}))
    found = asked(report_findings.findings(study), ADAPTS)
    assert len([f for f in found if f.kind == "confirmatory"]) == 6
    assert all("over 9 tests" in f.sentence for f in found if f.kind == "confirmatory")
    (missing,) = [f.sentence for f in found if f.kind == "missing"]
    assert missing.startswith("similar: not tested: LoRA r=32 and full")


def test_every_adapter_of_the_plan_is_tested_against_full(adapted, tmp_path):
    frame = adapted(lambda rank: -0.05, families=("similar",), arms=("lora_r8", "lora_r64", "full"))
    planned = {Arm("lora", 8): Arm("lora", 8, "all"), Arm("lora", 64): Arm("dora", 4)}
    frame = frame.assign(arm=frame["arm"].map(lambda arm: planned.get(arm, arm)))
    study = StudyRecords(frame, settings=settings_for(study="adapters"))
    study.adaptation_items = None
    study.planned_arms = {"similar": {FULL, *planned.values()}, "dissimilar": set()}
    found = asked(report_findings.findings(study), ADAPTS)
    tested = [(f.arm, f.verdict) for f in found if f.kind == "confirmatory"]
    assert sorted(tested) == sorted(
        (arm, "lower") for arm in ("LoRA r=8 (all)", "DoRA r=4") for _ in FAMILIES["similar"]
    )
    assert "DoRA r=4 scores" in " ".join(f.sentence for f in found)


def test_no_effect_is_not_distinguishable_with_what_could_have_been_missed(adapted):
    tests = asked(findings(adapted(lambda rank: 0.0, VAGUE), None, None, None, "study"), ADAPTS)
    assert {f.verdict for f in tests} == {"not distinguishable"}
    for f in tests:
        assert "are not distinguishable on" in f.sentence
        assert re.search(r"differences below \d+\.\d+ could have been missed", f.sentence)
        digits = 1 if f.about == "codexglue" else 3
        shown = numbers(f.sentence)
        assert round(f.effect, digits) in shown and round(f.detectable, digits) in shown


def test_equal_arms_are_rarely_told_apart(adapted):
    wrong = 0
    for seed in range(8):
        frame = adapted(lambda rank: 0.0, VAGUE, families=("similar",))
        rng = np.random.default_rng(seed)
        frame = frame.assign(value=0.6 + rng.normal(0, VAGUE, len(frame)))
        found = asked(findings(frame, None, None, None, "study"), ADAPTS)
        wrong += any(f.verdict in ("higher", "lower") for f in found)
    assert wrong <= 2  # a family-wise error of 5 % in 8 studies


@pytest.mark.parametrize("seeds, said", [((42,), "share 1 seed,"), ((42, 43), "share 2 seeds,")])
def test_too_few_seeds_claim_nothing_and_say_how_many_are_needed(adapted, seeds, said):
    frame = adapted(lambda rank: 0.3, seeds=seeds)
    found = asked(findings(frame, None, None, None, "study"), ADAPTS)
    assert [f.family for f in found] == ["similar", "dissimilar"]
    for f in found:
        assert f.kind == "missing" and f.verdict == "" and math.isnan(f.effect)
        assert "nothing can be claimed about methods" in f.sentence
        assert said in f.sentence and "at least 3 are needed" in f.sentence


def test_arms_that_are_not_there_still_count_in_the_family(adapted):
    frame = adapted(lambda rank: -0.05, arms=("lora_r8", "full"))
    found = asked(findings(frame, None, None, None, "study"), ADAPTS)
    tested = [f for f in found if f.kind == "confirmatory"]
    assert len(tested) == 6 and {f.arm for f in tested} == {"LoRA r=8"}
    assert all("over 30 tests" in f.sentence for f in tested)
    rest = [f.sentence for f in found if f.kind == "missing"]
    assert len(rest) == 2 and all("not tested: LoRA r=4, LoRA r=16" in s for s in rest)
    assert all("share no seeds" in s for s in rest)


def test_validation_is_not_taken_for_test(adapted):
    frame = adapted(lambda rank: 0.3)
    frame = frame.assign(split="validation")
    found = asked(findings(frame, None, None, None, "study"), ADAPTS)
    assert {f.kind for f in found} == {"missing"}


def test_with_items_the_interval_counts_them_too(tmp_path):
    runs = []
    for task in FAMILIES["similar"]:
        bench = Bench(items=500, rest=0.1)
        for seed in SEEDS:
            for arm, ability in (("lora_r8", 0.5), ("full", 1.0)):
                fields = arm_fields(arm, seed) | {"task": task}
                runs.append((fields, bench.answers(ability)))
    path, results = write_scored(tmp_path, runs)
    frame = load_records(path)
    both = findings(frame, None, None, None, "study", item_reader(results, adaptation_unit))
    alone = findings(frame, None, None, None, "study")
    for f, g in zip(asked(both, ADAPTS)[:3], asked(alone, ADAPTS)[:3]):
        assert f.effect == pytest.approx(g.effect)
        assert f.high - f.low > g.high - g.low and f.p_value > g.p_value
        assert "over seeds and items" in f.sentence and "on these items" in g.sentence


def test_runs_that_were_measured_on_other_items_are_not_tested(tmp_path):
    runs = []
    for arm, items in (("lora_r8", 100), ("full", 200)):
        for seed in SEEDS:
            fields = arm_fields(arm, seed) | {"task": "sst2"}
            runs.append((fields, Bench(items=items).answers(0.5)))
    path, results = write_scored(tmp_path, runs)
    found = findings(
        load_records(path), None, None, None, "study", item_reader(results, adaptation_unit)
    )
    (f, *_) = asked(found, ADAPTS)
    assert (f.kind, f.verdict, f.about) == ("missing", "", "sst2")
    assert "LoRA r=8, sst2: not tested" in f.sentence and "numbers of items" in f.sentence


def test_a_swept_arm_is_tested_at_its_chosen_rate(tmp_path):
    records, rates = [], {"": (1e-4, 0.9), "_lr5e-4": (5e-4, 0.5)}
    for seed in SEEDS:
        noise = 1e-4 * (seed - 42) ** 2
        full = dict(method="full", rank=0, seed=seed, split="test")
        records.append(record(f"similar_full_seed{seed}", "sst2", 0.7, **full))
        for name, (rate, value) in rates.items():
            own = dict(seed=seed, split="test", learning_rate=rate)
            records.append(
                record(f"similar_lora_r8{name}_seed{seed}", "sst2", value + noise, **own)
            )
    frame = load_records(write_study(tmp_path, records, "study"))
    choice = {"family": "similar", "arm": "similar_lora_r8", "method": "lora", "rank": 8}
    choice |= {"learning_rate": 5e-4, "chosen": True}
    found = findings(at_chosen_rates(frame, [choice]), None, None, None, "study")
    (tested,) = [f for f in asked(found, ADAPTS) if f.kind == "confirmatory"]
    assert (tested.arm, tested.verdict) == ("LoRA r=8", "lower")
    assert tested.effect == pytest.approx(-0.2, abs=1e-3)


# ------------------------------------------------------------------------------- exploratory


@pytest.mark.parametrize("sign, word, shots", [(1, "more", 0), (-1, "less", 5)])
def test_forgetting_is_told_in_either_direction(kept_frame, sign, word, shots):
    """Also over benchmarks that were all asked with examples."""
    retention = kept_frame(lambda rank: 0.05 + (sign * 0.03 if rank else 0), shots=shots)
    found = asked(findings(None, retention, None, None, "study"), FORGETS)
    assert len(found) == 10 and {f.kind for f in found} == {"exploratory"}
    for f in found:
        assert re.search(rf"{f.arm} forgets 0\.0[23]\d {word} than full fine-tuning", f.sentence)
        assert f.effect == pytest.approx(sign * 0.03, abs=0.002)
        assert f.verdict == ("higher" if sign > 0 else "lower")


def test_the_mean_says_that_benchmarks_with_more_examples_are_not_in_it(kept_frame):
    frame = kept_frame(lambda rank: 0.05)
    more = frame.assign(shots=5, arm=[replace(arm, shots=5) for arm in frame["arm"]])
    note, *_ = findings(None, pd.concat([frame, more]), None, None, "study")[1:]
    assert (
        note.kind == "note"
        and "with 0 examples in the prompt, not over those with 5" in note.sentence
    )


def test_no_difference_in_forgetting_is_said_to_be_none(kept_frame):
    retention = kept_frame(lambda rank: 0.05, VAGUE)
    found = asked(findings(None, retention, None, None, "study"), FORGETS)
    assert {f.verdict for f in found} == {"not distinguishable"}
    assert all("not distinguishable in what they forget" in f.sentence for f in found)


def test_forgetting_of_one_seed_claims_nothing(kept_frame):
    found = findings(None, kept_frame(lambda rank: 0.05, seeds=(42,)), None, None, "study")
    assert all("nothing can be claimed" in f.sentence for f in asked(found, FORGETS))


@pytest.mark.parametrize("sign, word", [(1, "more"), (-1, "less")])
def test_matched_forgetting_is_told_in_either_direction(kept_frame, sign, word):
    retention = kept_frame(lambda rank: 0.05, matched=lambda rank: sign * 0.05)
    found = asked(findings(None, retention, None, None, "study"), MATCHED)
    assert len(found) == 10
    assert all(
        f"{word} than full fine-tuning (mean over the benchmarks) where both score the same"
        in f.sentence
        for f in found
    )
    assert {f.over for f in found} == {"seeds and items"}
    without = asked(findings(None, kept_frame(lambda rank: 0.05), None, None, "study"), MATCHED)
    assert [f.kind for f in without] == ["missing"] and "--scale-update" in without[0].sentence


def test_matched_forgetting_is_not_that_of_the_seeds_that_happened_to_match(kept_frame):
    retention = kept_frame(lambda rank: 0.05, matched=lambda rank: 0.05, seeds=(42, 43, 44, 45))
    apart = retention["run"].eq("similar_lora_r8_seed44") & retention["metric"].eq(
        "matched_forgetting"
    )
    retention.loc[apart, "value"], retention["reason"] = np.nan, "its best is 0.4"
    found = asked(findings(None, retention, None, None, "study"), MATCHED)
    (missing,) = (f for f in found if f.kind == "missing")
    assert "similar: LoRA r=8, mean: not tested" in missing.sentence
    assert "no validation score in common (seed 44: its best is 0.4)" in missing.sentence
    assert len(found) == 10 and all("after Holm over 9" in f.sentence for f in found if f.verdict)


@pytest.mark.parametrize("sign, words", [(1, ("more", "lower")), (-1, ("less", "higher"))])
def test_shrunk_intruders_are_told_in_either_direction(kept_frame, tmp_path, sign, words):
    records = list(shrunk_study(dict.fromkeys(("mean", "text", "adaptation"), sign * 0.05)))
    study = StudyRecords(retention=kept_frame(lambda rank: 0.05))
    study.shrunk, study.preset = load_records(write_study(tmp_path, records, "study")), "study"
    study.adaptation_items = study.retention_items = None
    found = {f.about: f for f in asked(report_findings.findings(study), SHRUNK)}
    more, lower = words
    start = "similar: LoRA r=8 with its intruder dimensions multiplied by 0"
    assert f"{start} forgets 0.050 {more} than with as many other" in found["mean"].sentence
    assert "on held-out text" in found["text"].sentence
    assert f"{start} scores 0.050 {lower} than" in found["adaptation"].sentence
    assert {f.over for f in found.values()} == {"seeds and items"}
    study.shrunk = None
    (without,) = asked(report_findings.findings(study), SHRUNK)
    assert without.kind == "missing" and "--shrink-intruders" in without.sentence


@pytest.mark.parametrize("sign, word", [(1, "rises"), (-1, "falls")])
def test_a_trend_over_ranks_is_told_in_either_direction(adapted, kept_frame, sign, word):
    slope = sign * 0.01
    frame = adapted(lambda rank: slope * math.log2(rank) if rank else 0.0)
    retention = kept_frame(lambda rank: slope * math.log2(rank) if rank else 0.0)
    found = asked(findings(frame, retention, None, None, "study"), RANK)
    assert [(f.family, f.about) for f in found] == [
        (family, about) for family in FAMILIES for about in ("score", "forgetting")
    ]
    for f in found:
        assert f.effect == pytest.approx(slope, abs=5e-4)
        assert f"{word} by 0.0" in f.sentence and "doubling" in f.sentence


def test_a_trend_over_ranks_says_where_no_learning_rate_was_searched(adapted):
    study = StudyRecords(adapted(lambda rank: 0.001 * rank, families=("similar",)))
    study.adaptation_items, study.transfer, study.preset = None, None, "study"
    choice = {"family": "similar", "method": "lora", "target_modules": "qv", "chosen": True}
    ranks = 4, 8, 16, 32, 64
    for searched, defaults in ((ranks, ""), (ranks[1:], "LoRA r=4"), ((), "LoRA r=4, LoRA r=8,")):
        study.rates = [
            choice | {"rank": rank, "arm": f"similar_lora_r{rank}", "learning_rate": 1e-3}
            for rank in searched
        ]
        (f,) = asked(report_findings.findings(study), RANK)
        assert ("the trend mixes the rank with" in f.sentence) == bool(defaults)
        assert f"No learning rate was searched for {defaults}" in f.sentence or not defaults


def test_without_a_trend_none_is_told(adapted):
    found = asked(findings(adapted(lambda rank: 0.1, VAGUE), None, None, None, "study"), RANK)
    assert all("no trend" in f.sentence and f.verdict == "not distinguishable" for f in found)
    two = adapted(lambda rank: 0.1, arms=("lora_r4", "lora_r8", "full"))
    (missing,) = asked(findings(two, None, None, None, "study"), RANK)
    assert "fewer than 3 ranks" in missing.sentence


@pytest.mark.parametrize("together, word", [(1.2, "higher"), (0.4, "lower")])
def test_transfer_is_told_in_either_direction(tmp_path, together, word):
    bench, runs = Bench(items=2000, rest=0.05), []
    for seed in SEEDS:
        for tasks, ability in (("similar", together), ("sst2", 0.8)):
            fields = arm_fields("lora_r8", seed, tasks) | {"task": "sst2"}
            runs.append((fields, bench.answers(ability)))
    path, results = write_scored(tmp_path, runs)
    table = transfer_table(load_records(path), item_reader(results, adaptation_unit))
    (f,) = asked(findings(None, None, None, table, "study"), TRANSFER)
    assert (f.verdict, f.kind, f.over) == (word, "exploratory", "seeds and items")
    assert f"{word} on sst2 (accuracy) when trained on the whole family" in f.sentence
    one = transfer_table(
        load_records(path).query("seed == 42"), item_reader(results, adaptation_unit)
    )
    (f,) = asked(findings(None, None, None, one, "study"), TRANSFER)
    assert "the single-task control share 1 seed, and at least 3 are needed" in f.sentence
    mixed = pd.concat([table, one.assign(task="mnli")], ignore_index=True)
    (f, rest) = asked(findings(None, None, None, mixed, "study"), TRANSFER)
    assert "after Holm over 2 tests" in f.sentence and rest.kind == "missing"


def test_forgetting_with_items_is_the_difference_of_the_benchmarks_scores(tmp_path):
    runs, bench = [], Bench(items=200)
    for arm, ability in (("lora_r8", 0.9), ("full", 0.5)):
        for seed in SEEDS:
            fields = arm_fields(arm, seed) | {"task": "sst2"}
            runs.append((fields, bench.answers(ability)))
    path, results = write_scored(tmp_path, runs)
    for unit in list((tmp_path / "items").iterdir()):  # as retention_eval.py names them
        unit.rename(unit.with_name(unit.name.replace("-sst2-test", "-sst2")))
    rows = load_records(path)
    read = item_reader(results, retention_unit)
    assert all(read(row) is not None for row in rows.itertuples())
    sides = [by_seed(rows[rows["arm"] == arm]) for arm in (Arm("lora", 8), FULL)]
    found = contrast([[WeightedScores(-1, sides[0]), WeightedScores(1, sides[1])]], read)
    means = rows.groupby("arm")["value"].mean()
    assert found.comparison.difference == pytest.approx(means[FULL] - means[Arm("lora", 8)])
    assert found.over == "seeds and items"


def test_forgetting_of_runs_on_fewer_items_is_that_against_the_base(tmp_path):
    """Their scores are not on the same items, the differences from the base are."""
    records, noise = [], np.random.default_rng(3)
    for arm, n, score, lost in (("lora_r8", 50, 0.3, 0.02), ("full", 200, 0.5, 0.05)):
        for seed in SEEDS:
            method, rank = ARMS[arm]
            own = dict(method=method, rank=rank, seed=seed, n=n)
            run, off = f"similar_{arm}_seed{seed}", noise.normal(0, SURE)
            records.append(kept(run, "hellaswag", "acc_norm", score + off, **own))
            records += [
                kept(run, task, "forgetting", lost + off, **own) for task in ("hellaswag", "mean")
            ]
    retention = load_records(write_study(tmp_path, records, "study", script="retention"))
    for items in (None, lambda row: None):
        found = findings(None, retention, None, None, "study", None, items)
        (f, *_) = asked(found, FORGETS)
        assert f.effect == pytest.approx(-0.03, abs=0.002) and f.arm == "LoRA r=8"


def test_a_run_that_was_not_compared_with_the_base_is_not_held_against_one_that_was(kept_frame):
    rows = kept_frame(lambda rank: 0.05)
    scores = rows.assign(task="hellaswag", metric="acc_norm")
    lost = rows[~((rows["rank"] == 8) & (rows["seed"] == 42))]
    frame = pd.concat([lost, scores], ignore_index=True)
    found = findings(None, frame, None, None, "study", None, lambda row: None)
    few = [f.sentence for f in asked(found, FORGETS) if f.kind == "missing"]
    assert len(few) == 2 and all("LoRA r=8 and full" in s and "2 seeds" in s for s in few)


def test_forgetting_that_benchmarks_miss_is_found_on_held_out_text(kept_frame):
    """Rank 64 loses 5 nats a token, and as little as full fine-tuning on the benchmarks."""
    frame, noise = kept_frame(lambda rank: 0.03), np.random.default_rng(7)
    ranks = frame["rank"].to_numpy()
    lost = np.where(ranks == 64, 5.0, 0.2) + noise.normal(0, 0.01, len(frame))
    text = frame.assign(task="text", over="text_prose", value=lost)
    found = findings(None, pd.concat([frame, text], ignore_index=True), None, None, "study")
    tests = {(f.family, f.arm, f.about): f for f in asked(found, FORGETS) if f.verdict}
    assert len(tests) == 20
    for family in FAMILIES:
        f = tests[family, "LoRA r=64", "text"]
        assert (f.verdict, f.kind) == ("higher", "exploratory")
        assert f.effect == pytest.approx(4.8, abs=0.05) and "after Holm over 20" in f.sentence
        assert "more than full fine-tuning on held-out text (nats a token)" in f.sentence
        assert tests[family, "LoRA r=64", "mean"].verdict == "not distinguishable"
        assert tests[family, "LoRA r=8", "text"].verdict == "not distinguishable"
    slopes = {(f.family, f.about): f for f in asked(found, RANK) if f.verdict}
    assert "the loss on held-out text (nats a token)" in slopes["similar", "text lost"].sentence


def test_the_mean_without_benchmarks_at_chance_is_tested_and_named(kept_frame):
    frame = kept_frame(lambda rank: 0.03)
    above = frame.assign(task="mean_above_chance", over="hellaswag", value=lambda f: 2 * f["value"])
    guessed = frame.iloc[:1].assign(task="winogrande", at_chance=True)
    found = findings(None, pd.concat([frame, above, guessed]), None, None, "study")
    about = {f.about for f in asked(found, FORGETS) if f.verdict}
    assert about == {"mean", "mean_above_chance"}
    where = "(mean over the benchmarks without winogrande, where the base is at chance)"
    named = [f for f in asked(found, FORGETS) if where in f.sentence]
    assert {f.about for f in named} == {"mean_above_chance"} and len(named) == 10


def with_kl(retention, value, arms=1):
    """The records with KL on held-out text, `value(forgetting)` of each run; so many times."""
    ranks = {i: [replace(arm, rank=arm.rank + i) for arm in retention["arm"]] for i in range(arms)}
    parts = [retention.assign(run=f"{i}_" + retention["run"], arm=ranks[i]) for i in ranks]
    retention = pd.concat(parts, ignore_index=True)
    lost = retention[retention["task"] == "mean"]
    kl = lost.assign(task="text", metric="kl", value=[value(v) for v in lost["value"]])
    return pd.concat([retention, kl], ignore_index=True)


@pytest.mark.parametrize("sign, word", [(1, "more"), (-1, "less")])
def test_what_goes_with_forgetting_is_told_in_either_direction(kept_frame, sign, word):
    retention = kept_frame(lambda rank: 0.05, VAGUE)
    frame = with_kl(retention, lambda lost: sign * lost + 3, arms=2)
    found = asked(findings(None, frame, None, None, "study"), GOES_WITH["forgetting"])
    assert "svd_analysis.py" in found[0].sentence
    for f in found[1:]:
        assert f.kind == "exploratory" and f.over == "12 arms"
        assert f"across 12 arms (36 runs) more KL on held-out text goes with {word} forgetting" in (
            f.sentence
        )
        assert f.verdict == ("higher" if sign > 0 else "lower")
        assert f.effect == pytest.approx(sign)


def test_a_predictor_of_nothing_is_said_to_be_unrelated(kept_frame):
    noise = np.random.default_rng(12)
    frame = with_kl(kept_frame(lambda rank: 0.05, VAGUE), lambda lost: noise.normal(), arms=2)
    found = asked(findings(None, frame, None, None, "study"), GOES_WITH["forgetting"])[1:]
    for f in found:
        assert f.verdict == "not distinguishable" and "from unrelated" in f.sentence
        assert f"correlations below {f.detectable:.2f} could have been missed" in f.sentence


def test_six_arms_have_a_correlation_and_no_p_value_whatever_their_seeds(kept_frame):
    frame = with_kl(kept_frame(lambda rank: 0.05, VAGUE), lambda lost: lost + 1)
    found = asked(findings(None, frame, None, None, "study"), GOES_WITH["forgetting"])[1:]
    for f in found:
        assert "6 arms: no p-value below 8" in f.sentence and math.isnan(f.p_value)
        assert f.verdict == ""


def test_too_few_arms_are_one_sentence(kept_frame):
    frame = with_kl(kept_frame(lambda rank: 0.05, VAGUE, seeds=(42,)), lambda lost: lost + 1)
    frame = frame[frame["rank"].isin([0, 4])]
    found = asked(findings(None, frame, None, None, "study"), GOES_WITH["forgetting"])[1:]
    assert [f.kind for f in found] == ["missing"] * 2
    assert "nothing can be said of KL on held-out text: 6 arms are needed, here 2" in (
        found[0].sentence
    )


# ------------------------------------------------------------------------------ what is not there


def test_the_demo_has_no_findings_and_says_why(adapted, kept_frame):
    frame, retention = adapted(lambda rank: 0.3), kept_frame(lambda rank: 0.3)
    (only,) = findings(frame, retention, None, None, "demo")
    assert only.kind == "missing" and only.sentence.startswith("No findings: this is the demo")


def test_stages_that_were_not_run_are_named():
    said = as_markdown(findings(None, None, None, None, "study"))
    for command in ("eval.py", "retention_eval.py", "--single-task-controls"):
        assert command in said
    assert "(confirmatory)" not in said


def test_the_report_groups_sentences_below_their_questions(adapted):
    found = findings(adapted(lambda rank: -0.05), None, None, None, "study")
    said = as_markdown(found)
    assert said.startswith(f"**{ADAPTS}** (confirmatory)\n\n- Smallest detectable differences (80")
    assert "\n- similar: LoRA r=4 scores 0.0" in said
    assert all(f"- {f.sentence}" in said for f in found)
    table = as_table(found)
    assert len(table) == len(found) and {"effect", "corrected", "detectable"} <= set(table.columns)
