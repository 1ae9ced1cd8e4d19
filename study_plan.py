"""What a study consists of: its runs, the steps that make and measure them, and their state.

A step is one process of one script. What it was asked for, what it read and how long it took is
written when it has ended well, to `outputs/<study>/steps/<step>.json`: it is done while that still
holds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import FAMILIES, Settings, UserError
from training_run import Run

# stage: its script
STAGES = {
    "prepare": "data_preprocessing",
    "train": "multi_task_training",
    "evaluate": "eval",
    "retention": "retention_eval",
    "drift": "svd_analysis",
    "gradients": "gradient_conflict",
    "report": "report",
}
ANALYSES = ("evaluate", "retention", "drift", "gradients")
# A long study measures along the line to the last checkpoint, too; the demo measures the least that
# fills every figure. By preset, stage and family (None: both).
FLAGS = {
    ("study", "retention", None): ("--scale-update",),
    ("demo", "evaluate", "dissimilar"): ("--checkpoints", "last", "--limit", "8"),
    ("demo", "retention", None): ("--checkpoints", "last"),
    ("demo", "gradients", None): ("--checkpoints", "last"),
    ("demo", "gradients", "dissimilar"): ("--checkpoints", "last", "--batches", "4"),
}


@dataclass(frozen=True)
class Step:
    """One process. `runs` are those that it makes or measures; empty: all that the study has."""

    name: str
    stage: str
    flags: tuple[str, ...]
    runs: tuple[Run, ...] = ()
    needs: tuple[str, ...] = ()  # steps that have to be over before

    @property
    def script(self) -> str:
        return STAGES[self.stage]

    def arguments(self) -> list[str]:
        """The command line; of the runs to measure, those that have a checkpoint by now."""
        if self.stage not in ANALYSES or not self.runs:
            return list(self.flags)
        return [*self.flags, "--runs", *(run.name for run in self.runs if has_checkpoint(run))]

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


# ------------------------------------------------------------------------------------- runs


def plan_runs(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs that are asked for, families together, seed by seed. Raises UserError."""
    import multi_task_training as training

    runs: dict[str, Run] = {}
    for flags in _training_flags(args, settings):
        asked = training.build_parser().parse_args(flags)
        runs |= {run.name: run for run in training.plan(asked, settings, hidden_size)}
    return list(runs.values())


def _training_flags(args: argparse.Namespace, settings: Settings) -> list[list[str]]:
    """Command lines of multi_task_training.py that make a run each."""
    found = []
    for family in args.families or FAMILIES:
        mixes = [[f"--{family}"]]
        if args.single_task_controls:
            mixes += [["--tasks", task] for task in FAMILIES[family]]
        for seed in dict.fromkeys(args.seeds or settings.preset.seeds):
            for mix in mixes:
                for arm in _arms(args, settings, family):
                    found.append([*mix, *arm, "--seed", str(seed), *training_extras(args)])
    return found


def _arms(args: argparse.Namespace, settings: Settings, family: str) -> list[list[str]]:
    """The arms' flags. Ranks that are asked for stand beside full fine-tuning."""
    names = settings.preset.arms[family]
    if args.ranks:
        names = ("full", *(f"lora_r{rank}" for rank in dict.fromkeys(args.ranks)))
    if args.full_qv:
        names = (*names, "full_qv")
    flags = {"full": ["--full-finetune"], "full_qv": ["--full-qv"]}
    return [flags.get(name) or ["--lora", name.removeprefix("lora_r")] for name in names]


def training_extras(args: argparse.Namespace) -> list[str]:
    """Flags that go to multi_task_training.py as they are."""
    extras = [] if args.max_steps is None else ["--max-steps", str(args.max_steps)]
    extras += ["--dtype", args.dtype] if args.dtype != "auto" else []
    return extras + (["--set", *args.set] if args.set else [])


def flags_of(run: Run, args: argparse.Namespace) -> list[str]:
    """The command line that makes the run."""
    config = run.config
    mix = ["--tasks", *config.tasks]
    if config.tasks == FAMILIES[config.family]:
        mix = [f"--{config.family}"]
    arm = {"full": ["--full-finetune"], "full_qv": ["--full-qv"]}.get(config.method)
    arm = arm or ["--lora", str(config.rank)]
    return [*mix, *arm, "--seed", str(config.seed), *training_extras(args)]


# ------------------------------------------------------------------------------------ steps


def plan_steps(args: argparse.Namespace, settings: Settings, runs: Sequence[Run]) -> list[Step]:
    """Every step of the stages that are asked for, in the order in which they are begun."""
    common = common_flags(settings)
    tasks = sorted({task for run in runs for task in run.config.tasks})
    steps = [Step("prepare", "prepare", (*tasks, *common))]
    analyses: list[Step] = []
    for run in runs:
        train = f"train-{run.name}"
        flags = (*flags_of(run, args), *common)
        # measured and deleted before the next one begins: what is left is one run's checkpoints
        before = tuple(s.name for s in analyses) if args.measure_then_delete else ()
        steps.append(Step(train, "train", flags, (run,), ("prepare", *before)))
        if args.measure_then_delete:
            own = _analyses(args, settings, [run], f"-{run.name}", (train,))
            steps += own
            analyses += own
    if not args.measure_then_delete:
        trained = tuple(step.name for step in steps)
        analyses = _analyses(args, settings, runs, "", trained)
        steps += analyses
    steps.append(Step("report", "report", tuple(common), (), tuple(s.name for s in steps)))
    only = args.only or STAGES
    steps = [step for step in steps if step.stage in only]
    if args.measure_then_delete and args.only:
        raise UserError("--measure-then-delete measures in every stage; leave --only out")
    return steps


