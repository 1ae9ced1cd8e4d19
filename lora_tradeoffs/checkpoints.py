"""Checkpoints on disk: listed in a manifest, verified, found; which files hold their weights."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError
from lora_tradeoffs.files import COPY, file_record, file_sha256, read_json, sync, write_json

MANIFEST = "manifest.json"
FILES_SHAPE = {"*": {"size": int, "sha256": str}}
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
GENERATION_CONFIG = "generation_config.json"
MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"[\w.+@=-]{1,200}\.safetensors", re.ASCII)  # no path
PICKLED = re.compile(r"(adapter_|pytorch_)model.*\.bin")
SAFETENSORS = "[!.]*.safetensors"  # file managers leave ._model.safetensors and the like
# Needed to resume training, not to evaluate: only the two newest checkpoints have these.
UNCONVERTED = "unconverted"  # folder of an adapter as it is trained, if it is saved as another
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", f"{UNCONVERTED}/*")
RESUME_FILES += ("optimizer.bin", "pytorch_model_fsdp.bin")  # of FSDP


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk; its step is 0 if the folder's name has none.

    >>> run = Path("models/demo/similar_lora_r8_seed42")
    >>> Checkpoint(run.name, 6, run / "checkpoint-6").is_adapter
    True
    """

    run: str
    step: int
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's manifest. Raises UserError if it is damaged."""
    remedy = "delete the checkpoint, or retrain its run with --overwrite"
    return read_json(checkpoint / MANIFEST, {"files": FILES_SHAPE}, remedy)


def write_manifest(checkpoint: Path, **extra: Any) -> None:
    """List the checkpoint's files with sizes and sha256; written last, it marks it as whole."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        sync(path)  # Trainer does not; a manifest must not outlive its files
    listing = {str(p.relative_to(checkpoint)): file_record(p) for p in files}
    write_json(checkpoint / MANIFEST, {**extra, "files": listing})


def checkpoint_problem(checkpoint: Path, suffixes: tuple[str, ...] = ("",)) -> str | None:
    """Why the checkpoint is not whole, or None: it is whole iff its files match its manifest.

    With `suffixes` only files with these endings are read: who needs only the weights need not wait
    for the optimizer's state, which is twice as large.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{checkpoint} has no {MANIFEST}: its saving did not end"
    try:
        files = read_manifest(checkpoint)["files"]
    except UserError as error:
        return str(error)
    for name, record in files.items():
        if not name.endswith(suffixes):
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record["size"] or file_sha256(path) != record["sha256"]:
            return f"{path} is corrupt: its size or sha256 is not the manifest's"
    return None


