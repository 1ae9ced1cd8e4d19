"""A task file: a task of one's own as YAML, in the words of lm-evaluation-harness.

    FOLDER/my_task/task.yaml     beside its rows, <split>.jsonl (--data FOLDER)
    TASKS_DIR/my_task.yaml       with rows in a data folder, in files that it names, or on the Hub

docs/tasks.md lists the fields. A file holds data alone: whatever would run Python is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from config import BENCHMARKS, BUILT_IN_FAMILIES, SPLITS, TASKS, Settings, UserError
from lora_tradeoffs.command_line import did_you_mean
from lora_tradeoffs.task_description import FEWSHOT, DatasetDescription, compiled, template_fields

ErrorAt = Callable[[str, str], UserError]  # field and reason -> the error with its file and line

# What a record's `task` can be beside a task.
RESERVED = {*TASKS, *BENCHMARKS, *BUILT_IN_FAMILIES, "text", "mean", "both", "drift", "prose"}
NAME = re.compile(r"(?!text_|mean)[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
SPLIT_FIELDS = dict(zip(SPLITS, ("training_split", "validation_split", "test_split")))
# Notes; eval.py --shots; a greedy generation is the same every time; no effect in lm-eval, either.
IGNORED = ("tag", "task_alias", "metadata", "num_fewshot", "repeats", "should_decontaminate")
IGNORED += ("doc_to_decontamination_query",)
FIELDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("task", "dataset_path", "dataset_name", "output_type"), str),
    **dict.fromkeys((*SPLIT_FIELDS.values(), "fewshot_split", "target_delimiter"), str),
    **{"doc_to_text": str, "doc_to_target": (str, int), "doc_to_choice": (str, list, dict)},
    **dict.fromkeys(("family", "group_by", "truncate"), str),
    **dict.fromkeys(("dataset_kwargs", "generation_kwargs"), dict),
    **dict.fromkeys(("filter_list", "metric_list"), list),
    **dict.fromkeys(IGNORED, object),
}
WORDS = {str: "a text", list: "a list", dict: "a mapping", int: "a number"}
PYTHON = "no Python is run from a task file: write Jinja, or prepare the rows beforehand"
# The suite's metrics; lm-eval's `acc` is called accuracy in the records.
CHOICE_METRICS = ("accuracy", "f1", "acc_norm")
TEXT_METRICS = ("rougeL", "rougeLsum", "rouge1", "rouge2", "sacrebleu", "codexglue_bleu", "f1")
# As in lm-eval: what a generation takes and ends at unless generation_kwargs says otherwise.
GENERATION = {"max_gen_toks": 256, "until": ["\n\n"], "do_sample": False, "temperature": 0}


class TextMetric(NamedTuple):
    """A metric of generated text under its name in the records, and the filters before it."""

    name: str
    metric: str
    arguments: dict[str, Any]
    filters: list[tuple[str, dict[str, Any]]]  # of lm-eval: function and its arguments


def task_files(settings: Settings) -> dict[str, Path]:
    """The task files of the folder of tasks and of the data folder, by the task's name."""
    files = {path.stem: path for path in sorted(settings.tasks_dir.glob("*.yaml"))}
    if settings.data not in ("hub", "sample"):
        files |= {p.parent.name: p for p in sorted(Path(settings.data).glob("*/task.yaml"))}
    return files


def read_task(path: Path, name: str) -> DatasetDescription:
    """The task of a file. Raises UserError with file, line and field for what is wrong."""
    fields, lines = _load(path)

    def error(field: str, reason: str) -> UserError:
        return UserError(f"{path}:{lines.get(field, 1)}: {field} {reason}")

    return describe_fields(name, fields, error, path)


def is_free(name: str) -> bool:
    """Whether it is a name, and that of nothing built in."""
    return name not in RESERVED and bool(NAME.fullmatch(name))


