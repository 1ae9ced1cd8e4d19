"""Where runs and checkpoints are: atomic writes, manifests, verification."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from config import UserError

MANIFEST = "manifest.json"
# What Trainer needs to go on, and nobody needs to evaluate: kept in the two newest checkpoints.
RESUME_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")


# ------------------------------------------------------------------------------- files


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The file's JSON. Raises UserError if it cannot be parsed."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to make it anew") from None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


# -------------------------------------------------------------------------- checkpoints


def write_manifest(checkpoint: Path, **extra: Any) -> None:
    """List the checkpoint's files with sizes and sha256. Written last: it makes it whole."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # Trainer does not; a manifest must not outlive its files
    listing = {str(p.relative_to(checkpoint)): file_record(p) for p in files}
    write_json(checkpoint / MANIFEST, {**extra, "files": listing})


def checkpoint_problem(checkpoint: Path, suffix: str = "") -> str | None:
    """Why the checkpoint is not whole, or None: it is whole iff its manifest agrees.

    With `suffix` only files of that ending are read: whoever needs the weights alone need not
    wait for the optimizer's state, which is twice as large.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"{checkpoint} has no {MANIFEST}: its saving did not end"
    for name, record in read_json(manifest)["files"].items():
        if not name.endswith(suffix):
            continue
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != record["size"] or file_sha256(path) != record["sha256"]:
            return f"{path} is corrupt: its size or sha256 is not the manifest's"
    return None


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer step in a folder's name, `checkpoint-<step>`; -1 for another folder."""
    prefix, _, step = checkpoint.name.rpartition("-")
    return int(step) if prefix == "checkpoint" and step.isdigit() else -1


def checkpoints(run_dir: Path) -> list[Path]:
    """The run's checkpoint folders in the order of their steps, whole or not."""
    if not run_dir.is_dir():
        return []
    return sorted((p for p in run_dir.iterdir() if checkpoint_step(p) >= 0), key=checkpoint_step)


def newest_whole_checkpoint(run_dir: Path) -> Path | None:
    """The newest whole checkpoint that can be resumed; what broke after it is deleted."""
    for checkpoint in reversed(checkpoints(run_dir)):
        problem = checkpoint_problem(checkpoint)
        if problem is None and (checkpoint / "optimizer.pt").is_file():
            return checkpoint
        print(f"not resuming from {checkpoint.name}: {problem or 'it has no optimizer state'}")
        shutil.rmtree(checkpoint)
    return None


def drop_resume_state(checkpoint: Path) -> None:
    """Delete optimizer and RNG state; the manifest is rewritten first, so it stays whole."""
    doomed = [path for pattern in RESUME_FILES for path in checkpoint.glob(pattern)]
    if not doomed:
        return
    manifest = read_json(checkpoint / MANIFEST)
    for path in doomed:
        manifest["files"].pop(path.name, None)
    write_json(checkpoint / MANIFEST, manifest)
    for path in doomed:
        path.unlink()
