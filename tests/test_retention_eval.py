"""The retention script on runs of a two-layer LLaMA, as a user would call it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT, assert_one_line_error, edited_tensors, settings_for

from lora_tradeoffs.checkpoints import write_manifest
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.retention.derived import derived_records
from lora_tradeoffs.retention.scores import at_chance
from lora_tradeoffs.statistics.scores import Scores, mean
from multi_task_training import main as train
from retention_eval import main

STUDY = "kept"
RUN = "similar_lora_r4_limit64_fp32_checkpoints2_seed42"
FULL = "similar_full_limit64_fp32_checkpoints2_seed42"
FEW = ["--dtype", "fp32", "--limit", "6"]


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny), "--study", STUDY]


@pytest.fixture(scope="module")
def folder(model):
    """A study with a LoRA and a full run, its updates scaled."""
    short = ["--limit", "64", "--dtype", "fp32", "--set", "checkpoints=2", *model]
    assert train(["--similar", "--lora", "4", "--full-finetune", *short]) == 0
    assert main([*model, *FEW, "--scale-update", "0", "0.5", "1", "1.5"]) == 0
    return settings_for(study=STUDY).output_dir / "outputs" / STUDY


def records_in(folder):
    return pd.DataFrame(read_json(folder / "retention.json")["records"])


def test_base_and_every_checkpoint_have_benchmarks_text_and_drift(folder):
    records = records_in(folder)
    for run, steps in (("base", {0}), (RUN, {3, 6}), (FULL, {3, 6})):
        own = records[(records.run == run) & (records.update_scale == 1)]
        assert set(own[own.metric == "acc"].task) == {"hellaswag", "arc_challenge", "winogrande"}
        assert set(own[own.metric == "acc_norm"].task) == {"hellaswag", "arc_challenge"}
        assert set(own[own.metric == "acc"].step) == steps
        texts = own[own.metric == "log_likelihood"]
        assert set(texts.task) == {"text_prose", "text_cnn_dailymail"} and (texts.value < 0).all()
    ours = records[(records.run == RUN) & (records.step == 6) & (records.update_scale == 1)]
    assert {"kl", "agreement", "cka", "forgetting", "retention"} <= set(ours.metric)
    assert set(ours[ours.metric == "kl"].task) == {"text"}
    assert set(ours[ours.metric == "answer_kl"].task) == {"sst2", "mnli", "qqp"}
    assert set(ours[ours.metric == "cka"].layer) == {0, 1, 2}
    assert (ours[ours.metric.isin(["kl", "answer_kl"])].value > 0).all()


def test_the_mean_takes_acc_norm_where_there_is_one(folder):
    base = records_in(folder).query("run == 'base' and update_scale == 1")
    value = base.set_index(["task", "metric"]).value
    parts = [value["hellaswag", "acc_norm"], value["arc_challenge", "acc_norm"]]
    expected = np.mean([*parts, value["winogrande", "acc"]])
    assert value["mean", "retention"] == pytest.approx(expected)


def test_forgetting_is_paired_and_counts_what_flipped(folder):
    records = records_in(folder).query("run == @FULL and step == 6 and update_scale == 1")
    found = records[(records.task == "hellaswag") & (records.metric == "forgetting")].iloc[0]
    results = Results(folder)
    base, ours = (
        results.items(f"{unit}-hellaswag")["acc_norm"].items for unit in ("base-0", f"{FULL}-6")
    )
    assert found.value == pytest.approx((base - ours).mean())
    assert found.forgotten == ((base == 1) & (ours == 0)).sum()
    assert found.gained == ((base == 0) & (ours == 1)).sum()
    assert found.of == "acc_norm" and found.test == "exact McNemar"
    means = records[(records.task == "mean") & (records.metric == "forgetting")]
    each = records[(records.metric == "forgetting") & records.at_chance.notna()]
    assert len(each) == 3 and means.value.item() == pytest.approx(each.value.mean())
    assert means.stderr.item() == pytest.approx(np.sqrt((each.stderr**2).sum()) / 3)


def test_held_out_text_is_an_outcome_of_its_own_at_every_scale(folder):
    records, results = records_in(folder), Results(folder)
    lost = records[(records.metric == "forgetting") & (records.run == RUN) & (records.step == 6)]
    for scale in (0.5, 1.0, 1.5):
        own = lost[lost.update_scale == scale].set_index("task")
        sources = ["text_cnn_dailymail", "text_prose"]
        nats = []
        for task in sources:
            name = f"{RUN}-6{'' if scale == 1 else f'-x{scale:g}'}-{task}"
            base, tuned = (results.items(u)["log_likelihood"] for u in (f"base-0-{task}", name))
            sums = [scores.statistics.sum(axis=0) for scores in (base, tuned)]
            nats.append(sums[0][0] / sums[0][1] - sums[1][0] / sums[1][1])
        assert own.value[sources].tolist() == pytest.approx(nats)
        assert own.value["text"] == pytest.approx(np.mean(nats)) and own.value["text"] != 0
        assert own.stderr["text"] == pytest.approx(np.sqrt((own.stderr[sources] ** 2).sum()) / 2)
        assert set(own.over["text"].split(",")) == set(sources) and 0 <= own.p_value["text"] <= 1
    matched = records[records.metric == "matched_forgetting"]
    assert {"mean", "text"} <= set(matched.task)


def test_scaled_updates_lie_between_base_and_checkpoint(folder):
    records = records_in(folder)
    gains = records[records.metric == "adaptation"].set_index(["run", "update_scale"]).value
    assert set(gains[RUN].index) == {0.5, 1.0, 1.5} and set(gains["base"].index) == {1.0}
    assert set(records.update_scale) == {0.5, 1.0, 1.5}
    pairs = records[records.metric == "matched_forgetting"]
    assert set(pairs.run) | set(pairs.other_run) == {RUN, FULL}


@pytest.fixture(scope="module")
def shrunk(folder, model):
    """The study's last checkpoints in another one, LoRA's update large enough for intruders."""
    other = settings_for(study="shrunk")
    for run in (RUN, FULL):
        shutil.copytree(settings_for(study=STUDY).runs_dir / run, other.runs_dir / run)
    last = other.runs_dir / RUN / "checkpoint-6"
    torch.manual_seed(0)
    with edited_tensors(last / "adapter_model.safetensors") as weights:
        weights |= {name: torch.randn_like(weights[name]) / 8 for name in weights}
    write_manifest(last, step=6)
    few = [*FEW, "--tasks", "hellaswag", "--documents", "4", "--checkpoints", "last"]
    argv = [*model[:2], "--study", "shrunk", *few, "--scale-update", "0.5"]
    assert main([*argv, "--shrink-intruders", "0", "1"]) == 0
    return other.output_dir / "outputs" / "shrunk"


def test_shrunk_intruders_are_counted_and_compared_with_control_and_checkpoint(shrunk):
    records, results = records_in(shrunk), Results(shrunk)
    changed = records[records.shrunk.notna()]
    assert set(changed.shrunk) == {"intruders", "control"} and set(changed.shrink) == {0}
    counts = changed[(changed.metric == "intruders") & (changed.run == RUN)].set_index("shrunk")
    assert counts.directions.nunique() == 1 and counts.directions.iloc[0] > 0
    assert counts.value["intruders"] < counts.directions.iloc[0] <= counts.value["control"]
    effects = changed[(changed.metric == "shrink_effect") & (changed.run == RUN)]
    keys = ["shrunk", "against", "task"]
    assert not effects.duplicated(keys).any()
    value = effects.set_index(keys).value

    def log_likelihood(unit):
        scores = results.items(unit)["log_likelihood"]
        return scores.statistics[:, 0].sum() / scores.statistics[:, 1].sum()

    texts = ("text_cnn_dailymail", "text_prose")
    parts = {"checkpoint": "", "intruders": "-intruders0", "control": "-control0"}
    kept = {
        name: np.mean([log_likelihood(f"{RUN}-6{part}-{text}") for text in texts])
        for name, part in parts.items()
    }
    for one, other in (("intruders", "control"), ("control", "checkpoint")):
        assert value[one, other, "text"] == pytest.approx(kept[other] - kept[one])
    assert {"mean", "text", "adaptation"} <= set(effects.task)
    assert value["intruders", "checkpoint", "text"] != 0


def test_a_checkpoint_without_intruders_keeps_its_scores(shrunk):
    records = records_in(shrunk)
    changed = records[(records.run == FULL) & records.shrunk.notna()]
    assert set(changed[changed.metric == "intruders"].value) == {0}
    assert set(changed[changed.metric == "shrink_effect"].value) == {0}
    plain = records[(records.run == FULL) & records.shrunk.isna() & (records.update_scale == 1)]
    columns = ["metric", "task", "value", "n"]
    for kind in ("intruders", "control"):
        scores = changed[(changed.shrunk == kind) & changed.metric.isin(["acc", "log_likelihood"])]
        same = plain[plain.metric.isin(["acc", "log_likelihood"]) & plain.task.isin(scores.task)]
        both = [part.sort_values(columns)[columns].to_numpy() for part in (scores, same)]
        assert (both[0] == both[1]).all() and len(both[0])


def test_shrunk_directions_enter_no_other_table_or_figure(shrunk):
    from lora_tradeoffs.figures.study_records import StudyRecords

    study = StudyRecords.load(settings_for(study="shrunk"))
    assert "shrunk" not in study.retention or study.retention.shrunk.isna().all()


def test_what_is_there_is_not_measured_again(folder, model, capsys):
    files = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    lost = folder / "records" / f"{RUN}-6-winogrande.json"
    text = lost.read_text()
    lost.unlink()
    assert main([*model, *FEW, "--scale-update", "0.5", "1.5"]) == 0
    assert f": {len(files) - 1} cached, 1 to run" in capsys.readouterr().out
    changed = [p for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [lost] and lost.read_text() == text


def test_an_adapter_of_zeros_forgets_exactly_nothing(folder, model, tmp_path):
    run = tmp_path / "zeros"
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN / "checkpoint-6", run)
    (run / "manifest.json").unlink()
    with edited_tensors(run / "adapter_model.safetensors") as weights:
        weights |= {k: torch.zeros_like(v) for k, v in weights.items() if "lora_B" in k}
    argv = [*model[:2], "--study", "zeros", "--runs", str(run), *FEW]
    assert main(argv) == 0
    records = records_in(settings_for().output_dir / "outputs" / "zeros").query("run == 'zeros'")
    value = records[records.layer.isna()].set_index(["metric", "task"]).value
    assert set(value["forgetting"]) == {0} and set(value["kl"]) == {0}
    assert set(value["agreement"]) == {1}
    assert set(records[records.metric == "cka"].value) == {1}


def test_a_guess_is_told_from_knowledge():
    record = {"value": 0.29, "stderr": 0.03, "chance": 0.25}
    assert at_chance(record) and not at_chance({**record, "stderr": 0.019})
    assert at_chance({**record, "value": 0.18, "stderr": 0.012})  # misled: below, not above chance


def write_quiz(results, run, right, shots=0, task="quiz", **request):
    """A unit of a benchmark of our own: which items a model has right."""
    stats = np.stack([right, np.ones(len(right))], 1).astype(float)
    record = {"run": run, "step": 0 if run == "base" else 5, "update_scale": 1.0, "task": task}
    record |= {"metric": "acc", "value": float(right.mean()), "stderr": 0.024, "chance": 0.25}
    record |= {"n": len(right), "split": "test", "family": "similar", "method": "full"}
    record |= {"low": 0.0, "high": 1.0, "shots": shots}
    identity = {"requests": "all", "items": len(right)}
    asked = {"precision": "fp32", "limit": 0, "benchmark": {task: identity}} | request
    unit = f"{run}-{task}-{shots}shot"
    results.write(unit, asked, [record], [Scores("acc", stats, mean)])


def quiz_answers():
    rng = np.random.default_rng(0)
    base = rng.random(400) < 0.6
    return base, base & (rng.random(400) < 0.8)


def forgetting_in(results):
    records, others = derived_records(results)
    return {(r["task"], r["shots"]): r for r in records if r["metric"] == "forgetting"}, others


def test_forgetting_that_is_there_is_found_with_its_sign(tmp_path):
    base, tuned = quiz_answers()
    results = Results(tmp_path)
    write_quiz(results, "base", base)
    write_quiz(results, "tuned", tuned)
    found, others = forgetting_in(results)
    lost, quiz = (base & ~tuned).sum(), found["quiz", 0]
    assert quiz["forgotten"] == lost and quiz["gained"] == 0
    assert quiz["value"] == pytest.approx(lost / 400)
    assert quiz["p_value"] < 1e-6 and found["mean", 0]["p_value"] < 1e-6
    assert quiz["low"] > 0 and not quiz["at_chance"] and not others


def test_other_numbers_of_examples_are_compared_apart(tmp_path):
    base, tuned = quiz_answers()
    results = Results(tmp_path)
    write_quiz(results, "base", base)
    write_quiz(results, "base", np.ones(400, bool), shots=5)
    write_quiz(results, "tuned", tuned)
    found, _ = forgetting_in(results)
    assert set(found) == {("quiz", 0), ("mean", 0)}
    assert found["quiz", 0]["value"] == pytest.approx((base & ~tuned).mean())
    write_quiz(results, "tuned", np.zeros(400, bool), shots=5)
    found, _ = forgetting_in(results)
    assert found["quiz", 5]["value"] == 1 and found["mean", 5]["p_value"] == 0
    assert found["quiz", 0]["value"] == pytest.approx((base & ~tuned).mean())


@pytest.mark.parametrize(
    ("request_", "count", "is_compared"),
    [
        ({}, 400, True),
        ({"limit": 100, "benchmark": {"quiz": {"requests": "first", "items": 100}}}, 100, True),
        ({"precision": "bf16 autocast"}, 400, False),
        ({"benchmark": {"quiz": {"requests": "other rows"}}}, 400, False),
        ({"limit": 100, "benchmark": {"quiz": {"definition": "other"}}}, 100, False),
    ],
)
def test_only_what_was_measured_as_the_base_was_is_compared(tmp_path, request_, count, is_compared):
    base, tuned = quiz_answers()
    results = Results(tmp_path)
    write_quiz(results, "base", base)
    write_quiz(results, "tuned", tuned[:count], **request_)
    found, others = forgetting_in(results)
    assert (("quiz", 0) in found) == is_compared
    assert others == ([] if is_compared else ["tuned-quiz-0shot"])
    if is_compared:
        assert found["quiz", 0]["value"] == pytest.approx((base & ~tuned)[:count].mean())


def test_a_groups_items_are_paired_task_by_task(tmp_path):
    """300 and 100 items; of the first task's a limit leaves 50."""
    base, tuned = quiz_answers()
    few = np.concatenate([tuned[:50], tuned[300:]])

    def request(limit, first):
        sizes = {"long": first, "short": 100}
        return {"limit": limit, "benchmark": {name: {"items": n} for name, n in sizes.items()}}

    results = Results(tmp_path)
    write_quiz(results, "base", base, **request(0, 300))
    write_quiz(results, "tuned", few, **request(50, 50))
    found, _ = forgetting_in(results)
    lost = base & ~tuned
    assert found["quiz", 0]["forgotten"] == lost[:50].sum() + lost[300:].sum()
    assert found["quiz", 0]["gained"] == 0


