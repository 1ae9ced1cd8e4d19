"""Raw rows in the original schemas, from the Hub or a folder, checked and split.

Nothing is skipped silently: a bad line of a folder is an error with file and line; what the Hub's
official data hold broken is dropped and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import BENCHMARKS, DATA_SEED, ROOT, SPLITS, Settings, UserError
from dataset_descriptions import DatasetDescription, Row, describe
from lora_tradeoffs.data.splits import GROUPINGS, carve
from lora_tradeoffs.hub import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_ROWS = 2_000  # to carve from train where the official split is needed as test
# Held-out text beside Wikipedia's, where the trained SQuAD comes from: a folder's own prose, else
# the articles of CNN/DailyMail's test split.
PROSE, NEWS = "prose", "cnn_dailymail"


def source_folder(settings: Settings) -> Path | None:
    """The folder that rows are read from; None for the Hub."""
    if settings.data == "hub":
        return None
    return ROOT / "data" / "sample" if settings.data == "sample" else Path(settings.data)


def source_identity(source: Path | None, description: DatasetDescription) -> Any:
    """Of a folder its files' contents; of the Hub its name: a study keeps the rows it has."""
    if source is None:
        return [description.hub_id, description.hub_config]
    splits = (*SPLITS, *description.extra_splits)
    names = [f"{description.name}/{split}.jsonl" for split in splits]
    names += [f"{name}/{split}.jsonl" for name, (_, _, split) in BENCHMARKS.items()]
    found = [source / name for name in names if (source / name).is_file()]
    return [[str(p.relative_to(source)), hashlib.sha256(p.read_bytes()).hexdigest()] for p in found]


def read_folder(folder: Path, description: DatasetDescription, limit: int = 0) -> dict[str, list]:
    """Rows of <folder>/<task>/<split>.jsonl by split, every line checked.

    Raises UserError with file and line for what is wrong, and for a row that is in two splits.
    """
    splits, seen = {}, {}
    for split in (*SPLITS, *description.extra_splits):
        path = folder / description.name / f"{split}.jsonl"
        if split not in SPLITS and not path.exists():
            continue
        rows = read_jsonl(path, description.problem, limit)
        for line, row in enumerate(rows, 1):
            key = row_text(description, row)
            where = seen.setdefault(key, f"{path.name}:{line}")
            if not where.startswith(path.name):
                raise UserError(f"{path}:{line}: the same row is also in {where}; keep one of them")
        splits[split] = rows
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
                if found := problem(row):
                    raise UserError(f"{path}:{number}: {found}")
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

    Rows that the official data hold broken, and train rows that recur in test, are dropped and
    counted.
    """
    splits, made = {}, {"dropped": {}, "revision": None}
    for ours, theirs in description.hub_splits.items():
        data, made["revision"] = load_hub_split(
            description.hub_id, description.hub_config, theirs, description.name
        )
        dropped: Counter[str] = Counter()
        splits[ours] = []
        for row in data.select(range(min(limit or len(data), len(data)))):
            problem = description.problem(row)
            if problem:
                dropped[problem.partition(" (")[0]] += 1
            else:
                splits[ours].append(row)
        made["dropped"][ours] = dict(dropped)
    held_out = {
        row_text(description, row) for split in splits if split != "train" for row in splits[split]
    }
    kept = [row for row in splits["train"] if row_text(description, row) not in held_out]
    if len(kept) < len(splits["train"]):
        made["dropped"]["train"]["recurs in a held-out split"] = len(splits["train"]) - len(kept)
    splits["train"] = kept
    if "validation" not in splits:
        groups = GROUPINGS[description.groups](kept)
        mask = carve(groups, min(VALIDATION_ROWS, len(kept) // 10), DATA_SEED)
        splits["validation"] = [row for row, out in zip(kept, mask, strict=True) if out]
        splits["train"] = [row for row, out in zip(kept, mask, strict=True) if not out]
    for split in SPLITS:
        if not splits[split]:
            raise UserError(f"{description.name}: no row is left in {split}; raise --limit")
    return {split: splits[split] for split in (*SPLITS, *description.extra_splits)}, made


def load_hub_split(hub_id: str, config: str | None, split: str, task: str) -> tuple[Dataset, str]:
    """A split of a Hub data set and its commit. Raises UserError if it is not there."""
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
    """What makes a row the same row: its prompt's fields, without the template's words."""
    columns = (c for c, kind in description.columns.items() if kind is str)
    skip = {"id", "title", description.answer}
    return "\n".join(" ".join(row[c].split()) for c in columns if c not in skip)


def benchmark_texts(source: Path | None) -> dict[str, list[str]]:
    """The retention benchmarks' items as text; of a folder, those that are there."""
    texts = {}
    for name, (hub_id, config, split) in BENCHMARKS.items():
        if source is None:
            rows = load_hub_split(hub_id, config, split, name)[0]
        elif (source / name / f"{split}.jsonl").is_file():
            rows = read_jsonl(source / name / f"{split}.jsonl")
        else:
            continue
        texts[name] = [" ".join(_strings(row)) for row in rows]
    return texts


def held_out_texts(settings: Settings, limit: int = 0) -> dict[str, list[str]]:
    """The first `limit` (0: all) documents of two sources of held-out text, by name.

    Of the Hub Wikipedia (wikitext's pages) and news; of a folder the first two of wikitext, prose
    and news that are there. Raises UserError if none is.
    """
    source, texts = source_folder(settings), {}
    if source is None:
        hub_id, config, split = BENCHMARKS["wikitext"]
        news = describe(NEWS)
        places = {
            "wikitext": (hub_id, config, split, "page"),
            NEWS: (news.hub_id, news.hub_config, news.hub_splits["test"], "article"),
        }
        for name, (hub_id, config, split, field) in places.items():
            rows = load_hub_split(hub_id, config, split, name)[0]
            texts[name] = rows.select(range(min(limit or len(rows), len(rows))))[field]
        return {name: list(documents) for name, documents in texts.items()}
    for name, field in {"wikitext": "page", PROSE: "page", NEWS: "article"}.items():
        path = source / name / "test.jsonl"
        if len(texts) < 2 and path.is_file():
            rows = read_jsonl(path, lambda row, field=field: _text_problem(row, field), limit)
            texts[name] = [row[field] for row in rows]
    if not texts:
        raise UserError(
            f"{source} has no held-out text: put wikitext/test.jsonl, {PROSE}/test.jsonl (one"
            f' "page" a line) or {NEWS}/test.jsonl there'
        )
    return texts


def _text_problem(row: Row, field: str) -> str | None:
    value = row.get(field)
    return None if isinstance(value, str) and value.strip() else f"field {field!r} is no text"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