def check_single(task: DatasetDescription, tasks_dir: Path) -> None:
    """Raise UserError if the folder of tasks has another task of the name."""
    other = tasks_dir / f"{task.name}.yaml"
    if other.is_file() and read_task(other, task.name).definition != task.definition:
        both = f"{task.source_file} and {other}"
        raise UserError(f"{both} are two tasks {task.name}; remove or rename one")


def _load(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML mapping, and the lines of its keys."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}:1: not a task file, which has lines such as doc_to_text: ...")
        lines: dict[str, int] = {}
        for key, value in root.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise UserError(f"{path}:{line}: {name} stands twice; keep one")
            lines[name] = line
            for node in _nodes(value, set()):
                tag = node.tag.removeprefix("tag:yaml.org,2002:")
                if tag == node.tag or tag.startswith("python/"):
                    place = f"{path}:{node.start_mark.line + 1}"
                    raise UserError(f"{place}: {name} has the tag {tag:.60}; {PYTHON}")
        return yaml.safe_load(text), lines
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error) or "nested too deeply"
        place = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{place}: not YAML ({' '.join(str(reason).split())})") from None


def _nodes(node: Any, seen: set[int]) -> Iterator[Any]:
    """A YAML node and all in it, each once however often an alias repeats it."""
    if id(node) in seen:
        return
    seen.add(id(node))
    yield node
    for part in node.value if isinstance(node.value, list) else ():
        for inner in part if isinstance(part, tuple) else (part,):
            yield from _nodes(inner, seen)


# ------------------------------------------------------------------------- fields to a task


def describe_fields(
    name: str, fields: Mapping[str, Any], error: ErrorAt, path: Path | None = None
) -> DatasetDescription:
    """The task that a task file's fields describe. Raises what `error` makes of a bad field."""
    fields = {field: value for field, value in fields.items() if value is not None}
    _check_fields(name, fields, error)
    text, choices = fields["doc_to_text"], fields.get("doc_to_choice")
    words = () if isinstance(choices, str | None) else _fixed_choices(choices, error)
    kind = "classification" if words else "choice" if choices else "text"
    output = "generate_until" if kind == "text" else "multiple_choice"
    if fields.get("output_type", output) != output:
        why = "without" if kind == "text" else "with"
        raise error("output_type", f"must be {output} {why} doc_to_choice")
    template = f"{{{{{text}}}}}" if text.isidentifier() else text
    delimiter = fields.get("target_delimiter", " ")
    if kind != "text" and not delimiter[:1].isspace():  # a choice begins with the blank before it
        bare = template.rstrip()
        template, delimiter = bare, template[len(bare) :] + delimiter
    passage = fields.get("truncate")
    if passage and passage not in template_fields(template):
        raise error("truncate", f"is {passage!r}, which doc_to_text does not have")
    generation, group = _generation(fields, error), fields.get("group_by")
    files = _files(fields, path, error)
    return DatasetDescription(
        name=name,
        title=f"a task of your own ({output})",
        hub_id="" if files else fields.get("dataset_path", ""),
        hub_config=fields.get("dataset_name"),
        hub_splits=_splits(fields, error),
        files=files,
        grouping=("equal", group) if group else (),
        item_groups=group,
        template=template,
        passage=passage,
        kind=kind,
        label_names=words,
        label_words=words,
        choice_list=choices if kind == "choice" else None,
        answer=str(fields["doc_to_target"]),
        delimiter=delimiter,
        max_new_tokens=generation["max_gen_toks"] if kind == "text" else 0,
        stop=tuple(generation["until"]),
        metrics=_metrics(kind, fields, error),
        baseline="majority_answer" if kind == "text" else "majority_class",
        definition=dict(fields),
        own_family=fields.get("family"),
        source_file=str(path or ""),
    )