def test_what_nobody_can_guess_is_compared_and_not_in_the_mean(tmp_path):
    """A perplexity task, and a figure of a corpus, which has no items."""
    base, tuned = quiz_answers()
    results = Results(tmp_path)
    for run, right, log_likelihood in (("base", base, -300.0), ("tuned", tuned, -400.0)):
        write_quiz(results, run, right)
        document = read_json(results.unit_file(f"{run}-quiz-0shot"))
        common = document["records"][0] | {"chance": None, "stderr": None}
        scores = Scores("log_likelihood", np.full((5, 2), [log_likelihood, 100]), mean)
        page = common | {"task": "pages", "metric": "log_likelihood", "value": scores.value}
        results.write(f"{run}-pages", document["request"], [page], [scores])
        corpus = common | {"task": "corpus", "metric": "mcc", "value": 0.1}
        results.write(f"{run}-corpus", document["request"], [corpus])
    found, others = forgetting_in(results)
    assert set(found) == {("quiz", 0), ("pages", 0), ("mean", 0)} and not others
    assert found["pages", 0]["value"] == pytest.approx(1.0)
    assert found["mean", 0]["value"] == found["quiz", 0]["value"]
    assert found["mean", 0]["over"] == "quiz"


def write_text(results, run, source, log_likelihoods, tasks=""):
    """A unit of held-out text, 100 tokens a document."""
    stats = np.stack([log_likelihoods, np.full(len(log_likelihoods), 100.0)], 1)
    scores = Scores("log_likelihood", stats, mean)
    record = {"run": run, "step": 0 if run == "base" else 5, "update_scale": 1.0, "shots": 0}
    record |= {"task": f"text_{source}", "metric": "log_likelihood", "value": scores.value}
    record |= {"stderr": 0.1, "n": len(stats), "split": "test", "family": "both", "tasks": tasks}
    results.write(f"{run}-{source}", {"precision": "fp32", "limit": 0}, [record], [scores])


