"""A study's steps as jobs: of a real SLURM, and of other commands that take a script."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from slurm_cluster import Cluster, missing_programs
from support import DEMO, ROOT

import eval
import multi_task_training
from config import DOCUMENTS, UserError
from lora_tradeoffs.checkpoints import MANIFEST, checkpoints
from lora_tradeoffs.files import read_json
from lora_tradeoffs.hardware import pick_precision
from lora_tradeoffs.study.jobs import Job, launch_words
from run_study import main

SBATCH = "sbatch --wait --ntasks=1"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if missing := missing_programs():
        pytest.skip(f"SLURM is not installed: {', '.join(missing)}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def flags(tiny):
    """A study of one run of a two-layer LLaMA."""
    return [
        *("--model", str(tiny), "--families", "similar", "--adapter", "lora:4"),
        *("--items", "4", "--set", "eval_examples_per_task=6", "report_to=none"),
    ]


def records(output, study):
    """What a study measured, without its name."""
    path = output / DOCUMENTS["adaptation"].format(study=study)
    return [{**record, "study": None} for record in read_json(path)["records"]]


def other_precision(requested, device):
    automatic = pick_precision("auto", device)
    return {"bf16": "fp32", "fp32": "bf16"}[automatic] if requested == "auto" else requested


def wait_for(condition, seconds=300):
    """The condition's value once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)
    return value


def test_a_study_over_slurm_measures_what_its_commands_do(
    slurm, workspace, flags, capfd, monkeypatch
):
    # more workers than this machine has cores: they are SLURM's to share out
    arguments = [*flags, "checkpoints=2", "--max-steps", "4", "--study", "jobs"]
    arguments += ["--only", "train", "evaluate", "--workers", "99", "--launch", SBATCH]
    assert main(arguments) == 0
    assert "jobs must run here, too" in capfd.readouterr().out
    steps = workspace / "logs" / "jobs" / "steps"
    for name, module in (("train-*", multi_task_training), ("evaluate", eval)):
        (script,) = steps.glob(f"{name}.sh")
        first, *_, last = script.read_text().splitlines()
        assert first == "#!/bin/sh"
        python, path, *command = shlex.split(last.removeprefix("exec "))
        assert [python, path] == [sys.executable, str(ROOT / f"{module.__name__}.py")]
        number = script.with_suffix(".job").read_text().split()[-1]
        shown = slurm.ask("scontrol", "show", "job", number)
        assert "JobState=COMPLETED" in shown and f"Command={script}" in shown
        assert "\n$ python " in script.with_suffix(".log").read_text()
        # the same in this process
        assert module.main(["by-hand" if word == "jobs" else word for word in command]) == 0
    assert records(workspace, "jobs") == records(workspace, "by-hand")
    # from a host whose precision would be another
    monkeypatch.setattr("lora_tradeoffs.hardware.pick_precision", other_precision)
    capfd.readouterr()
    assert main(arguments) == 0
    assert "2 steps: 2 done, 0 to run" in capfd.readouterr().out
    assert not slurm.jobs()


# ------------------------------------------------------------------- jobs that do not end well


def words_of(process):
    """The words of a process's command line, without folders."""
    try:
        return [Path(word).name for word in process.cmdline()]
    except psutil.Error:
        return []


