"""run.json: what decides a run's result, and how two such records differ; the run's summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from config import Settings
from dataset_descriptions import own_definitions
from training_configs import TrainingConfig

if TYPE_CHECKING:
    from lora_tradeoffs.models.base import Base
    from lora_tradeoffs.training.schedule import Schedule

RECORD_VERSION = 1


def run_record(name: str, default_rate: float, base: Base, schedule: Schedule) -> dict[str, Any]:
    """The contents of run.json, without the environment."""
    config = schedule.config
    return {
        "record_version": RECORD_VERSION,
        "run": name,
        "default_learning_rate": default_rate,
        "config": config.record(),
        "compared": config.compared(),
        "base": base.record,
        "steps": schedule.steps,
        "checkpoint_steps": schedule.checkpoint_steps,
        "task_weights": _task_weights(schedule),
        "data": {task: prepared.report for task, prepared in schedule.prepared.items()},
        **own_definitions([config.family]),
    }


def _task_weights(schedule: Schedule) -> dict[str, dict[str, float]]:
    """Each task's share of the examples, of the supervised tokens, and of the loss."""
    tokens = {}
    for (task, prepared), share in zip(schedule.prepared.items(), schedule.shares, strict=True):
        train = prepared.report["splits"]["train"]
        tokens[task] = share * train["supervised_tokens"] / train["rows"]
    weights = {}
    for task, share in zip(tokens, schedule.shares, strict=True):
        of_tokens = tokens[task] / sum(tokens.values())
        of_loss = share if schedule.config.loss_weighting == "example" else of_tokens
        shares = {"examples": share, "supervised_tokens": of_tokens, "loss": of_loss}
        weights[task] = {name: round(float(value), 4) for name, value in shares.items()}
    return weights


def shares_line(name: str, weights: dict[str, dict[str, float]]) -> str:
    """The tasks' shares as one line."""
    parts = [
        f"{task} {w['examples']:.0%} of the examples, {w['supervised_tokens']:.0%} of the"
        f" supervised tokens, {w['loss']:.0%} of the loss"
        for task, w in weights.items()
    ]
    return f"{name}: {'; '.join(parts)}"


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The differences between two records of a run: those that forbid resuming, and the others."""
    environments = [
        {**record["environment"], **record["environment"].get("versions", {}), "versions": None}
        for record in (old, new)
    ]
    return different_settings(old, new), changed(*environments)


def different_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings, base and data in which two records of a run differ."""
    changes = changed(old["compared"], new["compared"])
    if old["base"]["digest"] != new["base"]["digest"]:
        changes.append(f"base model {old['base']['name']} -> {new['base']['name']}, other files")
    return changes + changed(
        {f"data of {task}": report["fingerprint"] for task, report in old["data"].items()},
        {f"data of {task}": report["fingerprint"] for task, report in new["data"].items()},
    )


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields in which two records differ, with both values."""
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]


def summary(config: TrainingConfig, training: dict[str, Any], settings: Settings) -> str:
    """Validation loss and accuracy per task before and after, and where the files are."""
    import pandas as pd

    name = training["run"]
    first, last = training["validation"][0], training["validation"][-1]
    rows = {}
    for task in config.tasks:
        keys = {"loss": f"eval_{task}_loss", "accuracy": f"eval_{task}_accuracy"}
        rows[task] = {
            f"{metric} before -> after": f"{first[key]:.3f} -> {last[key]:.3f}"
            for metric, key in keys.items()
            if key in last
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("validation", axis=1)
    table = table.fillna("-")
    return (
        f"{name}: {training['steps']} steps, {training['examples_per_second']:.1f} examples/s\n"
        f"{table.to_string()}\n"
        f"checkpoints, run.json, training.json: {settings.runs_dir / name}\n"
        f"log and TensorBoard files: {settings.logs_dir / name}\n"
        f"base model: {settings.bases_dir}; prepared data: {settings.prepared_dir}"
    )
