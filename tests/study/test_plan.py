"""The runs and steps of a study, and their command lines."""

import dataclasses
import importlib
import json
import re
import shutil

import pytest
from support import ROOT

import multi_task_training
from config import FAMILIES
from lora_tradeoffs.adaptation.analysis import AdaptationOptions
from lora_tradeoffs.drift.analysis import DriftOptions
from lora_tradeoffs.gradients.analysis import GradientOptions
from lora_tradeoffs.retention.analysis import RetentionOptions
from lora_tradeoffs.study.estimates import detectable_differences, training_need
from lora_tradeoffs.study.plan import SAMPLE_OPTIONS, plan_steps
from lora_tradeoffs.study.same_study import check_study, checked_runs
from lora_tradeoffs.study.steps import ANALYSES, STAGES, command_line
from lora_tradeoffs.training.learning_rates import Search, search_records, write_rates
from run_study import build_parser, main, read_plan


@pytest.fixture
def planned(tiny):
    """A function from flags of run_study.py to its settings, runs and steps."""

    def plan(*flags):
        args = build_parser().parse_args(["--model", str(tiny), "--max-steps", "4", *flags])
        study, settings = read_plan(args)
        runs = checked_runs(study, settings)
        return study, settings, runs, plan_steps(study, settings, runs, args.workers)

    return plan


def test_the_grid_of_the_flags(planned):
    flags = ["--families", "similar", "--ranks", "4", "8", "--full-qv", "--single-task-controls"]
    _, _, runs, steps = planned("--study", "grid", *flags)
    assert len(runs) == 4 * 4 and len({run.name for run in runs}) == 16
    assert sum(run.name.startswith("sst2_") for run in runs) == 4
    assert [s.stage for s in steps[:2]] == ["prepare", "train"]
    assert len({step.name for step in steps}) == len(steps)
    position = {step.name: i for i, step in enumerate(steps)}
    assert all(position[n] < position[s.name] for s in steps for n in s.needs if n in position)


def test_the_arms_that_were_planned_are_kept_and_may_grow(planned):
    for rank, expected in (("8", [["lora", 8]]), ("4", [["lora", 4], ["lora", 8]])):
        flags = ("--study", "arms", "--families", "similar", "--ranks", rank)
        study, settings, runs, _ = planned(*flags, "--single-task-controls")
        check_study(study, settings, runs)
        path = settings.output_dir / "outputs/arms/study.json"
        arms = json.loads(path.read_text())["arms"]
        kept = [[arm["method"], arm["rank"], arm["variant"]] for arm in arms["similar"]]
        assert kept == [[*arm, "steps4"] for arm in [*expected, ["full", 0]]]
        assert not arms["dissimilar"]
    written = path.stat().st_mtime_ns
    check_study(study, settings, runs)
    assert path.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        (["hellaswag"], "benchmark hellaswag needs its split validation: no "),
        (["prose", "cnn_dailymail"], "has no held-out text: put "),
    ],
    ids=["benchmark", "text"],
)
def test_what_cannot_be_measured_is_said_before_training(tiny, tmp_path, capsys, missing, says):
    rows = shutil.copytree(ROOT / "data" / "sample", tmp_path / "rows")
    for name in missing:
        shutil.rmtree(rows / name)
    where = ["--model", str(tiny), "--data", str(rows), "--study", f"lacks_{missing[0]}"]
    flags = [*where, "--families", "similar", "--ranks", "4", "--max-steps", "4"]
    assert main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and str(rows) in line
    _, settings = read_plan(build_parser().parse_args(flags))
    written = settings.document("retention").parent.iterdir()
    assert not settings.runs_dir.exists() and [p.name for p in written] == [".study.lock"]


@pytest.mark.parametrize("flags", [("--max-steps", "40"), ("--set", "mixing=equal", "epochs=5")])
def test_a_control_takes_its_share_of_the_mixed_runs_rows(tiny, flags):
    where = ["--model", str(tiny), "--study", "controls", "--single-task-controls"]
    args = build_parser().parse_args([*where, "--ranks", "4", "--families", "similar", *flags])
    study, settings = read_plan(args)
    runs = checked_runs(study, settings)
    sample = ROOT / "data" / "sample"
    rows = {t: len((sample / t / "train.jsonl").open().readlines()) for t in FAMILIES["similar"]}
    for step in plan_steps(study, settings, runs):
        if step.stage == "train":
            (run,) = step.planned_runs
            parsed = multi_task_training.build_parser().parse_args(command_line(step, settings)[1:])
            (same,) = multi_task_training.plan(parsed, settings, 32)
            assert same.name == run.name and same.config == run.config
            if run.config.tasks != FAMILIES["similar"]:
                (task,) = run.config.tasks
                mixed = 40 * rows[task] / sum(rows.values())
                if study.set:
                    mixed = 5 * sum(rows.values()) / 16 / 3
                assert abs(run.config.max_steps - mixed) < 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--single-task-controls", "--full-qv", "--set", "checkpoints=2", "warmup=0.1"),
        ("--measure-then-delete", "--dtype", "bf16", "--scale-update"),
        ("--workers", "2", "--items", "8", "--lr-sweep", "1", "2", "--seeds", "42", "43"),
        ("--data", "hub", "--preset", "study", "--ranks", "4", "8"),
    ],
)
def test_every_command_line_is_one_that_its_script_accepts(planned, flags):
    study, settings, _, steps = planned("--study", "commands", *flags)
    seen = set()
    for step in steps:
        command = command_line(step, settings)
        assert command[0] == f"{STAGES[step.stage]}.py" or command[0] == "-m"
        module = importlib.import_module(STAGES[step.stage])
        parsed = module.build_parser().parse_args(command[1 + (command[0] == "-m") :])
        seen.add(step.stage)
        for name in ("preset", "study", "model", "data"):
            assert getattr(parsed, name) in (getattr(settings, name), settings.preset.name)
        for name, value in step.options.items():
            if name == "adapter":
                assert parsed.adapter == [value]
            elif name == "seed":
                assert parsed.seed == [value]
            elif isinstance(value, tuple):
                assert tuple(getattr(parsed, name)) == value
            elif value is not None:
                assert getattr(parsed, name) == value, name
        if step.stage == "prepare":
            assert parsed.tasks == step.tasks
        if step.stage in ("sweep", "train"):
            assert "warmup=0.1" in parsed.adapter[0] or not study.set
    assert seen >= {"prepare", "report", *ANALYSES}


