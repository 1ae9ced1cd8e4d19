"""Files on disk: written whole, read against a shape."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from config import UserError
from lora_tradeoffs.command_line import reason_of, system_error
from lora_tradeoffs.shapes import Shape, shape_problem

RECORDS = re.compile(r'"records"\s*:\s*\[')  # where they begin in a document
SEPARATOR = re.compile(r"[\s,]*")
READ_BLOCK = 1 << 16  # characters of a document that are read at a time
LONGEST_RECORD = 1 << 20


PARTIAL = ".partial"  # how the names of temporary files and folders end
SAFETENSORS_PARTIAL = re.compile(r"\.tmp\w{6}")
DAY = 86_400  # seconds; no write takes that long


LEASE = 120.0  # seconds without a sign of life from a lock's holder on another host


@functools.cache
def shared_mount(folder: Path) -> str | None:
    """The file system below a folder if other hosts may mount it, too, such as "nfs4"."""
    import psutil

    mounts = psutil.disk_partitions(all=True)
    above = [mount for mount in mounts if folder.resolve().is_relative_to(mount.mountpoint)]
    kind = max(above, key=lambda mount: len(mount.mountpoint)).fstype if above else None
    disks = {disk.fstype for disk in psutil.disk_partitions()}
    return None if kind in {"tmpfs", "overlay", *disks} else kind


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold the lock of this path; with a `timeout` in seconds, raise filelock.Timeout after it.

    The system's locks do not reach other hosts on some network mounts (Lustre, BeeGFS, NFS by its
    options). There a file is the lock, which its holder renews. It is taken over from a holder that
    has not done so for LEASE seconds, who then ends.
    """
    from filelock import FileLock, SoftFileLease

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if shared_mount(path.parent):
        lock = SoftFileLease(f"{path}.lease", lease_duration=LEASE, on_compromise=_end)
        if timeout >= 0:  # whoever does not wait finds out here whether the holder lives
            timeout += 1.25 * LEASE
            if Path(lock.lock_file).exists():
                print(
                    f"{path} is held: waiting up to {timeout:.0f} s for its holder's sign of life"
                )
    with lock.acquire(timeout=timeout, poll_interval=0.2):
        yield


def _end(loss: Any) -> None:
    """A process of another host may write now; every file that was being written stays partial."""
    print(f"error: {loss.lock_file} was lost to another host: {loss.reason}", file=sys.stderr)
    os._exit(1)


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


def write_text(path: Path, text: str) -> None:
    """Write a text, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


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
    with _open(path) as file, _damage(path, remedy):
        head = json.loads(_read_to_records(file)[0])
    check_shape(path, head, shape, remedy)
    return head


def read_records(path: Path, shape: Shape = dict, remedy: str = DELETE) -> Iterator[dict[str, Any]]:
    """The records of a file of `write_records`, each of the shape, a block of the file at a time.

    Raises UserError as `read_json` does, where the damage begins.
    """
    decode = json.JSONDecoder().raw_decode
    with _open(path) as file, _damage(path, remedy):
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


def _open(path: Path) -> TextIO:
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8")


@contextmanager
def _damage(path: Path, remedy: str) -> Iterator[None]:
    """Raise UserError where the file is no JSON of records."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}; {remedy}") from None
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


@contextmanager
def intact(path: Path, remedy: str = DELETE) -> Iterator[None]:
    """Raise UserError where a library cannot read the file inside the block, the disk aside."""
    try:
        yield
    except Exception as error:
        if system_error(error):
            raise
        raise UserError(f"{path} is damaged: {reason_of(error)}; {remedy}") from None


def read_json(path: Path, shape: Shape = dict, remedy: str = DELETE) -> Any:
    """The file's JSON. Raises UserError with the remedy unless it is whole and of the shape."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
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
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """A short sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def file_record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}
