"""lm-eval's task definitions by name, over the Hub's rows or a folder's, checked.

Of a folder `<benchmark>/<split>.jsonl` in the original schema is put below lm-eval's own
definition, from which the splits are read. lm-eval scores a row whose gold answer is not among its
choices 0, and renders a missing field as "None", in silence: here both are errors with file and
line.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Settings, UserError
from dataset_descriptions import Row
from lora_tradeoffs.data.sources import read_jsonl, source_folder
from lora_tradeoffs.hub import hub_error

SPLIT_KEYS = ("training_split", "validation_split", "test_split")
# datasets' names for local files, where the Hub need not be asked
FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow", None)


@dataclass(frozen=True)
class LocalBenchmark:
    """What is put below a definition: `overrides` of it, and its files by split."""

    name: str
    overrides: dict[str, Any]
    evaluated: str
    shots_from: str | None
    files: dict[str, Path]

    def definition(self, own: Path, **files: Path) -> dict[str, Any]:
        """The definition that includes lm-eval's `own`; `files` replace those of their splits."""
        places = {split: str(path) for split, path in {**self.files, **files}.items()}
        return {"include": str(own), **self.overrides, "dataset_kwargs": {"data_files": places}}


def local_benchmark(
    name: str, definition: dict[str, Any], folder: Path, num_fewshot: int
) -> LocalBenchmark:
    """The benchmark over <folder>/<name>/<split>.jsonl, every line of the files read and checked.

    Shots come from the definition's split; where the folder lacks it, from the next one by
    lm-eval's own rule (training, validation, test), at last from the evaluated split without the
    item itself. Raises UserError for a missing split or a bad line.
    """
    evaluated = definition.get("test_split") or definition.get("validation_split")
    if not evaluated or "class" in definition:
        raise UserError(f"benchmark {name} is defined in code, not by splits: it needs --data hub")
    path = folder / name / f"{evaluated}.jsonl"
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.jsonl"))) or "no other split"
        raise UserError(f"benchmark {name} needs its split {evaluated}: no {path} ({others} there)")
    few = definition.get("fewshot_config") or {}
    own = definition.get("fewshot_split") or few.get("split")
    ranked = [own] if own else [definition.get(key) for key in SPLIT_KEYS]
    there = [s for s in ranked if s and (folder / name / f"{s}.jsonl").is_file()]
    shots_from = there[0] if there else evaluated
    overrides: dict[str, Any] = dict.fromkeys((*SPLIT_KEYS, "dataset_name", "custom_dataset"))
    overrides |= {"task": name, "tag": None, "dataset_path": "json"}
    # lm-eval leaves the item itself out of its shots where these two are the same
    overrides |= {"test_split": evaluated, "fewshot_split": shots_from}
    files = {split: folder / name / f"{split}.jsonl" for split in (shots_from, evaluated)}
    for split, file in files.items():
        rows = read_jsonl(file)
        if found := schema_problem(rows):
            raise UserError(f"{file}:{found[0]}: {found[1]}")
        needed = num_fewshot + (split == evaluated)
        if num_fewshot and split == shots_from and len(rows) < needed:
            raise UserError(f"{file}: {num_fewshot} shots need {needed} rows, it has {len(rows)}")
    return LocalBenchmark(name, overrides, evaluated, shots_from if num_fewshot else None, files)


# --------------------------------------------------------------------------- checks of rows