@pytest.mark.parametrize(
    ("tasks", "over"),
    [
        ("similar", ["wikitext", "cnn_dailymail"]),
        ("dissimilar", ["wikitext"]),
        ("squad_v2+cnn_dailymail", ["wikitext"]),
        ("squad_v2", ["wikitext", "cnn_dailymail"]),
        ("", ["wikitext", "cnn_dailymail"]),
    ],
)
def test_text_that_a_run_was_trained_on_is_not_held_out(tmp_path, tasks, over):
    results, rng = Results(tmp_path), np.random.default_rng(0)
    lost = {"wikitext": 20.0, "cnn_dailymail": -50.0}
    for source, sum_lost in lost.items():
        base = -300 + rng.normal(0, 30, 40)
        write_text(results, "base", source, base)
        write_text(results, "tuned", source, base - sum_lost + rng.normal(0, 1, 40), tasks)
    found, _ = forgetting_in(results)
    assert set(found["text", 0]["over"].split(",")) == {f"text_{source}" for source in over}
    expected = np.mean([lost[source] / 100 for source in over])
    assert found["text", 0]["value"] == pytest.approx(expected, abs=0.01)
    assert found["text", 0]["p_value"] < 1e-6 and found["text", 0]["of"] == "log_likelihood"


def test_a_second_mean_leaves_out_benchmarks_at_chance(tmp_path):
    base, tuned = quiz_answers()
    results = Results(tmp_path)
    guesses = np.random.default_rng(5).random((2, 400)) < 0.25
    for run, right, guess in (("base", base, guesses[0]), ("tuned", tuned, guesses[1])):
        write_quiz(results, run, right)
        write_quiz(results, run, guess, task="guessed")
    found, _ = forgetting_in(results)
    assert found["guessed", 0]["at_chance"] and not found["quiz", 0]["at_chance"]
    assert found["mean", 0]["over"] == "guessed,quiz"
    both = found["quiz", 0]["value"] + found["guessed", 0]["value"]
    assert found["mean", 0]["value"] == pytest.approx(both / 2)
    above = found["mean_above_chance", 0]
    assert above["over"] == "quiz" and above["value"] == pytest.approx(found["quiz", 0]["value"])
    assert above["stderr"] == pytest.approx(found["quiz", 0]["stderr"])
    kept = [r for r in derived_records(results)[0] if r["metric"] == "retention"]
    assert {(r["run"], r["task"]) for r in kept} == {
        (run, task) for run in ("base", "tuned") for task in ("mean", "mean_above_chance")
    }


