"""What the analyses measure: the base, and the chosen checkpoints of the chosen runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import Settings, UserError
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.checkpoints import (
    ADAPTER_CONFIG,
    SAFETENSORS,
    Checkpoint,
    checkpoint_step,
    checkpoints_in,
    weights_key,
)
from lora_tradeoffs.files import read_json
from lora_tradeoffs.hub import fetch_checkpoints, is_hub_id
from lora_tradeoffs.models.adapters import own_head
from lora_tradeoffs.models.base import Base, own_fields
from lora_tradeoffs.models.configs import adapter_fields, refusing
from lora_tradeoffs.models.weights import SIGNIFICANT_BITS, Weights
from lora_tradeoffs.records import read_run, read_training, run_configs, run_fields

# The fields of a task file that make the text on which a run was trained.
LEARNED = ("doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter", "truncate")
# Two tokenizers that encode this text alike are taken for the same.
PROBE = (
    "The café's 12,345 dogs ran, naïvely: ÜBER-überall?\n\tif (x <= 10) { return y[0]; }  東京 🙂"
)


@dataclass(frozen=True)
class Subject:
    """A checkpoint, or the base (step 0), with the columns that its records share."""

    run: str
    step: int
    checkpoint: Checkpoint | None  # None: the base
    fields: dict[str, Any]
    family: str | None  # None: both
    is_last: bool
    is_best_on_validation: bool  # the run's checkpoint with the lowest validation loss
    max_lengths: dict[str, int] = field(default_factory=dict)  # by task, if not the preset's
    rows_per_step: dict[str, float] = field(default_factory=dict)  # training rows by task

    @property
    def is_measured_in_full(self) -> bool:
        """Base, last or best on validation: measured on all items, and on test where allowed."""
        return self.checkpoint is None or self.is_last or self.is_best_on_validation

    @property
    def is_foreign(self) -> bool:
        """Whether it is a checkpoint that was not made here."""
        return self.checkpoint is not None and _record_file(self.checkpoint.folder) is None


def weights_of(subject: Subject, base: Base) -> dict[str, Any]:
    """What identifies the measured weights: a run's name does not, it can be used again."""
    weights = weights_key(subject.checkpoint.folder) if subject.checkpoint else {}
    return {"base": base.digest, "weights": weights}


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
    study = {"base_model": base.name, "study": settings.study}
    lengths = trained_lengths(settings)
    subjects = [Subject("base", 0, None, {**study, **no_arm("base")}, None, True, True, lengths)]
    folders = {"base": base.folder}
    by_run: dict[Path, dict[tuple[str, int], Checkpoint]] = {}  # whose checkpoints may come singly
    for name, folder in _run_folders(runs, settings):
        for c in checkpoints_in(folder, name):
            other = by_run.setdefault(_folder_of_run(c), {}).setdefault((c.run, c.step), c)
            if other.folder.resolve() != c.folder.resolve():
                raise UserError(
                    f"{other.folder} and {c.folder} are both step {c.step} of {c.run!r}: move one"
                )
    for folder, of_run in by_run.items():
        found, best = [c for _, c in sorted(of_run.items())], _best_step(folder)
        last = {c.run: c.step for c in found}
        chosen = [c for c in found if _is_chosen(c.step, last[c.run], checkpoints)]
        if not chosen:
            steps = ", ".join(str(c.step) for c in found)
            raise UserError(f"{folder} has no such checkpoint; its steps are {steps}")
        for c in chosen:
            _check_name(folders, c, settings)
            trained, record = _trained(c.run, c.folder, base)
            config, steps = record.get("config", {}), record.get("steps") or last[c.run]
            own = dict.fromkeys(config.get("tasks", ()), config.get("max_length"))
            # the model that a Trainer saved at its end has no step
            fields = {**study, **trained, "fraction": c.step / steps if last[c.run] else 1.0}
            max_lengths = lengths | own if all(own.values()) else lengths
            about = c.step == last[c.run], c.step == best, max_lengths, _rows_per_step(record)
            subjects.append(Subject(c.run, c.step, c, fields, config.get("family"), *about))
    return subjects


def in_trained_form(settings: Settings, runs: Sequence[str] | None = None) -> Settings:
    """The settings, asking as the runs were trained: in plain text, or by the chat template.

    Base and checkpoints are so asked in the same form. Runs of no run.json are asked as the
    settings say. Raises UserError for runs that differ, or that differ from the flags.
    """
    forms: dict[tuple[bool, str], str] = {}
    for _, folder in _run_folders(runs, settings):
        if record_file := _record_file(folder):
            config = read_run(record_file.parent, "config")["config"]
            form = config.get("apply_chat_template", False), config.get("system_instruction", "")
            forms[form] = folder.name
    asked = settings.apply_chat_template, settings.system_instruction
    if asked != (False, ""):
        forms.setdefault(asked, "the flags")
    if len(forms) > 1:
        said = [f"{_form_name(*form)} ({whose})" for form, whose in forms.items()]
        raise UserError(
            f"prompts are {said[0]} and {said[1]}: give runs of one form with --runs, or another"
            " --study"
        )
    chat, system = next(iter(forms), asked)
    return replace(settings, apply_chat_template=chat, system_instruction=system)