class Study:
    """A study over SLURM in a process of its own: one run, whose training takes a while."""

    def __init__(self, slurm, workspace, flags, name, launch=SBATCH):
        self.slurm, self.workspace, self.name = slurm, workspace, name
        self.arguments = [*flags, "checkpoints=5", "batch_size=4", "--max-steps", "100"]
        self.arguments += ["--dtype", "fp32", "--only", "train", "--study", name]
        self.arguments += ["--launch", launch] * bool(launch)
        self.printed = workspace / f"{name}.txt"

    def start(self):
        with self.printed.open("a") as printed:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "run_study.py"), *self.arguments],
                env={**DEMO, **os.environ},
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )

    def wait_for_checkpoint(self):
        """The number of the job that trains, once it has saved one; it is halted then."""
        pattern = f"models/{self.name}/*/checkpoint-*/{MANIFEST}"
        wait_for(lambda: any(self.workspace.glob(pattern)))
        (number,) = self.slurm.jobs()
        words = {"multi_task_training.py", self.name}
        processes = [p for p in psutil.process_iter() if words <= set(words_of(p))]
        (self.training,) = processes
        self.training.suspend()
        return number

    def resume_at_signal(self):
        """Let the training go on once it has got a signal, which a halted process does not see."""
        status = Path(f"/proc/{self.training.pid}/status")

        def has_signal():
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
            return int(lines["ShdPnd"], 16) or not lines["State"].strip().startswith("T")

        wait_for(has_signal)
        self.training.resume()

    def end(self, code=0):
        assert self.process.wait(380) == code, self.text()

    def trained(self):
        """Validation losses and last weights of the run.

        Trainer's logged training loss is a mean since the last log, or since training was resumed.
        """
        (training,) = self.workspace.glob(f"models/{self.name}/*/training.json")
        (weights,) = checkpoints(training.parent)[-1].glob("*.safetensors")
        return read_json(training)["validation"], weights.read_bytes()

    def text(self):
        logs = self.workspace.glob(f"logs/{self.name}/steps/train-*.log")
        return self.printed.read_text() + "".join(log.read_text() for log in logs)

    def submitted(self):
        """How many jobs SLURM has had of the training step, requeued ones counted once."""
        listed = self.slurm.ask("squeue", "--noheader", "--states=all", "--format=%o")
        return listed.count(f"/{self.name}/steps/train-")


@pytest.fixture(scope="module")
def uninterrupted(slurm, workspace, flags):
    """What the same study trains without SLURM, and without an end before its time."""
    study = Study(slurm, workspace, flags, "uninterrupted", launch="")
    study.start()
    study.end()
    return study.trained()


@pytest.fixture
def study(slurm, workspace, flags, uninterrupted, request):
    """A function that starts a study, which must train what an uninterrupted one does."""
    name = re.sub(r"\W", "-", request.node.name.removeprefix("test_"))[:60]

    def begin(launch=SBATCH):
        study = begin.study = Study(slurm, workspace, flags, name, launch)
        study.start()
        return study

    yield begin
    begin.study.process.kill()  # if the test failed before it ended
    assert begin.study.trained() == uninterrupted
    assert not slurm.jobs()


@pytest.mark.slow
def test_a_job_that_was_killed_is_submitted_again(study, slurm):
    study = study()
    slurm.ask("scancel", study.wait_for_checkpoint())
    study.end()
    assert "stopped early, submitted again" in study.text() and study.submitted() == 2
    assert "resuming from checkpoint-" in study.text()


@pytest.mark.slow
def test_a_requeued_job_is_waited_for(study, slurm):
    study = study(f"{SBATCH} --requeue")
    number = study.wait_for_checkpoint()
    slurm.ask("scontrol", "requeue", number)
    study.resume_at_signal()
    wait_for(lambda: "PENDING" in slurm.ask("squeue", "--noheader", "--format=%T"))
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")  # not in two minutes
    study.end()
    assert "saved checkpoint-" in study.text() and study.submitted() == 1
    assert "resuming from checkpoint-" in study.text()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--signal=B:TERM@50", ""])
