"""What the runs cost: time, memory, disk, trained parameters; and what they gain for it.

    costs = cost_table(settings.runs_dir)
    print(arm_costs(costs))
    points = gain_costs(settings.runs_dir, retention, adaptation)

All of it comes from run.json, training.json and the checkpoints' manifests. Times and memory of
other hardware are other quantities: `device` stands in every row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FAMILIES, UserError
from lora_tradeoffs.files import checkpoint_step
from lora_tradeoffs.tables.arms import Arm, arm_of
from lora_tradeoffs.tables.retention import gains
from training_configs import tasks_and_variant

if TYPE_CHECKING:
    from pandas import DataFrame

FIGURES = ("seconds", "examples_per_second", "tokens", "peak_memory_bytes", "trainable_parameters")
COLUMNS = (
    *("run", "family", "tasks", "arm", "seed", "steps", *FIGURES, "trainable_share"),
    *("checkpoint_bytes", "disk_bytes", "device"),
)
POINTS = ("run", "family", "arm", "seed", "step", "fraction", "seconds", "tokens", "gain", "stderr")
WEIGHTS = ".safetensors"


def cost_table(runs_dir: Path) -> DataFrame:
    """A row for each run that is done; empty if there is none. Raises UserError, naming the file,
    for a record that no run writes; one that is not whole is passed over.

    `seconds` are of training without validating and saving, `tokens` all that were trained on
    (prompts and completions, without padding), `peak_memory_bytes` allocated on the GPU, or
    resident.
    `checkpoint_bytes` are the weights of one checkpoint, `disk_bytes` all files of the run.
    """
    import pandas as pd

    rows = []
    for folder in sorted(path.parent for path in runs_dir.glob("*/training.json")):
        record, training = _read(folder / "run.json"), _read(folder / "training.json")
        if not record or not training:
            continue
        config = _config(folder / "run.json", record)
        _check_figures(folder / "training.json", training)
        row = {name: training.get(name) for name in ("steps", *FIGURES)}
        row |= {"run": folder.name, "family": config["family"], "seed": config["seed"]}
        row["tasks"], variant = tasks_and_variant(folder.name, config)
        row["arm"] = arm_of({**config, **row, "variant": variant})
        parameters = training.get("base_parameters")
        if parameters and row["trainable_parameters"]:
            row["trainable_share"] = row["trainable_parameters"] / parameters
        row["checkpoint_bytes"] = _weights(folder)
        row["disk_bytes"] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        row["device"] = record.get("environment", {}).get("device_name")
        rows.append(row)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def arm_costs(costs: DataFrame) -> DataFrame:
    """Means over an arm's seeds, in units to read, with the number of seeds; a row an arm."""
    import pandas as pd

    shown = {
        "minutes": ("seconds", 1 / 60),
        "examples/s": ("examples_per_second", 1),
        "million tokens": ("tokens", 1e-6),
        "peak memory (GB)": ("peak_memory_bytes", 1e-9),
        "trained parameters (million)": ("trainable_parameters", 1e-6),
        "trained share (%)": ("trainable_share", 100),
        "checkpoint (MB)": ("checkpoint_bytes", 1e-6),
        "run on disk (GB)": ("disk_bytes", 1e-9),
    }
    numbers = {name: unit * pd.to_numeric(costs[key]) for name, (key, unit) in shown.items()}
    keys = ["family", "arm", "device"]
    table = costs[keys].fillna("unknown").assign(**numbers)
    grouped = table.groupby(keys)
    means = grouped.mean().assign(seeds=grouped.size()).reset_index()
    return means.sort_values(
        keys,
        key=lambda s: s.map([*FAMILIES].index) if s.name == "family" else s,
        ignore_index=True,
    )


def gain_costs(
    runs_dir: Path, retention: DataFrame | None = None, adaptation: DataFrame | None = None
) -> DataFrame:
    """A row for each checkpoint of the runs that are done: its gain, and what it had cost by then.

    The gain is the mean over the family's tasks of the validation score minus the base's. Seconds
    are the checkpoint's own, from its manifest, else the run's in proportion to its steps; tokens
    are always in proportion: every batch draws from the same mixture. Single-task controls have no
    gain over the family, and are left out.
    """
    import pandas as pd

    costs = cost_table(runs_dir).set_index("run")
    arms: dict[str, Arm] = {}  # as the frames call them: at a chosen learning rate, plainly
    for frame in (retention, adaptation):
        arms |= {} if frame is None else dict(zip(frame["run"], frame["arm"]))
    costs = costs.assign(**{n: pd.to_numeric(costs[n]) for n in ("steps", *FIGURES)})
    rows = []
    found = gains(retention, adaptation)
    for point in found[found["update_scale"] == 1].itertuples():
        if point.run not in costs.index or costs.loc[point.run, "tasks"] not in FAMILIES:
            continue
        run = costs.loc[point.run]
        fraction = point.step / run["steps"]
        manifest = _read(runs_dir / point.run / f"checkpoint-{point.step}" / "manifest.json") or {}
        seconds = manifest.get("seconds", fraction * run["seconds"])
        about = (point.run, run["family"], arms[point.run], run["seed"], point.step, fraction)
        rows.append((*about, seconds, fraction * run["tokens"], point.value, point.stderr))
    return pd.DataFrame(rows, columns=list(POINTS)).sort_values(["run", "step"], ignore_index=True)


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if it is not there or not whole."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _config(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    config = record.get("config")
    names = {"family", "method", "rank", "seed"}
    if isinstance(config, dict) and names <= config.keys() and config["family"] in [*FAMILIES]:
        return config
    raise UserError(f"{path} holds no configuration of a run; was it edited? put it back")


def _check_figures(path: Path, training: dict[str, Any]) -> None:
    for name in ("steps", *FIGURES, "base_parameters"):
        value = training.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise UserError(f"{path}: {name} is {value!r}, no number; was it edited? put it back")


def _weights(folder: Path) -> int | None:
    """Bytes of the weights of the last checkpoint, from its manifest; None if it does not say."""
    manifests = {checkpoint_step(p.parent): p for p in folder.glob("checkpoint-*/manifest.json")}
    if not manifests:
        return None
    files = (_read(manifests[max(manifests)]) or {}).get("files", {})
    try:
        return sum(entry["size"] for name, entry in files.items() if name.endswith(WEIGHTS)) or None
    except (AttributeError, KeyError, TypeError):  # nobody's manifest: the checkpoint is not whole
        return None