def schema_problem(rows: list[Row]) -> tuple[int, str] | None:
    """The first line whose fields are not those of the others, and how; None if there is none."""
    kinds: dict[str, tuple[str, int]] = {}  # a field's kind, and the line that has it
    for line, row in enumerate(rows, 1):
        for field, value in row.items():
            if value is not None:
                kinds.setdefault(field, (_kind(value), line))
    for line, row in enumerate(rows, 1):
        for field, (kind, first) in kinds.items():
            if row.get(field) is None:
                return line, f"field {field!r} is missing (line {first} has it)"
            if _kind(row[field]) != kind:
                return line, f"field {field!r} is {_kind(row[field])}, in line {first} {kind}"
    return None


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def doc_problem(task: Any, doc: Row) -> str | None:
    """Why lm-eval could not score the document, or would score it 0 in silence; else None."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None if str(task.doc_to_target(doc)).strip() else "its text is empty"
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(doc)
    if len(choices) < 2:
        return f"it has {len(choices)} choice, so there is nothing to choose"
    if empty := [k for k, choice in enumerate(choices, 1) if not str(choice).strip()]:
        return f"choice {empty[0]} is empty"
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str) and gold == task.config.doc_to_target and gold not in choices:
        return f"field {gold!r}, the gold answer, is missing"
    for answer in (gold or [""]) if isinstance(gold, list) else [gold]:
        known = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        if not known:
            return f"the gold answer {answer!r} is not among the {len(choices)} choices"
    return None


def _first_problem(task: Callable[[], Any], evaluated: bool) -> str | None:
    """What is wrong with the documents of a task, or with making it."""
    try:
        made = task()
        docs = made.eval_docs if evaluated else made.fewshot_docs()
        return next((found for doc in docs if (found := doc_problem(made, doc))), None)
    except Exception as error:  # a definition's own code may raise anything on a bad row
        cause = error.__cause__ or error
        what = next(iter(str(cause).splitlines()), "")[:160]
        return (
            f"the definition cannot be applied to it ({type(cause).__name__}: {what}); are all its"
            " fields there, and the gold answer among its choices?"
        )


def _raise_bad_line(path: Path, build: Callable[[Path], Any], evaluated: bool) -> None:
    """Raise UserError with the first line of the file that `build` makes no sound task of.

    The line is found by halving: a definition may filter and reorder the rows.
    """
    with path.open(encoding="utf-8") as file:
        lines = list(file)
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "rows.jsonl"

        def problem(start: int, end: int) -> str | None:
            part.write_text("".join(lines[start:end]), encoding="utf-8")
            return _first_problem(lambda: build(part), evaluated)

        low, high = 0, len(lines)
        found = problem(low, high)
        if found is None:
            return
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if problem(low, middle) else (middle, high)
        # lm-eval tries the first document while it loads; after a sound one ours is the message
        raise UserError(f"{path}:{low + 1}: {problem(max(0, low - 1), high) or found}")


# ------------------------------------------------------------------------------- loading


class TaskLoader:
    """Finds lm-eval's definitions, puts local rows below them, and loads the tasks.

    `folder` is for files that must be there while it loads. Raises UserError for an unknown name,
    a task that generates text, and local files that are not there or whose lines are bad.
    """

    def __init__(self, settings: Settings, names: Iterable[str], num_fewshot: int, folder: Path):
        self.names, self.folder = list(dict.fromkeys(names)), folder
        self.manager = _task_manager(self.names)
        self.index = self.manager.task_index
        self.local: dict[str, LocalBenchmark] = {}
        self.definitions: dict[str, Path] = {}
        for name in self.names:
            if name not in self.index:
                raise UserError(_unknown(name, self.manager.all_tasks))
        leaves: dict[str, str] = {}  # and the name that each is a part of
        for name in self.names:
            for leaf in self.leaves(name):
                leaves.setdefault(leaf, name)
        for leaf in leaves:
            cfg = self.index[leaf].cfg
            if "class" not in cfg:
                _refuse_generation(leaf, cfg.get("output_type", "generate_until"))
        source = source_folder(settings)
        if source is None:
            _ask_hub({self.index[leaf].cfg.get("dataset_path"): leaf for leaf in leaves})
            return
        for leaf, name in leaves.items():
            self.definitions[leaf] = self.index[leaf].yaml_path
            try:
                self.local[leaf] = local_benchmark(leaf, self.index[leaf].cfg, source, num_fewshot)
            except UserError as error:
                raise error if leaf == name else UserError(f"{name}: {error}") from None
            self._register(leaf)

    def leaves(self, name: str) -> Iterator[str]:
        """The tasks that a name stands for: itself, a group's, a tag's."""
        entry = self.index.get(name)
        if entry is None or entry.kind.name not in ("TAG", "GROUP"):
            yield from [] if entry is None else [name]
            return
        members = entry.tags if entry.kind.name == "TAG" else entry.cfg.get("task")
        for member in [members] if isinstance(members, str) else sorted(members or [], key=str):
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            yield from self.leaves(inner) if isinstance(inner, str) else ()

    def load(self) -> dict[str, Any]:
        """lm-eval's `{"tasks", "groups", "group_map"}` of the names."""
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in self.names:
            try:
                found = self.manager.load([name])
            except Exception as error:
                for leaf in self.leaves(name) if self.local else ():
                    self._check(leaf)
                raise self._load_error(name, error) from error
            for key, values in found.items():
                loaded[key].update(values)
        for leaf, task in loaded["tasks"].items():
            _refuse_generation(leaf, task.OUTPUT_TYPE)
            if leaf in self.local:
                self._check(leaf, task)
        return loaded

    def _register(self, leaf: str, **files: Path) -> None:
        """Let the name stand for the definition over local rows."""
        from lm_eval.tasks import TaskManager

        place = self.folder / leaf
        place.mkdir(exist_ok=True)
        definition = self.local[leaf].definition(self.definitions[leaf], **files)
        # every JSON document is a YAML document
        (place / "task.yaml").write_text(json.dumps(definition), encoding="utf-8")
        local = TaskManager(include_path=place, include_defaults=False)
        self.index[leaf] = local.task_index[leaf]

    def _check(self, leaf: str, task: Any = None) -> None:
        """Raise UserError for the first bad line of the benchmark's files."""
        local = self.local[leaf]
        for split, path in local.files.items():
            evaluated = split == local.evaluated
            if not evaluated and not local.shots_from:
                continue
            if task is None or _first_problem(lambda: task, evaluated):

                def build(part: Path, split: str = split) -> Any:
                    self._register(leaf, **{split: part})
                    return self.manager.load([leaf])["tasks"][leaf]

                _raise_bad_line(path, build, evaluated)

    def _load_error(self, name: str, error: Exception) -> Exception:
        if self.local:
            what = next(iter(str(error).splitlines()), "")[:160]
            return UserError(f"benchmark {name} cannot be loaded: {type(error).__name__}: {what}")
        paths = [self.index[leaf].cfg.get("dataset_path") for leaf in self.leaves(name)]
        return hub_error(error, f"data set {paths[0]}", f"benchmark {name}")


