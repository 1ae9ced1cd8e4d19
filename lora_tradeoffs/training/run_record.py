"""What a run leaves about itself: its record, and how two records differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_tradeoffs.data.preparation import PreparedTask
    from lora_tradeoffs.models.base import Base
    from training_configs import TrainingConfig

RECORD_VERSION = 1


def run_record(
    name: str,
    config: TrainingConfig,
    base: Base,
    prepared: dict[str, PreparedTask],
    shares: Any,
    steps: int,
    grid: list[int],
) -> dict[str, Any]:
    """The contents of run.json, but for the environment."""
    return {
        "record_version": RECORD_VERSION,
        "run": name,
        "config": config.record(),
        "compared": config.compared(),
        "base": base.record,
        "steps": steps,
        "checkpoint_steps": grid,
        "task_weights": _task_weights(config, prepared, shares),
        "data": {task: p.report for task, p in prepared.items()},
    }


def _task_weights(
    config: TrainingConfig, prepared: dict[str, PreparedTask], shares: Any
) -> dict[str, dict[str, float]]:
    """Each task's share of the examples, of the supervised tokens, and so of the loss."""
    tokens = {}
    for task, share in zip(config.tasks, shares):
        train = prepared[task].report["splits"]["train"]
        tokens[task] = share * train["supervised_tokens"] / train["rows"]
    total = sum(tokens.values())
    return {
        task: {
            "examples": round(float(share), 4),
            "supervised_tokens": round(float(tokens[task] / total), 4),
            "loss": round(
                float(share if config.loss_weighting == "example" else tokens[task] / total), 4
            ),
        }
        for task, share in zip(config.tasks, shares)
    }


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two records of a run: what forbids going on, and what is a warning."""
    environments = [
        {**record["environment"], **record["environment"]["versions"], "versions": None}
        for record in (old, new)
    ]
    return different_settings(old, new), _changed(*environments)


def different_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The settings, base and data in which two records of a run differ."""
    changes = _changed(old["compared"], new["compared"])
    if old["base"]["digest"] != new["base"]["digest"]:
        changes.append(f"base model {old['base']['name']} -> {new['base']['name']}, other weights")
    return changes + _changed(
        {f"data of {task}": report["fingerprint"] for task, report in old["data"].items()},
        {f"data of {task}": report["fingerprint"] for task, report in new["data"].items()},
    )


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [
        f"{key} {old.get(key)} -> {new.get(key)}"
        for key in {**old, **new}
        if old.get(key) != new.get(key)
    ]
