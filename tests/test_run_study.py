"""The study as one command: resumed, failing, side by side, and refused."""

import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
from support import DEMO, ROOT, assert_one_line_error

from config import resolve_settings
from lora_tradeoffs.files import read_json
from lora_tradeoffs.study.estimates import training_need
from lora_tradeoffs.study.plan import plan_runs, plan_steps
from lora_tradeoffs.study.processes import duration
from lora_tradeoffs.study.steps import Stamps
from lora_tradeoffs.training.learning_rates import Search, search_records, write_rates
from run_study import build_parser, main

DOCUMENTS = {
    "performance_analysis": "adaptation.json",
    "outputs": "retention.json",
    "drift_analysis_plots": "drift.json",
}
STAGES = ["prepare", "train", "evaluate", "retention", "drift"]
OTHERWISE = "steps4_fp32_checkpoints2_evalexamplespertask6_seed42"
RUNS = (f"similar_full_{OTHERWISE}", f"similar_lora_r4_{OTHERWISE}")


@pytest.fixture(scope="module")
def short(tiny):
    """A study of two runs of a two-layer LLaMA, four steps each; all stages but the report."""
    return [
        *("--model", str(tiny), "--families", "similar", "--ranks", "4", "--max-steps", "4"),
        *("--dtype", "fp32", "--items", "4", "--only", *STAGES),
        *("--set", "checkpoints=2", "eval_examples_per_task=6", "report_to=none"),
    ]


@pytest.fixture(scope="module")
def whole(workspace, short):
    """The study, uninterrupted."""
    assert main([*short, "--study", "whole"]) == 0
    return values(workspace, "whole")


def values(output, study, places=tuple(DOCUMENTS)):
    """Every number of the documents, by what it is of."""
    found = {}
    for place, name in DOCUMENTS.items():
        if place not in places:
            continue
        for r in read_json(output / place / study / name)["records"]:
            key = {
                k: v for k, v in r.items() if k not in ("value", "stderr", "low", "high", "study")
            }
            key = {k: v for k, v in key.items() if not isinstance(v, float) or k == "eps"}
            found.setdefault((name, json.dumps(key, sort_keys=True)), []).append(r["value"])
    return found


def same(found, expected):
    """Equal but for the last bits: products of fp64 round by where their operands lie."""
    return found.keys() == expected.keys() and all(
        found[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12) for key in expected
    )


@pytest.fixture(scope="module")
def adapted(workspace, whole):
    return values(workspace, "whole", ["performance_analysis"])


@pytest.fixture(scope="module")
def shorter(short):
    """The same without retention and drift."""
    only, rest = short.index("--only"), short.index("--set")
    return [*short[:only], "--only", *STAGES[:3], *short[rest:]]


