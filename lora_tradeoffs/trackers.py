"""Experiment trackers that Trainer integrates: TensorBoard, W&B, MLflow, Trackio and others.

They know a run by its own name, the study as its project and the arm as its group or tag, where
they have such. The variables of a tracker that the user has set beat ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from config import UserError
from training_configs import TrainingConfig

LEAVE_A_RUN_OPEN = ("wandb", "swanlab")  # their callbacks do, and the next run would join it


class TrackedArguments(TrainingArguments):
    """Trainer's arguments, of which the trackers get `told` alone: no places of this machine."""

    told: Any = None

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() if self.told is None else self.told


def track(arguments: TrackedArguments, study: str, run: str, record: Mapping[str, Any]) -> None:
    """Have Trainer report the run, as its configuration, `record`, has it."""
    arguments.report_to = tracker_names(record["report_to"])
    arguments.project, arguments.run_name = study, run
    arguments.told = {
        name: Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
        for name, value in record.items()
    }


def tracker_names(report_to: str) -> list[str]:
    """The trackers of a value such as "tensorboard,trackio"; [] of "none".

    Without TensorBoard, the default, there are none, either.

    Raises UserError for one that Trainer does not integrate, or that is not installed.
    """
    names = [name.strip() for name in report_to.split(",")]
    if names in (["none"], [""]):
        return []
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            allowed = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"report_to: {name!r:.60} is none of {allowed}; or write none")
        if name not in get_available_reporting_integrations():
            if report_to == TrainingConfig.report_to:  # nobody asked for it
                return []
            raise UserError(
                f"report_to: {name} is not installed; pip install {name}, or --set report_to=none"
            )
    return names


def variables(study: str, run: str, logs: Path) -> dict[str, str]:
    """What the trackers read from the environment."""
    arm, identity = run.rpartition("_seed")[0] or run, str(logs.resolve()).encode()
    return {
        "WANDB_PROJECT": study,
        "WANDB_RUN_GROUP": arm,
        "WANDB_RUN_ID": hashlib.sha256(identity).hexdigest()[:16],
        "WANDB_RESUME": "allow",
        "MLFLOW_EXPERIMENT_NAME": study,
        "MLFLOW_TAGS": json.dumps({"arm": arm}),
        "COMET_PROJECT_NAME": study,
        "SWANLAB_PROJECT": study,
        "CLEARML_PROJECT": study,
        "CLEARML_TASK": run,
    }


@contextmanager
def tracked_run(study: str, run: str, logs: Path) -> Iterator[None]:
    """What the trackers' callbacks report in the block is of this run."""
    ours = {name: v for name, v in variables(study, run, logs).items() if name not in os.environ}
    os.environ.update(ours | {"TENSORBOARD_LOGGING_DIR": str(logs)})
    try:
        yield
    finally:
        for name in LEAVE_A_RUN_OPEN:
            with suppress(Exception):  # without a run it may raise
                sys.modules[name].finish()
        for name in ours:
            os.environ.pop(name, None)


def send(
    report_to: str, study: str, run: str, logs: Path, by_step: Mapping[int, Mapping[str, float]]
) -> None:
    """Report a run's scores by step, after its training, in another process."""
    arguments = TrackedArguments(output_dir=str(logs), use_cpu=True)
    track(arguments, study, run, {"report_to": report_to})
    arguments.told = {}  # the trackers know it already
    state, control = TrainerState(), TrainerControl()
    with tracked_run(study, run, logs):
        for kind in get_reporting_integration_callbacks(arguments.report_to):
            callback = kind()
            for state.global_step in sorted(by_step):
                callback.on_log(arguments, state, control, logs=dict(by_step[state.global_step]))
            callback.on_train_end(arguments, state, control)
