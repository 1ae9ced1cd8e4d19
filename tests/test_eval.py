"""The evaluation script on runs of a two-layer LLaMA, as a user would call it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from support import ROOT, assert_one_line_error, edited_tensors, settings_for

from config import DATA_SEED
from eval import main
from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions, TaskUnit
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.base import load_base, load_tokenizer
from lora_tradeoffs.records import RECORD_VERSION
from multi_task_training import main as train

STUDY = "evaluated"
RUN = "similar_lora_r4_limit64_fp32_checkpoints2_seed42"


@pytest.fixture(scope="module")
def model(tiny):
    return ["--model", str(tiny), "--study", STUDY]


@pytest.fixture(scope="module")
def folder(model):
    """A study with a LoRA and a full run, evaluated on validation and test."""
    short = ["--limit", "64", "--dtype", "fp32", "--set", "checkpoints=2", *model]
    assert train(["--similar", "--lora", "4", "--full-finetune", *short]) == 0
    assert main([*model, "--dtype", "fp32", "--shots", "2"]) == 0
    return settings_for(study=STUDY).output_dir / "performance_analysis" / STUDY


def records_in(folder):
    return pd.DataFrame(json.loads((folder / "adaptation.json").read_text())["records"])


def test_every_checkpoint_and_the_base_have_flat_records(folder):
    records = records_in(folder)
    assert set(records.run) == {
        "base",
        "majority_class",
        RUN,
        "similar_full_limit64_fp32_checkpoints2_seed42",
    }
    ours = records[(records.run == RUN) & (records.metric == "accuracy")]
    assert set(ours.step) == {3, 6} and set(ours["rank"]) == {4} and set(ours.alpha) == {8}
    assert ours.fraction.isin([0.5, 1.0]).all()
    assert set(ours[ours.step == 6].split) == {"validation", "test"}
    assert set(records[records.run == "base"].shots) == {0, 2}
    assert ((records.low <= records.value) & (records.value <= records.high))[
        records.metric == "accuracy"
    ].all()
    shares = records[(records.run == RUN) & (records.step == 6) & (records.task == "mnli")]
    shares = shares[shares.metric.str.startswith("share_") & (shares.split == "test")]
    assert len(shares) == 3 and shares.value.sum() == pytest.approx(1)


def test_a_figure_is_that_of_the_model_asked_row_by_row(folder, base):
    from peft import PeftModel

    from dataset_descriptions import describe
    from lora_tradeoffs.data.encoding import choice_ids
    from lora_tradeoffs.data.preparation import prepare

    settings = settings_for(study=STUDY)
    tokenizer = load_tokenizer(base)
    rows = prepare(settings, tokenizer, ["qqp"], 256, 2_000)["qqp"].split("test")
    model = PeftModel.from_pretrained(
        load_base(base), settings.runs_dir / RUN / "checkpoint-6"
    ).eval()
    ids = [token for (token,) in choice_ids(tokenizer, describe("qqp"))]
    predictions = []
    for row in rows:
        prompt = torch.tensor([row["input_ids"][: row["prompt_length"]]])
        with torch.no_grad():
            predictions.append(model(prompt).logits[0, -1, ids].argmax().item())
    records = records_in(folder).query(
        "run == @RUN and step == 6 and task == 'qqp' and split == 'test' and metric == 'accuracy'"
    )
    right = np.array(predictions) == np.array(rows["label"][:])
    assert records.value.item() == pytest.approx(right.mean())
    scores = Results(folder).items(f"{RUN}-6-qqp-test")["accuracy"]
    assert np.array_equal(scores.items, right)


def test_what_is_there_is_not_measured_again_and_what_is_missing_is(folder, model, capsys):
    files = {p: p.stat().st_mtime_ns for p in (folder / "records").iterdir()}
    lost = folder / "records" / f"{RUN}-6-mnli-validation.json"
    text = lost.read_text()
    lost.unlink()
    assert main([*model, "--dtype", "fp32", "--shots", "2"]) == 0
    assert (
        f"{len(files)} measurements: {len(files) - 1} cached, 1 to run" in capsys.readouterr().out
    )
    changed = [p for p, stamp in files.items() if p.stat().st_mtime_ns != stamp]
    assert changed == [lost] and lost.read_text() == text


def test_another_limit_is_another_measurement(folder, model, tmp_path):
    copy = settings_for(study="limited")
    shutil.copytree(settings_for(study=STUDY).runs_dir, copy.runs_dir)
    argv = [*model[:2], "--study", "limited", "--dtype", "fp32", "--shots", "0"]
    argv += ["--tasks", "sst2", "--splits", "validation", "--checkpoints", "last"]
    assert main([*argv, "--limit", "10"]) == 0
    place = copy.output_dir / "performance_analysis" / "limited"
    assert set(records_in(place).n) == {10}
    assert main([*argv, "--limit", "12"]) == 0
    assert set(records_in(place).n) == {12}


def test_paraphrased_prompts_have_records_and_a_spread_of_their_own(folder, model, capsys):
    argv = [*model, "--runs", RUN, "--checkpoints", "last", "--tasks", "sst2", "--splits", "test"]
    assert main([*argv, "--dtype", "fp32", "--shots", "0", "--prompts", "2"]) == 0
    records = records_in(folder).query(
        "run == @RUN and task == 'sst2' and split == 'test' and metric == 'accuracy' and step == 6"
    )
    assert sorted(records.prompt) == [0, 1, 2]
    spread = f"over 3 prompts: {RUN} sst2 test mean {records.value.mean():.3f}"
    assert f"{spread}, sd {records.value.std():.3f}" in capsys.readouterr().out
    assert main([*argv, "--prompts", "9"]) == 2


def test_generation_is_scored_and_shown(folder, model, capsys):
    argv = [*model, "--runs", RUN, "--checkpoints", "last", "--cross-family", "--shots", "0"]
    argv += ["--tasks", "squad_v2", "cnn_dailymail", "codexglue", "--splits", "test"]
    assert main([*argv, "--limit", "3", "--dtype", "fp32"]) == 0
    assert "rougeL" in capsys.readouterr().out
    records = records_in(folder)
    assert {"codexglue_bleu", "rougeL", "f1", "abstained"} <= set(records.metric)
    assert {"lead_3", "always_abstain", "nearest_description"} <= set(records.run)
    lines = (folder / "samples" / f"{RUN}-6-squad_v2-test.jsonl").read_text().splitlines()
    assert len(lines) == 3 and set(json.loads(lines[0])) == {
        "row",
        "prompt",
        "output",
        "references",
    }


def test_a_corrupt_checkpoint_is_named_and_the_others_are_done(folder, model, capsys):
    copy = settings_for(study="corrupt")
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN, copy.runs_dir / RUN)
    path = copy.runs_dir / RUN / "checkpoint-3" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    argv = [*model[:2], "--study", "corrupt", "--tasks", "sst2", "--shots", "0", "--limit", "8"]
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert "checkpoint-3/adapter_model.safetensors is corrupt" in captured.err
    place = copy.output_dir / "performance_analysis" / "corrupt"
    assert set(records_in(place).query("run == @RUN").step) == {6}


def test_mismatched_genres_are_read_with_test_where_there_are_some(folder, model, tmp_path):
    data = tmp_path / "rows"
    shutil.copytree(ROOT / "data" / "sample" / "mnli", data / "mnli")
    lines = (data / "mnli" / "test.jsonl").read_text().splitlines()[:6]
    rows = [{**json.loads(line), "premise": f"By telephone: {i}."} for i, line in enumerate(lines)]
    path = data / "mnli" / "test_mismatched.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = settings_for(study=STUDY).runs_dir / RUN
    argv = [*model[:2], "--study", "mismatched", "--runs", str(run), "--checkpoints", "last"]
    assert main([*argv, "--data", str(data), "--tasks", "mnli", "--shots", "0"]) == 0
    place = settings_for().output_dir / "performance_analysis" / "mismatched"
    found = records_in(place).query("run == @RUN and metric == 'accuracy'").set_index("split")
    assert set(found.index) == {"validation", "test", "test_mismatched"}
    assert found.n["test_mismatched"] == 6
    assert {p.name for p in (place / "figures").glob("*.png")} == {
        f"{name}.png" for name in ("learning_curves", "last_by_rank", "validation_against_test")
    }


def test_a_foreign_adapter_is_taken(folder, model, tmp_path):
    run = settings_for(study=STUDY).runs_dir / RUN
    foreign = tmp_path / "mine"
    shutil.copytree(run / "checkpoint-6", foreign)
    (foreign / "manifest.json").unlink()
    argv = [*model[:2], "--study", "foreign", "--runs", str(foreign), "--tasks", "sst2"]
    assert main([*argv, "--shots", "0", "--dtype", "fp32"]) == 0
    place = settings_for().output_dir / "performance_analysis" / "foreign"
    found = records_in(place).query("run == 'mine' and metric == 'accuracy' and split == 'test'")
    ours = records_in(folder).query(
        "run == @RUN and step == 6 and task == 'sst2' and metric == 'accuracy'"
        " and split == 'test' and prompt == 0"
    )
    assert found.value.item() == ours.value.item() and found["rank"].item() == 4


def test_other_weights_under_the_same_name_are_measured_again(folder, model, tmp_path, capsys):
    foreign = tmp_path / "mine"
    shutil.copytree(settings_for(study=STUDY).runs_dir / RUN / "checkpoint-6", foreign)
    (foreign / "manifest.json").unlink()
    argv = ["--study", "again", "--runs", str(foreign), "--tasks", "sst2", "--shots", "0"]
    argv += ["--splits", "test", "--limit", "4", "--dtype", "fp32"]

    def there(*more):
        assert main([*argv, *more]) == 0
        return capsys.readouterr().out.partition(" cached")[0].rpartition("\n")[2]

    assert there(*model[:2]) == "2 measurements: 0"
    assert there(*model[:2]) == "2 measurements: 2"
    with edited_tensors(foreign / "adapter_model.safetensors") as weights:
        weights |= {name: 3 * weight for name, weight in weights.items()}
    assert there(*model[:2]) == "2 measurements: 1"
    other = tmp_path / "other"
    shutil.copytree(model[1], other)
    with edited_tensors(other / "model.safetensors") as weights:
        weights["model.norm.weight"] += 1
    assert there("--model", str(other)) == "2 measurements: 0"


def test_checkpoints_from_elsewhere_are_fractions_of_their_last(folder, model, tmp_path, capsys):
    run = settings_for(study=STUDY).runs_dir / RUN
    foreign = tmp_path / "mine"
    for step in (3, 6):
        shutil.copytree(run / f"checkpoint-{step}", foreign / f"checkpoint-{step}")
    broken = foreign / "checkpoint-2"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    shutil.copy(run / "checkpoint-3" / "adapter_model.safetensors", broken)
    argv = [*model[:2], "--study", "elsewhere", "--runs", str(foreign), "--tasks", "sst2"]
    assert main([*argv, "--shots", "0", "--limit", "4", "--splits", "validation"]) == 1
    assert "checkpoint-2 cannot be loaded: it has no target_modules" in capsys.readouterr().err
    place = settings_for().output_dir / "performance_analysis" / "elsewhere"
    found = records_in(place).query("run == 'mine' and metric == 'accuracy'")
    assert dict(zip(found.step, found.fraction)) == {3: 0.5, 6: 1.0}


def test_two_runs_of_one_name_are_refused(folder, model, tmp_path, capsys):
    run = settings_for(study=STUDY).runs_dir / RUN
    for name in ("one/mine", "two/mine", f"three/{RUN}", "four/base"):
        shutil.copytree(run / "checkpoint-6", tmp_path / name)
    for names in (("one/mine", "two/mine"), (f"three/{RUN}",), ("four/base",)):
        assert main([*model, "--runs", *(str(tmp_path / name) for name in names)]) == 2
        error = capsys.readouterr().err
        assert "are both called" in error and len(error.splitlines()) == 1


def test_one_item_of_a_task_is_enough_to_evaluate(folder, model):
    argv = [*model[:2], "--study", "few", "--runs", str(settings_for(study=STUDY).runs_dir / RUN)]
    argv += ["--checkpoints", "last", "--tasks", "squad_v2", "--splits", "test", "--shots", "0"]
    assert main([*argv, "--limit", "1"]) == 0
    place = settings_for().output_dir / "performance_analysis" / "few"
    found = records_in(place).query("run == 'base'").set_index("metric").value
    # the question is answerable or not: of the other kind there is none
    assert found[["f1_has_answer", "f1_no_answer"]].isna().sum() == 1


def test_questions_about_a_passage_are_resampled_together(base, tmp_path):
    from lora_tradeoffs.adaptation.analysis import (
        Adaptation,
        AdaptationOptions,
        TaskUnit,
        records_of,
    )
    from lora_tradeoffs.adaptation.metrics import score
    from lora_tradeoffs.measuring.subjects import Subject
    from lora_tradeoffs.retention.analysis import Retention, RetentionOptions, RetentionUnit
    from lora_tradeoffs.statistics.comparisons import estimate, grouped

    for split, count in (("train", 2), ("validation", 40), ("test", 2)):
        rows = [squad_row(split, i // 2, i) for i in range(2 * count)]
        path = tmp_path / "squad_v2" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = settings_for(study="passages", data=str(tmp_path))
    options = AdaptationOptions(dtype="fp32")
    analysis = Adaptation(settings, base, options)
    subject = Subject("base", 0, None, {}, None, True, True)
    for prompt in range(4):
        groups = analysis.groups(TaskUnit(subject, "validation", "squad_v2", 0, 0, prompt))
        assert groups.tolist() == [i // 2 for i in range(80)]
    assert analysis.groups(TaskUnit(subject, "test", "squad_v2", 0, 0, 0)) is None  # too few
    unit = TaskUnit(subject, "validation", "squad_v2", 0, 0, 0)
    # both questions about a passage are right, or none: half as many items as it seems
    right = np.repeat(np.arange(40) % 2, 2)
    scores = score("squad_v2", ["x" if hit else "y" for hit in right], [["x"]] * 80)
    (alone, *_), (together, *_) = records_of(unit, scores, {}), records_of(unit, scores, {}, groups)
    assert (together["value"], together["n"]) == (alone["value"], alone["n"]) == (0.5, 80)
    assert together["stderr"] == pytest.approx(2**0.5 * alone["stderr"], rel=0.1)
    # beside retention, at scaled updates, too
    retention = Retention(settings, analysis.base, RetentionOptions(dtype="fp32"))
    retention.adaptation.scores = lambda *_: (scores, {}, [])
    scaled = RetentionUnit(subject, "adaptation", "squad_v2", scale=0.5)
    measured = retention._measure_adaptation(None, scaled, 0)
    retention.results.write("scaled", {}, measured.records, measured.scores, measured.groups)
    primary = next(s for s in scores if s.name == measured.scores[0].name)
    assert measured.records[0]["stderr"] == estimate(grouped(primary, groups)).stderr
    assert len(retention.results.items("scaled")[primary.name].statistics) == 40


def squad_row(split, passage, number):
    """A question that the passage answers."""
    context = f"{split} passage {passage} says that the answer is {passage}."
    answers = {"text": [str(passage)], "answer_start": [context.rindex(str(passage))]}
    own = {"id": f"{split}{number}", "title": f"{split} {passage}", "context": context}
    return {**own, "question": f"What is the answer, number {number}?", "answers": answers}


def test_more_examples_than_there_are_or_fit_are_refused(folder, model, capsys):
    argv = [*model, "--runs", RUN, "--checkpoints", "last", "--splits", "validation"]
    for task, shots in (("sst2", 500), ("cnn_dailymail", 20)):
        assert main([*argv, "--tasks", task, "--limit", "2", "--shots", str(shots)]) == 2
        assert "lower --shots" in capsys.readouterr().err


def test_bad_input_is_one_line(folder, model, inside, tmp_path):
    def run(*argv):
        return inside(main, *model, *argv)

    nothing = inside(main, *model[:2], "--study", "nothing")
    assert_one_line_error(nothing, "has no run with a checkpoint", "multi_task_training.py", STUDY)
    assert_one_line_error(run("--runs", "none"), "no run 'none'")
    assert_one_line_error(run("--checkpoints", "7"), "its steps are 3, 6")
    assert_one_line_error(run("--checkpoints", "first"), "write all, last, or steps")
    assert_one_line_error(run("--limit", "0"), "--limit must be 1 or more")
    assert_one_line_error(run("--tasks", "sst3"), "unknown task 'sst3'")
    other = tmp_path / "other"
    shutil.copytree(model[1], other)
    with edited_tensors(other / "model.safetensors") as weights:
        weights["model.norm.weight"] += 1
    process = inside(main, "--model", other, "--study", STUDY)
    assert_one_line_error(process, "was trained on tiny-", "--model")


def test_a_base_that_gives_nan_is_told(folder, model, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model[1], broken)
    with edited_tensors(broken / "model.safetensors") as weights:
        weights["model.norm.weight"][0] = float("nan")
    checkpoint = settings_for(study=STUDY).runs_dir / RUN / "checkpoint-6"
    foreign = tmp_path / "adapter"
    shutil.copytree(checkpoint, foreign)
    argv = ["--model", str(broken), "--study", "nan-base", "--runs", str(foreign), "--shots", "0"]
    for task in ("sst2", "squad_v2"):
        assert main([*argv, "--tasks", task, "--limit", "4"]) == 2
        assert "logits are not finite" in capsys.readouterr().err


def test_results_of_another_version_are_left_alone(folder, model, capsys):
    path = folder / "records" / f"{RUN}-6-sst2-validation.json"
    text = path.read_text()
    old = text.replace(f'"record_version": {RECORD_VERSION}', '"record_version": 0')
    assert old != text
    path.write_text(old)
    for more in ([], ["--overwrite"]):
        assert main([*model, "--dtype", "fp32", "--shots", "2", *more]) == 2
        assert "record version 0" in capsys.readouterr().err
        assert path.read_text() == old
    path.write_text(text)


def test_validation_loss_is_trainings_and_plain_transformers(folder, model, base):
    """Over the same rows the run's own validation; by row the loss of Transformers."""
    from peft import PeftModel

    argv = [*model, "--runs", RUN, "--checkpoints", "last", "--cross-family", "--shots", "0"]
    argv += ["--tasks", "codexglue", "--splits", "validation", "--limit", "3"]
    assert main([*argv, "--dtype", "fp32"]) == 0
    records = records_in(folder)
    losses = records[(records.metric == "loss") & (records.run == RUN) & (records.step == 6)]
    assert set(records[records.metric == "loss"].split) == {"validation"}
    assert set(records[records.metric == "loss"].shots) == {0}
    value = losses.set_index("task").value
    run = settings_for(study=STUDY).runs_dir / RUN
    count = read_json(run / "run.json")["config"]["eval_examples_per_task"]
    validated = read_json(run / "training.json")["validation"][-1]
    for task in ("sst2", "mnli", "qqp"):
        items = Results(folder).items(f"{RUN}-6-{task}-validation")["loss"].items
        rows = np.random.default_rng(DATA_SEED).permutation(len(items))[:count]
        assert items[rows].mean() == pytest.approx(validated[f"eval_{task}_loss"], abs=2e-5)
        assert items.mean() == pytest.approx(value[task])
    tuned = PeftModel.from_pretrained(load_base(base), run / "checkpoint-6").eval()
    for task, limit in (("qqp", 0), ("codexglue", 3)):
        unit = TaskUnit(Subject("base", 0, None, {}, None, True, True), "validation", task, limit)
        rows = Adaptation(settings_for(study=STUDY), base, AdaptationOptions()).rows(unit)
        expected = []
        for row in rows:
            ids = torch.tensor([row["input_ids"]])
            labels = ids.clone()
            labels[:, : row["prompt_length"]] = -100
            with torch.no_grad():
                expected.append(tuned(ids, labels=labels).loss.item())
        items = Results(folder).items(f"{RUN}-6-{task}-validation")["loss"].items
        assert items == pytest.approx(np.array(expected), abs=2e-5)
