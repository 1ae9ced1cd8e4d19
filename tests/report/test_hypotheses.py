"""Hypotheses of a study's file: each test against SciPy's, and what is said where there is none."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml
from scipy.stats import nct, norm, permutation_test, spearmanr, t, ttest_rel
from support import settings_for
from synthetic_effects import ARMS
from synthetic_records import kept, record, shrunk_study, write_study

from config import FAMILIES, UserError
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.records import TRAINED
from lora_tradeoffs.report.findings import findings
from lora_tradeoffs.report.hypotheses import OTHERS, PRIMARY, hypotheses, hypothesis_findings
from lora_tradeoffs.report.wording import ADAPTS
from lora_tradeoffs.statistics.comparisons import holm
from lora_tradeoffs.statistics.scores import mean_scores
from lora_tradeoffs.statistics.seed_intervals import reach
from lora_tradeoffs.study.hypotheses import check_written, smallest_p_values
from lora_tradeoffs.study.plan import plan_runs
from lora_tradeoffs.study.study_file import StudyPlan
from lora_tradeoffs.tables.frames import load_records

SEEDS = range(42, 48)
MEASURED = ("score", "validation loss", "text lost")
EQUAL = {
    "text lost at equal score": ("matched_forgetting", "score"),
    "text lost at equal loss": ("loss_matched_forgetting", "loss"),
}
PAIR = {"contrast": ["lora:8", "full"], "family": "similar"}


@pytest.fixture
def made(tmp_path, workspace):
    """A study of two arms and six seeds, its values by outcome and arm, and its file's writer."""
    rng, scores, lost = np.random.default_rng(3), [], []
    values = {name: {} for name in (*MEASURED, *EQUAL)}
    for arm, better in (("lora_r8", 0.01), ("full", 0.0)):
        method, rank = ARMS[arm]
        value = {t: 0.6 + better + rng.normal(0, 0.01, len(SEEDS)) for t in FAMILIES["similar"]}
        values["score"][arm] = np.mean([*value.values()], axis=0)
        loss = {t: 0.7 - better + rng.normal(0, 0.01, len(SEEDS)) for t in FAMILIES["similar"]}
        values["validation loss"][arm] = np.mean([*loss.values()], axis=0)
        for outcome in ("text lost", *EQUAL):
            values[outcome][arm] = 0.2 - better + rng.normal(0, 0.01, len(SEEDS))
        for i, seed in enumerate(SEEDS):
            run, own = f"similar_{arm}_seed{seed}", {"method": method, "rank": rank, "seed": seed}
            scores += [record(run, t, v[i], split="test", **own) for t, v in value.items()]
            scores += [record(run, t, v[i], metric="loss", **own) for t, v in loss.items()]
            at = values["text lost"][arm][i]
            lost.append(kept(run, "text", "forgetting", at, over="text_prose", **own))
            if rank:
                other = {"other_run": f"similar_full_seed{seed}", "half": 0.0} | own
                for outcome, (metric, level) in EQUAL.items():
                    at = values[outcome][arm][i]
                    lost.append(kept(run, "text", metric, at, **other, **{level: 0.6}))
    for outcome in EQUAL:
        values[outcome]["full"] = np.zeros(len(SEEDS))
    settings = settings_for(preset="study", study="hypotheses")
    study = StudyRecords(
        load_records(write_study(tmp_path, scores, "study")),
        load_records(write_study(tmp_path, lost, "study", script="retention")),
        settings=settings,
    )
    study.adaptation_items = study.retention_items = None

    def write(*hypotheses, **others):
        path = study.folder("study") / "study.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = {"families": ["similar"], "arms": ["lora:4", "lora:8", "full"]} | others
        fields = {name: value for name, value in fields.items() if value}
        path.write_text(yaml.safe_dump(fields | {"hypotheses": list(hypotheses)}))
        return study

    return write, {name: (of["lora_r8"], of["full"]) for name, of in values.items()}


