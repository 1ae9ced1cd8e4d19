"""Raw rows of the Hub, a folder or the sample -> checked, split, tokenised rows in data/<study>/.

Prepared data carry a fingerprint of source, tokenizer, description and limits, so that a change
prepares them anew and two settings lie side by side. Training calls `prepare` by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import DATA_SEED, Settings, UserError
from dataset_descriptions import DatasetDescription, Row, describe
from lora_tradeoffs.data.encoding import bos_ids, encode, label_token_ids
from lora_tradeoffs.data.sources import (
    VALIDATION_ROWS,
    benchmark_texts,
    read_folder,
    read_hub,
    row_text,
    source_folder,
    source_identity,
)
from lora_tradeoffs.data.splits import overlap
from lora_tradeoffs.files import written_whole

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # of the prepared rows; a change of this file that changes them counts it up
REPORT = "report.json"
# The fields of a description that decide what the rows are; a licence does not.
ROW_FIELDS = (
    *("name", "hub_id", "hub_config", "hub_splits", "groups"),
    *("template", "label_words", "answer", "passage"),
)


@dataclass(frozen=True)
class PreparedTask:
    """One task's tokenised splits on disk, and the report of how they were made.

    Columns: `row` (number in its split), `prompt`, `completion`, `references` (texts), `label`
    (class or -1), `input_ids` (BOS if any, prompt, completion, EOS), `prompt_length`, `length`.
    """

    name: str
    folder: Path
    report: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return self.report["fingerprint"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.report["splits"])

    def split(self, name: str) -> Dataset:
        from datasets import load_from_disk

        return load_from_disk(str(self.folder / name))


def prepare(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str | DatasetDescription],
    max_length: int,
    examples_per_task: int,
    limit: int = 0,
    overwrite: bool = False,
) -> dict[str, PreparedTask]:
    """The tasks' prepared data by name: found by fingerprint, or made and renamed into place.

    A task may be given as a description of one's own, such as one with another template.

    Raises UserError for bad data; nothing half-written is left.
    """
    prepared = {}
    for task in tasks:
        description = describe(task) if isinstance(task, str) else task
        prepared[description.name] = _prepare_task(
            settings, tokenizer, description, max_length, examples_per_task, limit, overwrite
        )
    return prepared


def find_prepared(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    tasks: Sequence[str],
    max_length: int,
    examples_per_task: int,
    limit: int = 0,
) -> dict[str, PreparedTask] | None:
    """The tasks' prepared data by name as `prepare` would return them; None if any are missing."""
    prepared = {}
    for task in tasks:
        made_from = _made_from(
            settings, tokenizer, describe(task), max_length, examples_per_task, limit
        )
        folder = settings.prepared_dir / task / _fingerprint(made_from)
        if not (folder / REPORT).is_file():
            return None
        prepared[task] = _read_prepared(task, folder)
    return prepared


