"""Steps as jobs of a cluster's scheduler, submitted by any command that takes a script and waits.

A job of SLURM's is found again by a later start of the study, and Ctrl-C reaches it. With other
schedulers the lock of a run prevents that two jobs train it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from config import ROOT, UserError

SCRIPT = """#!/bin/sh
cd {}
export PYTHONPATH={}${{PYTHONPATH:+:$PYTHONPATH}} {}
exec >> {} 2>&1
exec {}
"""  # exec: signals reach Python
# waits for a job that an earlier start has submitted, also while SLURM's controller is away
WAIT = """
while ! jobs=$(squeue --me --noheader --format=:%i:) || [ "${jobs#*:$0:}" != "$jobs" ]
do sleep 5; done
"""


def launch_words(text: str) -> list[str]:
    """The words of --launch. Raises UserError for a command that is missing or does not wait."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launch {text}: {error}") from None
    if not words or not shutil.which(words[0]):
        raise UserError(f"--launch {text}: this machine has no such command")
    if is_slurm(words) and not {"--wait", "-W"} & set(words):
        raise UserError("--launch: sbatch needs --wait, else it ends before the job has begun")
    return words


def is_slurm(launch: Sequence[str]) -> bool:
    return any(Path(word).name == "sbatch" for word in launch)


def ask(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


class Job(subprocess.Popen):
    """A step that a scheduler runs: the process that waits for it.

    <step>.sh, the script, and <step>.job, what the launching command printed (SLURM: the job's
    number), lie beside the log. Raises UserError if SLURM does not answer.
    """

    def __init__(
        self, launch: Sequence[str], command: Sequence[str], log: Path, variables: dict[str, str]
    ) -> None:
        self.script, self.is_slurm = log.with_name(f"{log.stem}.sh"), is_slurm(launch)
        self.exitcode: int | None = None
        head = [] if command[0] == "-m" else [str(ROOT / command[0])]
        words = [sys.executable, *head, *command[len(head) :]]
        cwd, root, output = map(shlex.quote, (os.getcwd(), str(ROOT), str(log)))
        exports = shlex.join(f"{name}={value}" for name, value in variables.items())
        text = SCRIPT.format(cwd, root, exports, output, shlex.join(words))
        self.script.write_text(text, encoding="utf-8")
        words, mode = [*launch, str(self.script)], "w"
        if number := self._number():
            print(f"{log.stem}: waiting for job {number}, which was submitted before", flush=True)
            words, mode = ["sh", "-c", WAIT, number], "a"
        # the log also gets what SLURM itself has to say, unless the user wants that elsewhere
        environment = {"SBATCH_OUTPUT": str(log), "SBATCH_OPEN_MODE": "append", **os.environ}
        with self.script.with_suffix(".job").open(mode) as printed, log.open("a") as errors:
            files = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": errors}
            # a session of its own: Ctrl-C reaches the job through `stop` alone
            super().__init__(words, env=environment, start_new_session=True, **files)

    def _number(self) -> str:
        """SLURM's number of a job of this script that waits or runs, or ""."""
        if not self.is_slurm:
            return ""
        squeue = ask("squeue", "--me", "--noheader", "--format=%i %o")
        if squeue.returncode:
            raise UserError(f"SLURM does not answer: {' '.join(squeue.stderr.split())}")
        number = re.search(rf"^(\d+) {re.escape(str(self.script))}$", squeue.stdout, re.M)
        return number[1] if number else ""

    def is_alive(self) -> bool:
        """Whether the job waits or runs; if it does not, `exitcode` is set."""
        if self.exitcode is None and self.poll() is not None:
            self.exitcode = self.returncode
            if self.is_slurm and not self.exitcode:  # as sbatch has it for a job that was killed
                number = re.search(r"\d+", self.script.with_suffix(".job").read_text())
                shown = ask("scontrol", "show", "job", number[0] if number else "0").stdout
                self.exitcode = int("JobState=" in shown and "JobState=COMPLETED" not in shown)
        return self.exitcode is None

    def stop(self, now: bool) -> None:
        """End the job: well, so that training saves a checkpoint, or at once."""
        if not self.is_slurm:
            os.killpg(self.pid, signal.SIGKILL) if now else self.send_signal(signal.SIGINT)
            return
        while not (number := self._number()) and self.is_alive():
            time.sleep(0.1)  # it is being submitted
        ways = [[]] if now else [["--state=PENDING"], ["--signal=INT", "--batch"]]
        for options in ways if number else []:  # without a number scancel would take all jobs
            ask("scancel", *options, number)