@pytest.mark.parametrize(
    "outcome, sign", [("score", 1), *((name, -1) for name in (*MEASURED[1:], *EQUAL))]
)
@pytest.mark.parametrize("margin", [0.005, 0.03])
def test_every_test_is_scipys_paired_t(made, outcome, sign, margin):
    """`sign`: LoRA is better where the difference has it."""
    write, values = made
    first, second = values[outcome]
    better = "greater" if sign > 0 else "less"
    p = {
        "difference": ttest_rel(first, second).pvalue,
        "superiority": ttest_rel(first - sign * margin, second, alternative=better).pvalue,
        "non-inferiority": ttest_rel(first + sign * margin, second, alternative=better).pvalue,
        "equivalence": max(
            ttest_rel(first + margin, second, alternative="greater").pvalue,
            ttest_rel(first - margin, second, alternative="less").pvalue,
        ),
    }
    asked = [PAIR | {"outcome": outcome, "test": test, "margin": margin} for test in p]
    found = hypothesis_findings(write(*asked))
    assert [f.p_value for f in found] == pytest.approx([*p.values()], rel=1e-6, abs=1e-12)
    assert [f.corrected for f in found] == pytest.approx([*holm([*p.values()])], rel=1e-6)
    assert [f.effect for f in found] == pytest.approx([np.mean(first - second)] * 4)
    for finding in found:
        assert finding.verdict == ("shown" if finding.corrected < 0.05 else "not shown")
        assert finding.kind == "confirmatory" and finding.seeds == len(SEEDS)
    # the other way round it is the same statement about the other arm
    turned = PAIR | {"contrast": ["full", "lora:8"], "outcome": outcome, "test": "superiority"}
    expected = ttest_rel(second, first, alternative=better).pvalue
    if outcome not in EQUAL:
        assert hypothesis_findings(write(turned))[0].p_value == pytest.approx(expected, rel=1e-6)


def test_what_is_detectable_is_so_at_the_first_step_of_the_correction(made):
    """The power at the difference that is said, by the noncentral t distribution."""
    write, values = made
    first, second = values["text lost"]
    asked = {"difference": 0.0, "superiority": 0.01, "equivalence": 0.01, "non-inferiority": 0.01}
    asked = {
        test: PAIR | {"outcome": "text lost", "test": test, "margin": m}
        for test, m in asked.items()
    }
    found = dict(zip(asked, hypothesis_findings(write(*asked.values()))))
    error, freedom = np.std(first - second, ddof=1) / np.sqrt(len(SEEDS)), len(SEEDS) - 1
    for test, sides, margin in (("difference", 2, 0.0), ("superiority", 1, 0.01)):
        bar = t.isf(0.05 / 4 / sides, freedom)
        power = nct.sf(bar, freedom, (found[test].detectable - margin) / error)
        assert power == pytest.approx(0.8, abs=0.005)
    for test in ("equivalence", "non-inferiority"):  # they are about smaller differences
        assert np.isnan(found[test].detectable) and "detectable" not in found[test].sentence


def test_a_seed_without_an_interval_takes_nothing_from_the_error_of_the_others(made):
    write, values = made
    asked = PAIR | {"outcome": "text lost at equal loss", "test": "difference"}
    study = write(asked)
    rows = study.retention["metric"] == "loss_matched_forgetting"
    study.retention.loc[rows, "stderr"] = [0.02, *[np.nan] * (len(SEEDS) - 1)]
    (found,) = hypothesis_findings(study)
    differences = np.subtract(*values["text lost at equal loss"])
    half = reach(differences.var(ddof=1) / len(SEEDS), len(SEEDS) - 1, 0.02**2)
    assert found.high - found.low == pytest.approx(2 * half)


