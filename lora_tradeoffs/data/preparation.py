"""Raw rows of the Hub, a folder or the sample -> checked, split, tokenised rows in data/<study>/.

A fingerprint of source, tokenizer, description and limits names the folder of prepared data, so
that a change prepares them again and two settings lie side by side.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import DATA_SEED, Settings, UserError
from dataset_descriptions import DatasetDescription, Row, describe
from lora_tradeoffs.chat import form_of
from lora_tradeoffs.data.encoding import bos_ids, choice_ids, encode, end_id
from lora_tradeoffs.data.sources import (
    VALIDATION_ROWS,
    benchmark_texts,
    read_folder,
    read_hub,
    row_files,
    row_text,
    source_identity,
)
from lora_tradeoffs.data.splits import overlap
from lora_tradeoffs.files import locked, read_json, remove_partial, written_whole
from lora_tradeoffs.task_yaml import TEXT_METRICS, text_metrics

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of the prepared rows; raise it with a change that alters them
REPORT = "report.json"
# The fields of a description that decide what the rows are; a licence does not.
ROW_FIELDS = (
    *("name", "hub_id", "hub_config", "hub_splits", "groups"),
    *("template", "label_words", "answer", "passage", "max_new_tokens"),
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
    """The tasks' prepared data by name: those with the same fingerprint, or newly made ones.

    A task is a name or a description, such as one with another template. `limit` takes the first
    rows of each split (0: all), `examples_per_task` then draws from train. Raises UserError for bad
    data, and leaves nothing half-written.
    """
    prepared = {}
    for task in tasks:
        preparation = Preparation(settings, tokenizer, task, max_length, examples_per_task, limit)
        prepared[preparation.description.name] = preparation.run(overwrite)
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
        preparation = Preparation(settings, tokenizer, task, max_length, examples_per_task, limit)
        if not preparation.is_done():
            return None
        prepared[task] = preparation.read()
    return prepared


class Preparation:
    """One task's rows, from their source to the folder that their fingerprint names."""

    def __init__(
        self,
        settings: Settings,
        tokenizer: PreTrainedTokenizerFast,
        task: str | DatasetDescription,
        max_length: int,
        examples_per_task: int,
        limit: int,
    ):
        self.description = describe(task) if isinstance(task, str) else task
        self.tokenizer, self.source = tokenizer, settings.data_folder
        self.max_length, self.cap, self.limit = max_length, examples_per_task, limit
        is_own = self.description.definition is not None
        fields = (*ROW_FIELDS, "choice_list", "delimiter") if is_own else ROW_FIELDS
        made_from = {
            "format": FORMAT,
            "source": source_identity(self.source, self.description),
            "description": {name: getattr(self.description, name) for name in fields},
            "tokenizer": _tokenizer_digest(tokenizer),
            "max_length": max_length,
            "examples_per_task": examples_per_task,
            "limit": limit,
            "seed": DATA_SEED,
            "validation_rows": VALIDATION_ROWS,
        }
        text = json.dumps(made_from, sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder = settings.prepared_dir / self.description.name / self.fingerprint

    def is_done(self) -> bool:
        return (self.folder / REPORT).is_file()

    def read(self) -> PreparedTask:
        report = read_json(self.folder / REPORT, {"fingerprint": str, "splits": {"*": dict}})
        return PreparedTask(self.description.name, self.folder, report)

    def run(self, overwrite: bool) -> PreparedTask:
        """The prepared data, made if they are missing or to be overwritten."""
        if self.description.is_classification:
            choice_ids(self.tokenizer, self.description)
        with locked(self.folder.parent / ".lock"):
            if overwrite:
                shutil.rmtree(self.folder, ignore_errors=True)
            if not self.is_done():
                remove_partial(self.folder.parent, age=0)  # what a kill left, since none writes now
                with written_whole(self.folder) as temporary:
                    report = {"fingerprint": self.fingerprint, **self._make(temporary)}
                    (temporary / REPORT).write_text(json.dumps(report, indent=1), encoding="utf-8")
        return self.read()

    def _make(self, folder: Path) -> dict[str, Any]:
        """Write every split into the folder; the report."""
        if self.description.kind == "text":  # before anything is trained for them
            check_metrics(self.description)
        is_hub = row_files(self.source, self.description) is None
        if is_hub:
            splits, made = read_hub(self.description, self.limit, self.cap)
        else:
            splits, made = read_folder(self.source, self.description, self.limit, self.cap), {}
        recipe = "the folder's three splits as they are"
        if is_hub or self.description.definition is not None:
            recipe = self.description.splits_sentence()
        recipe += f"; at most {self.cap:,} train rows, drawn with seed {DATA_SEED}"
        report = {
            "task": self.description.name,
            "source": "hub" if is_hub else str(self.source or self.description.source_file),
            "recipe": recipe,
            "revision": made.get("revision"),
            "max_length": self.max_length,
            "overlap": self._overlaps(splits),
            "splits": {},
        }
        for split, rows in splits.items():
            summary = self._write_split(rows, split, folder)
            for reason, count in made.get("dropped", {}).get(split, {}).items():
                summary["dropped"][reason] = summary["dropped"].get(reason, 0) + count
            report["splits"][split] = summary
        return report

    def _overlaps(self, splits: dict[str, list[Row]]) -> dict[str, dict[str, int]]:
        """Overlap of train with each other split and each retention benchmark of the source."""
        texts = {s: [row_text(self.description, row) for row in rows] for s, rows in splits.items()}
        train = texts.pop("train")
        others = texts | benchmark_texts(self.source)
        return {name: overlap(train, other) for name, other in others.items()}

    def _write_split(self, rows: list[Row], split: str, folder: Path) -> dict[str, Any]:
        """Write the split's tokenised rows; their sizes, and what was cut and dropped."""
        from datasets import disable_progress_bars, enable_progress_bars

        data = self._encode(rows, split)
        problems = data["problem"]
        # a held-out row keeps its place in the score though its answer was cut off or is too long
        usable = [not p or (split != "train" and "answer" in p) for p in problems]
        dropped = Counter(p for p, use in zip(problems, usable, strict=True) if not use)
        data = data.select(np.flatnonzero(usable))
        if not len(data):
            raise UserError(
                f"{self.description.name}: no {split} row fits into {self.max_length} tokens; raise"
                " max_length"
            )
        last = {ids[-1] for ids in data["input_ids"]}
        assert last == {end_id(self.tokenizer)}, "every completion ends"
        disable_progress_bars()
        data.remove_columns(["problem", "cut"]).save_to_disk(str(folder / split))
        enable_progress_bars()
        return _summary(data, self.description) | {"dropped": dict(dropped)}

    def _encode(self, rows: list[Row], split: str) -> Dataset:
        from datasets import Dataset

        tokenizer, description, max_length = self.tokenizer, self.description, self.max_length
        # rows of the Hub may hold dates and the like, which JSON cannot
        items = [{"row": i, "raw": pickle.dumps(row)} for i, row in enumerate(rows)]
        processes = min(os.cpu_count() or 1, len(rows) // 2_000)
        return Dataset.from_list(items).map(
            lambda item: encode(tokenizer, description, pickle.loads(item["raw"]), max_length),
            remove_columns="raw",
            # processes pay where there are many rows; each needs a moment to start
            num_proc=processes if processes > 1 else None,
            desc=f"{description.name} {split}",
        )


def check_metrics(description: DatasetDescription) -> None:
    """Raise UserError for a metric or filter of the task file that lm-eval does not have."""
    from lora_tradeoffs.scoring.lm_eval_text import filtered, metric_values

    for metric in text_metrics(description.definition):
        try:
            texts = filtered(metric.filters, ["a"])
            if metric.metric not in TEXT_METRICS:
                metric_values(metric.metric, metric.arguments, texts, [["a"]])
            elif metric.arguments:
                raise UserError(f"{metric.metric} takes no {', '.join(metric.arguments)}")
        except UserError as error:
            raise UserError(f"{description.source_file}: {metric.name}: {error}") from None


def _summary(data: Dataset, description: DatasetDescription) -> dict[str, Any]:
    prompts = np.array(data["prompt_length"])
    completions = np.array(data["length"]) - prompts
    summary = {
        "rows": len(data),
        "prompt_tokens": _lengths(prompts),
        "completion_tokens": _lengths(completions),
        "supervised_tokens": int(completions.sum()),
        "truncated": int(np.sum(np.array(data["cut"]) > 0)),
    }
    if description.is_classification:
        counts = Counter(data["label"])
        summary["labels"] = {n: counts[i] for i, n in enumerate(description.label_names)}
    return summary


def _lengths(tokens: np.ndarray) -> dict[str, float]:
    return {
        "mean": round(float(tokens.mean()), 1),
        "p95": int(np.percentile(tokens, 95)),
        "max": int(tokens.max()),
    }


def _tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, bos_ids(tokenizer)]
    if form := form_of(tokenizer):
        special.append(form.request)
    text = tokenizer.backend_tokenizer.to_str() + json.dumps(special)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