def check_whole(checkpoint: Checkpoint, suffixes: tuple[str, ...] = ("",)) -> None:
    """Raise UserError for a checkpoint made here that does not match its manifest.

    With `suffixes` only files with these endings are read.
    """
    made_here = (checkpoint.folder.parent / "run.json").is_file()
    if made_here or (checkpoint.folder / MANIFEST).is_file():
        problem = checkpoint_problem(checkpoint.folder, suffixes)
        if problem:
            raise UserError(problem)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of a model or an adapter, as Transformers and PEFT find them.

    model.safetensors, else the files that the index names; other safetensors beside them are not
    read. Raises UserError if there are none, one is missing, or an adapter lies beside a model.
    """
    single, index = folder / MODEL_FILE, folder / INDEX_FILE
    paths = [single]
    if (folder / ADAPTER_CONFIG).is_file():
        paths = [folder / ADAPTER_FILE]
        if single.is_file() or index.is_file():
            raise UserError(
                f"{folder} holds a whole model and an adapter ({ADAPTER_CONFIG}): move one of them"
                " to another folder"
            )
    elif index.is_file() and not single.is_file():
        names = set(read_json(index, {"weight_map": {"*": str}}, COPY)["weight_map"].values())
        if not names or not all(map(WEIGHT_FILE.fullmatch, names)):
            raise UserError(
                f"{index}: its weight_map must give every tensor the name of a safetensors file in"
                " the same folder"
            )
        paths = [folder / name for name in sorted(names)]
    for path in paths:
        if not path.is_file():
            others = _instead(folder) if len(paths) == 1 else ""
            raise UserError(f"{folder} holds no {path.name}{others}")
    return paths


def _instead(folder: Path) -> str:
    """What an error says of what a folder holds in place of a model's weights; "" of nothing."""
    if (folder / ADAPTER_FILE).is_file():
        return f"; its {ADAPTER_FILE} lacks {ADAPTER_CONFIG}"
    if _is_pickled(folder):
        return "; pickled weights are not loaded, convert them first"
    names = sorted(path.parent.name for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    return f"; give one of the adapters' folders in it: {', '.join(names)}" if names else ""


def _is_pickled(folder: Path) -> bool:
    return any(PICKLED.fullmatch(path.name) for path in folder.glob("*.bin"))


def ends_files(folder: Path) -> list[str]:
    """generation_config.json, if texts end by it otherwise than by config.json; else none."""
    paths = [folder / "config.json", folder / GENERATION_CONFIG]
    if not all(path.is_file() for path in paths):
        return []
    with suppress(UserError):  # one that is damaged counts, too
        of_model, of_texts = (read_json(path).get("eos_token_id") for path in paths)
        if of_texts in (None, of_model):
            return []
    return [GENERATION_CONFIG]


def weights_key(folder: Path) -> dict[str, Any]:
    """What identifies a checkpoint's weights: their sha256 by the manifest, or else size and time;
    and sha256 of the files that say what is computed with them.
    """
    configs = (ADAPTER_CONFIG, "config.json", INDEX_FILE, *ends_files(folder))
    paths = (folder / name for name in configs)
    key: dict[str, Any] = {path.name: file_sha256(path) for path in paths if path.is_file()}
    if (folder / MANIFEST).is_file():
        try:
            files = read_manifest(folder)["files"]
        except UserError:  # `check_whole` says what is wrong before anything is measured
            return {}
        return {n: r["sha256"] for n, r in files.items() if WEIGHT_FILE.fullmatch(n)} | key
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()} | key


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step in a folder's name, `checkpoint-<step>`; -1 for another folder."""
    prefix, _, step = checkpoint.name.rpartition("-")
    return int(step) if prefix == "checkpoint" and step.isdecimal() else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders in the order of their steps, whole or not.

    >>> [folder.name for folder in checkpoints(Path("models/demo/similar_lora_r8_seed42"))]
    ['checkpoint-3', 'checkpoint-6']
    """
    if not run_dir.is_dir():
        return []
    folders = (p for p in run_dir.iterdir() if p.is_dir() or p.is_symlink())
    return sorted((p for p in folders if checkpoint_step(p) >= 0), key=checkpoint_step)


def checkpoints_in(folder: Path, name: str | None = None) -> list[Checkpoint]:
    """The checkpoints of a run's folder, or the folder itself if it is one, ordered by step.

    Any PEFT or Transformers folder is accepted, also one that was not made here. `name` is the
    run's; by default it is the folder's. A Trainer's output folder may also hold the model that it
    saved at its end: it comes last, as a run of its own, <name>-final. Raises UserError for a
    folder without a checkpoint.

    >>> [c.step for c in checkpoints_in(Path("models/demo/similar_lora_r8_seed42"))]
    [3, 6]
    """
    steps = [Checkpoint(name or folder.name, checkpoint_step(p), p) for p in checkpoints(folder)]
    is_one = any(folder.glob(SAFETENSORS))
    if steps:  # a pickled model is named when it is loaded
        is_final = is_one or _is_pickled(folder)
        return steps + [Checkpoint(f"{steps[0].run}-final", 0, folder)] * is_final
    if not is_one:
        raise UserError(
            f"{folder} holds no checkpoint-<step> folder and no *.safetensors{_instead(folder)}"
        )
    run, step = folder.name, 0
    if checkpoint_step(folder) >= 0:
        run, step = folder.parent.name, checkpoint_step(folder)
    elif (path := folder / "run.json").is_file():  # as published
        step = read_json(path, {"step?": int}, COPY).get("step", 0)
    return [Checkpoint(name or run, step, folder)]


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint that can be resumed; broken ones after it are deleted.

    >>> newest_whole_checkpoint(Path("models/demo/similar_lora_r8_seed42")).name
    'checkpoint-6'
    """
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = checkpoint_problem(checkpoint)
        if problem is None and any(checkpoint.glob("optimizer.*")):
            return checkpoint
        print(f"not resuming from {checkpoint.name}: {problem or 'it has no optimizer state'}")
        shutil.rmtree(checkpoint)
    return None


def drop_resume_state(checkpoint: Path) -> None:
    """Delete optimizer and RNG state; the manifest is rewritten first, so it stays whole."""
    resume_files = [path for pattern in RESUME_FILES for path in checkpoint.glob(pattern)]
    if not resume_files:
        return
    try:
        manifest = read_manifest(checkpoint)
    except UserError:  # whoever loads the checkpoint is told
        return
    for path in resume_files:
        manifest["files"].pop(str(path.relative_to(checkpoint)), None)
    write_json(checkpoint / MANIFEST, manifest)
    for path in resume_files:
        path.unlink()
    with suppress(OSError):
        (checkpoint / UNCONVERTED).rmdir()