def test_a_hypothesis_is_tested_where_its_arms_and_task_are_trained(made):
    write, _ = made
    score = {"contrast": ["lora:8", "full"], "outcome": "sst2", "test": "difference"}
    text = score | {"outcome": "text lost"}
    study = write(score, text, families=["similar", "dissimilar"])
    found = hypothesis_findings(study)
    assert [(f.family, f.about) for f in found] == [
        *(("similar", "sst2"), ("similar", "text lost"), ("dissimilar", "text lost"))
    ]
    assert found[0].corrected == pytest.approx(3 * found[0].p_value)
    plan = StudyPlan.of(
        yaml.safe_load((study.folder("study") / "study.yaml").read_text()), study.settings
    )
    assert plan.primary_tests == 3
    arms = {"similar": ["lora:8"], "dissimilar": ["full"]}
    plan = replace(plan, arms=arms)
    with pytest.raises(UserError, match="no family trains what is compared: lora:8 and full"):
        check_written([score], {"evaluate": {}}, plan.families_of)


def test_runs_on_a_part_of_a_family_have_hypotheses_too(made):
    write, _ = made
    asked = [PAIR | {"outcome": name, "test": "difference"} for name in ("score", "sst2")]
    for hypothesis in asked:
        del hypothesis["family"]
    study = write(*asked, families=None, tasks=["sst2"])
    scores = study.adaptation.query("task == 'sst2'").assign(tasks="sst2")
    study.adaptation = scores.assign(arm=[replace(arm, tasks="sst2") for arm in scores["arm"]])
    alone = [
        study.adaptation.query("split == 'test' and method == @m")["value"]
        for m in ("lora", "full")
    ]
    for found in hypothesis_findings(study):
        assert found.p_value == pytest.approx(ttest_rel(*alone).pvalue, rel=1e-6)
        assert "LoRA r=8 (sst2 alone)" in found.sentence


def test_what_cannot_be_tested_counts_in_the_correction_and_says_why(made):
    write, _ = made
    known = PAIR | {"outcome": "score", "test": "difference", "name": "Adaptation"}
    alone = hypothesis_findings(write(known))[0]
    others = [
        PAIR | {"outcome": "forgetting", "test": "difference"},
        PAIR | {"outcome": "intruders", "test": "difference"},
        {"contrast": ["lora:4", "full"], "outcome": "score", "test": "difference"},
        PAIR | {"outcome": "text lost", "test": "difference", "primary": False},
    ]
    found = hypothesis_findings(write(known, *others))
    assert found[0].corrected == pytest.approx(min(1, 4 * alone.p_value))
    assert [f.kind for f in found] == ["confirmatory", *["missing"] * 3, "exploratory"]
    assert "Adaptation: " in found[0].sentence and "H2: " in found[1].sentence
    assert "0 seeds" in found[3].sentence and "python svd_analysis.py" in found[2].sentence
    assert found[4].corrected == found[4].p_value and found[4].question == OTHERS


def test_curves_that_do_not_meet_at_a_seed_answer_nothing(made):
    write, _ = made
    asked = PAIR | {"outcome": "text lost at equal loss", "test": "equivalence", "margin": 0.02}
    study = write(asked)
    rows = study.retention
    apart = (rows["metric"] == "loss_matched_forgetting") & (rows["seed"] == 44)
    reason = "similar_lora_r8_seed44 has 0.9 before any update: the base has 0.9"
    rows.loc[apart, "value"], rows["reason"] = np.nan, reason
    (found,) = hypothesis_findings(study)
    assert found.kind == "missing" and f"in common (seed 44: {reason})" in found.sentence
    by_score = PAIR | {"outcome": "text lost at equal score", "test": "difference"}
    (found,) = hypothesis_findings(write(by_score))
    assert found.p_value < 1
    study.retention = rows[rows["metric"] != "loss_matched_forgetting"]
    assert "no loss of scaled updates" in hypothesis_findings(write(asked))[0].sentence


def test_hypotheses_take_the_place_of_the_confirmatory_family(made):
    write, _ = made
    study = write(PAIR | {"outcome": "score", "test": "difference"})
    kinds = {f.question: f.kind for f in findings(study) if f.kind.endswith("ory")}
    assert kinds[PRIMARY] == "confirmatory" and kinds[ADAPTS] == "exploratory"
    study = write()
    kinds = {f.question: f.kind for f in findings(study) if f.kind.endswith("ory")}
    assert PRIMARY not in kinds and kinds[ADAPTS] == "confirmatory"