def _task_manager(names: list[str]) -> Any:
    """lm-eval's index of the folders that define the names; of all tasks if that is not enough.

    Reading all 14,000 definitions takes 9 s, finding the lines that name their tasks 1 s, once.
    """
    from lm_eval import tasks

    found = [_definitions().get(name, []) for name in names]
    # a group's tasks may be defined in other folders, and of two definitions the first one counts
    if all(len(places) == 1 and places[0][0] == "task" for places in found):
        folders = list(dict.fromkeys(places[0][1] for places in found))
        manager = tasks.TaskManager(include_path=folders, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    return tasks.TaskManager()


@functools.cache
def _definitions() -> dict[str, list[tuple[str, Path]]]:
    """Of every task and group of lm-eval, by its name, the folders that define it, and as what."""
    from lm_eval import tasks

    line = re.compile(rb"^(task|group):[ \t]*[\"']?([^\"'\s]+)[\"']?[ \t\r]*$", re.M)
    found: dict[str, list[tuple[str, Path]]] = {}
    for path in Path(tasks.__file__).parent.rglob("*.yaml"):
        for kind, name in line.findall(path.read_bytes()):
            found.setdefault(name.decode(), []).append((kind.decode(), path.parent))
    return found


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close = close or [task for task in known if name in task][:3]
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"lm-eval has no task {name!r}{hint} (all: lm_eval ls tasks)"


def _refuse_generation(name: str, output_type: str) -> None:
    if output_type == "generate_until":
        raise UserError(
            f"benchmark {name} generates text; retention is measured by multiple-choice and"
            " perplexity tasks alone"
        )


def _ask_hub(data_sets: dict[str | None, str]) -> None:
    """Raise UserError unless the data sets, {id: task}, can be had from the Hub.

    Asked before loading: without a network, that would retry for half a minute.
    """
    import datasets
    from huggingface_hub import HfApi

    for data_set, task in data_sets.items():
        if data_set in FILE_FORMATS or datasets.config.HF_HUB_OFFLINE:
            continue
        try:
            HfApi().dataset_info(data_set)
        except Exception as error:
            raise hub_error(error, f"data set {data_set}", f"benchmark {task}") from error