def test_a_single_item_has_no_error(model, capsys):
    argv = [*model[:2], "--study", "one", "--tasks", "hellaswag", "--dtype", "fp32", "--limit", "1"]
    assert main(argv) == 0
    records = records_in(settings_for().output_dir / "outputs" / "one")
    own = records[(records.task == "mean") & (records.metric == "retention")].iloc[0]
    assert own.value in (0, 1) and np.isnan(own.stderr)


def test_without_runs_the_base_is_measured(model):
    assert main([*model[:2], "--study", "only-base", "--tasks", "winogrande", *FEW]) == 0
    records = records_in(settings_for().output_dir / "outputs" / "only-base")
    assert set(records.run) == {"base"}


def test_checkpoints_whose_records_would_mix_are_refused(folder, model, tmp_path, capsys):
    checkpoint = settings_for(study=STUDY).runs_dir / RUN / "checkpoint-6"
    places = [tmp_path / name for name in ("one/final", "other/final", "base")]
    for place in places:
        shutil.copytree(checkpoint, place)
    assert main([*model, "--runs", *map(str, places[:2])]) == 2
    assert "are both called 'final'" in capsys.readouterr().err
    assert main([*model, "--runs", str(places[2])]) == 2
    assert "are both called 'base'" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, model, inside, tmp_path):
    def run(*argv):
        return inside(main, *model, *argv)

    assert_one_line_error(run("--tasks", "helaswag"), "hellaswag")
    assert_one_line_error(run("--limit", "0"), "--limit must be 1 or more")
    assert_one_line_error(run("--documents", "0"), "--documents must be 1 or more")
    assert_one_line_error(run("--scale-update", "nan"), "--scale-update")
    of_text = run("--scale-update", "--scale-measure", "text")
    assert_one_line_error(of_text, "--scale-measure", "needs score or loss")
    assert_one_line_error(run("--shrink-intruders", "-1"), "--shrink-intruders -1: write numbers")
    assert_one_line_error(run("--runs", "none"), "no run 'none'")
    scaled = run("--runs", RUN, "--checkpoints", "3", "--scale-update")
    assert_one_line_error(scaled, "none of the chosen checkpoints is one")
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN / "checkpoint-6", tmp_path / "theirs")
    theirs = run("--runs", tmp_path / "theirs", "--scale-update")
    assert_one_line_error(theirs, "the last checkpoint of a run that was trained here, and none")
    empty = ["--data", str(ROOT / "tests")]
    assert_one_line_error(run(*empty), "hellaswag needs its split validation")