@pytest.mark.parametrize(
    "given",
    [
        {"arms": ["full_qv", "lora:8@all", "lora:8,scaling=constant", "dora:4"]},
        {"arms": ["lora:8", "lora:8,scaling=2r", "full"], "set": {"scaling": "constant"}},
        {"arms": ["lora:8", "lora:8@qv", "full"], "set": {"target_modules": "all"}},
        {"arms": ["full", "lora:8,batch_size=4"], "set": {"batch_size": 16}, "max_steps": 9},
        {"arms": ["lora:4", "lora:16", "lora:64"], "set": {"learning_rate": 1.3e-3}},
        {"arms": ["lora:16,learning_rate=1.3e-3", "lora:8,learning_rate=0.001", "lora:8"]},
        {"arms": ["full", "lora:8"], "tasks": ["sst2", "qqp"]},
        {"arms": ["full", "lora:8"], "families": ["mine=sst2+qqp"]},
        {"arms": ["full", "lora:8"], "single_task_controls": True, "max_steps": 9},
    ],
    ids=str,
)
def test_a_word_is_the_arm_of_the_runs_that_it_makes(tmp_path, workspace, monkeypatch, given):
    """Whatever is set for all arms, and at a rate that is the default of some."""
    monkeypatch.setitem(FAMILIES, "mine", ())  # it goes with the test
    settings = settings_for(preset="study", study="words")
    pairs = [[a, b] for a, b in itertools.pairwise(given["arms"])]
    asked = [{"contrast": pair, "outcome": "score", "test": "difference"} for pair in pairs]
    mix = {} if "tasks" in given else {"families": ["similar"]}
    plan = StudyPlan.of({"hypotheses": asked} | mix | given, settings)
    runs, noise = plan_runs(plan, settings, 576), np.random.default_rng(0)
    rows = [
        record(run.name, task, noise.random(), split="test")
        | {name: run.config.record()[name] for name in (*TRAINED, "family")}
        for run in runs
        for task in run.config.tasks
    ]
    study = StudyRecords(load_records(write_study(tmp_path, rows, "study")), settings=settings)
    monkeypatch.setattr(StudyRecords, "adaptation_items", None)
    path = study.folder("study") / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(plan.text())
    arms = dict(zip(study.plain.adaptation["run"], study.plain.adaptation["arm"]))
    names = [run.name for run in runs[: len(given["arms"])]]
    expected = [(arms[a], arms[b]) for a, b in itertools.pairwise(names)]
    assert [(h.first, h.second) for h in hypotheses(study)] == expected
    assert len({arms[name] for name in names}) == len(names)
    assert {f.kind for f in hypothesis_findings(study)} == {"confirmatory"}


def test_an_unknown_outcome_is_refused():
    wrong = PAIR | {"outcome": "luck", "test": "difference"}
    with pytest.raises(UserError, match="outcome is 'luck'; allowed: score, validation loss"):
        StudyPlan.of({"hypotheses": [wrong]}, settings_for(preset="study"))


# ------------------------------------------------------- one seed, sign flips, one arm, predictors


def test_sign_flips_are_scipys_and_say_the_smallest_p(made):
    write, values = made
    names = ("text lost", "text lost at equal loss")
    asked = [PAIR | {"outcome": name, "test": "sign flips"} for name in names]
    for name, found in zip(names, hypothesis_findings(write(*asked))):
        differences = np.subtract(*values[name])
        exact = permutation_test((differences,), np.sum, permutation_type="samples")
        assert found.p_value == pytest.approx(exact.pvalue)
        assert (found.low, found.high) == pytest.approx((differences.min(), differences.max()))
        assert "6 seeds, of which the smallest p is 0.031" in found.sentence
    lines = smallest_p_values([*asked, asked[0] | {"primary": False}], 6, 2)
    assert lines[0].endswith("sign flips of 6 seeds: 0.031, 0.062 after correction for 2 tests")
    assert lines[2].endswith("H3, sign flips of 6 seeds: 0.031")


