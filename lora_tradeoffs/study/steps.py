"""A study's steps: what one is, what it makes or measures, and whether it is done.

A step is one process of one script. What it was asked for, what it read and how long it took is
written when it has ended well, to `outputs/<study>/steps/<step>.json`: it is done while that still
holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Settings
from lora_tradeoffs.files import write_json
from lora_tradeoffs.training.learning_rates import rates_around, read_rates
from lora_tradeoffs.training.run import Run

# stage: its script
STAGES = {
    "prepare": "data_preprocessing",
    "sweep": "multi_task_training",
    "train": "multi_task_training",
    "evaluate": "eval",
    "retention": "retention_eval",
    "drift": "svd_analysis",
    "gradients": "gradient_conflict",
    "report": "lora_tradeoffs.report.html",
}
# the stages that analyse, and what their documents are called
ANALYSES = {
    "evaluate": "adaptation",
    "retention": "retention",
    "drift": "drift",
    "gradients": "gradients",
}


@dataclass(frozen=True)
class Sweep:
    """A search of every arm's learning rate: the seed that it is made with, and its grid."""

    seed: int
    factors: tuple[float, ...]

    def runs(self, planned: Run) -> list[Run]:
        """What a planned run stands for by now.

        With the sweep's seed: the arm at every rate that was tried, else at those of the grid. With
        another: at the chosen rate (until the search has ended the default), if there is one.
        """
        own = [r for r in read_rates(planned.folder.parent) if r["arm"] == planned.arm]
        if planned.config.seed == self.seed:
            rates = [r["learning_rate"] for r in own]
            rates = rates or rates_around(planned.default.learning_rate, self.factors)
        elif own:
            rates = [r["learning_rate"] for r in own if r["chosen"]]
        else:
            rates = [planned.default.learning_rate]
        return [planned.at_rate(rate) for rate in rates]


@dataclass(frozen=True)
class Step:
    """One process, and the runs that it is planned to make or measure (none: all there are)."""

    name: str
    stage: str
    flags: tuple[str, ...]
    planned: tuple[Run, ...] = ()
    needs: tuple[str, ...] = ()  # steps that have to be over before
    sweep: Sweep | None = None

    @property
    def script(self) -> str:
        return STAGES[self.stage]

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that it makes or measures, under a sweep at the rates that are known by now."""
        if self.sweep is None:
            return self.planned
        return tuple(run for planned in self.planned for run in self.sweep.runs(planned))

    def arguments(self) -> list[str]:
        """The command line; of the runs to measure, those that have a checkpoint by now.

        Figures are left to the report, which draws them all once.
        """
        if self.stage not in ANALYSES:
            return list(self.flags)
        names = [run.name for run in self.runs if has_checkpoint(run)]
        return [*self.flags, "--no-figures", *(["--runs", *names] if names else [])]

    def request(self) -> dict[str, Any]:
        """What makes it the same step, with the same things to read."""
        return {"script": self.script, "flags": list(self.flags), "runs": _state(self.runs)}


def has_checkpoint(run: Run) -> bool:
    return any(run.folder.glob("checkpoint-*/manifest.json"))


def _state(runs: Sequence[Run]) -> dict[str, str]:
    """Of every run what tells its checkpoints apart: of one that is done its training.json."""
    found = {}
    for run in runs:
        files = [run.folder / "training.json"]
        if not run.is_done:
            files = sorted(run.folder.glob("checkpoint-*/manifest.json"))
        content = b"".join(path.read_bytes() for path in files)
        found[run.name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def steps_done(steps: Sequence[Step], stamps: Stamps) -> set[str]:
    """Names of the steps that need not be carried out: what they read is made, too."""
    done: set[str] = set()
    names = {step.name for step in steps}
    for step in steps:
        if stamps.is_done(step) and not names & set(step.needs) - done:
            done.add(step.name)
    return done


class Stamps:
    """What is written of steps that have ended, in `outputs/<study>/steps/`."""

    def __init__(self, settings: Settings) -> None:
        self.study = settings.output_dir / "outputs" / settings.study
        self.folder = self.study / "steps"
        self.documents = {stage: settings.document(name) for stage, name in ANALYSES.items()}

    def error_file(self, step: Step) -> Path:
        return self.folder / f"{step.name}-error.json"

    def read(self, step: Step) -> dict[str, Any] | None:
        """The stamp of a step that has ended well; None if there is none that can be read."""
        try:
            return json.loads((self.folder / f"{step.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def is_done(self, step: Step) -> bool:
        """Whether the step has ended well, for what it would be asked and would read now."""
        stamp = self.read(step)
        if stamp is None or stamp["request"] != json.loads(json.dumps(self.request(step))):
            return False
        if step.stage in ("sweep", "train"):
            return all(run.is_done or run.has_diverged for run in step.runs)
        return step.stage != "prepare" or all(
            (Path(folder) / "report.json").is_file() for folder in stamp["made"]
        )

    def request(self, step: Step) -> dict[str, Any]:
        """The step's request, and of what it reads and makes a digest."""
        request = step.request()
        if step.stage == "report":
            made = [*self.documents.values(), self.study / "report.html"]
            request["documents"] = _digests(made)
        elif step.stage in ANALYSES:
            names = {run.name for run in step.runs}
            request["measured"] = _listing(self.records(step), names)
        return request

    def write(self, step: Step, settings: Settings, seconds: float, new: int) -> None:
        """Note that the step has ended well: its seconds, and the units that it measured."""
        stamp = {"request": self.request(step), "seconds": round(seconds, 1), "new": new}
        if step.stage == "prepare":
            stamp["made"] = [str(p.parent) for p in settings.prepared_dir.glob("*/*/report.json")]
        write_json(self.folder / f"{step.name}.json", stamp)
        self.error_file(step).unlink(missing_ok=True)

    def write_error(self, step: Step, code: int, log: Path, message: str) -> None:
        error = {"step": step.name, "exit_code": code, "error": message, "log": str(log)}
        write_json(self.error_file(step), error)

    def units(self, step: Step) -> int:
        """How many units there are of the step's runs."""
        if step.stage not in ANALYSES:
            return 0
        return len(_records(self.records(step), {run.name for run in step.runs}))

    def records(self, step: Step) -> Path:
        """Where the step's analysis keeps its units."""
        return self.documents[step.stage].parent / "records"


def _records(folder: Path, runs: set[str]) -> list[Path]:
    """Files of the runs' units; a unit's name begins with its run's."""
    found = sorted(folder.glob("*.json"))
    return [p for p in found if not runs or any(p.name.startswith(f"{run}-") for run in runs)]


def _listing(folder: Path, runs: set[str]) -> str:
    """Tells whether a unit was written, changed or deleted since."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in _records(folder, runs)]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _digests(paths: Sequence[Path]) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in paths
        if path.is_file()
    }