def test_a_job_at_its_time_limit_saves_and_is_submitted_again(study, slurm, options):
    study = study(f"{SBATCH} --time=30 {options}")
    number = study.wait_for_checkpoint()
    slurm.ask("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    study.resume_at_signal()
    study.end()
    assert "saved checkpoint-" in study.text() and study.submitted() == 2
    assert "resuming from checkpoint-" in study.text()


@pytest.mark.slow
def test_a_study_that_was_killed_finds_its_job_again(study, slurm):
    study = study()
    number = study.wait_for_checkpoint()
    study.process.kill()
    study.process.wait()
    study.start()
    wait_for(lambda: "waiting for job" in study.text())
    study.training.resume()
    study.end()
    assert "resuming" not in study.text()  # it ran on meanwhile
    assert f"waiting for job {number}, which was submitted before" in study.text()
    assert study.submitted() == 1
    study.start()
    study.end()
    assert study.submitted() == 1


@pytest.mark.slow
def test_ctrl_c_reaches_the_job(study, slurm):
    study = study()
    study.wait_for_checkpoint()
    study.process.send_signal(signal.SIGINT)
    study.resume_at_signal()
    study.end(130)
    assert "saved checkpoint-" in study.text() and not slurm.jobs()
    study.start()
    study.end()
    assert "resuming from checkpoint-" in study.text()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_the_job_at_once(study, slurm):
    """Even one that does not answer: the training is halted, and saves nothing."""
    study = study()
    study.wait_for_checkpoint()
    for times in (1, 2):
        study.process.send_signal(signal.SIGINT)
        wait_for(lambda times=times: study.text().count("Ctrl-C again stops now") >= times)
    study.end(130)
    assert not slurm.jobs() and not psutil.pid_exists(study.training.pid)
    study.start()
    study.end()
    assert "resuming from checkpoint-" in study.text()


@pytest.mark.slow
def test_a_job_with_the_whole_study_requeues_itself(slurm, workspace, flags, uninterrupted):
    study = Study(slurm, workspace, flags, "one-node", launch="")
    smaller = ["--gres=none", "--mem=0", "--cpus-per-task=1", f"--output={study.printed}"]
    command = ["sbatch", *smaller, str(ROOT / "examples" / "slurm" / "one_node.sh")]
    environment = {**DEMO, **os.environ, "WORKERS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([*command, *study.arguments], cwd=ROOT, env=environment, check=True)
    pattern = f"models/{study.name}/*/checkpoint-*/{MANIFEST}"
    wait_for(lambda: any(workspace.glob(pattern)))
    (number,) = slurm.jobs()
    slurm.ask("scancel", "--signal=TERM", "--batch", number)  # as before its time limit
    wait_for(lambda: "PENDING" in slurm.ask("squeue", "--noheader", "--format=%T"))
    slurm.ask("scontrol", "update", f"JobId={number}", "StartTime=now")
    wait_for(lambda: not slurm.jobs())
    assert study.trained() == uninterrupted, study.text()
    assert "resuming from checkpoint-" in study.text()
    assert "JobState=COMPLETED" in slurm.ask("scontrol", "show", "job", number)


@pytest.mark.slow
def test_what_slurm_refuses_is_named(slurm, flags, capfd):
    arguments = [*flags, "--study", "refused", "--max-steps", "4", "--only", "train"]
    assert main([*arguments, "--launch", f"{SBATCH} --partition=nowhere"]) == 1
    assert "Invalid partition name specified" in capfd.readouterr().err


# ------------------------------------------------------------------------- other commands


@pytest.mark.parametrize(
    ("launch", "part"),
    [
        ("no_such_command --wait", "no such command"),
        ("", "no such command"),
        ("sh 'unbalanced", "No closing quotation"),
        ("env sbatch -p gpu", "sbatch needs --wait"),
    ],
)
def test_a_command_that_cannot_submit_is_one_line(launch, part):
    with pytest.raises(UserError, match=part) as error:
        launch_words(launch)
    assert "--launch" in str(error.value)


def test_any_command_that_takes_a_script_can_launch(tmp_path, monkeypatch):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    (folder / "waits.py").write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(7))\n"
        "print(sys.argv[1:], os.environ['A'], flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.chdir(folder)
    for now, code in ((False, 7), (True, -signal.SIGKILL)):
        log = folder / f"step-{now}.log"
        job = Job(["env", "MARK=1", "sh"], ["-m", "waits", "a b", "$HOME"], log, {"A": "it's"})
        wait_for(lambda log=log: log.is_file() and "$HOME" in log.read_text(), 30)
        assert job.is_alive()
        job.stop(now)
        wait_for(lambda job=job: not job.is_alive(), 30)
        assert job.exitcode == code
        assert log.read_text() == "['a b', '$HOME'] it's\n"
