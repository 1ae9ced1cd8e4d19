"""Run multi_task_training.py and let something happen to it: a driver of the tests.

python interrupted_run.py MOMENT STEP ARGUMENT ...
"""

import os
import resource
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import multi_task_training
from lora_tradeoffs.training import trainer as multi_task_trainer
from lora_tradeoffs.training.trainer import MultiTaskTrainer, RunCallback

moment, step = sys.argv[1], int(sys.argv[2])


def at(step_now, action):
    if step_now == step:
        action()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name, action):
    """Let `action(self or module, *args)` happen before the method or function runs."""
    original = getattr(owner, name)

    def patched(*args, **kwargs):
        action(*args)
        return original(*args, **kwargs)

    setattr(owner, name, patched)


def on_step(action):
    before(RunCallback, "on_step_end", lambda s, args, state, c: at(state.global_step, action))


if moment == "killed-between-saves":
    on_step(killed)
elif moment == "killed-before-the-optimizer-is-saved":
    before(
        MultiTaskTrainer,
        "_save_optimizer_and_scheduler",
        lambda self, folder: at(self.state.global_step, killed),
    )
elif moment == "killed-before-the-manifest":
    before(
        multi_task_trainer,
        "write_manifest",
        lambda folder: at(int(folder.name.split("-")[1]), killed),
    )
elif moment == "terminated":
    on_step(lambda: os.kill(os.getpid(), signal.SIGTERM))
elif moment == "disk-full":
    # a file-size limit is what a process can impose upon itself; its error is a full disk's
    limit = (2_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    on_step(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
else:
    sys.exit(f"unknown moment {moment}")

sys.exit(multi_task_training.main(sys.argv[3:]))