def common_flags(settings: Settings) -> list[str]:
    """What the study runs on; every script takes these."""
    names = ("preset", "study", "model", "data")
    values = (settings.preset.name, settings.study, settings.model, settings.data)
    return [part for name, value in zip(names, values) for part in (f"--{name}", value)]


def _analyses(
    args: argparse.Namespace,
    settings: Settings,
    runs: Sequence[Run],
    suffix: str,
    needs: tuple[str, ...],
) -> list[Step]:
    """The steps that measure these runs.

    Several workers share them; before, one measures the base, with the last checkpoint of a run of
    each family.
    """
    found: list[Step] = []
    for stage in ANALYSES:
        by_family = {run.config.family: [] for run in runs}
        for run in runs:
            by_family[run.config.family].append(run)
        own_flags = any((settings.preset.name, stage, family) in FLAGS for family in by_family)
        groups = by_family if own_flags else {None: list(runs)}
        for family, members in groups.items():
            flags = (*_stage_flags(args, settings, stage, family), *common_flags(settings))
            name = f"{stage}{suffix}" + (f"-{family}" if own_flags and not suffix else "")
            before = needs
            # drift spreads matrices over the cores by itself
            shards = 1 if stage == "drift" or suffix else min(args.workers, len(members))
            if shards > 1:
                firsts = tuple({run.config.family: run for run in reversed(members)}.values())
                flags_first = (*flags, "--checkpoints", "last")
                found.append(Step(f"{name}-base", stage, flags_first, firsts, needs))
                before = (*needs, found[-1].name)
            for shard in range(shards):
                part = tuple(members[shard::shards])
                numbered = f"{name}-{shard + 1}of{shards}" if shards > 1 else name
                found.append(Step(numbered, stage, flags, part, before))
    return found


def _stage_flags(
    args: argparse.Namespace, settings: Settings, stage: str, family: str | None
) -> tuple[str, ...]:
    preset = settings.preset.name
    flags = FLAGS.get((preset, stage, family)) or FLAGS.get((preset, stage, None), ())
    if stage in ("evaluate", "retention", "gradients"):
        flags += ("--dtype", args.dtype)
    if args.items and stage in ("evaluate", "retention"):
        flags += ("--limit", str(args.items))
    if args.scale_update and stage == "retention" and "--scale-update" not in flags:
        flags += ("--scale-update",)
    return flags


# ------------------------------------------------------------------------------------ state


class Stamps:
    """What is written of steps that have ended, in `outputs/<study>/steps/`."""

    def __init__(self, settings: Settings) -> None:
        self.study = settings.output_dir / "outputs" / settings.study
        self.folder = self.study / "steps"
        self.places = {
            "evaluate": settings.output_dir / "performance_analysis" / settings.study,
            "retention": self.study,
            "drift": settings.output_dir / "drift_analysis_plots" / settings.study,
            "gradients": settings.output_dir
            / "performance_analysis"
            / settings.study
            / "gradients",
        }

    def error_file(self, step: Step) -> Path:
        return self.folder / f"{step.name}-error.json"

    def read(self, step: Step) -> dict[str, Any] | None:
        """The stamp of a step that has ended well; None if there is none that can be read."""
        try:
            return json.loads((self.folder / f"{step.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def is_done(self, step: Step, others: Sequence[Step] = ()) -> bool:
        """Whether the step has ended well, for what it would be asked and would read now.

        The report reads what the `others` have made, so it is done if they were done before it.
        """
        stamp = self.read(step)
        if stamp is None or stamp["request"] != json.loads(json.dumps(self.request(step))):
            return False
        if step.stage == "train":
            return step.runs[0].is_done
        return step.stage != "prepare" or all(
            (Path(folder) / "report.json").is_file() for folder in stamp["made"]
        )

    def request(self, step: Step) -> dict[str, Any]:
        """The step's request, and of what it reads and makes a digest."""
        request = step.request()
        if step.stage == "report":
            documents = [self.places[s] / f"{n}.json" for s, n in DOCUMENTS.items()]
            request["documents"] = _digests([*documents, self.study / "report.html"])
        elif step.stage in ANALYSES:
            place = self.places[step.stage]
            request["measured"] = _listing(place / "records", {run.name for run in step.runs})
        return request

    def write(self, step: Step, settings: Settings, seconds: float, new: int) -> None:
        """Note that the step has ended well: its seconds, and the units that it measured."""
        from checkpoint_utils import write_json

        stamp = {"request": self.request(step), "seconds": round(seconds, 1), "new": new}
        if step.stage == "prepare":
            stamp["made"] = [str(p.parent) for p in settings.prepared_dir.glob("*/*/report.json")]
        write_json(self.folder / f"{step.name}.json", stamp)
        self.error_file(step).unlink(missing_ok=True)

    def write_error(self, step: Step, code: int, log: Path, message: str) -> None:
        from checkpoint_utils import write_json

        error = {"step": step.name, "exit_code": code, "error": message, "log": str(log)}
        write_json(self.error_file(step), error)

    def units(self, step: Step) -> int:
        """How many units there are of the step's runs."""
        if step.stage not in ANALYSES:
            return 0
        return len(_records(self.places[step.stage] / "records", {r.name for r in step.runs}))


DOCUMENTS = {
    "evaluate": "adaptation",
    "retention": "retention",
    "drift": "drift",
    "gradients": "gradients",
}


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
