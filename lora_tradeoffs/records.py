"""Names and fields of records that the part that measures and the part that reports share."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from config import DOCUMENTS, FAMILIES, Settings, UserError
from dataset_descriptions import learn
from lora_tradeoffs.files import read_head, read_json, read_records, write_records
from lora_tradeoffs.shapes import NUMBER
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


# ------------------------------------------------------------------------------- adaptation

# A row's mean negative log-likelihood over its completion's tokens and EOS, in nats: the mean over
# rows is the validation loss of training. Recorded of the validation split, without examples in the
# prompt.
LOSS = "loss"

# -------------------------------------------------------------------------------- retention

TEXT = "text_"  # before a source of held-out text
PRIMARY = ("acc_norm", "acc", "log_likelihood")
# The tasks of records over several: all held-out text that a run was not trained on, the benchmarks
# on which the base is above chance, and all benchmarks (MEAN, below).
HELD_OUT, ABOVE_CHANCE = "text", "mean_above_chance"
# Records of a checkpoint of which some singular directions were shrunk have columns of their own:
# `shrunk` says which directions, `shrink` is the factor of their singular values.
INTRUDERS, CONTROL, CHECKPOINT = "intruders", "control", "checkpoint"
# Forgetting where two runs have learned as much, by what is equal on validation: score or LOSS.
MATCHED = {"score": "matched_forgetting", "loss": "loss_matched_forgetting"}
LEARNED = "adaptation"  # the task of a mean over the trained tasks, beside outcomes of forgetting
AS_MEASURED = {"update_scale": 1.0, "shrunk": "", "shrink": 1.0}  # of the checkpoint as it is


def primary(metrics: Iterable[str]) -> str:
    """The metric by which a benchmark is compared: acc_norm if it has one, else acc, else the first
    of its definition.
    """
    metrics = list(metrics)
    return next((name for name in PRIMARY if name in metrics), metrics[0])


# ------------------------------------------------------------------------------- gradients

OVERALL, BOTH = -1, "both"  # the layer, and the module, of records over all of them
MEAN = "mean"  # the task of records over all pairs


def metric_scale(metric: str) -> int:
    """The upper end of a metric's scale: 100 for BLEU, 1 for every other."""
    return 100 if "bleu" in metric else 1


# ------------------------------------------------------------------------- files of JSON

VALUE = (*NUMBER, type(None))
# Families and tasks of one's own, as run.json and the documents' meta have them.
OWN = {"families": {"*": [str]}, "tasks": {"*": dict}}
UNIT = {"request": dict, "records": [{"run": str, "step": int, "metric": str, "value": VALUE}]}
STUDY = {  # outputs/<study>/study.json; the arms that were planned, by family
    **{"preset": str, "model": str, "data": str},
    "digests?": {"*": str},
    "arms?": {"*": [{"method": str, "rank": int, "variant?": str}]},
}
DOCUMENT = {"meta": {"preset?": str, "own?": OWN}, "records": [{"value?": VALUE}]}
RUN = {
    "config": {
        **{"family": str, "tasks": [str], "method": str, "rank": int, "alpha": NUMBER},
        **{"scaling": str, "target_modules": str, "learning_rate": NUMBER, "seed": int},
        **{"max_length?": int, "batch_size?": int},
        **{"apply_chat_template?": bool, "system_instruction?": str},
    },
    "task_weights": {"*": {"examples": NUMBER}},
    "compared": dict,
    "base": {"name": str, "digest": str, "files?": dict},
    "steps": int,
    "data": {"*": {"fingerprint": str}},
    "environment": {"versions?": dict},
    "own?": OWN,
}
TRAINING = {
    "steps": int,
    "seconds": NUMBER,
    "wall_seconds": NUMBER,
    "validation": [{"step": int, "eval_loss": NUMBER}],
}


def read_run(folder: Path, *needed: str) -> dict[str, Any]:
    """The run.json of a run's folder. Raises UserError if it is damaged or lacks what is needed."""
    remedy = "restore it, or retrain the run with --overwrite"
    record = read_json(folder / "run.json", _with_optional(RUN, needed), remedy)
    learn(record.get("own", {}))
    family = record.get("config", {}).get("family")
    if family is not None and not FAMILIES.get(family):
        problem = f"its family {family!r:.40} has no tasks"
        raise UserError(f"{folder / 'run.json'} is damaged: {problem}; {remedy}")
    return record


def run_configs(runs_dir: Path) -> dict[str, dict[str, Any]]:
    """The configurations of a study's runs by name; what measures a damaged run names it."""
    configs = {}
    for path in sorted(runs_dir.glob("*/run.json")):
        with suppress(UserError):
            configs[path.parent.name] = read_run(path.parent, "config")["config"]
    return configs


def read_training(folder: Path, *needed: str) -> dict[str, Any]:
    """The training.json of a run's folder. Raises UserError as `read_run` does."""
    return read_json(folder / "training.json", _with_optional(TRAINING, needed))


def _with_optional(shape: dict[str, Any], needed: Collection[str]) -> dict[str, Any]:
    return {n if n in needed or n[-1] == "?" else f"{n}?": part for n, part in shape.items()}


# ------------------------------------------------------------------- the results of a run


def units_of(runs: Collection[str], records: Path) -> list[str]:
    """Names of the units in a folder of records that are of one of the runs.

    A unit's name may begin like that of another run, so its records say whose it is. Of a damaged
    file the name has to: <run>-<step>-<what>, where what was measured begins with no digit.
    """
    prefixes = tuple(f"{run}-" for run in runs)

    def is_theirs(path: Path) -> bool:
        try:
            return bool({record["run"] for record in read_json(path, UNIT)["records"]} & {*runs})
        except UserError:
            rests = [path.stem[len(p) :] for p in prefixes if path.stem.startswith(p)]
            return any(re.match(r"\d+(-\D|$)", rest) for rest in rests)

    paths = sorted(records.glob("*.json"))
    return [path.stem for path in paths if path.name.startswith(prefixes) and is_theirs(path)]


def forget(settings: Settings, run: str) -> int:
    """Remove what a study's analyses measured of a run of this name; the number of units.

    For a run that is trained anew: what was measured of the one before would stand beside what is
    measured of it, as if it were its own.
    """
    removed = 0
    for document in map(settings.document, DOCUMENTS):
        folder = document.parent
        units = units_of([run], folder / "records")
        removed += len(units)
        files = [path for path in folder.glob("*/*") if path.stem in units]
        # tables of drift that were written just before a kill have no records
        files += [path for path in folder.glob("*/*") if _is_orphan(path, folder, run)]
        # records last: until all else is gone they say whose it is
        for path in sorted(files, key=lambda path: path.parent.name == "records"):
            path.unlink()
        if document.is_file():
            _leave_out(run, document)
    return removed


def _is_orphan(path: Path, folder: Path, run: str) -> bool:
    """Whether a file, <run>-<step>, is of the run and of no unit with records."""
    name, _, step = path.stem.rpartition("-")
    records = folder / "records" / f"{path.stem}.json"
    return name == run and step.isdigit() and not records.exists()


def _leave_out(run: str, document: Path) -> None:
    """Take a run's records out of a joined document, those of two runs too, as phi's are."""
    try:
        if any(run in record.values() for record in read_records(document)):
            others = (r for r in read_records(document) if run not in r.values())
            write_records(document, read_head(document), others)
    except UserError:
        return  # the next join writes it anew