def test_a_scale_can_be_measured_on_loss_and_text_alone(folder, model):
    """Without a benchmark, and without a score: the scales that have more keep it."""
    argv = [*model, "--checkpoints", "last", "--tasks", "--scale-update", "0.25"]
    assert main([*argv, "--scale-measure", "loss", "text", *FEW]) == 0
    new = {path.stem.split("x0.25-")[1] for path in folder.glob("records/*x0.25*")}
    assert new == {"sst2", "mnli", "qqp", "text_prose", "text_cnn_dailymail"}
    records = records_in(folder)
    of_loss = records[records.metric == "loss"]
    assert set(of_loss[of_loss.run == RUN].update_scale) == {0.25, 0.5, 1.0, 1.5}
    assert set(of_loss.task) == {"sst2", "mnli", "qqp"} and (of_loss.value > 0).all()
    matched = records[records.metric == "loss_matched_forgetting"].set_index("task")
    assert {"mean", "text"} <= set(matched.index)
    curves = {}
    for run in (RUN, FULL):
        loss = of_loss[of_loss.run.isin([run, "base"])].assign(t=lambda r: r.update_scale)
        loss.loc[loss.run == "base", "t"] = 0
        lost = records[(records.metric == "forgetting") & (records.task == "text")]
        lost = lost[(lost.run == run) & (lost.step == 6)].set_index("update_scale").value
        curves[run] = loss.groupby("t").value.mean(), lost
    row = matched.loc["text"]
    assert row.loss == pytest.approx(max(loss.min() for loss, _ in curves.values()))
    forgotten = [
        np.interp(t, [0, *curves[run][1].index.sort_values()], [0, *curves[run][1].sort_index()])
        for run, t in ((row.run, row.scale), (row.other_run, row.other_scale))
    ]
    assert row.value == pytest.approx(forgotten[0] - forgotten[1], abs=1e-6)


def test_results_are_strict_json(folder):
    def refuse(word):
        raise AssertionError(word)

    json.loads((folder / "retention.json").read_text(), parse_constant=refuse)