def _check_fields(name: str, fields: Mapping[str, Any], error: ErrorAt) -> None:
    """Names, types and templates of the fields."""
    from jinja2 import TemplateSyntaxError

    if not is_free(name):
        raise error("task", f"{name!r:.80} is taken or no name; use letters, digits, '_', '-', '.'")
    if fields.get("task", name) != name:
        raise error("task", f"is {fields['task']!r}, but the file is {name}'s; use one name")
    for field, value in fields.items():
        if field not in FIELDS:
            meant = did_you_mean(str(field), FIELDS)
            reason = f"is no field of a task file; {meant}fields: {', '.join(FIELDS)}"
            raise error(str(field), reason)
        kinds = FIELDS[field]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not object):
            allowed = " or ".join(WORDS[k] for k in (kinds if type(kinds) is tuple else (kinds,)))
            raise error(field, f"is {value!r:.60}; it takes {allowed}")
        if field.startswith("doc_to_") and isinstance(value, str):
            try:
                compiled(value)
            except TemplateSyntaxError as problem:
                raise error(field, f"is no Jinja template: {problem.message}") from None
    for field in ("doc_to_text", "doc_to_target", "training_split"):
        if field not in fields:
            raise error(field, "is missing")
    text, family = fields["doc_to_text"], fields.get("family")
    if not text.isidentifier() and not template_fields(text):
        raise error("doc_to_text", "is neither a column's name nor a template with {{column}}")
    if family is not None and not is_free(family):
        raise error("family", f"{family!r:.80} is taken or no name; choose another")


def _fixed_choices(choices: list | dict, error: ErrorAt) -> tuple[str, ...]:
    words = tuple(choices.values() if isinstance(choices, dict) else choices)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise error("doc_to_choice", f"holds {word!r}; write texts, in quotation marks")
    if len(words) < 2 or len(set(words)) < len(words):
        raise error("doc_to_choice", f"is {list(words)}; it takes two or more, each once")
    return words


def _splits(fields: Mapping[str, Any], error: ErrorAt) -> dict[str, str]:
    """Our splits and the source's; with one held-out split that is test, as with the built-in."""
    splits = {ours: fields[field] for ours, field in SPLIT_FIELDS.items() if field in fields}
    if len(splits) < 2:
        raise error("test_split", "is missing: name it, or validation_split")
    if len({*splits.values()}) < len(splits):
        raise error("training_split", f"and the others must differ: {', '.join(splits.values())}")
    if "test" not in splits:
        splits["test"] = splits.pop("validation")
    fewshot = fields.get("fewshot_split", splits["train"])
    if fewshot in (splits["test"], splits.get("validation")):
        raise error("fewshot_split", f"is {fewshot!r}, which is measured; name training_split")
    return splits if fewshot == splits["train"] else {**splits, FEWSHOT: fewshot}


def _files(fields: Mapping[str, Any], path: Path | None, error: ErrorAt) -> dict[str, str]:
    """The files of `dataset_path: json`, by our split; relative ones lie beside the task file."""
    options = fields.get("dataset_kwargs") or {}
    if fields.get("dataset_path") != "json":
        if options:
            raise error("dataset_kwargs", "goes with dataset_path: json alone")
        return {}
    named = options.get("data_files")
    if not isinstance(named, dict) or {*options} != {"data_files"}:
        raise error("dataset_kwargs", "must be data_files: {split: file.jsonl, ...}")
    files = {}
    for ours, split in _splits(fields, error).items():
        if not isinstance(named.get(split), str):
            raise error("dataset_kwargs", f"names no file of the split {split!r} in data_files")
        files[ours] = str((path.parent if path else Path()) / named[split])
    return files