def test_one_seed_is_two_checkpoints_over_items_and_no_method(made):
    write, _ = made
    asked = {"outcome": "validation loss", "test": "difference", "seed": 43, "primary": False}
    study = write(PAIR | asked)
    assert "no outcomes of the same items" in hypothesis_findings(study)[0].sentence
    rng = np.random.default_rng(1)
    items = {}
    for row in study.adaptation[study.adaptation["metric"] == "loss"].itertuples():
        noise = rng.normal(0, 0.3, 200)
        items[row.run, row.task] = mean_scores("loss", row.value + noise - noise.mean())
    study.adaptation_items = lambda row: items[row.run, row.task]
    (found,) = hypothesis_findings(study)
    runs = "similar_lora_r8_seed43", "similar_full_seed43"
    pairs = [np.subtract(*(items[run, t].items for run in runs)) for t in FAMILIES["similar"]]
    assert found.effect == pytest.approx(np.mean([pair.mean() for pair in pairs]))
    error = np.sqrt(sum(pair.var(ddof=1) / 200 for pair in pairs)) / 3
    assert found.high - found.low == pytest.approx(2 * norm.isf(0.025) * error, rel=0.01)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(found.effect) / error), rel=0.05)
    assert found.kind == "exploratory" and found.over == "items" and found.seeds == 1
    assert "these two checkpoints of seed 43" in found.sentence
    assert "says nothing about other seeds" in found.sentence


def test_shrinking_an_arms_intruders_is_a_test_over_its_seeds(made, tmp_path):
    write, _ = made
    asked = {"contrast": ["lora:8"], "family": "similar", "test": "superiority"}
    study = write(asked | {"outcome": "text lost by shrinking intruders"})
    assert "no intruders were shrunk" in hypothesis_findings(study)[0].sentence
    records = [*shrunk_study({"text": -0.01}, range(42, 46))]
    study.shrunk = load_records(write_study(tmp_path, records, "study", script="retention"))
    (found,) = hypothesis_findings(study)
    lost = np.array([-0.01 + 1e-4 * i for i in range(4)])  # factor 0, against the control
    assert found.effect == pytest.approx(lost.mean()) and found.seeds == 4
    assert found.verdict == "shown" and "LoRA r=8 with its intruders shrunk" in found.sentence


def test_predictors_are_compared_over_arms_at_all_their_rates(made, tmp_path):
    write, _ = made
    rng, records = np.random.default_rng(2), []
    for rank in (4, 8, 16, 32, 64):
        for rate in (1e-4, 3e-4):
            name = f"similar_lora_r{rank}{'' if rate == 1e-4 else '_lr3e-04'}_seed41"
            own = {"rank": rank, "learning_rate": rate, "seed": 41, "tasks": "similar"}
            x = rng.normal()
            records.append(kept(name, "text", "forgetting", x, over="text_prose", **own))
            records.append(kept(name, "sst2", "answer_kl", x + 0.3 * rng.normal(), **own))
            records.append(kept(name, "text", "kl", rng.normal(), **own))
    asked = {"contrast": ["kl_tasks", "kl_text"], "family": "similar", "test": "difference"}
    study = write(asked | {"outcome": "text lost", "primary": False})
    frame = load_records(write_study(tmp_path, records, "study", script="retention"))
    study.at_all_rates["retention"] = frame
    (found,) = hypothesis_findings(study)
    value = frame.set_index(["run", "metric"])["value"].unstack()
    rhos = [spearmanr(value[name], value["forgetting"]).statistic for name in ("answer_kl", "kl")]
    assert found.effect == pytest.approx(rhos[0] - rhos[1]) and found.p_value < 0.05
    assert found.over == "10 arms x learning rates" and found.low < found.effect < found.high
    assert f"correlations {rhos[0]:+.2f} and {rhos[1]:+.2f}" in found.sentence
    asked |= {"contrast": ["kl_tasks", "size"], "outcome": "text lost"}
    assert "is not measured" in hypothesis_findings(write(asked))[0].sentence
