"""Raw rows in the original schemas, from the Hub or a folder, checked and split.

Nothing is skipped silently: a bad line of a folder is an error with file and line; broken rows of
the Hub's official data are dropped and counted.
"""

from __future__ import annotations

import itertools
import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import BENCHMARKS, DATA_SEED, SPLITS, Settings, UserError
from dataset_descriptions import DESCRIPTIONS, DatasetDescription, Row
from lora_tradeoffs.data.splits import carve, draw, group_rows
from lora_tradeoffs.files import file_sha256, json_digest
from lora_tradeoffs.hub import hub_errors

if TYPE_CHECKING:
    from datasets import Dataset

VALIDATION_ROWS = 2_000  # to carve from train where the official split is needed as test
MOST_LEVELS = 50  # of nesting in a row: what handles it recurses
PROSE = "prose"  # a folder's own held-out text, one "page" a line


def row_files(source: Path | None, description: DatasetDescription) -> dict[str, Path] | None:
    """The files of a task's splits, in the data folder or where its task file says.

    None for rows on the Hub. Raises UserError for a task that has neither.
    """
    own = description.hub_splits if description.definition is not None else ()
    splits = own or (*SPLITS, *description.extra_splits)
    paths = {split: description.row_file(source, split) for split in splits}
    if all(paths.values()):
        return paths
    if not description.hub_id:
        raise UserError(
            f"{description.source_file}: no rows; put <split>.jsonl into FOLDER/{description.name}/"
            " and give --data FOLDER, or name dataset_path"
        )
    return None


def source_identity(source: Path | None, description: DatasetDescription) -> Any:
    """The data set's name on the Hub, or the contents of its files and of the benchmarks'.

    Rows of the Hub are not compared with newer ones: a study keeps those that it has.
    """
    files = row_files(source, description)
    if files is None:
        return [description.hub_id, description.hub_config]
    names = [f"{name}/{benchmark.split}.jsonl" for name, benchmark in BENCHMARKS.items()]
    paths = {f"{description.name}/{path.name}": path for path in files.values()}
    paths |= {name: source / name for name in names if source is not None}
    return [[name, file_sha256(path)] for name, path in paths.items() if path.is_file()]


def source_digest(source: Path) -> str:
    """A digest of all the folder's files that are read."""
    identities = [source_identity(source, description) for description in DESCRIPTIONS.values()]
    return json_digest(identities)


def row_problem(description: DatasetDescription, row: Row) -> str | None:
    """What is wrong with a raw row, in words, or None."""
    if description.definition is not None:
        return description.problem(row)
    for column, kind in description.columns.items():
        if column not in row:
            return f"field {column!r} is missing (fields: {', '.join(description.columns)})"
        value = row[column]
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"field {column!r} holds {reprlib.repr(value)}, not {kind.__name__}"
        if kind is str and not value.strip():
            return f"field {column!r} is empty"
    words = description.label_words
    if description.is_classification and not 0 <= row["label"] < len(words):
        allowed = ", ".join(f"{i} {name}" for i, name in enumerate(description.label_names))
        return f"label {reprlib.repr(row['label'])} is outside the set ({allowed})"
    return _answers_problem(description, row) if description.kind == "answers" else None


def _answers_problem(description: DatasetDescription, row: Row) -> str | None:
    field, context = description.answer, row[description.passage]
    texts, starts = row[field].get("text"), row[field].get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return f"field {field!r} needs two lists of one length, text and answer_start"
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not text.strip():
            return f"field {field!r} needs texts that are not empty, not {reprlib.repr(text)}"
        if type(start) is not int or start < 0:  # pandas writes 28.0
            return f"answer_start is {reprlib.repr(start)}, not a whole number of 0 or more"
        if context[start : start + len(text)] != text:
            place, words = reprlib.repr(start), reprlib.repr(text)
            return f"answer_start {place} does not point at {words} in the {description.passage}"
    return None


def read_folder(
    folder: Path | None, description: DatasetDescription, limit: int = 0, cap: int = 0
) -> dict[str, list]:
    """Rows of <folder>/<task>/<split>.jsonl, or of the task's own files, by split, all checked.

    Of train the `cap` rows (0: all) that `draw` chooses are held in memory; where validation has to
    be carved from train, all are. Raises UserError with file and line for what is wrong, and for a
    row that is in two splits.
    """
    paths = row_files(folder, description)
    problem, carved = partial(row_problem, description), "validation" not in paths
    with readable(train := paths.pop("train")), train.open("rb") as file:
        count = sum(1 for _ in file)
    drawn = draw(min(limit or count, count), cap)
    splits, lines = {"train": []}, {}
    for split, path in paths.items():
        if split not in SPLITS and not path.exists():
            continue
        splits[split] = read_jsonl(path, problem, limit)
        for number, row in enumerate(splits[split], 1):
            first = lines.setdefault(row_text(description, row), (path, number))
            if first[0] != path:
                raise _in_two_splits(path, number, *first)
    for number, row in enumerate(iterate_jsonl(train, problem, limit), 1):
        if first := lines.get(row_text(description, row)):
            raise _in_two_splits(*first, train, number)
        if drawn[number - 1] or carved:
            splits["train"].append(row)
    if carved:
        mask = validation_mask(description, splits["train"])
        splits["validation"] = [*itertools.compress(splits["train"], mask)]
        rest = [*itertools.compress(splits["train"], ~mask)]
        splits["train"] = [*itertools.compress(rest, draw(len(rest), cap))]
        if not splits["validation"]:
            raise UserError(
                f"{train}: too few rows, or groups of them, to carve validation from: name"
                " validation_split"
            )
    return splits


