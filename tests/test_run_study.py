"""The study as one command: measured, resumed, failing, side by side, and refused."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import DEMO, ROOT, assert_close, assert_one_line_error, change_json, values

from config import DOCUMENTS
from lora_tradeoffs.data.sources import source_digest
from lora_tradeoffs.files import read_json
from run_study import main

STAGES = ["prepare", "train", "evaluate", "retention", "drift", "gradients"]
FIELDS = "steps4_fp32_checkpoints2_evalexamplespertask6_seed42"
RUNS = (f"similar_full_{FIELDS}", f"similar_lora_r4_{FIELDS}")
ADAPTATION = ("adaptation",)


@pytest.fixture(scope="module")
def flags(tiny):
    """A study of two runs of a two-layer LLaMA, four steps each."""
    return [
        *("--model", str(tiny), "--families", "similar", "--ranks", "4", "--max-steps", "4"),
        *("--dtype", "fp32", "--items", "4"),
        *("--set", "checkpoints=2", "eval_examples_per_task=6", "report_to=none"),
    ]


@pytest.fixture(scope="module")
def measured(flags):
    """All stages but the report."""
    return [*flags, "--only", *STAGES]


@pytest.fixture(scope="module")
def evaluated(flags):
    """The first three stages."""
    return [*flags, "--only", *STAGES[:3]]


@pytest.fixture(scope="module")
def whole(workspace, measured):
    """The study, uninterrupted; only read by the tests."""
    assert main([*measured, "--study", "whole"]) == 0
    return values(workspace, "whole")


@pytest.fixture(scope="module")
def adapted(workspace, whole):
    return values(workspace, "whole", ADAPTATION)


@pytest.fixture
def copied(workspace, whole):
    """A function that copies the study to another name, with its measurements or without."""

    def copy(name, measurements=True):
        folders = ["models/{}", "data/{}"]
        folders += ["outputs/{}", "performance_analysis/{}", "drift_analysis_plots/{}"] * (
            measurements
        )
        for folder in folders:
            shutil.copytree(workspace / folder.format("whole"), workspace / folder.format(name))
        return workspace / "models" / name

    return copy


def start(arguments, **options):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_study.py"), *arguments],
        cwd=ROOT,
        env={**DEMO, **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def files(workspace, study):
    return {p: p.stat().st_mtime_ns for p in workspace.glob(f"*/{study}/**/*") if p.is_file()}


# ------------------------------------------------------------------------------- measured


def test_a_study_is_trained_and_measured(whole, workspace):
    assert len(whole) > 100
    for run in RUNS:
        assert (workspace / "models" / "whole" / run / "training.json").is_file()
        assert any(f'"run": "{run}"' in key for _, key in whole)
    outcomes = read_json(workspace / "outputs/whole/steps.json")
    assert all(outcome["seconds"] > 0 for outcome in outcomes.values()) and len(outcomes) == 7
    assert all(outcomes[stage]["new_results"] > 0 for stage in STAGES[2:])


def test_a_second_start_does_nothing(whole, workspace, measured, capsys, monkeypatch):
    # not even reading lm-eval's tasks, or starting the server of processes
    monkeypatch.setattr("lora_tradeoffs.retention.benchmarks.Benchmarks.__init__", None)
    monkeypatch.setattr("lora_tradeoffs.study.processes.process_context", None)
    before = files(workspace, "whole")
    assert main([*measured, "--study", "whole"]) == 0
    assert "7 steps: 7 done, 0 to run" in capsys.readouterr().out
    after = files(workspace, "whole")
    assert {p for p in after if after[p] != before.get(p)} <= {
        workspace / "outputs/whole/.study.lock"
    }


def test_a_study_follows_its_model_and_rows_to_other_folders(
    whole, copied, workspace, measured, tiny, tmp_path, capsys
):
    copied("moved")
    sample = shutil.copytree(ROOT / "data" / "sample", tmp_path / "rows")
    model = shutil.copytree(tiny, tmp_path / "tiny")
    study = workspace / "outputs/moved/study.json"
    elsewhere = {"data": "/gone/rows", "digests": {"data": source_digest(sample)}}
    before = read_json(study)
    elsewhere["digests"] |= before["digests"]
    study.write_text(json.dumps(before | elsewhere))
    arguments = [str(model) if part == str(tiny) else part for part in measured]
    arguments += ["--data", str(sample), "--study", "moved"]
    assert main([*arguments, "--only", "prepare", "train"]) == 0
    assert "3 steps: 3 done, 0 to run" in capsys.readouterr().out
    (sample / "sst2" / "test.jsonl").write_text("")
    assert main(arguments) == 2
    assert "data /gone/rows -> " in capsys.readouterr().err


def test_a_deleted_unit_is_measured_again_alone(whole, copied, workspace, measured, capsys):
    copied("incomplete")
    records = workspace / "performance_analysis" / "incomplete" / "records"
    unit = next(records.glob(f"{RUNS[0]}-4-sst2-validation*.json"))
    unit.unlink()
    before = files(workspace, "incomplete")
    assert main([*measured, "--study", "incomplete"]) == 0
    assert "7 steps: 6 done, 1 to run" in capsys.readouterr().out
    assert unit.is_file()
    assert_close(values(workspace, "incomplete"), whole)
    others = set(records.glob("*.json")) - {unit}
    assert all(p.stat().st_mtime_ns == before[p] for p in others)


def test_checkpoints_are_deleted_once_they_are_measured(whole, copied, workspace, flags, capsys):
    models = copied("deleted")
    report = workspace / "outputs" / "deleted" / "report.html"
    report.write_text("newer than all that it shows")
    change_json(workspace / "outputs/deleted/study.json", measure_then_delete=True)
    arguments = [*flags, "--study", "deleted", "--measure-then-delete"]
    for _ in range(2):  # the later start does not take the deleted ones for unmeasured
        assert main(arguments) == 0
        assert "12 steps: 12 done, 0 to run" in capsys.readouterr().out
        for run in RUNS:
            assert [p.name for p in (models / run).glob("checkpoint-*")] == ["checkpoint-4"]
    assert_close(values(workspace, "deleted"), whole)


@pytest.mark.slow
def test_each_run_is_measured_and_its_checkpoints_deleted_before_the_next(
    whole, workspace, flags, capfd
):
    arguments = [*flags, "--study", "one-by-one", "--measure-then-delete"]
    assert main(arguments) == 0
    for run in RUNS:
        folder = workspace / "models" / "one-by-one" / run
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_close(values(workspace, "one-by-one"), whole)
    report = workspace / "outputs" / "one-by-one" / "report.html"
    assert f"report: {report}" in capfd.readouterr().out and report.is_file()
    assert main(arguments) == 0
    assert "12 steps: 12 done, 0 to run" in capfd.readouterr().out


@pytest.mark.slow
def test_a_sweep_is_searched_trained_and_measured(workspace, flags, capsys):
    only = ["--only", "prepare", "sweep", "train", "drift"]
    arguments = [*flags, *only, "--study", "swept-study", "--seeds", "42", "43"]
    arguments += ["--lr-sweep", "1", "100", "10000"]
    assert main(arguments) == 0
    rates = read_json(workspace / "models/swept-study/learning_rates.json")["records"]
    runs = {path.parent.name for path in workspace.glob("models/swept-study/*/training.json")}
    drift = read_json(workspace / "drift_analysis_plots/swept-study/drift.json")["records"]
    assert {r["run"] for r in drift} - {"base"} >= runs
    for method in ("full", "lora"):
        searched = [r for r in rates if r["method"] == method]
        drifted = [r for r in drift if r["method"] == method]
        first = {r["learning_rate"] for r in drifted if r["seed"] == 42}
        assert first == {r["learning_rate"] for r in searched if r["loss"] is not None}
        second = {r["learning_rate"] for r in drifted if r["seed"] == 43}
        assert second == {r["learning_rate"] for r in searched if r["chosen"]} and len(second) == 1
    capsys.readouterr()
    assert main(arguments) == 0
    assert "6 steps: 6 done, 0 to run" in capsys.readouterr().out


# ------------------------------------------------------------------ interrupted and failing


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_study_killed_at_random_moments_ends_with_the_same_records(
    whole, workspace, measured, evaluated, kills
):
    arguments = [*(evaluated if kills == 1 else measured), "--study", f"killed-{kills}"]
    moments = random.Random(kills)
    for _ in range(kills):
        study = start(arguments, start_new_session=True)
        time.sleep(moments.uniform(2, 14))
        study.send_signal(signal.SIGKILL)
        study.communicate()  # ends once all children have, which hold the pipe
    assert main(arguments) == 0
    documents = ADAPTATION if kills == 1 else DOCUMENTS
    assert_close(
        values(workspace, f"killed-{kills}", documents),
        {key: value for key, value in whole.items() if key[0] in documents},
    )


def test_ctrl_c_ends_well_and_the_same_command_continues(adapted, workspace, evaluated, capfd):
    arguments = [*evaluated, "--study", "stopped"]
    log = workspace / "logs" / "stopped" / RUNS[0] / "log.jsonl"

    def interrupt():
        deadline = time.monotonic() + 120
        while not log.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    assert main(arguments) == 130
    printed = capfd.readouterr()
    assert "stopping after the running steps" in printed.out
    assert "run the same command to continue" in printed.err
    assert main(arguments) == 0
    assert values(workspace, "stopped", ADAPTATION) == adapted


def test_a_failing_step_is_named_and_the_rest_goes_on(
    adapted, copied, workspace, flags, evaluated, capfd
):
    weights = copied("failing", measurements=False) / RUNS[1]
    weights = weights / "checkpoint-2/adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    failing = [*flags, "--study", "failing", "--only", "prepare", "train", "evaluate", "drift"]
    assert main(failing) == 1
    printed = capfd.readouterr().err
    assert "error: evaluate: " in printed and "error: drift: " in printed
    assert "checkpoint-2" in printed
    assert "2 of 5 steps failed" in printed and "logs/failing/steps/evaluate.log" in printed
    outcomes = workspace / "outputs/failing/steps.json"
    assert "checkpoint-2" in read_json(outcomes)["evaluate"]["error"]
    numbers = values(workspace, "failing", ("adaptation", "drift"))
    assert set(RUNS) <= {json.loads(key)["run"] for _, key in numbers}  # the other checkpoints
    weights.write_bytes(good)
    assert main([*evaluated, "--study", "failing"]) == 0
    assert "error" not in read_json(outcomes)["evaluate"]
    assert values(workspace, "failing", ADAPTATION) == adapted


@pytest.mark.slow
def test_a_full_disk_fails_what_needs_it_and_the_next_start_completes(
    adapted, workspace, evaluated
):
    arguments = [*evaluated, "--study", "narrow"]
    # a process's limit on a file is a full disk to it; an adapter is smaller, a whole model larger
    limit = (2_000_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    study = start(arguments, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    printed, _ = study.communicate(timeout=300)
    assert study.returncode == 1, printed
    assert f"error: train-{RUNS[0]}: " in printed and "free disk space" in printed
    assert "1 of 4 steps failed" in printed and "Traceback" not in printed
    numbers = values(workspace, "narrow", ADAPTATION)
    assert RUNS[1] in {json.loads(key)["run"] for _, key in numbers}
    assert main(arguments) == 0
    assert values(workspace, "narrow", ADAPTATION) == adapted


# ------------------------------------------------------------------------- other processes


@pytest.mark.slow
def test_two_workers_measure_the_same(adapted, workspace, evaluated):
    # the cores are divided, where there is more than one
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    assert main([*evaluated, "--study", "shared", "--workers", "2"]) == 0
    assert_close(values(workspace, "shared", ADAPTATION), adapted, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_processes_that_start_new_measure_the_same(adapted, workspace, evaluated, monkeypatch):
    # as beside a GPU, whose driver does not survive a fork
    monkeypatch.setattr(
        "lora_tradeoffs.study.processes.process_context",
        lambda: multiprocessing.get_context("spawn"),
    )
    assert main([*evaluated, "--study", "spawned"]) == 0
    assert values(workspace, "spawned", ADAPTATION) == adapted


# ---------------------------------------------------------------------- dry run and errors


def test_the_dry_run_says_what_is_left(whole, measured, capsys):
    assert main([*measured, "--study", "whole", "--seeds", "42", "43", "44", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith("  ")}
    assert lines[f"train-{RUNS[0]}"].split()[1] == "done"
    other = lines[f"train-{RUNS[0].replace('42', '43')}"]
    assert other.split()[1] == "left" and "4 steps" in other and "disk" in other
    assert "min of cpu time" in printed and "?" not in lines["evaluate"]
    assert "two methods, with 3 seeds and 3 tests: " in printed and "hellaswag" in printed


def test_the_dry_run_of_a_new_study_says_when_the_time_is_known(workspace, measured, capsys):
    assert main([*measured, "--study", "unmade", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "7 steps: 0 done, 7 to run" in printed
    assert "without train, evaluate, retention, drift, gradients (known once one run" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line[:2] == "  "}
    lines = {name: line for name, line in lines.items() if not name.endswith(":")}  # no YAML
    assert all(line[1:3] == ["left", "?"] for line in lines.values())
    assert not (workspace / "models" / "unmade").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--only", "evaluation"], ("--only", "evaluate")),
        (["--families", "other"], ("families: other", "similar")),
        (["--ranks", "0"], ("rank", "at least 1")),
        (["--ranks", "4096"], ("4096", "allowed")),
        (["--workers", "0"], ("--workers", "1 or more")),
        (["--items", "0"], ("--items", "1 or more")),
        (["--measure-then-delete", "--only", "train"], ("--only",)),
        (["--set", "rank=3"], ("--set rank=3", "fields")),
    ],
)
def test_wrong_arguments_are_one_line(inside, arguments, parts):
    assert_one_line_error(inside(main, "--study", "wrong", *arguments), *parts)


def test_different_settings_are_refused(whole, measured, inside):
    other = ["8" if part == "4" else part for part in measured]
    process = inside(main, *other, "--study", "whole")
    assert_one_line_error(process, "max_steps 4 -> 8", "--study NAME")


def test_one_study_at_a_time(workspace, measured, inside):
    from filelock import FileLock

    folder = workspace / "outputs" / "busy"
    folder.mkdir(parents=True)
    with FileLock(folder / ".study.lock"):
        process = inside(main, *measured, "--study", "busy")
    assert_one_line_error(process, "another run_study.py", "busy")


@pytest.mark.slow
def test_runs_on_two_processes_each_measure_the_same(adapted, workspace, evaluated):
    # through accelerate launch, as on two GPUs
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    assert main([*evaluated, "--study", "two-each", "--gpus-per-run", "2"]) == 0
    for run in RUNS:
        record = read_json(workspace / "models" / "two-each" / run / "run.json")
        assert record["environment"]["world_size"] == 2
    assert_close(values(workspace, "two-each", ADAPTATION), adapted, rel=1e-3, abs=1e-4)