def check_trained_form(settings: Settings) -> None:
    """Raise UserError if the study's runs were trained in another form than a new one would be."""
    trained = in_trained_form(settings)
    if settings != trained:
        system = trained.system_instruction
        system = system and f" --system-instruction {system!r}"
        raise UserError(
            f"the runs of study {settings.study!r} were trained on turns of a chat: add"
            f" --apply-chat-template{system}, or give another --study"
        )


def _form_name(chat: bool, system: str) -> str:
    after = f" after {system!r:.40}" if system else ""
    return f"turns of a chat{after}" if chat else "plain text"


def _record_file(folder: Path) -> Path | None:
    """The run.json of a run's folder or checkpoint; None of a run from elsewhere."""
    files = (parent / "run.json" for parent in (folder, folder.parent))
    return next((path for path in files if path.is_file()), None)


def _check_name(folders: dict[str, Path], checkpoint: Checkpoint, settings: Settings) -> None:
    """Note the run's folder. Raises UserError if another run has its name, and so its records."""
    folder = _folder_of_run(checkpoint)
    in_study = settings.runs_dir / checkpoint.run
    other = folders.setdefault(checkpoint.run, in_study.resolve() if in_study.is_dir() else folder)
    if other != folder:
        raise UserError(
            f"{folder} and {other} are both called {checkpoint.run!r}, and their records would mix:"
            " rename one, or give another --study"
        )


def _folder_of_run(checkpoint: Checkpoint) -> Path:
    folder = checkpoint.folder
    return (folder.parent if checkpoint_step(folder) >= 0 else folder).resolve()


def no_runs(settings: Settings) -> UserError:
    """The error of a study without runs: how to train one, and the studies that have some."""
    models = settings.runs_dir.parent
    studies = sorted({p.parent.parent.name for p in models.glob("*/*/checkpoint-*")})
    return UserError(
        f"the study {settings.study!r} has no run with a checkpoint; make one with: python"
        f" multi_task_training.py --similar --lora 8 (studies that have: {studies or 'none'})"
    )


def no_arm(method: str) -> dict[str, Any]:
    """The columns of a record about training, of what no run of this suite trained."""
    fields = dict(method=method, rank=0, alpha=0, scaling="", target_modules="")
    return {**fields, "learning_rate": 0.0, "seed": 0, "tasks": "", "variant": "", "fraction": 0.0}


def _run_folders(runs: Sequence[str] | None, settings: Settings) -> list[tuple[str | None, Path]]:
    """Folders of runs, each with the run's name where that is not the folder's."""
    if not runs:
        trained = sorted(p.parent for p in settings.runs_dir.glob("*/run.json"))
        return [(None, folder) for folder in trained if any(folder.glob("checkpoint-*"))]
    folders: list[tuple[str | None, Path]] = []
    for run in runs:
        if (settings.runs_dir / run).is_dir():
            folders.append((None, settings.runs_dir / run))
        elif Path(run).is_dir():
            folders.append((None, Path(os.path.abspath(run))))  # of a link, the name that it has
        elif is_hub_id(run):
            folders.append((run.replace("/", "--"), fetch_checkpoints(run)))
        else:
            raise UserError(f"no run {run!r} in {settings.runs_dir}, and no such folder")
    return folders


def trained_lengths(settings: Settings) -> dict[str, int]:
    """By task the `max_length` of the study's runs, where it is one.

    The base is measured on prompts of this length. Where runs differ, it is on those of the
    preset's, and the analyses warn of it.
    """
    lengths: dict[str, set[int]] = {}
    for config in run_configs(settings.runs_dir).values():
        for task in config["tasks"]:
            lengths.setdefault(task, set()).add(config.get("max_length"))
    known = {task: found for task, found in lengths.items() if None not in found}
    return {task: found.pop() for task, found in known.items() if len(found) == 1}


def _trained(run: str, folder: Path, base: Base) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns about a run's training, and its run.json.

    Of a run from elsewhere, what its adapter's configuration says, and nothing.
    """
    record_file = _record_file(folder)
    if record_file is None:
        return {**_foreign(folder), "variant": run}, {}
    record = read_run(record_file.parent, "base", "config", "steps")
    trained_on = record["base"]
    if trained_on["digest"] != base.digest:
        raise UserError(
            f"{run} was trained on {trained_on['name']}, not on {base.name}: give that base"
            " with --model"
        )
    for task, fields in record.get("own", {}).get("tasks", {}).items():
        now = DESCRIPTIONS[task].definition or {}
        if differs := [name for name in LEARNED if fields.get(name) != now.get(name)]:
            raise UserError(
                f"{run} was trained on {task} with another {differs[0]} than its task file"
                " has: restore the file, or give the task of today another name"
            )
    return run_fields(run, record["config"]), record


def _rows_per_step(record: dict[str, Any]) -> dict[str, float]:
    batch = record.get("config", {}).get("batch_size", 0)
    return {t: w["examples"] * batch for t, w in record.get("task_weights", {}).items()}


def _foreign(folder: Path) -> dict[str, Any]:
    """The columns of a checkpoint from elsewhere: LoRA, another adapter, or full.

    An adapter that is broken or of a type that is not known is refused later, when it is loaded.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return no_arm("full")
    with suppress(UserError):
        adapter = adapter_fields(folder)
        modules = adapter.get("target_modules", ())
        names = [modules] if isinstance(modules, str) else sorted(modules)
        method = "dora" if adapter.get("use_dora") else "lora"
        fields = {"rank": adapter.get("r", 0), "alpha": adapter.get("lora_alpha", 0)}
        if "lora_alpha" not in adapter:
            method = "oft" if "oft_block_size" in adapter else "adapter"
            fields["rank"] = adapter.get("oft_block_size") or 0
        return {**no_arm(method), **fields, "target_modules": ",".join(names)}
    return no_arm("lora")


