"""Files and checkpoints on disk: written whole, listed in a manifest, verified."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from config import UserError
from lora_tradeoffs.shapes import Shape, shape_problem

MANIFEST = "manifest.json"
FILES_SHAPE = {"*": {"size": int, "sha256": str}}
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MODEL_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILE = re.compile(r"[\w.+@=-]{1,200}\.safetensors", re.ASCII)  # no path
# Needed to resume training, not to evaluate: only the two newest checkpoints have these.
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
RECORDS = re.compile(r'"records"\s*:\s*\[')  # where they begin in a document
SEPARATOR = re.compile(r"[\s,]*")
READ_BLOCK = 1 << 16  # characters of a document that are read at a time
LONGEST_RECORD = 1 << 20


# ------------------------------------------------------------------------------- files


PARTIAL = ".partial"  # how the names of temporary files and folders end
SAFETENSORS_PARTIAL = re.compile(r"\.tmp\w{6}")
DAY = 86_400  # seconds; no write takes that long


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write a file or a folder to; rename it to `path` after the block.

    A reader sees the old content or the whole new one, also after a crash, and two processes do
    not write to the same file. If the block fails, `path` is unchanged and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield temporary
        for file in [temporary, *temporary.rglob("*")] if temporary.is_dir() else [temporary]:
            if file.is_file():
                sync(file)
        if temporary.is_dir():
            _remove(path)  # a folder cannot be renamed onto a full one
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not name its file
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as the disk allows."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def remove_partial(folder: Path, age: float = DAY) -> None:
    """Remove what writes that were killed have left below a folder, if it is `age` seconds old."""
    for path in folder.rglob(".*"):
        is_partial = path.name.endswith(PARTIAL) or SAFETENSORS_PARTIAL.fullmatch(path.name)
        with suppress(OSError):  # the write has just ended
            if is_partial and time.time() - path.stat().st_mtime >= age:
                _remove(path)


def sync(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    with written_whole(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


# What to do about a damaged file.
DELETE = "delete it and run the same command"
COPY = "copy or fetch it again"  # of files that were not made here


def write_records(path: Path, head: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Write `{**head, "records": [...]}`, a record a line, whole or not at all.

    The records may come from a generator: a study's fill gigabytes. Raises ValueError for nan and
    infinity, which JSON does not have.
    """
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    with written_whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{encode(head)[:-1]},\n "records": [')
        separator = "\n  "
        for record in records:
            file.write(separator + encode(record))
            separator = ",\n  "
        file.write("\n ]\n}\n")


def read_head(path: Path, shape: Shape = dict, remedy: str = DELETE) -> dict[str, Any]:
    """What stands before the records in a file of `write_records`. Raises UserError as `read_json`
    does.
    """
    with path.open(encoding="utf-8") as file, _damage(path, remedy):
        head = json.loads(_read_to_records(file)[0])
    check_shape(path, head, shape, remedy)
    return head


def read_records(path: Path, shape: Shape = dict, remedy: str = DELETE) -> Iterator[dict[str, Any]]:
    """The records of a file of `write_records`, each of the shape, a block of the file at a time.

    Raises UserError as `read_json` does, where the damage begins.
    """
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8") as file, _damage(path, remedy):
        text, position, number = _read_to_records(file)[1], 0, 0
        while True:
            position = SEPARATOR.match(text, position).end()
            try:
                if text[position] == "]":
                    break
                record, position = decode(text, position)
            except (IndexError, ValueError):
                is_cut = len(text) - position < LONGEST_RECORD
                if not is_cut or not (block := file.read(READ_BLOCK)):
                    raise
                text, position = text[position:] + block, 0
                continue
            if shape_problem(record, shape):
                check_shape(
                    path, {"records": {f"{number}": record}}, {"records": {"*": shape}}, remedy
                )
            yield record
            number += 1
        if (text[position + 1 :] + file.read()).strip() != "}":
            raise ValueError("something stands after the records")


@contextmanager
def _damage(path: Path, remedy: str) -> Iterator[None]:
    """Raise UserError where the file is no JSON of records."""
    try:
        yield
    except (IndexError, ValueError, RecursionError) as error:
        read_json(path, {"records": [object]}, remedy)  # says what is wrong
        raise UserError(f"{path} is damaged: {error}; {remedy}") from None


def _read_to_records(file: TextIO) -> tuple[str, str]:
    """The file's JSON without its records, and the text that was read from there on."""
    text = ""
    while not (start := RECORDS.search(text)):
        if not (block := file.read(READ_BLOCK)):
            raise ValueError("without records")
        text += block
    return text[: start.start()].rstrip().rstrip(",") + "}", text[start.end() :]


def read_json(path: Path, shape: Shape = dict, remedy: str = DELETE) -> Any:
    """The file's JSON. Raises UserError with the remedy unless it is whole and of the shape."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: it is no JSON ({error}); {remedy}") from None
    check_shape(path, value, shape, remedy)
    return value


def check_shape(path: Path, value: Any, shape: Shape, remedy: str = DELETE) -> None:
    """Raise UserError with the remedy if what the file holds is not of the shape."""
    if problem := shape_problem(value, shape):
        raise UserError(f"{path} is damaged: {problem}; {remedy}")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


# -------------------------------------------------------------------------- checkpoints


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
            others = "; pickled weights are not loaded, convert them first" * (len(paths) == 1)
            raise UserError(f"{folder} holds no {path.name}{others}")
    return paths


def weights_key(folder: Path) -> dict[str, Any]:
    """What identifies a checkpoint's weights: their sha256 by the manifest, or else size and time;
    and sha256 of the files that say what is computed with them.
    """
    configs = (folder / name for name in (ADAPTER_CONFIG, "config.json", INDEX_FILE))
    key: dict[str, Any] = {path.name: file_sha256(path) for path in configs if path.is_file()}
    if (folder / MANIFEST).is_file():
        try:
            files = read_manifest(folder)["files"]
        except UserError:  # `check_whole` says what is wrong before anything is measured
            return {}
        return {n: r["sha256"] for n, r in files.items() if n.endswith(".safetensors")} | key
    stats = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()} | key


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step in a folder's name, `checkpoint-<step>`; -1 for another folder."""
    prefix, _, step = checkpoint.name.rpartition("-")
    return int(step) if prefix == "checkpoint" and step.isdigit() else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders in the order of their steps, whole or not.

    >>> [folder.name for folder in checkpoints(Path("models/demo/similar_lora_r8_seed42"))]
    ['checkpoint-3', 'checkpoint-6']
    """
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if checkpoint_step(p) >= 0), key=checkpoint_step)


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
    is_one = any(folder.glob("*.safetensors"))
    if steps:
        return steps + [Checkpoint(f"{steps[0].run}-final", 0, folder)] * is_one
    if not is_one:
        raise UserError(f"{folder} holds no checkpoint-<step> folder and no *.safetensors")
    run = folder.parent.name if checkpoint_step(folder) >= 0 else folder.name
    return [Checkpoint(name or run, max(0, checkpoint_step(folder)), folder)]


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint that can be resumed; broken ones after it are deleted.

    >>> newest_whole_checkpoint(Path("models/demo/similar_lora_r8_seed42")).name
    'checkpoint-6'
    """
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = checkpoint_problem(checkpoint)
        if problem is None and (checkpoint / "optimizer.pt").is_file():
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
        manifest["files"].pop(path.name, None)
    write_json(checkpoint / MANIFEST, manifest)
    for path in resume_files:
        path.unlink()