def _prepare_task(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    description: DatasetDescription,
    max_length: int,
    examples_per_task: int,
    limit: int,
    overwrite: bool,
) -> PreparedTask:
    from filelock import FileLock

    if description.is_classification:
        label_token_ids(tokenizer, description)
    source = source_folder(settings)
    made_from = _made_from(settings, tokenizer, description, max_length, examples_per_task, limit)
    fingerprint = _fingerprint(made_from)
    parent = settings.prepared_dir / description.name
    folder = parent / fingerprint
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / ".lock"):
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / REPORT).is_file():
            for leftover in parent.glob(f".{fingerprint}.*"):  # of a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            with written_whole(folder) as temporary:
                report = _make(description, tokenizer, source, temporary, made_from)
                report = {"fingerprint": fingerprint, **report}
                (temporary / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
    return _read_prepared(description.name, folder)


def _made_from(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    description: DatasetDescription,
    max_length: int,
    examples_per_task: int,
    limit: int,
) -> dict[str, Any]:
    """All that decides what the prepared rows are."""
    return {
        "format": FORMAT,
        "source": source_identity(source_folder(settings), description),
        "description": {name: getattr(description, name) for name in ROW_FIELDS},
        "tokenizer": _tokenizer_digest(tokenizer),
        "max_length": max_length,
        "examples_per_task": examples_per_task,
        "limit": limit,
        "seed": DATA_SEED,
        "validation_rows": VALIDATION_ROWS,
    }


def _fingerprint(made_from: dict[str, Any]) -> str:
    text = json.dumps(made_from, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _read_prepared(name: str, folder: Path) -> PreparedTask:
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return PreparedTask(name, folder, report)


def _make(
    description: DatasetDescription,
    tokenizer: PreTrainedTokenizerFast,
    source: Path | None,
    folder: Path,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    if source is None:
        splits, made = read_hub(description, made_from["limit"])
        recipe = description.splits_sentence()
    else:
        splits, made = read_folder(source, description, made_from["limit"]), {}
        recipe = "the folder's three splits as they are"
    cap = made_from["examples_per_task"]
    if len(splits["train"]) > cap:
        order = np.random.default_rng(DATA_SEED).permutation(len(splits["train"]))[:cap]
        splits["train"] = [splits["train"][i] for i in np.sort(order)]
        recipe += f"; {cap:,} train rows drawn with seed {DATA_SEED}"
    report = {
        "task": description.name,
        "source": "hub" if source is None else str(source),
        "recipe": recipe,
        "revision": made.get("revision"),
        "max_length": made_from["max_length"],
        "overlap": _overlaps(description, splits, source),
        "splits": {},
    }
    for split, rows in splits.items():
        summary = _write_split(description, tokenizer, rows, split, folder, made_from["max_length"])
        for reason, count in made.get("dropped", {}).get(split, {}).items():
            summary["dropped"][reason] = summary["dropped"].get(reason, 0) + count
        report["splits"][split] = summary
    return report


def _write_split(
    description: DatasetDescription,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[Row],
    split: str,
    folder: Path,
    max_length: int,
) -> dict[str, Any]:
    from datasets import Dataset, disable_progress_bars, enable_progress_bars

    processes = min(os.cpu_count() or 1, len(rows) // 2_000)
    data = Dataset.from_list([{"row": i, "json": json.dumps(row)} for i, row in enumerate(rows)])
    data = data.map(
        lambda item: encode(tokenizer, description, json.loads(item["json"]), max_length),
        remove_columns="json",
        # processes pay where there are many rows; each needs a moment to start
        num_proc=processes if processes > 1 else None,
        desc=f"{description.name} {split}",
    )
    problems = data["problem"]
    # a held-out row keeps its place in the score though truncation took its answer
    keeps = [p is None or (split != "train" and "answer" in p) for p in problems]
    dropped = Counter(p for p, keep in zip(problems, keeps, strict=True) if not keep)
    data = data.select(np.flatnonzero(keeps))
    if not len(data):
        raise UserError(
            f"{description.name}: no {split} row fits into {max_length} tokens; raise max_length"
        )
    last = [ids[-1] for ids in data["input_ids"]]
    assert set(last) == {tokenizer.eos_token_id}, "every completion ends in EOS"
    prompts = np.array(data["prompt_length"])
    completions = np.array(data["length"]) - prompts
    summary = {
        "rows": len(data),
        "prompt_tokens": _lengths(prompts),
        "completion_tokens": _lengths(completions),
        "supervised_tokens": int(completions.sum()),
        "truncated": int(np.sum(np.array(data["cut"]) > 0)),
        "dropped": dict(dropped),
    }
    if description.is_classification:
        counts = Counter(data["label"])
        summary["labels"] = {n: counts[i] for i, n in enumerate(description.label_names)}
    disable_progress_bars()
    data.remove_columns(["problem", "cut"]).save_to_disk(str(folder / split))
    enable_progress_bars()
    return summary


def _lengths(tokens: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(tokens.mean()), 1),
        "p95": int(np.percentile(tokens, 95)),
        "max": int(tokens.max()),
    }


def _overlaps(
    description: DatasetDescription, splits: dict[str, list], source: Path | None
) -> dict[str, dict[str, int]]:
    """Overlap of train with validation, test, and the retention benchmarks that are there."""
    texts = {s: [row_text(description, row) for row in rows] for s, rows in splits.items()}
    held_out = {s: texts[s] for s in texts if s != "train"} | benchmark_texts(source)
    return {name: overlap(texts["train"], other) for name, other in held_out.items()}


def _tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, bos_ids(tokenizer)]
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(special)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------- table