def own_settings(subjects: Iterable[Subject], base: Base) -> list[str]:
    """What a reader has to know of checkpoints that were not made here: one that names another
    base, one that computes with other settings than the base, one with a head or a tokenizer of its
    own, and models beside them that are not measured.

    Only the last parts of the bases' names are compared, since a base may be a folder, a Hub
    repository or a copy.
    """
    foreign = dict.fromkeys(s.checkpoint for s in subjects if s.is_foreign)
    given = {checkpoint.folder.resolve() for checkpoint in foreign}
    lines = (c.run + told for c in foreign for told in _own_settings(c, base, given))
    return list(dict.fromkeys(lines))


def _own_settings(checkpoint: Checkpoint, base: Base, given: Collection[Path]) -> Iterator[str]:
    folder = checkpoint.folder
    if checkpoint_step(folder) >= 0:
        models = {path.parent for path in folder.parent.glob(f"[!.]*/{SAFETENSORS}")}
        models = {p.name for p in models if checkpoint_step(p) < 0 and p.resolve() not in given}
        if models:
            where = ", ".join(sorted(models)[:5])
            yield f": {where} beside its checkpoints is not measured: give its folder with --runs"
    with suppress(UserError):  # one that cannot be read is not used
        if _has_other_tokenizer(folder, base):
            yield " has a tokenizer that encodes text otherwise, and is measured with the base's"
    with suppress(UserError):  # what is broken is reported by the measurement
        weights, base_weights = Weights(folder), Weights(base.folder)
        if checkpoint.is_adapter:
            path, names_base = folder / ADAPTER_CONFIG, "base_model_name_or_path"
            if own_head(weights, base_weights):
                yield " has a head of its own, which is not scored; its update is measured"
        else:
            path, names_base = folder / "config.json", "_name_or_path"
            if fields := own_fields(folder, base):
                yield f" computes with its own {', '.join(fields)}, not the base's"
            kind, bits = weights.stored_type(), SIGNIFICANT_BITS
            if bits.get(kind, 53) < bits.get(base_weights.stored_type(), 53):
                share = f"{2.0 ** -bits[kind]:.2%} of each weight, which its drift includes"
                yield f" is rounded to {kind}: up to {share}"
        name = path.is_file() and read_json(path).get(names_base)
        if name and _last_part(str(name)) not in map(_last_part, (base.name, base.folder.name)):
            name = ascii(str(name))[1:-1]
            yield f" names {name} as its base and is measured against {base.name}"


def _has_other_tokenizer(folder: Path, base: Base) -> bool:
    """Whether a checkpoint's folder holds a tokenizer that encodes text otherwise than the base's.

    Raises UserError for one that cannot be read.
    """
    from tokenizers import Tokenizer

    paths = [path / "tokenizer.json" for path in (folder, base.tokenizer_folder)]
    if not all(path.is_file() for path in paths):
        return False
    with refusing(f"{paths[0]} cannot be read"):
        first, second = (Tokenizer.from_file(str(path)) for path in paths)
        for tokenizer in (first, second):  # Trainer's collators leave theirs in the file
            tokenizer.no_truncation()
            tokenizer.no_padding()
        return first.encode(PROBE).ids != second.encode(PROBE).ids


def _last_part(name: str) -> str:
    return name.replace("--", "/").rstrip("/").rpartition("/")[2].lower()


def _best_step(folder: Path) -> int:
    """The checkpoint with the lowest validation loss, -1 if the run does not say."""
    if not (folder / "training.json").is_file():
        return -1
    training = read_training(folder, "validation")
    entries = [e for e in training["validation"] if e["step"] > 0]
    return min(entries, key=lambda e: e["eval_loss"])["step"] if entries else -1


def _is_chosen(step: int, last: int, choice: Sequence[str]) -> bool:
    """Whether `--checkpoints` includes the step. Raises UserError for another word."""
    for word in choice:
        if word not in ("all", "last") and not word.isdigit():
            raise UserError(f"--checkpoints {word}: write all, last, or steps")
    return "all" in choice or str(step) in choice or ("last" in choice and step == last)