def begin(arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_study.py"), *arguments],
        cwd=ROOT,
        env={**DEMO, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def test_a_study_is_trained_and_measured(whole, workspace):
    assert len(whole) > 100
    for run in RUNS:
        assert (workspace / "models" / "whole" / run / "training.json").is_file()
        assert any(f'"run": "{run}"' in key for _, key in whole)


def test_a_second_start_does_nothing(whole, workspace, short, capsys):
    before = {p: p.stat().st_mtime_ns for p in workspace.glob("*/whole/**/*") if p.is_file()}
    assert main([*short, "--study", "whole"]) == 0
    assert "6 steps, 6 of them are done" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in workspace.glob("*/whole/**/*") if p.is_file()}
    assert {p for p in after if after[p] != before.get(p)} <= {
        workspace / "outputs/whole/.study.lock"
    }


def test_a_deleted_unit_is_measured_again_alone(whole, workspace, short, capsys):
    records = workspace / "performance_analysis" / "whole" / "records"
    unit = next(records.glob(f"{RUNS[0]}-4-sst2-validation*.json"))
    unit.unlink()
    assert main([*short, "--study", "whole"]) == 0
    assert "6 steps, 5 of them are done" in capsys.readouterr().out
    assert unit.is_file() and same(values(workspace, "whole"), whole)


def test_a_study_killed_at_random_moments_ends_with_the_same_records(whole, workspace, short):
    random_moments = random.Random(0)
    for _ in range(10):
        study = begin([*short, "--study", "killed"], start_new_session=True)
        time.sleep(random_moments.uniform(2, 14))
        study.send_signal(signal.SIGKILL)
        study.communicate()
    assert main([*short, "--study", "killed"]) == 0
    assert same(values(workspace, "killed"), whole)


def test_two_workers_measure_the_same(adapted, workspace, shorter):
    # the cores are divided, where there is more than one
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    assert main([*shorter, "--study", "shared", "--workers", "2"]) == 0
    found = values(workspace, "shared", ["performance_analysis"])
    assert found.keys() == adapted.keys()
    for key, expected in adapted.items():
        assert found[key] == pytest.approx(expected, rel=1e-3, abs=1e-4), key


def test_processes_that_begin_anew_measure_the_same(adapted, workspace, shorter, monkeypatch):
    # as beside a GPU, whose driver does not outlive a fork
    monkeypatch.setattr(
        "lora_tradeoffs.study.stage_process.context", lambda: multiprocessing.get_context("spawn")
    )
    assert main([*shorter, "--study", "spawned"]) == 0
    assert values(workspace, "spawned", ["performance_analysis"]) == adapted


def test_a_failing_step_is_named_and_the_rest_goes_on(adapted, workspace, shorter, capfd):
    arguments = [*shorter, "--study", "failing"]
    assert main([*arguments, "--only", "prepare", "train"]) == 0
    weights = workspace / "models" / "failing" / RUNS[1] / "checkpoint-2/adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    everything = [*arguments, "--only", "prepare", "train", "evaluate", "drift"]
    assert main(everything) == 1
    told = capfd.readouterr().err
    assert "error: evaluate: " in told and "error: drift: " in told and "checkpoint-2" in told
    assert "2 of 5 steps failed" in told and "logs/failing/steps/evaluate.log" in told
    error = workspace / "outputs/failing/steps/evaluate-error.json"
    assert "checkpoint-2" in read_json(error)["error"]
    found = values(workspace, "failing", ["performance_analysis", "drift_analysis_plots"])
    assert set(RUNS) <= {json.loads(key)["run"] for _, key in found}  # the other checkpoints
    weights.write_bytes(good)
    assert main(arguments) == 0
    assert not error.exists()
    assert values(workspace, "failing", ["performance_analysis"]) == adapted


def test_a_full_disk_fails_what_needs_it_and_the_next_start_completes(adapted, workspace, shorter):
    arguments = [*shorter, "--study", "narrow"]
    # a process's limit on a file is a full disk to it; an adapter is smaller, a whole model larger
    limit = (2_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    study = begin(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    told, _ = study.communicate(timeout=300)
    assert study.returncode == 1, told
    assert f"error: train-{RUNS[0]}: " in told and "the disk is full" in told
    assert "1 of 4 steps failed" in told and "Traceback" not in told
    found = values(workspace, "narrow", ["performance_analysis"])
    assert RUNS[1] in {json.loads(key)["run"] for _, key in found}
    assert main(arguments) == 0
    assert values(workspace, "narrow", ["performance_analysis"]) == adapted


def test_ctrl_c_ends_well_and_the_same_command_goes_on(adapted, workspace, shorter):
    arguments = [*shorter, "--study", "stopped"]
    study = begin(arguments)
    log = workspace / "logs" / "stopped" / "steps" / f"train-{RUNS[0]}.log"
    deadline = time.monotonic() + 120
    while not log.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    study.send_signal(signal.SIGINT)
    told, _ = study.communicate(timeout=120)
    assert study.returncode == 130, told
    assert "run the same command to go on" in told
    assert main(arguments) == 0
    assert values(workspace, "stopped", ["performance_analysis"]) == adapted


def test_checkpoints_are_deleted_once_they_are_measured(whole, workspace, short, capfd):
    at = short.index("--only")
    kept = short[:at] + short[at + 1 + len(STAGES) :]
    arguments = [*kept, "--study", "deleted", "--measure-then-delete"]
    assert main(arguments) == 0
    for run in RUNS:
        folder = workspace / "models" / "deleted" / run
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert same(values(workspace, "deleted"), whole)
    report = workspace / "outputs" / "deleted" / "report.html"
    assert f"report: {report}" in capfd.readouterr().out and report.is_file()
    assert main(arguments) == 0
    assert "12 steps, 12 of them are done" in capfd.readouterr().out


def test_a_sweep_is_searched_trained_and_measured(workspace, shorter, capsys):
    only = shorter.index("--only")
    asked = ["--only", "prepare", "sweep", "train", "drift", *shorter[shorter.index("--set") :]]
    arguments = [*shorter[:only], *asked, "--study", "swept-study", "--seeds", "42", "43"]
    arguments += ["--lr-sweep", "1", "100", "10000"]
    assert main(arguments) == 0
    rates = read_json(workspace / "models/swept-study/learning_rates.json")["records"]
    runs = {path.parent.name for path in workspace.glob("models/swept-study/*/training.json")}
    drift = read_json(workspace / "drift_analysis_plots/swept-study/drift.json")["records"]
    assert {r["run"] for r in drift} - {"base"} >= runs
    for method in ("full", "lora"):
        own = [r for r in rates if r["method"] == method]
        measured = [r for r in drift if r["method"] == method]
        first = {r["learning_rate"] for r in measured if r["seed"] == 42}
        assert first == {r["learning_rate"] for r in own if r["loss"] is not None}
        second = {r["learning_rate"] for r in measured if r["seed"] == 43}
        assert second == {r["learning_rate"] for r in own if r["chosen"]} and len(second) == 1
    capsys.readouterr()
    assert main(arguments) == 0
    assert "6 steps, 6 of them are done" in capsys.readouterr().out


def test_the_dry_run_says_what_is_left(whole, short, capsys):
    assert main([*short, "--study", "whole", "--seeds", "42", "43", "44", "--dry-run"]) == 0
    told = capsys.readouterr().out
    lines = {line.split()[0]: line for line in told.splitlines() if line.startswith("  ")}
    assert lines[f"train-{RUNS[0]}"].split()[1] == "done"
    other = lines[f"train-{RUNS[0].replace('42', '43')}"]
    assert other.split()[1] == "left" and "4 steps" in other and "disk" in other
    assert "min of cpu time" in told and "?" not in lines["evaluate"]
    assert "two methods, with 3 seeds: by" in told and "hellaswag" in told


def test_the_dry_run_of_a_new_study_trains_a_probe(workspace, short, capsys):
    asked = ["--only", "train", "evaluate", "drift"]
    assert main([*short, *asked, "--study", "unmade", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.count("measuring 4 steps of") == 2 and "failed" not in told
    assert "without" not in told
    lines = {line.split()[0]: line.split() for line in told.splitlines() if line.startswith("  ")}
    assert all(float(lines[stage][2]) > 0 for stage in ("evaluate", "drift"))
    assert not (workspace / "models" / "unmade").exists()


def test_a_sweep_is_planned_at_the_rates_that_are_known(workspace, short):
    arguments = [*short[: short.index("--only")], "--study", "planned", "--seeds", "42", "43"]
    args = build_parser().parse_args([*arguments, "--lr-sweep", "1", "2"])
    settings = resolve_settings(args)
    runs = plan_runs(args, settings, 32)
    steps = {step.name: step for step in plan_steps(args, settings, runs)}
    searches = [step for step in steps.values() if step.stage == "sweep"]
    assert len(searches) == 2 and all(len(step.runs) == 2 for step in searches)
    assert training_need(args, settings, searches[0], {}).words.startswith(
        "4 steps at 2 learning rates, or more"
    )
    (later,) = (s for s in steps.values() if s.stage == "train" and "lora" in s.name)
    assert "--swept-rates" in later.flags and searches[1].name in later.needs
    default = later.runs[0].config.learning_rate
    tried = {rate: [1.0 + abs(rate - 2 * default)] for rate in (default, 2 * default, 4 * default)}
    search = Search(tried, 2 * default)
    arm = later.runs[0].arm
    write_rates(settings.runs_dir, arm, search_records(arm, later.runs[0].config, default, search))
    assert [run.config.learning_rate for run in later.runs] == [2 * default]
    assert {run.config.learning_rate for run in searches[1].runs} == set(tried)
    measured = [
        (r.config.seed, r.config.learning_rate) for r in steps["drift"].runs if r.arm == arm
    ]
    assert sorted(measured) == [(42, rate) for rate in sorted(tried)] + [(43, 2 * default)]


def test_the_grid_of_the_flags(short):
    args = build_parser().parse_args(
        [*short, "--study", "grid", "--ranks", "4", "8", "--full-qv", "--single-task-controls"]
    )
    settings = resolve_settings(args)
    runs = plan_runs(args, settings, 32)
    assert len(runs) == 4 * 4 and len({run.name for run in runs}) == 16
    assert sum(run.name.startswith("sst2_") for run in runs) == 4
    steps = plan_steps(args, settings, runs)
    assert [s.stage for s in steps[:2]] == ["prepare", "train"]
    assert len({step.name for step in steps}) == len(steps)
    places = {step.name: i for i, step in enumerate(steps)}
    assert all(places[n] < places[s.name] for s in steps for n in s.needs if n in places)
    assert not any(Stamps(settings).is_done(step) for step in steps)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--only", "evaluation"], ("--only", "evaluate")),
        (["--families", "other"], ("--families", "similar")),
        (["--ranks", "0"], ("rank", "at least 1")),
        (["--ranks", "4096"], ("4096", "allowed")),
        (["--workers", "0"], ("--workers", "at least 1")),
        (["--items", "0"], ("--items", "at least 1")),
        (["--measure-then-delete", "--only", "train"], ("--only",)),
        (["--set", "rank=3"], ("--set rank=3", "fields")),
    ],
)
def test_wrong_arguments_are_one_line(inside, arguments, parts):
    assert_one_line_error(inside(main, "--study", "wrong", *arguments), *parts)


def test_another_configuration_is_refused(whole, short, inside):
    other = ["8" if part == "4" else part for part in short]
    found = inside(main, *other, "--study", "whole")
    assert_one_line_error(found, "max_steps is 8 and was 4", "--study NAME")


def test_one_study_at_a_time(workspace, short, inside):
    from filelock import FileLock

    folder = workspace / "outputs" / "busy"
    folder.mkdir(parents=True)
    with FileLock(folder / ".study.lock"):
        found = inside(main, *short, "--study", "busy")
    assert_one_line_error(found, "another run_study.py", "busy")


def test_durations_read_like_clocks():
    assert [duration(s) for s in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]
