"""The task files that travel inside a study's file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from config import TASKS, Settings, UserError
from lora_tradeoffs.files import write_text
from lora_tradeoffs.study.study_file import StudyPlan, as_yaml
from lora_tradeoffs.task_yaml import task_files


def check_task_files(given: Mapping[str, Any], plan: StudyPlan, settings: Settings) -> None:
    """Raise UserError if a task file that was found is another than the study's file has."""
    for name, carried in given.get("task_files", {}).items():
        if name in TASKS:
            raise UserError(f"task_files: {name} is a built-in task; leave it out")
        if plan.task_files.get(name, carried) != carried:
            found = task_files(settings).get(name, "the one that is known")
            raise UserError(f"task_files: {name} differs from {found}; remove or rename one")


def write_task_files(plan: StudyPlan, settings: Settings) -> None:
    """Write the task files that only the study's file has, for the processes of its steps."""
    for name in sorted(plan.task_files.keys() - task_files(settings).keys()):
        path = settings.tasks_dir / f"{name}.yaml"
        write_text(path, as_yaml(plan.task_files[name]))
        print(f"task {name}: its file was written to {path}")
