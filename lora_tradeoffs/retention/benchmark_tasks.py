"""lm-eval's tasks by name, over the Hub's rows or over those of a folder, which are checked.

A folder's `<benchmark>/<split>.jsonl` in the original schema takes the place of the data set in
lm-eval's own definition.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config import Settings, UserError
from dataset_descriptions import Row
from lora_tradeoffs.command_line import is_out_of_memory
from lora_tradeoffs.data.sources import held_out_texts, read_jsonl
from lora_tradeoffs.hub import hub_errors
from lora_tradeoffs.retention.benchmark_checks import (
    cause_of,
    check_requests,
    first_problem,
    packages_of,
    refusal,
    schema_problem,
)

SPLIT_KEYS = ("training_split", "validation_split", "test_split")
# datasets' names for local files, where the Hub need not be asked
FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow", None)


@dataclass(frozen=True)
class LocalBenchmark:
    """A folder's benchmark: its whole definition, the files by split, and what they are for.

    `shots_from` is the split that few-shot examples come from; None without examples.
    """

    definition: dict[str, Any]
    files: dict[str, Path]
    evaluated: str
    shots_from: str | None

    def check(self, task: Any = None) -> None:
        """Raise UserError for the first line that the definition cannot be applied to.

        With lm-eval's `task` over the files, lines are read only if one of its documents is bad.
        """
        for split in self.files if self.shots_from else [self.evaluated]:
            problem = task and first_problem(
                task, task.eval_docs if split == self.evaluated else task.fewshot_docs()
            )
            if problem or not task:
                self._check_lines(split)
            if problem:  # of no line alone
                raise UserError(f"{self.files[split]}: {problem}")

    def _check_lines(self, split: str) -> None:
        """Apply the definition to one row after another: to all, it may drop or reorder them."""
        from datasets import Dataset

        process, task = self.definition.get("process_docs"), None
        for line, row in enumerate(read_jsonl(self.files[split]), 1):
            try:
                docs = Dataset.from_list([row])
                docs = process(docs) if process else docs
                if task is None and len(docs):
                    task = self._task_over(docs)
                problem = first_problem(task, docs)
            except Exception as error:  # a definition's own code may raise anything on a bad row
                problem = cause_of(error)
            if problem:
                raise UserError(f"{self.files[split]}:{line}: {problem}")

    def _task_over(self, docs: Any) -> Any:
        """lm-eval's task over documents that are processed already."""
        from lm_eval.api.task import ConfigurableTask

        splits = dict.fromkeys(self.files, docs)
        return ConfigurableTask(
            config={**self.definition, "process_docs": None, "custom_dataset": lambda **_: splits}
        )


def local_benchmark(
    name: str, definition: dict[str, Any], folder: Path, num_fewshot: int | None
) -> LocalBenchmark:
    """lm-eval's `definition` over <folder>/<name>/<split>.jsonl, whose lines are read and checked.

    Few-shot examples are those that the definition holds, or come from its split; if the folder
    lacks that, from the next one in lm-eval's own order (training, validation, test), at last from
    the evaluated split without the item itself. Raises UserError for a missing split or a bad line.
    """
    shots = definition.get("num_fewshot") or 0 if num_fewshot is None else num_fewshot
    evaluated = definition.get("test_split") or definition.get("validation_split")
    if not evaluated or "class" in definition:
        raise UserError(f"benchmark {name} is defined in code, not by splits: it needs --data hub")
    path = folder / name / f"{evaluated}.jsonl"
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.glob("*.jsonl"))) or "no other split"
        raise UserError(f"benchmark {name} needs its split {evaluated}: no {path} ({others} there)")
    few = definition.get("fewshot_config") or {}
    shot_split = definition.get("fewshot_split") or few.get("split")
    ranked = [shot_split] if shot_split else [definition.get(key) for key in SPLIT_KEYS]
    present = [s for s in ranked if s and (folder / name / f"{s}.jsonl").is_file()]
    shots_from = present[0] if present else evaluated
    if few.get("samples") and not shot_split:
        shots_from = None
    splits = filter(None, (shots_from, evaluated))
    files = {split: folder / name / f"{split}.jsonl" for split in splits}
    rows = {split: read_jsonl(file) for split, file in files.items()}
    for split, file in files.items():
        if problem := schema_problem(rows[split]):
            raise UserError(f"{file}:{problem[0]}: {problem[1]}")
        needed, count = shots + (split == evaluated), len(rows[split])
        if shots and split == shots_from and count < needed:
            raise UserError(f"{file}: {shots} shots need {needed} rows, it has {count}")
    definition = {k: v for k, v in definition.items() if k not in ("group", "task_list")}
    definition |= dict.fromkeys((*SPLIT_KEYS, "dataset_name", "dataset_kwargs"))
    definition |= {"task": name, "tag": None, "dataset_path": "json"}
    # lm-eval leaves the item itself out of its shots where these two are the same
    definition |= {"test_split": evaluated, "fewshot_split": shots_from}
    definition["custom_dataset"] = lambda **_: _data_sets(rows)
    return LocalBenchmark(definition, files, evaluated, shots_from if shots else None)


