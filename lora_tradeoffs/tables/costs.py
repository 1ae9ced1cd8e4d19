"""What the runs cost: time, memory, disk, trained parameters; and what they gain for it.

    costs = cost_table(settings.runs_dir)
    print(arm_costs(costs))
    points = gain_costs(settings.runs_dir, retention, adaptation)

All of it comes from run.json, training.json and the checkpoints' manifests. Times and memory of
other hardware are other quantities: `device` stands in every row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.checkpoints import MANIFEST, checkpoints, read_manifest
from lora_tradeoffs.records import read_run, read_training
from lora_tradeoffs.tables.arms import arm_of, arms_by_run
from lora_tradeoffs.tables.frames import in_order
from lora_tradeoffs.tables.retention import gains
from training_configs import tasks_and_variant

if TYPE_CHECKING:
    from pandas import DataFrame

NUMBERS = ("seconds", "examples_per_second", "tokens", "peak_memory_bytes", "trainable_parameters")
COLUMNS = (
    *("run", "family", "tasks", "arm", "seed", "steps", *NUMBERS, "trainable_share"),
    *("checkpoint_bytes", "disk_bytes", "device"),
)
POINTS = ("run", "family", "arm", "seed", "step", "fraction", "seconds", "tokens", "gain", "stderr")


def cost_table(runs_dir: Path) -> DataFrame:
    """A row for each finished run; empty if there is none.

    `seconds` are those of training, without validation and saving; `tokens` all that were trained
    on (prompts and completions, without padding); `peak_memory_bytes` allocated on the GPU, on a
    CPU resident. `checkpoint_bytes` are the weights of one checkpoint, `disk_bytes` all files of
    the run's checkpoints, by their manifests. Raises UserError for a file that is damaged.
    """
    import pandas as pd

    rows = []
    for folder in sorted(path.parent for path in runs_dir.glob("*/training.json")):
        record, training = read_run(folder, "config"), read_training(folder)
        row = training | _who(folder.name, record["config"])
        files = [m["files"] for m in map(_manifest, checkpoints(folder)) if m]
        row["checkpoint_bytes"] = _bytes(files[-1:], ".safetensors") or None
        row["disk_bytes"] = _bytes(files)
        row["device"] = record.get("environment", {}).get("device_name")
        rows.append(row)
    table = pd.DataFrame(rows, columns=[*COLUMNS, "base_parameters"])
    numbers = [*NUMBERS, "steps", "base_parameters"]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce")
    table["trainable_share"] = table["trainable_parameters"] / table["base_parameters"]
    return table[list(COLUMNS)]


def _who(run: str, config: dict[str, Any]) -> dict[str, Any]:
    tasks, variant = tasks_and_variant(run, config)
    fields = {"run": run, "tasks": tasks, "family": config["family"], "seed": config["seed"]}
    return fields | {"arm": arm_of({**config, **fields, "variant": variant})}


def arm_costs(costs: DataFrame) -> DataFrame:
    """Means over an arm's seeds, in units to read, with the number of seeds; a row an arm."""
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
    numbers = {name: unit * costs[key].astype(float) for name, (key, unit) in shown.items()}
    keys = ["family", "arm", "device"]
    table = costs[keys].fillna("unknown").assign(**numbers)
    grouped = table.groupby(keys)
    return in_order(grouped.mean().assign(seeds=grouped.size()).reset_index(), *keys)


def gain_costs(
    runs_dir: Path, retention: DataFrame | None = None, adaptation: DataFrame | None = None
) -> DataFrame:
    """A row for each checkpoint of the finished runs: its gain, and what it had cost by then.

    The gain is the mean over the family's tasks of the validation score minus the base's. Seconds
    are the checkpoint's own, from its manifest, else the run's in proportion to its steps; tokens
    are always in proportion: every batch draws from the same mixture. Single-task controls have no
    gain over the family, and are left out.
    """
    costs = cost_table(runs_dir)
    costs = costs[costs["tasks"] == costs["family"]].drop(columns="arm")
    gain = gains(retention, adaptation).rename(columns={"value": "gain"})
    gain = gain[gain["update_scale"] == 1].drop(columns="family")
    points = gain.merge(costs, on="run")
    points["fraction"] = points["step"] / points["steps"].astype(float)
    # as in the frames: a swept arm at its chosen learning rate has its plain label
    points["arm"] = points["run"].map(arms_by_run(retention, adaptation))
    points["tokens"] *= points["fraction"]
    proportional = points["fraction"] * points["seconds"]
    folders = [runs_dir / p.run / f"checkpoint-{p.step}" for p in points.itertuples()]
    manifests = [_manifest(folder) for folder in folders]
    points["seconds"] = [m.get("seconds", s) for m, s in zip(manifests, proportional)]
    return points[list(POINTS)].sort_values(["run", "step"], ignore_index=True)


def _manifest(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint) if (checkpoint / MANIFEST).is_file() else {}


def _bytes(manifests: Sequence[Mapping[str, Any]], suffix: str = "") -> int:
    """Bytes of the files that manifests list, of those with the suffix."""
    files = ((n, entry) for files in manifests for n, entry in files.items())
    return sum(entry["size"] for name, entry in files if name.endswith(suffix))