def _generation(fields: Mapping[str, Any], error: ErrorAt) -> dict[str, Any]:
    options = {**GENERATION, **(fields.get("generation_kwargs") or {})}
    if unknown := {*options} - {*GENERATION}:
        raise error(
            "generation_kwargs", f"has {sorted(unknown)[0]}; known: {', '.join(GENERATION)}"
        )
    if isinstance(options["until"], str):
        options["until"] = [options["until"]]
    tokens, stops = options["max_gen_toks"], options["until"]
    if type(tokens) is not int or not 1 <= tokens <= 100_000:
        raise error("generation_kwargs", f"has max_gen_toks {tokens!r}; it takes 1 to 100,000")
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise error("generation_kwargs", f"has until {stops!r}; it takes texts")
    if options["do_sample"] or options["temperature"]:
        raise error("generation_kwargs", "samples, and generation is greedy: leave it out")
    return options


# ------------------------------------------------------------------------------- metrics


def text_metrics(fields: Mapping[str, Any]) -> list[TextMetric]:
    """The metrics of a task that generates: each of metric_list after each filter of filter_list.

    With several filters a metric is named as lm-eval's results name it: exact_match,strict-match.
    """
    filters = fields.get("filter_list") or [{"name": "none", "filter": []}]
    found = []
    for pipeline in filters:
        steps = [
            (s["function"], {k: v for k, v in s.items() if k != "function"})
            for s in pipeline["filter"]
        ]
        for entry in fields.get("metric_list") or [{"metric": "exact_match"}]:
            arguments = {k: v for k, v in entry.items() if k not in ("metric", *AGGREGATION)}
            suffix = f",{pipeline['name']}" if len(filters) > 1 else ""
            found.append(TextMetric(entry["metric"] + suffix, entry["metric"], arguments, steps))
    return found


AGGREGATION = ("aggregation", "higher_is_better", "hf_evaluate")


def _metrics(kind: str, fields: Mapping[str, Any], error: ErrorAt) -> tuple[str, ...]:
    """The names of the task's metrics. lm-eval's are looked up when rows are prepared."""
    for entry in fields.get("metric_list") or ():
        if not isinstance(entry, dict) or not isinstance(entry.get("metric"), str):
            raise error("metric_list", "takes entries such as - metric: exact_match")
        if entry.get("hf_evaluate"):
            raise error("metric_list", f"{entry['metric']} is a script of `evaluate`; {PYTHON}")
        if not entry.get("higher_is_better", True):
            raise error("metric_list", f"{entry['metric']}: of every metric here more is better")
        if entry.get("aggregation", "mean") != "mean":
            reason = "is no mean over items, and cannot be tested over them"
            raise error("metric_list", f"{entry['metric']} with {entry['aggregation']!r} {reason}")
    for pipeline in fields.get("filter_list") or ():
        steps = pipeline.get("filter") if isinstance(pipeline, dict) else None
        if (
            not isinstance(steps, list)
            or not isinstance(pipeline.get("name"), str)
            or not all(isinstance(s, dict) and isinstance(s.get("function"), str) for s in steps)
        ):
            raise error("filter_list", "takes entries with a name and a filter: [{function: ...}]")
    if kind == "text":
        names = [metric.name for metric in text_metrics(fields)]
        wrong = [m for m in names if m.split(",")[0] in ("acc", "accuracy", "acc_norm")]
        known = f"exact_match, {', '.join(TEXT_METRICS)}, and lm-eval's of generated text"
    else:
        if "filter_list" in fields:
            raise error(
                "filter_list", "is for generated text, and doc_to_choice is scored as it is"
            )
        named = [entry["metric"] for entry in fields.get("metric_list") or ()]
        names = ["accuracy" if name == "acc" else name for name in named]
        names = names or list(CHOICE_METRICS[: 2 if kind == "classification" else 1])
        allowed = CHOICE_METRICS if kind == "classification" else ("accuracy", "acc_norm")
        wrong, known = [n for n in names if n not in allowed], ", ".join(("acc", *allowed[1:]))
    if wrong or len({*names}) < len(names):
        which = f"has {wrong[0]}" if wrong else f"names one twice ({', '.join(names)})"
        raise error("metric_list", f"{which}; metrics of this kind of task: {known}")
    return tuple(names)