def _data_sets(rows: dict[str, list[Row]]) -> dict[str, Any]:
    from datasets import Dataset

    return {split: Dataset.from_list(part) for split, part in rows.items()}


# ------------------------------------------------------------------------------- loading


class TaskLoader:
    """Finds lm-eval's definitions, puts local rows below them, and loads the tasks.

    Raises UserError for an unknown name, a task that cannot be asked here, a package or NLTK's data
    that it needs, and local files that are missing or have bad lines.
    """

    def __init__(self, settings: Settings, names: Iterable[str], num_fewshot: int | None):
        from lm_eval.tasks._yaml_loader import load_yaml

        self.names = list(dict.fromkeys(names))
        self.manager = task_manager(self.names)
        self.index = self.manager.task_index
        self.local: dict[str, LocalBenchmark] = {}
        leaves: dict[str, str] = {}  # and the first name that each belongs to
        for name in self.names:
            for leaf in self.leaves(name):
                leaves.setdefault(leaf, name)
        for leaf in leaves:
            if self.index[leaf].cfg.get("unsafe_code"):  # its own code would fetch more at loading
                raise refusal(leaf, "runs the code that the model writes")
        source = settings.data_folder
        if source is None:
            _ask_hub({self.index[leaf].cfg.get("dataset_path"): leaf for leaf in leaves})
            return
        for leaf, name in leaves.items():
            entry = self.index[leaf]
            with packages_of(leaf):
                definition = entry.cfg if "class" in entry.cfg else load_yaml(entry.yaml_path)
            try:
                self.local[leaf] = local_benchmark(leaf, definition, source, num_fewshot)
            except UserError as error:
                raise error if leaf == name else UserError(f"{name}: {error}") from None
            self.index[leaf] = replace(entry, yaml_path=None, cfg=self.local[leaf].definition)

    def leaves(self, name: str) -> Iterator[str]:
        """The tasks that a name stands for: itself, or those of a group or tag."""
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
            with packages_of(name):
                parts = (self._load_local if self.local else self._load_hub)(name)
            for key, values in parts.items():
                loaded[key].update(values)
        for leaf, task in loaded["tasks"].items():
            check_requests(leaf, task)
            with packages_of(leaf):
                if leaf in self.local:
                    self.local[leaf].check(task)
                elif task.OUTPUT_TYPE == "generate_until":
                    first_problem(task, task.eval_docs)  # raises for what is not installed
        return loaded

    def _load_local(self, name: str) -> dict[str, Any]:
        try:
            return self.manager.load([name])
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, ImportError):
                raise
            for leaf in self.leaves(name):
                self.local[leaf].check()
            what = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:160]}"
            raise UserError(f"benchmark {name} cannot be loaded: {what}") from error

    def _load_hub(self, name: str) -> dict[str, Any]:
        data_sets = [self.index[leaf].cfg.get("dataset_path") for leaf in self.leaves(name)]
        with hub_errors(f"data set {data_sets[0]}", f"benchmark {name}"):
            return self.manager.load([name])


def check_sources(settings: Settings, names: Iterable[str], num_fewshot: int | None) -> None:
    """Raise UserError for benchmarks that cannot be had, or a folder without held-out text.

    Before a study, since it measures only after it has trained.
    """
    TaskLoader(settings, names, num_fewshot)
    if settings.data_folder is not None:
        held_out_texts(settings, 1)


def task_manager(names: Sequence[str]) -> Any:
    """lm-eval's index of the folders that define the names; of all tasks if that is not enough.

    Raises UserError for an unknown name. Reading all 14,000 definitions takes 9 s, searching them
    for their names 1 s.
    """
    from lm_eval import tasks

    known = _defining_files()
    files = {path for name in names for path in known.get(name, ())}
    # a group's tasks may be defined in other folders, and of two definitions the first one counts
    if len(files) == len(names):
        folders = sorted({path.parent for path in files})
        manager = tasks.TaskManager(include_path=folders, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = tasks.TaskManager()
    for name in names:
        if name not in manager.task_index:
            raise UserError(_unknown(name, manager.all_tasks))
    return manager


@functools.cache
def _defining_files() -> dict[str, list[Path]]:
    """lm-eval's files by the names that a line of theirs gives to a task or group."""
    from lm_eval import tasks

    files: dict[str, list[Path]] = {}
    for path in Path(tasks.__file__).parent.rglob("*.yaml"):
        for line in path.read_bytes().splitlines():
            if line.startswith((b"task: ", b"group: ")):
                files.setdefault(line.decode().partition(": ")[2], []).append(path)
    return files


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close = close or [task for task in known if name in task][:3]
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"lm-eval has no task {name!r}{hint} (all: lm_eval ls tasks)"


def _ask_hub(data_sets: dict[str | None, str]) -> None:
    """Raise UserError unless the data sets, {id: task}, can be had from the Hub.

    Asked before loading: without a network, that would retry for half a minute.
    """
    import datasets
    from huggingface_hub import HfApi

    for data_set, task in data_sets.items():
        if data_set in FILE_FORMATS or datasets.config.HF_HUB_OFFLINE:
            continue
        with hub_errors(f"data set {data_set}", f"benchmark {task}"):
            HfApi().dataset_info(data_set)
