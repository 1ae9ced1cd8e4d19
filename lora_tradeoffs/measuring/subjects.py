"""What the analyses are about: the base, and the chosen checkpoints of the chosen runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Settings, UserError
from lora_tradeoffs.files import (
    Checkpoint,
    checkpoint_step,
    checkpoints_in,
    read_json,
    weights_key,
)
from lora_tradeoffs.hub import fetch_checkpoints, is_hub_id
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.records import run_fields


@dataclass(frozen=True)
class Subject:
    """A checkpoint, or the base (step 0), and what its records say about it."""

    run: str
    step: int
    checkpoint: Checkpoint | None  # None: the base
    fields: dict[str, Any]
    family: str | None  # None: both
    is_last: bool
    is_chosen: bool  # of the run's checkpoints, the one with the lowest validation loss

    @property
    def is_final(self) -> bool:
        """Base, last or validation-chosen: measured on all items, and where it may be, on test."""
        return self.checkpoint is None or self.is_last or self.is_chosen


def weights_of(subject: Subject, base: Base) -> dict[str, Any]:
    """What tells the measured weights from others: the name of a run can come back."""
    own = weights_key(subject.checkpoint.folder) if subject.checkpoint else {}
    return {"base": base.digest, "weights": own}


def find_subjects(
    settings: Settings,
    base: Base,
    runs: Sequence[str] | None = None,
    checkpoints: Sequence[str] = ("all",),
) -> list[Subject]:
    """The base, then the chosen checkpoints of the chosen runs.

    `runs` are names of the study's runs, folders, or Hub repositories (default: all runs of the
    study), `checkpoints` "all", "last", or steps. Raises UserError for a run that does not exist,
    has another base, lacks the checkpoint or has the name of another run. A study without runs
    gives the base alone; `no_runs` says how to make one.
    """
    fields = {"base_model": base.name, "study": settings.study}
    subjects = [Subject("base", 0, None, {**fields, **no_arm("base")}, None, True, True)]
    homes = {"base": base.folder}
    for name, folder in _run_folders(runs, settings):
        found = checkpoints_in(folder, name)
        arm, family, steps = _arm(found[0].run, folder, base)
        chosen = _chosen_step(folder)
        kept = [c for c in found if _is_asked(c.step, found[-1].step, checkpoints)]
        if not kept:
            listed = ", ".join(str(c.step) for c in found)
            raise UserError(f"{folder} has no such checkpoint; its steps are {listed}")
        _check_name(homes, kept[0], settings)
        steps = steps or found[-1].step  # of what was not made here, the last checkpoint's
        for c in kept:
            own = {**fields, **arm, "fraction": c.step / steps if steps else 1.0}
            last = c.step == found[-1].step
            subjects.append(Subject(c.run, c.step, c, own, family, last, c.step == chosen))
    return subjects


def _check_name(homes: dict[str, Path], checkpoint: Checkpoint, settings: Settings) -> None:
    """Note where the run lies. Raises UserError if another goes by its name: so do its records."""
    folder = checkpoint.folder
    home = (folder.parent if checkpoint_step(folder) >= 0 else folder).resolve()
    own = settings.runs_dir / checkpoint.run
    other = homes.setdefault(checkpoint.run, own.resolve() if own.is_dir() else home)
    if other != home:
        raise UserError(
            f"{home} and {other} are both called {checkpoint.run!r}, and so would be their records:"
            " rename one, or give another --study"
        )


def no_runs(settings: Settings) -> UserError:
    """What to say of a study without runs: how to make one, and the studies that have some."""
    models = settings.runs_dir.parent
    studies = sorted({p.parent.parent.name for p in models.glob("*/*/run.json")})
    return UserError(
        f"the study {settings.study!r} has no run with a checkpoint; make one with: python"
        f" multi_task_training.py --similar --lora 8 (studies that have: {studies or 'none'})"
    )


def no_arm(method: str) -> dict[str, Any]:
    """The arm's fields of what no run of ours made."""
    arm = dict(method=method, rank=0, alpha=0, scaling="", target_modules="")
    return {**arm, "learning_rate": 0.0, "seed": 0, "tasks": "", "variant": "", "fraction": 0.0}


def _run_folders(runs: Sequence[str] | None, settings: Settings) -> list[tuple[str | None, Path]]:
    """Folders of runs, each with the name that it goes by where that is not the folder's."""
    if not runs:
        found = sorted(p.parent for p in settings.runs_dir.glob("*/run.json"))
        return [(None, folder) for folder in found if any(folder.glob("checkpoint-*"))]
    folders: list[tuple[str | None, Path]] = []
    for run in runs:
        if (settings.runs_dir / run).is_dir():
            folders.append((None, settings.runs_dir / run))
        elif Path(run).is_dir():
            folders.append((None, Path(run).resolve()))
        elif is_hub_id(run):
            folders.append((run.replace("/", "--"), fetch_checkpoints(run)))
        else:
            raise UserError(f"no run {run!r} in {settings.runs_dir}, and no such folder")
    return folders


def _arm(run: str, folder: Path, base: Base) -> tuple[dict[str, Any], str | None, int]:
    """What the records say of a run, its family, and its steps; of a foreign folder, less."""
    record_file = next(
        (p / "run.json" for p in (folder, folder.parent) if (p / "run.json").is_file()), None
    )
    if record_file is None:
        adapters = [*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")]
        if not adapters:
            return {**no_arm("full"), "variant": run}, None, 0
        return {**_adapter_arm(sorted(adapters)), "variant": run}, None, 0
    record = read_json(record_file)
    try:
        trained_on, config = record["base"], record["config"]
        arm, family, steps = run_fields(run, config), config["family"], record["steps"]
        digest, name = trained_on["digest"], trained_on["name"]
    except (KeyError, TypeError):
        raise UserError(f"{record_file} is no record of a run of this suite; delete it") from None
    if digest != base.digest:
        raise UserError(
            f"{folder.name} was trained on {name}, not on {base.name}: give that base with --model"
        )
    return arm, family, steps


def _adapter_arm(configs: list[Path]) -> dict[str, Any]:
    """The arm of an adapter from elsewhere; a broken one, or not of LoRA, is named when loaded."""
    for path in configs:
        try:
            adapter = read_json(path)
            found = {"rank": adapter["r"] or 0, "alpha": adapter["lora_alpha"] or 0}
            modules = adapter.get("target_modules")
        except (UserError, KeyError, TypeError):
            continue
        names = [modules] if isinstance(modules, str) else sorted(modules or ())
        return {**no_arm("lora"), **found, "target_modules": ",".join(names)}
    return no_arm("lora")


def _chosen_step(folder: Path) -> int:
    """The checkpoint with the lowest validation loss, -1 if the run does not say."""
    path = folder / "training.json"
    if not path.is_file():
        return -1
    entries = [e for e in read_json(path)["validation"] if e["step"] > 0]
    return min(entries, key=lambda e: e["eval_loss"])["step"] if entries else -1


def _is_asked(step: int, last: int, asked: Sequence[str]) -> bool:
    for word in asked:
        if word not in ("all", "last") and not word.isdigit():
            raise UserError(f"--checkpoints {word}: write all, last, or steps")
    return "all" in asked or str(step) in asked or ("last" in asked and step == last)