def test_the_options_of_the_sample_are_options_of_the_analyses():
    classes = {
        "evaluate": AdaptationOptions,
        "retention": RetentionOptions,
        "drift": DriftOptions,
        "gradients": GradientOptions,
    }
    for (stage, _), options in SAMPLE_OPTIONS.items():
        names = {field.name for field in dataclasses.fields(classes[stage])}
        assert options.keys() <= names | {"checkpoints"}


def test_workers_share_an_analysis_after_one_has_measured_the_base(planned):
    _, _, runs, steps = planned(
        "--study", "shards", "--workers", "2", "--data", "hub", "--preset", "demo"
    )
    named = {step.name: step for step in steps}
    base, one, two = (named[f"retention-{part}"] for part in ("base", "1of2", "2of2"))
    assert {run.config.family for run in base.runs} == {"similar", "dissimilar"}
    assert base.options["checkpoints"] == ("last",)
    assert "retention-base" in one.needs and "retention-base" in two.needs
    assert {*one.runs, *two.runs} == {*runs} and not {*one.runs} & {*two.runs}
    assert "drift" in named  # its threads use all cores


def test_a_sweep_is_planned_at_the_rates_that_are_known(planned):
    flags = ["--families", "similar", "--ranks", "4", "--seeds", "42", "43"]
    study, settings, _, planned_steps = planned(
        "--study", "planned", *flags, "--lr-sweep", "1", "2"
    )
    steps = {step.name: step for step in planned_steps}
    searches = [step for step in steps.values() if step.stage == "sweep"]
    assert len(searches) == 2 and all(len(step.runs) == 2 for step in searches)
    assert training_need(study, settings, searches[0], ()).words.startswith(
        "4 steps at 2 learning rates, or more"
    )
    (later,) = (s for s in steps.values() if s.stage == "train" and "lora" in s.name)
    assert "--swept-rates" in command_line(later, settings) and searches[1].name in later.needs
    default = later.runs[0].config.learning_rate
    tried = {rate: [1.0 + abs(rate - 2 * default)] for rate in (default, 2 * default, 4 * default)}
    arm, sweep = later.runs[0].arm, searches[1].sweep
    assert not sweep.has_chosen(searches[1].planned_runs[0])
    search = Search(tried, 2 * default)
    write_rates(settings.runs_dir, arm, search_records(arm, later.runs[0].config, default, search))
    assert sweep.has_chosen(searches[1].planned_runs[0])
    assert not dataclasses.replace(sweep, factors=(1, 16)).has_chosen(searches[1].planned_runs[0])
    assert [run.config.learning_rate for run in later.runs] == [2 * default]
    assert {run.config.learning_rate for run in searches[1].runs} == set(tried)
    measured = [
        (r.config.seed, r.config.learning_rate) for r in steps["drift"].runs if r.arm == arm
    ]
    assert sorted(measured) == [(42, rate) for rate in sorted(tried)] + [(43, 2 * default)]


def test_what_a_study_could_detect_counts_what_it_measures_and_tests(planned):
    study, settings, runs, _ = planned("--families", "similar", "--seeds", "1", "2", "3")
    one = {"contrast": ["lora:8", "full"], "outcome": "score", "test": "difference"}
    measure = {"evaluate": {"limit": 3}, "retention": {"tasks": ["hellaswag"], "limit": 2}}
    study = dataclasses.replace(study, measure=measure, hypotheses=(one, one | {"primary": False}))
    items, seeds = detectable_differences(study, settings, runs)
    assert re.findall(r"(\w+) [\d.]+ \((\d+)\)", items) == [
        *(("sst2", "3"), ("mnli", "3"), ("qqp", "3"), ("hellaswag", "2"))
    ]
    assert "3 seeds and 1 test:" in seeds
