"""Raw rows in the original schemas, from the Hub or a folder, checked and split.

Nothing is skipped silently: a bad line of a folder is an error with file and line; broken rows of
the Hub's official data are dropped and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BENCHMARKS, DATA_SEED, ROOT, SPLITS, Settings, UserError
from dataset_descriptions import DESCRIPTIONS, DatasetDescription, Row
from lora_tradeoffs.data.splits import carve, group_rows
from lora_tradeoffs.hub import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_ROWS = 2_000  # to carve from train where the official split is needed as test
PROSE = "prose"  # a folder's own held-out text, one "page" a line


def source_folder(settings: Settings) -> Path | None:
    """The folder that rows are read from; None for the Hub."""
    if settings.data == "hub":
        return None
    return ROOT / "data" / "sample" if settings.data == "sample" else Path(settings.data)


def source_identity(source: Path | None, description: DatasetDescription) -> Any:
    """The data set's name on the Hub, or the contents of a folder's files.

    Rows of the Hub are not compared with newer ones: a study keeps those that it has.
    """
    if source is None:
        return [description.hub_id, description.hub_config]
    names = [f"{description.name}/{split}.jsonl" for split in (*SPLITS, *description.extra_splits)]
    names += [f"{name}/{benchmark.split}.jsonl" for name, benchmark in BENCHMARKS.items()]
    paths = [source / name for name in names if (source / name).is_file()]
    return [[str(p.relative_to(source)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in paths]


def row_problem(description: DatasetDescription, row: Row) -> str | None:
    """What is wrong with a raw row, in words, or None."""
    for column, kind in description.columns.items():
        if column not in row:
            return f"field {column!r} is missing (fields: {', '.join(description.columns)})"
        value = row[column]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"field {column!r} holds {value!r:.40}, not {kind.__name__}"
        if kind is str and not value.strip():
            return f"field {column!r} is empty"
    words = description.label_words
    if description.is_classification and not 0 <= row["label"] < len(words):
        allowed = ", ".join(f"{i} {name}" for i, name in enumerate(description.label_names))
        return f"label {row['label']} is outside the set ({allowed})"
    return _answers_problem(description, row) if description.kind == "answers" else None


def _answers_problem(description: DatasetDescription, row: Row) -> str | None:
    field, context = description.answer, row[description.passage]
    texts, starts = row[field].get("text"), row[field].get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return f"field {field!r} needs two lists of one length, text and answer_start"
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not text.strip():
            return f"field {field!r} holds an empty text"
        if context[start : start + len(text)] != text:
            passage = description.passage
            return f"answer_start {start} does not point at {text!r:.40} in the {passage}"
    return None


def read_folder(folder: Path, description: DatasetDescription, limit: int = 0) -> dict[str, list]:
    """Rows of <folder>/<task>/<split>.jsonl by split, every line checked.

    Raises UserError with file and line for what is wrong, and for a row that is in two splits.
    """
    splits, first_lines = {}, {}
    for split in (*SPLITS, *description.extra_splits):
        path = folder / description.name / f"{split}.jsonl"
        if split not in SPLITS and not path.exists():
            continue
        splits[split] = read_jsonl(path, partial(row_problem, description), limit)
        for line, row in enumerate(splits[split], 1):
            first = first_lines.setdefault(row_text(description, row), f"{path.name}:{line}")
            if not first.startswith(path.name):
                raise UserError(f"{path}:{line}: the same row is also in {first}; keep one of them")
    return splits


def read_jsonl(
    path: Path, problem: Callable[[Row], str | None] = lambda row: None, limit: int = 0
) -> list[Row]:
    """The first `limit` (0: all) rows of a JSON-lines file. Raises UserError with file and line."""
    rows: list[Row] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if limit and len(rows) == limit:
                    break
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{path}:{number}: not a JSON object")
                if reason := problem(row):
                    raise UserError(f"{path}:{number}: {reason}")
                rows.append(row)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not rows:
        raise UserError(f"{path} is empty; it needs at least one row")
    return rows


def read_hub(
    description: DatasetDescription, limit: int = 0
) -> tuple[dict[str, list], dict[str, Any]]:
    """Rows by our splits from the Hub, validation carved where it must be; and what was done.

    Broken rows, and train rows that recur in a held-out split, are dropped and counted.
    """
    splits, made = {}, {"dropped": {}, "revision": None}
    for ours, official in description.hub_splits.items():
        data, made["revision"] = load_hub_split(
            description.hub_id, description.hub_config, official, description.name
        )
        dropped: Counter[str] = Counter()
        splits[ours] = []
        for row in data.select(range(min(limit or len(data), len(data)))):
            if reason := row_problem(description, row):
                dropped[reason.partition(" (")[0]] += 1
            else:
                splits[ours].append(row)
        made["dropped"][ours] = dict(dropped)
    held_out = {
        row_text(description, row) for split in splits if split != "train" for row in splits[split]
    }
    train = [row for row in splits["train"] if row_text(description, row) not in held_out]
    if len(train) < len(splits["train"]):
        made["dropped"]["train"]["recurs in a held-out split"] = len(splits["train"]) - len(train)
    if "validation" not in splits:
        groups = group_rows(description, train)
        mask = carve(groups, min(VALIDATION_ROWS, len(train) // 10), DATA_SEED)
        splits["validation"] = [row for row, out in zip(train, mask, strict=True) if out]
        train = [row for row, out in zip(train, mask, strict=True) if not out]
    splits["train"] = train
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f"{description.name}: no row is left in {split}; raise --limit")
    return {split: splits[split] for split in (*SPLITS, *description.extra_splits)}, made


def load_hub_split(hub_id: str, config: str | None, split: str, task: str) -> tuple[Dataset, str]:
    """A split of a Hub data set and its commit. Raises UserError if it cannot be had."""
    import datasets
    from huggingface_hub import HfApi

    with hub_errors(f"data set {hub_id}", f"task {task}"):
        # asked first: without a network, load_dataset would retry for half a minute
        offline = datasets.config.HF_HUB_OFFLINE
        revision = None if offline else HfApi().dataset_info(hub_id).sha
        data = datasets.load_dataset(hub_id, config, split=split, revision=revision)
    # offline, rows come from the cache of datasets, whose folder is named after the commit
    return data, revision or Path(data.cache_files[0]["filename"]).parent.name


def row_text(description: DatasetDescription, row: Row) -> str:
    """What makes a row the same row: the fields of its prompt, without the template's words."""
    fields = (name for name, kind in description.columns.items() if kind is str)
    return "\n".join(
        " ".join(row[name].split()) for name in fields if f"{{{name}}}" in description.template
    )