def validation_mask(description: DatasetDescription, train: Sequence[Row]) -> np.ndarray:
    """Which train rows become validation where the official split is needed as test."""
    groups = group_rows(description, train)
    return carve(groups, min(VALIDATION_ROWS, len(train) // 10), DATA_SEED)


def _in_two_splits(path: Path, number: int, other: Path, line: int) -> UserError:
    place = f"{other.name}:{line}"
    return UserError(f"{path}:{number}: the same row is also in {place}; keep one of them")


def read_jsonl(
    path: Path, problem: Callable[[Row], str | None] = lambda row: None, limit: int = 0
) -> list[Row]:
    """The first `limit` (0: all) rows of a JSON-lines file. Raises UserError with file and line."""
    return list(iterate_jsonl(path, problem, limit))


def iterate_jsonl(
    path: Path, problem: Callable[[Row], str | None], limit: int = 0
) -> Iterator[Row]:
    """The rows of `read_jsonl`, one after another."""
    number = 0
    with readable(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if limit and number > limit:
                return
            try:
                row = json.loads(line.decode("utf-8-sig"))
                if rb"\u" in line:  # may be half of a surrogate pair, which is no text
                    json.dumps(row, ensure_ascii=False).encode()
                if _levels(row) > MOST_LEVELS:
                    raise RecursionError
                reason = problem(row) if isinstance(row, dict) else "not a JSON object"
            except UnicodeError as error:
                reason = f"not UTF-8 text ({error.reason})"
            except ValueError as error:
                reason = f"not JSON ({error})"
            except RecursionError:
                reason = "nested too deeply"
            if reason:
                raise UserError(f"{path}:{number}: {reason}")
            yield row
    if not number:
        raise UserError(f"{path} is empty; it needs at least one row")


def _levels(value: Any) -> int:
    """How deep lists and dicts are nested in a JSON value."""
    levels, inner = 0, [value]
    while inner := [v for v in inner if isinstance(v, (dict, list))]:
        inner = [v for part in inner for v in (part.values() if type(part) is dict else part)]
        levels += 1
    return levels


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise UserError if the file cannot be read inside the block."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def read_hub(
    description: DatasetDescription, limit: int = 0, cap: int = 0
) -> tuple[dict[str, list], dict[str, Any]]:
    """Rows by our splits from the Hub, validation carved where it must be; and what was done.

    Broken rows, and train rows that recur in a held-out split, are dropped and counted. Of train
    the `cap` rows (0: all) that `draw` chooses are held in memory.
    """
    official, keys, made = {}, {}, {"dropped": {}, "revision": None}
    for split, name in description.hub_splits.items():
        data, made["revision"] = load_hub_split(
            description.hub_id, description.hub_config, name, description.name
        )
        data = data.select(range(min(limit or len(data), len(data))))
        dropped: Counter[str] = Counter()
        good, keys[split] = [], []
        for i, row in enumerate(data):
            if reason := row_problem(description, row):
                dropped[reason.partition(" (")[0]] += 1
            else:
                good.append(i)
                keys[split].append(hash(row_text(description, row)))
        made["dropped"][split], official[split] = dict(dropped), data.select(good)
    train, train_keys = official.pop("train"), keys.pop("train")
    splits = {split: list(data) for split, data in official.items()}
    is_new = ~np.isin(train_keys, [key for split in keys.values() for key in split])
    if not is_new.all():
        made["dropped"]["train"]["recurs in a held-out split"] = int(np.sum(~is_new))
        train = train.select(np.flatnonzero(is_new))
    if "validation" not in splits:
        mask = validation_mask(description, train)
        splits["validation"] = list(train.select(np.flatnonzero(mask)))
        train = train.select(np.flatnonzero(~mask))
    splits["train"] = list(train.select(np.flatnonzero(draw(len(train), cap))))
    for split in SPLITS:
        if not splits[split]:
            reasons = made["dropped"].get(split)
            advice = max(reasons, key=reasons.get) if reasons else "raise --limit"
            raise UserError(f"{description.name}: no row is left in {split}; {advice}")
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
    return "\n".join(" ".join(str(row.get(name)).split()) for name in description.prompt_fields)


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
    source, texts = settings.data_folder, {}
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
