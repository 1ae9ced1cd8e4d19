"""Steps as processes: side by side, with their output in logs, and gone when the study is."""

import multiprocessing
import os

import pytest
from support import ROOT

from config import UserError
from lora_tradeoffs.files import read_json
from lora_tradeoffs.study.plan import plan_runs
from lora_tradeoffs.study.processes import (
    StepRunner,
    duration,
    last_count,
    last_error_line,
    run_script,
    worker_environments,
)
from lora_tradeoffs.study.steps import Step, command_line
from run_study import build_parser, read_plan


@pytest.fixture
def planned(tiny):
    """A function from a study's name to its settings and two steps that prepare a task each."""

    def plan(study, tasks=(("sst2",), ("qqp",))):
        flags = ["--study", study, "--model", str(tiny), "--families", "similar"]
        args = build_parser().parse_args([*flags, "--ranks", "4", "--single-task-controls"])
        study, settings = read_plan(args)
        plan.runs = plan_runs(study, settings, 32)
        runs = {run.config.tasks: run for run in plan.runs}
        return settings, [
            Step(f"prepare-{i}", "prepare", {}, (runs[mix],)) for i, mix in enumerate(tasks)
        ]

    return plan


def test_steps_run_side_by_side_and_one_that_fails_is_noted(planned):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    settings, steps = planned("processes")
    steps.append(Step("broken", "report", {"no_such_flag": True}, needs=("prepare-0",)))
    runner, ended = StepRunner(settings, 2), []
    runner.run(steps, lambda step: ended.append(step.name))
    assert sorted(ended) == ["prepare-0", "prepare-1"]
    assert list(runner.failed) == ["broken"] and "--no-such-flag" in runner.failed["broken"]
    outcomes = read_json(settings.output_dir / "outputs/processes/steps.json")
    assert outcomes["prepare-1"]["seconds"] > 0 and outcomes["broken"]["exit_code"] == 2
    log = (settings.logs_dir / "steps" / "prepare-0.log").read_text()
    assert f"$ python {' '.join(command_line(steps[0], settings))}\n" in log
    assert log.startswith("\n$ python data_preprocessing.py sst2 --preset demo")
    assert "prepared data: " in log


def test_how_far_a_step_is_is_read_from_the_last_bar_of_its_last_start(tmp_path):
    log = tmp_path / "step.log"
    log.write_text("\n$ python eval.py\nrun: 100%|##| 9/9 [00:01<00:00]\n$ python eval.py\n")
    assert last_count(log) == ""
    with log.open("a") as file:
        file.write("sst2:  10%|# | 1/9 [00:01<00:09, 1.0s/it]\rmnli:  20%|# | 2/9 [00:02<")
    assert last_count(log) == "2/9"


def test_a_process_that_starts_new_does_the_same(planned, tmp_path):
    # as beside a GPU, whose driver does not survive a fork
    settings, (step, _) = planned("new-process")
    log, environment = tmp_path / "log", {**os.environ, "MARK": "1"}
    process = multiprocessing.get_context("spawn").Process(
        target=run_script, args=(command_line(step, settings), log, environment)
    )
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert (settings.prepared_dir / "sst2").is_dir()


def test_workers_share_the_cores():
    assert worker_environments(1) == [{}]
    with pytest.raises(UserError, match="--workers 4096: this machine has"):
        worker_environments(4096)


def test_the_error_of_a_log_is_that_of_its_last_command(tmp_path):
    log = tmp_path / "log"
    log.write_text("\n$ python a.py\nerror: old\n\n$ python a.py\n 1%\r 2%\nerror: new\n3 s\n")
    assert last_error_line(log) == "new"
    log.write_text("\n$ python a.py\nsomething\n")
    assert last_error_line(log) == "something"


def test_durations_read_like_clocks():
    assert [duration(s) for s in (0.4, 61, 3725)] == ["0:00", "1:01", "1:02:05"]


def test_training_on_several_gpus_is_launched_by_accelerate(planned):
    from accelerate.commands.launch import launch_command_parser

    settings, _ = planned("several")
    runs = {run.config.method: run for run in planned.runs if len(run.config.tasks) == 3}
    configuration = ROOT / "examples" / "slurm" / "fsdp2.yaml"
    for method, run in runs.items():
        step = Step(f"train-{run.name}", "train", {"lora": (4,)}, (run,))
        single = command_line(step, settings)
        module, launcher, *options = command_line(step, settings, 2, configuration)
        assert (module, launcher) == ("-m", "accelerate.commands.launch")
        args = launch_command_parser().parse_args(options)
        assert [args.training_script, *args.training_script_args] == [
            str(ROOT / single[0]),
            *single[1:],
        ]
        assert (args.num_processes, args.main_process_port) == (2, 0)
        assert args.config_file == (str(configuration) if method == "full" else None)
        assert args.multi_gpu == (method != "full")
    measured = Step("drift", "drift", {}, tuple(runs.values()))
    assert command_line(measured, settings, 2)[0] == "svd_analysis.py"


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    names = [environment["CUDA_VISIBLE_DEVICES"] for environment in worker_environments(2, 2)]
    assert names == ["0,1", "2,3"]
    with pytest.raises(UserError, match="--workers 3 --gpus-per-run 2: this machine has 5 GPUs"):
        worker_environments(3, 2)