def benchmark_texts(source: Path | None) -> dict[str, list[str]]:
    """The items of the retention benchmarks as text; of a folder, of those that it has."""
    texts = {}
    for name, benchmark in BENCHMARKS.items():
        if source is None:
            rows = load_hub_split(*benchmark[:3], name)[0]
        elif (source / name / f"{benchmark.split}.jsonl").is_file():
            rows = read_jsonl(source / name / f"{benchmark.split}.jsonl")
        else:
            continue
        texts[name] = [" ".join(_strings(row)) for row in rows]
    return texts


def held_out_texts(settings: Settings, limit: int = 0) -> dict[str, list[str]]:
    """The first `limit` (0: all) documents of two sources of held-out text, by name.

    From the Hub: the benchmarks that are text (Wikipedia) and the test split of a task with prose.
    From a folder: the first two of these and its own prose, which comes between them, since a
    model may be trained on the task. Raises UserError if a folder has none.
    """
    source, texts = source_folder(settings), {}
    fields = {name: benchmark.text for name, benchmark in BENCHMARKS.items() if benchmark.text}
    hub = {name: BENCHMARKS[name][:3] for name in fields}
    fields[PROSE] = "page"
    for name, d in DESCRIPTIONS.items():
        if d.prose:
            fields[name], hub[name] = d.prose, (d.hub_id, d.hub_config, d.hub_splits["test"])
    for name, field in fields.items():
        if len(texts) == 2:
            break
        if source is None and name in hub:
            rows = load_hub_split(*hub[name], name)[0]
            texts[name] = list(rows.select(range(min(limit or len(rows), len(rows))))[field])
        elif source is not None and (source / name / "test.jsonl").is_file():
            rows = read_jsonl(source / name / "test.jsonl", partial(_text_problem, field), limit)
            texts[name] = [row[field] for row in rows]
    if not texts:
        files = " or ".join(
            f"{name}/test.jsonl (field {field!r})" for name, field in fields.items()
        )
        raise UserError(f"{source} has no held-out text: put {files} there")
    return texts


def _text_problem(field: str, row: Row) -> str | None:
    value = row.get(field)
    return None if isinstance(value, str) and value.strip() else f"field {field!r} is no text"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
