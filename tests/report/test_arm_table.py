"""The table of the arms: on test, else validation; ROUGE-Lsum and held-out text beside."""

from support import settings_for
from synthetic_effects import write_run
from synthetic_records import kept, rate_points, record, write_study

from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.report.arm_table import _scores, arm_table
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.learning_rates import at_chosen_rates


def test_a_family_without_test_scores_is_shown_on_validation(tmp_path):
    import json

    base = {"method": "base", "step": 0, "fraction": 0.0}
    records = []
    for task, run, score in (("sst2", "similar_full_seed42", 0.8), ("squad_v2", "d_seed42", 0.3)):
        family = {"family": "similar" if task == "sst2" else "dissimilar"}
        for split in ("validation", "test"):
            shift = 0.1 * (split == "test")
            records.append(record("base", task, 0.2 + shift, split=split, **base, **family))
            if task == "sst2" or split == "validation":
                fields = {"method": "full", "rank": 0, "split": split, **family}
                records.append(record(run, task, score + shift, **fields))
    path = tmp_path / "adaptation.json"
    meta = {"study": "demo", "base_model": "tiny", "preset": "study", "record_version": 2}
    path.write_text(json.dumps({"meta": meta, "records": records}))
    scores = _scores(load_records(path))
    values = {(row.family, str(row.arm)): round(row.value, 3) for row in scores.itertuples()}
    trained = {family: value for (family, arm), value in values.items() if arm != "base"}
    assert trained == {"similar": 0.9, "dissimilar": 0.3}
    bases = {family: value for (family, arm), value in values.items() if arm == "base"}
    assert bases == {"similar": 0.3, "dissimilar": 0.2}


def test_rouge_lsum_and_the_loss_on_held_out_text_have_columns(tmp_path):
    run, full = "dissimilar_full_seed42", {"method": "full", "split": "test"}
    family = {"family": "dissimilar"}
    adapted = [
        record(run, "cnn_dailymail", value, metric=metric, **full)
        for metric, value in (("rougeL", 0.21), ("rougeLsum", 0.264))
    ]
    another = full | {"seed": 43}
    adapted += [record(run.replace("42", "43"), "cnn_dailymail", 0.21, **another)]
    base = {"method": "base", "step": 0, "fraction": 0.0, "split": "test"}
    adapted += [record("base", "cnn_dailymail", 0.1, **base)]
    lost = [
        kept(run, "mean", "forgetting", 0.02, method="full", **family),
        kept(run, "text", "forgetting", 0.35, method="full", **family),
    ]
    frames = [
        load_records(write_study(tmp_path, records, "study", script=script))
        for script, records in (("adaptation", adapted), ("retention", lost))
    ]
    table = arm_table(StudyRecords(*frames, settings=settings_for(study="nowhere")))
    row = table[table["arm"].map(str) == "full"].iloc[0]
    assert row["score"] == "0.210" and row["seeds"] == 2  # two have no error
    assert row["ROUGE-Lsum"] == "0.264 ± 0.012 (1 of 2 seeds)"
    assert row["forgetting"].startswith("+0.020") and row["forgetting"].endswith("(1 of 2 seeds)")
    assert row["text lost (nats/token)"].startswith("+0.350")


def test_a_run_at_a_rate_that_was_not_chosen_is_no_seed_of_the_arm(tmp_path):
    """The default's name has no rate, and so the label of the arm at its chosen one."""
    adaptation = rate_points({("lora", 8): {1e-3: (0.7, 0.1), 2e-3: (0.8, 0.1)}})[0]
    frame = load_records(write_study(tmp_path, adaptation, "study"))
    choice = {"family": "similar", "arm": "similar_lora_r8", "method": "lora", "rank": 8}
    chosen = at_chosen_rates(frame, [choice | {"learning_rate": 2e-3, "chosen": True}])
    settings = settings_for(study="rates")
    for name, rate, seconds in (("", 1e-3, 600.0), ("_lr2e-3", 2e-3, 60.0)):
        config = {"learning_rate": rate}
        write_run(settings.runs_dir, f"similar_lora_r8{name}_seed42", config, seconds)
    table = arm_table(StudyRecords(chosen, settings=settings, at_all_rates={"adaptation": frame}))
    (row,) = table[table["arm"].map(lambda arm: arm.is_trained)].to_dict("records")
    assert (str(row["arm"]), row["seeds"], row["minutes"]) == ("LoRA r=8", 1, "1.0")
