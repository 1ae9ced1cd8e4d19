"""A study as a file: the same as flags, checked as a whole, replayed elsewhere."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from support import DEMO, ROOT, assert_close, assert_one_line_error, settings_for, values

from config import FAMILIES, UserError
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.files import read_json
from lora_tradeoffs.study.same_study import check_study, checked_runs
from lora_tradeoffs.study.study_file import StudyPlan, read_study_file
from lora_tradeoffs.study.task_files import write_task_files
from run_study import build_parser, main, read_plan

ARMS = ["full", "lora:8", "lora:8@all", "dora:4"]


def study_file(folder, tiny, **changes):
    fields = {
        **{"preset": "demo", "study": "filed", "model": str(tiny), "data": "sample"},
        **{"families": ["similar"], "arms": ARMS, "max_steps": 4, "items": 4, "dtype": "fp32"},
        "set": {"checkpoints": 2, "eval_examples_per_task": 6, "report_to": "none"},
    }
    fields = {k: v for k, v in (fields | changes).items() if v is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def parsed(*argv):
    return read_plan(build_parser().parse_args([*map(str, argv)]))


def test_flags_and_a_file_say_the_same_and_a_saved_plan_is_read_back(tiny, tmp_path):
    flags = ["--model", tiny, "--study", "filed", "--families", "similar", "--adapter", *ARMS]
    flags += ["--max-steps", "4", "--items", "4", "--dtype", "fp32"]
    flags += ["--set", "checkpoints=2", "eval_examples_per_task=6", "report_to=none"]
    study, settings = parsed(*flags)
    same, same_settings = parsed(study_file(tmp_path, tiny))
    assert (study.text(), settings) == (same.text(), same_settings)
    runs = checked_runs(study, settings)
    assert [run.name.split("_steps4")[0] for run in runs] == [
        *("similar_full", "similar_lora_r8", "similar_lora_r8_all", "similar_dora_r4")
    ]
    (tmp_path / "saved.yaml").write_text(study.text())
    again, _ = parsed(tmp_path / "saved.yaml")
    assert again == StudyPlan.of(read_study_file(tmp_path / "saved.yaml"), settings)
    assert again.text() == study.text()


def test_what_is_measured_rates_and_hypotheses_are_in_the_file(tiny, tmp_path):
    hypothesis = {"contrast": ["lora:8", "full"], "outcome": "forgetting"}
    hypothesis |= {"test": "non-inferiority", "margin": 0.01}
    path = study_file(
        *(tmp_path, tiny),
        measure={"retention": {"documents": 2, "scale_update": [0.5]}, "drift": {}},
        learning_rates={"sweep": [0.5, 1]},
        arms={"similar": ["full", "lora:8"]},
        hypotheses=[hypothesis],
    )
    from lora_tradeoffs.study.plan import plan_steps

    study, settings = parsed(path)
    assert study.hypotheses == (hypothesis,)
    steps = plan_steps(study, settings, checked_runs(study, settings))
    assert [s.stage for s in steps] == [
        *("prepare", "sweep", "sweep", "retention", "drift", "report")
    ]
    retention = steps[3].options
    assert (retention["documents"], retention["scale_update"]) == (2, (0.5,))
    assert steps[1].options["lr_sweep"] == (0.5, 1)


def test_the_example_of_the_docs_is_a_study(tmp_path):
    (block,) = re.findall(r"```yaml\n(study: .*?)```", (ROOT / "docs/study.md").read_text(), re.S)
    (tmp_path / "study.yaml").write_text(block)
    study, _ = parsed(tmp_path / "study.yaml")
    assert [str(arm) for arm in study.mixes[FAMILIES["similar"]]] == study.arms["similar"]
    assert study.hypotheses[0]["contrast"] == ["lora:8", "full"] and len(study.arms["similar"]) == 5


def test_tasks_are_a_mix_of_their_own(tiny, tmp_path):
    path = study_file(tmp_path, tiny, families=None, tasks=["qqp", "sst2"], arms=["lora:4"])
    study, settings = parsed(path)
    (run,) = checked_runs(study, settings)
    assert run.config.tasks == ("sst2", "qqp") and run.name.startswith("sst2+qqp_lora_r4")


def test_a_family_that_flags_name_is_in_the_file(tiny, tmp_path):
    study, _ = parsed("--model", tiny, "--families", "pair=qqp+sst2", "--adapter", "full")
    (tmp_path / "saved.yaml").write_text(study.text())
    del FAMILIES["pair"]
    again, _ = parsed(tmp_path / "saved.yaml")
    assert again == study and FAMILIES.pop("pair") == ("sst2", "qqp")


def test_a_flag_of_every_command_beats_the_file_and_other_flags_are_refused(tiny, tmp_path, inside):
    path = study_file(tmp_path, tiny, data=str(tmp_path / "gone"))
    _, settings = parsed(path, "--data", "sample", "--study", "other")
    assert (settings.data, settings.study, settings.model) == ("sample", "other", str(tiny))
    process = inside(main, path, "--data", "sample", "--ranks", "4", "--items", "2")
    assert_one_line_error(process, "items, arms", "says what the study is")


def test_a_grid_that_grows_is_one_file(tiny, tmp_path):
    for arms, seeds in ((["full", "lora:4"], [42]), (["full", "dora:4"], [43])):
        path = study_file(tmp_path, tiny, study="grown", arms=arms, seeds=seeds)
        study, settings = parsed(path)
        check_study(study, settings, checked_runs(study, settings))
    folder = settings.output_dir / "outputs" / "grown"
    saved = yaml.safe_load((folder / "study.yaml").read_text())
    assert saved["arms"] == ["full", "lora:4", "dora:4"] and saved["seeds"] == [42, 43]
    planned = read_json(folder / "study.json")["arms"]["similar"]
    assert [arm["method"] for arm in planned] == ["lora", "dora", "full"]
    before = (folder / "study.yaml").read_text()
    study, settings = parsed(study_file(tmp_path, tiny, study="grown", arms=["lora:4@qv"]))
    with pytest.raises(UserError, match=r"yaml: the arm lora:4@qv occurs twice, also as lora:4"):
        check_study(study, settings, checked_runs(study, settings))
    assert (folder / "study.yaml").read_text() == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"arm": ["full"]}, ["unknown field 'arm'", "did you mean arms?"]),
        ({"arms": "full"}, ["arms is 'full'"]),
        ({"arms": ["full", 8]}, ["arms.similar.1 is 8", "write a list of arms"]),
        ({"arms": []}, ["name at least one"]),
        ({"arms": {"similar": ["full"], "dissimilar": ["full"]}}, ["dissimilar is not trained"]),
        ({"arms": ["full", "lora:8", "lora:8@qv"]}, ["lora:8@qv occurs twice, also as lora:8"]),
        ({"arms": ["lorra:8"]}, ["arm 'lorra:8': did you mean lora?"]),
        ({"arms": ["full", "scaling=constant"]}, ["arm 'scaling=constant'"]),
        ({"arms": ["lora:64"]}, ["LoRA rank is 64", "allowed: 1 to 16"]),
        ({"arms": ["oft:5"]}, ["blocks of 5 do not divide"]),
        ({"families": ["similiar"]}, ["families: similiar is none"]),
        ({"families": ["similar"], "tasks": ["sst2"]}, ["families and tasks"]),
        ({"families": []}, ["families are []: name at least one"]),
        ({"families": ["sst2+qqp"]}, ["not the whole of similar", "mine=sst2+qqp"]),
        ({"families": ["similar=sst2+qqp"]}, ["'similar' is taken"]),
        ({"families": ["../x=sst2+qqp"]}, ["'../x' is taken or no name"]),
        ({"families": ["a=sst2+qqp", "b=sst2+qqp"]}, ["families are ['a', 'b']"]),
        ({"task_files": {"sst2": {}}}, ["task_files: sst2 is a built-in task"]),
        ({"families": None, "tasks": ["sst3"]}, ["sst3"]),
        ({"seeds": ["42"]}, ["seeds.0 is '42'"]),
        ({"seeds": [-1]}, ["seeds: -1; allowed: 0 to"]),
        ({"max_steps": 0}, ["max_steps is 0"]),
        ({"dtype": "fp8"}, ["dtype is 'fp8'; allowed: auto, bf16, fp32"]),
        ({"set": {"epoch": 2}}, ["set: epoch=2", "fields:"]),
        ({"set": {"epochs": -2}}, ["epochs is -2.0"]),
        ({"learning_rates": "best"}, ["learning_rates: write default, swept"]),
        ({"learning_rates": {"sweep": [0]}}, ["--lr-sweep 0"]),
        ({"learning_rates": {"sweeps": [1]}}, ["learning_rates: write"]),
        ({"learning_rates": {"sweep": [1], "seed": 1}}, ["learning_rates: write"]),
        ({"learning_rates": {"sweep": []}}, ["learning_rates: write"]),
        (
            {"learning_rates": {"sweep": [1]}, "arms": ["full,learning_rate=0.1"]},
            ["learning_rates and full,learning_rate=0.1 both set the rate"],
        ),
        ({"set": {"max_steps": 9}}, ["max_steps and set.max_steps are both given"]),
        ({"learning_rates": "swept"}, ["no learning rate was chosen for similar_full"]),
        ({"measure": {"evaluation": {}}}, ["measure: evaluation is none", "retention"]),
        ({"measure": {"drift": {"k": [4]}}}, ["measure: drift has no 'k'", "top_k"]),
        ({"measure": {"retention": {"documents": "all"}}}, ["retention: documents is 'all'"]),
        ({"measure": {"gradients": {"batches": 1}}}, ["--batches must be 2 or more"]),
        ({"measure": {"evaluate": {"splits": ["dev"]}}}, ["--splits takes validation and test"]),
        pytest.param(
            {"measure": {"retention": {"tasks": ["helloswag"]}}},
            ["no task 'helloswag'; close: hel"],
            marks=pytest.mark.slow,  # all of lm-eval's definitions are read
        ),
        *(
            ({"measure": {"retention": {"shrink_intruders": [factor]}}}, [part])
            for factor, part in ((2, "write numbers from 0 to 1"), (1, "a factor below 1"))
        ),
        (
            {"hypotheses": [{"contrast": ["dora:4", "pissa:4"], "outcome": "a", "test": "b"}]},
            ["hypotheses: contrast ['dora:4', 'pissa:4'] must be two of the study's arms"],
        ),
        (
            {"hypotheses": [{"contrast": ["dora:4", "full"], "outcome": "score", "test": "t"}]},
            ["test is 't'; allowed: difference"],
        ),
        (
            {"hypotheses": [{"contrast": ["dora:4", "full"], "outcome": "a"}]},
            ["hypotheses.0.test is missing"],
        ),
        (
            {
                "hypotheses": [
                    {"contrast": ["dora:4", "full"], "outcome": "score", "test": "equivalence"}
                ]
            },
            ["equivalence needs a margin above 0"],
        ),
        *(
            ({"hypotheses": [{"contrast": ["dora:4", "full"], "test": "difference"} | own]}, [part])
            for own, part in (
                ({"outcome": "score", "seed": 42}, "seed 42 alone shows nothing about methods"),
                ({"outcome": "score", "seed": 1, "primary": False}, "seed 1 is not trained"),
                ({"outcome": "score", "contrast": ["full", "full"]}, "compares full with itself"),
                ({"outcome": "score", "margin": 0.1}, "margin is 0.1, and difference takes none"),
                ({"outcome": "size", "seed": 42, "primary": False}, "outcome must be score, valid"),
                (
                    {"outcome": "score", "seed": 42, "test": "sign flips"},
                    "seed 42 is tested over items: test must be difference",
                ),
                (
                    {"outcome": "score", "contrast": ["kl_tasks", "size"]},
                    "outcome must be forgetting or text lost, test difference",
                ),
                (
                    {"outcome": "text lost by shrinking intruders"},
                    "must be one of the study's arms",
                ),
            )
        ),
        (
            {
                "hypotheses": [
                    {"contrast": ["dora:4", "full"], "outcome": "score", "test": test} | name
                    for test, name in (("difference", {"name": "H2"}), ("sign flips", {}))
                ]
            },
            ["hypotheses: two are called H2"],
        ),
        *(
            (
                {
                    "hypotheses": [{"contrast": ["dora:4", "full"], "test": "difference"} | own],
                    "measure": {"evaluate": {"splits": ["test"]}, "retention": retention},
                },
                [f"hypotheses: {own['outcome']} is not measured: it needs {missing} in measure"],
            )
            for own, retention, missing in (
                ({"outcome": "size"}, {}, "drift"),
                ({"outcome": "validation loss"}, {}, "evaluate.splits: validation"),
                ({"outcome": "forgetting"}, {"tasks": []}, "retention.tasks"),
                ({"outcome": "text lost at equal loss"}, {}, "retention.scale_update"),
                (
                    {"outcome": "text lost at equal loss"},
                    {"scale_update": [], "scale_measure": ["score", "text"]},
                    "retention.scale_measure: loss",
                ),
                (
                    {"outcome": "text lost by shrinking intruders", "contrast": ["full"]},
                    {},
                    "retention.shrink_intruders",
                ),
                ({"outcome": "text lost", "contrast": ["kl_tasks", "size"]}, {}, "drift"),
            )
        ),
    ],
)
def test_a_file_that_says_no_study_is_one_line_and_leaves_nothing(
    inside, tiny, tmp_path, workspace, changes, parts
):
    path = study_file(tmp_path, tiny, study="refused", **changes)
    assert_one_line_error(inside(main, path), f"{path}: ", *parts)
    assert not list(workspace.glob("*/refused"))


def test_rows_of_a_familys_other_tasks_are_asked_for_before_anything_starts(
    inside, tiny, tmp_path, workspace
):
    shutil.copytree(ROOT / "data" / "sample" / "sst2", tmp_path / "rows" / "sst2")
    changes = {"families": None, "tasks": ["sst2"], "data": str(tmp_path / "rows")}
    path = study_file(tmp_path, tiny, study="refused", **changes)
    parts = ("part of similar, whose mnli is measured too", "families: [mine=sst2]")
    assert_one_line_error(inside(main, path, "--dry-run"), *parts)
    path = study_file(tmp_path, tiny, study="refused", data=changes["data"], families=["mine=sst2"])
    assert inside(main, path, "--dry-run").returncode == 0


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("arms: [full", "is no YAML"),
        ("- full", "is no study file"),
        ("", "is no study file"),
        ("seeds: [1]\nseeds: [2]", "'seeds' occurs twice"),
        ("model: !!python/object/apply:os.system ['true']", "is no YAML"),
        ("study: \x00", "is no YAML"),
        ("? [a]\n: b", "is no YAML"),
    ],
)
def test_a_file_that_is_no_mapping_of_fields_is_one_line(inside, tmp_path, text, part):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert_one_line_error(inside(main, path), str(path), part)
    assert_one_line_error(inside(main, tmp_path / "gone.yaml"), "gone.yaml cannot be read")


# ------------------------------------------------------------------------- the whole study


@pytest.mark.slow
def test_a_study_of_four_arms_is_killed_resumed_reported_and_replayed(workspace, tiny, tmp_path):
    last = {"checkpoints": ["last"]}
    measure = {"evaluate": last, "retention": last | {"tasks": ["hellaswag"], "documents": 1}}
    measure |= {"drift": last | {"top_k": [4]}, "gradients": last}
    budget = {"examples_per_task": 40, "eval_examples_per_task": 5}
    of_set = {"checkpoints": 2, "report_to": "none"}
    path = study_file(tmp_path, tiny, items=2, measure=measure, set=of_set, **budget)
    command = [sys.executable, str(ROOT / "run_study.py"), str(path)]
    study = subprocess.Popen(command, cwd=ROOT, env={**DEMO, **os.environ})
    deadline = time.monotonic() + 120
    while not list(workspace.glob("models/filed/*/training.json")):
        assert study.poll() is None and time.monotonic() < deadline
        time.sleep(random.random() / 4)
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert main([str(path)]) == 0
    for run in workspace.glob("models/filed/*/run.json"):  # the file's, not the environment's
        assert read_json(run)["config"].items() >= budget.items()
    report = (workspace / "outputs" / "filed" / "report.html").read_text()
    assert all(label in report for label in ("LoRA r=8 (all)", "DoRA r=4", "LoRA r=8"))
    numbers = values(workspace, "filed")
    assert len({json.loads(key)["run"] for _, key in numbers}) >= 5  # the base, four arms

    elsewhere = {"OUTPUT_DIR": str(tmp_path / "out"), "DATA_DIR": str(tmp_path / "data")}
    saved = workspace / "outputs" / "filed" / "study.yaml"
    only = ["--only", "prepare", "train", "evaluate", "retention", "drift", "gradients"]
    subprocess.run(
        [*command[:2], str(saved), *only],
        cwd=ROOT,
        env={**DEMO, **os.environ, **elsewhere},
        check=True,
    )
    assert (tmp_path / "out/outputs/filed/study.yaml").read_text() == saved.read_text()
    assert_close(values(tmp_path / "out", "filed"), numbers, rel=1e-6, abs=1e-9)


# ------------------------------------------------------------------------- tasks of one's own

SKY = """\
training_split: train
test_split: test
doc_to_text: "Sky: {{ sky }}\\nWeather:"
doc_to_target: weather
doc_to_choice: [rain, sun]
family: weather
"""


def sky_study(folder, tiny, family=("weather",)):
    """A study of a task whose file is in the folder of tasks; its file, as it was saved."""
    (folder / "tasks").mkdir()
    (folder / "tasks" / "sky.yaml").write_text(SKY)
    given = study_file(folder, tiny, families=[*family], arms=["lora:4"])
    study, _ = parsed(given)
    saved = folder / "saved.yaml"
    saved.write_text(study.text())
    for name in ("sky", "weather", "sst2+sky"):
        DESCRIPTIONS.pop(name, None), FAMILIES.pop(name, None)
    return saved


@pytest.mark.parametrize("family", [("weather",), ("similar", "sst2+sky")])
def test_a_saved_study_carries_its_tasks(tiny, tmp_path, monkeypatch, family):
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "tasks"))
    saved = sky_study(tmp_path, tiny, family)
    assert read_study_file(saved)["task_files"] == {"sky": yaml.safe_load(SKY)}
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "elsewhere"))
    study, settings = parsed(saved)
    assert study.text() == saved.read_text() and "sky" in {t for mix in study.mixes for t in mix}
    assert not settings.tasks_dir.exists()  # as of --dry-run
    write_task_files(study, settings)
    assert yaml.safe_load((tmp_path / "elsewhere" / "sky.yaml").read_text()) == yaml.safe_load(SKY)
    DESCRIPTIONS.pop("sky")
    assert parsed(saved)[0] == study and DESCRIPTIONS["sky"].own_family == "weather"


def test_a_task_file_that_is_another_than_the_studys_is_one_line(
    tiny, tmp_path, monkeypatch, inside
):
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "tasks"))
    saved, other = sky_study(tmp_path, tiny), tmp_path / "tasks" / "sky.yaml"
    other.write_text(SKY.replace("Sky:", "Clouds:"))
    told = inside(main, saved, "--dry-run")
    assert_one_line_error(told, str(saved), "task_files: sky differs from", str(other))
    other.unlink()
    saved.write_text(saved.read_text().replace("doc_to_target: weather", "doc_to_answer: weather"))
    DESCRIPTIONS.pop("sky")
    assert_one_line_error(inside(main, saved, "--dry-run"), str(saved), "task sky", "doc_to_answer")


@pytest.mark.slow
def test_a_study_of_ones_own_task_is_replayed_where_only_its_rows_are(tiny, tmp_path, monkeypatch):
    """Its steps are processes of their own: they find the task file that was written."""
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "tasks"))
    saved = sky_study(tmp_path, tiny)
    (tmp_path / "rows" / "sky").mkdir(parents=True)
    for split, numbers in {"train": range(40), "test": range(40, 52)}.items():
        rows = [{"sky": f"of day {n}", "weather": ("rain", "sun")[n % 2]} for n in numbers]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows" / "sky" / f"{split}.jsonl").write_text(lines)
    monkeypatch.setenv("TASKS_DIR", str(tmp_path / "elsewhere"))
    argv = [saved, "--data", tmp_path / "rows", "--study", "replayed", "--only"]
    assert main([*map(str, argv), "prepare", "train", "evaluate"]) == 0
    records = read_json(settings_for(study="replayed").document("adaptation"))["records"]
    assert {r["family"] for r in records if r["method"] == "lora"} == {"weather"}
