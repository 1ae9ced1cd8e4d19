"""Names and fields of records that the part that measures and the part that reports share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from config import DOCUMENTS, Settings
from lora_tradeoffs.files import write_json
from training_configs import tasks_and_variant

Record = dict[str, Any]

RECORD_VERSION = 2
OLD_VERSIONS = (1,)  # without `tasks` and `variant`, which `updated` adds

# -------------------------------------------------------------------- who a record is about

# A record is flat. It says who it is about (study, base_model, run, family, tasks, TRAINED,
# variant, step, fraction), then what was measured: split, task, metric, value, stderr, low, high,
# n, and columns of its script's own. `tasks` is the family's name for all of its tasks, else
# their names joined by "+"; `variant` is what the run's name says beside tasks, method, target
# modules, rate and seed: "steps4_fp32". A run from elsewhere has tasks "", and its name is its
# variant.

# How a run was trained, by its configuration; 0 or "" for the base and baselines.
TRAINED = ("method", "rank", "alpha", "scaling", "target_modules", "learning_rate", "seed")


def unit_name(run: str, step: int, *parts: str) -> str:
    """The name of a unit's files: run, step and what was measured (empty parts are left out)."""
    return "-".join([run, str(step), *filter(None, parts)])


def run_fields(run: str, config: Mapping[str, Any]) -> Record:
    """The columns that say how a run was trained, from its name and its configuration."""
    tasks, variant = tasks_and_variant(run, config)
    return {name: config[name] for name in TRAINED} | {"tasks": tasks, "variant": variant}


def updated(record: Record) -> Record:
    """The record with `tasks` and `variant`, which records of version 1 lack."""
    if "variant" in record:
        return record
    tasks = variant = ""
    if record["method"] not in ("base", "baseline"):
        tasks, variant = tasks_and_variant(record["run"], record)
    return record | {"tasks": tasks, "variant": variant}


# -------------------------------------------------------------------------------- retention

TEXT = "text_"  # before a source of held-out text

# ------------------------------------------------------------------------------- gradients

OVERALL, BOTH = -1, "both"  # the layer, and the module, of records over all of them
MEAN = "mean"  # the task of records over all pairs


def metric_scale(metric: str) -> int:
    """The upper end of a metric's scale: 100 for BLEU, 1 for every other."""
    return 100 if "bleu" in metric else 1


def forget(settings: Settings, run: str) -> int:
    """Remove what a study's analyses measured of a run of this name; the number of units.

    For a run that is trained anew: what was measured of the one before would stand beside what is
    measured of it, as if it were its own.
    """
    units = 0
    for document in map(settings.document, DOCUMENTS):
        for path in document.parent.glob(f"*/{run}-*"):
            units += path.parent.name == "records"
            path.unlink()
        _leave_out(run, document)
    return units


def _leave_out(run: str, document: Path) -> None:
    """Take a run's records out of a joined document, those of two runs too, as phi's are."""
    try:
        whole = json.loads(document.read_text(encoding="utf-8"))
        kept = [record for record in whole["records"] if run not in record.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # not there; or not as written, and the next join writes it anew
    if len(kept) < len(whole["records"]):
        write_json(document, {**whole, "records": kept})
