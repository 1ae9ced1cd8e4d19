"""What a task is: where its rows come from, prompt, answer, choices and metrics, as one dataclass.

dataset_descriptions.py describes the six built-in tasks with it, task_yaml.py makes one of a task
file. Imports the standard library and config alone; Jinja when a task file's template is rendered.
"""

from __future__ import annotations

import ast
import functools
import re
import reprlib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from config import FAMILIES, SPLITS, UserError

Row = dict[str, Any]
UNANSWERABLE = "unanswerable"
FEWSHOT = "fewshot"  # the split of a task's in-context examples, if it is none of the three
PASSAGE = "\ue000\ue001\ue000"  # stands for the passage while the text around it is rendered


class EvaluateMetric(NamedTuple):
    """A further metric, computed by the library `evaluate` for each item and averaged.

    `path` is what `evaluate.load` takes: the folder or file of a metric script of your own, or a
    name on the Hub. `key` names the figure in its result; `scale` is that figure's maximum.
    """

    path: str
    key: str
    scale: float = 1


@dataclass(frozen=True, kw_only=True)
class DatasetDescription:
    """A data set as a text-to-text task, with everything particular to it: no code names a task.

    A built-in task's template has fields in braces, and its columns have types. A task file's
    (`definition` is set) are Jinja templates over the row, as in lm-evaluation-harness; where one
    takes a value, a column's name stands for the column.
    """

    name: str
    title: str
    # Where rows come from.
    hub_id: str
    hub_config: str | None = None
    hub_splits: dict[str, str]  # our split -> the source's; without "validation" it is carved
    files: dict[str, str] = field(default_factory=dict)  # our split -> a JSON-lines file, if any
    columns: dict[str, type] = field(default_factory=dict)  # of a raw row; the class is "label"
    grouping: tuple[str, ...] = ()  # rows that carving keeps together: see group_rows in splits.py
    groups: str | None = None  # the grouping in words, part of the fingerprint of prepared rows
    rows: dict[str, int] = field(default_factory=dict)  # official sizes
    licence: str = ""
    citation: str = ""
    notes: tuple[str, ...] = ()
    # What the model reads and writes.
    template: str  # the prompt
    paraphrases: tuple[str, ...] = ()  # other templates, to see how much the wording matters
    derive: Callable[[Row], dict[str, str]] | None = None  # further fields of a row, by name
    passage: str | None = None  # the one field that truncation may shorten
    # How it is scored: "choice" has choices of each row's own; "answers" are SQuAD v2's, "text" is
    # any other generated text.
    kind: str = "classification"  # or choice, answers, code, summary, text
    label_names: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()  # in the labels' order
    choice_list: str | None = None  # a row's own choices: a template or column
    answer: str | None = None  # what is learned, unless it is a label word; a task file's target
    delimiter: str = " "  # between the prompt and what is learned
    max_new_tokens: int = 0
    stop: str | tuple[str, ...] = "\n"  # ends a generation as EOS does: a base rarely ends itself
    # How it is measured.
    metrics: tuple[str, ...] = ("accuracy", "f1")  # the first is the primary metric
    extra_metrics: tuple[EvaluateMetric, ...] = ()
    positive_class: int | None = None  # F1 is of this class; None: the mean over all classes
    item_groups: str | None = None  # items that share this field are resampled together
    baseline: str = "majority_class"  # a key of BASELINES in adaptation/baselines.py
    prose: str | None = None  # the field that serves as held-out text
    # Of a task file.
    definition: Mapping[str, Any] | None = None  # its fields
    own_family: str | None = None  # the family that it names
    source_file: str = ""

    def __post_init__(self) -> None:
        """Fill in `groups`. Raises ValueError for a description that contradicts itself."""
        labelled = self.kind == "classification"
        if labelled != bool(self.label_words) or len(self.label_words) != len(self.label_names):
            raise ValueError(f"{self.name}: label words, one a label, are for classification")
        known = self.definition is not None or self.answer in self.columns
        if not self.has_choices and (not known or self.max_new_tokens < 1):
            raise ValueError(f"{self.name}: kind {self.kind!r} needs answer and max_new_tokens")
        object.__setattr__(self, "groups", self.groups or " ".join(self.grouping) or None)

    @property
    def family(self) -> str:
        """The first family that has the task; a task file's own name, if none has it."""
        for family, tasks in FAMILIES.items():
            if self.name in tasks:
                return family
        if self.definition is not None:
            return self.name
        raise UserError(f"task {self.name} has no family; add it to FAMILIES in config.py")

    @property
    def extra_splits(self) -> tuple[str, ...]:
        """Held-out splits beside our three, such as MNLI's mismatched genres; read with test."""
        return tuple(split for split in self.hub_splits if split not in (*SPLITS, FEWSHOT))

    @property
    def is_classification(self) -> bool:
        return self.kind == "classification"

    @property
    def has_choices(self) -> bool:
        """Whether it is scored by the likelihoods of choices, not by generated text."""
        return self.kind in ("classification", "choice")

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else self.stop

    def row_file(self, folder: Path | None, split: str) -> Path | None:
        """The file of a split's rows: one that the task file names, or in a data folder.

        None for rows on the Hub.
        """
        if self.files:
            return Path(self.files[split])
        if folder is None:
            return None
        theirs = split if self.definition is None else self.hub_splits[split]
        path = folder / self.name / f"{theirs}.jsonl"
        is_elsewhere = self.definition is not None and self.hub_id and not path.exists()
        return None if is_elsewhere else path

    # ------------------------------------------------------------------------------ a row

    def fields(self, row: Row) -> Row:
        """The row's texts by field, with the derived ones; a task file's templates see the row."""
        if self.definition is not None:
            return row
        texts = {name: text.strip() for name, text in row.items() if isinstance(text, str)}
        return {**texts, **(self.derive(row) if self.derive else {})}

    @property
    def prompt_fields(self) -> tuple[str, ...]:
        """The raw row's fields that stand in the prompt."""
        if self.definition is not None:
            return template_fields(self.template)
        texts = (name for name, kind in self.columns.items() if kind is str)
        return tuple(name for name in texts if f"{{{name}}}" in self.template)

    def prompt_parts(self, row: Row) -> tuple[str, str, str]:
        """The prompt as (head, passage, tail): only the passage may be shortened."""
        fields = self.fields(row)
        whole = self._rendered(self.template, fields)
        if self.passage is None:
            return whole, "", ""
        marked = self._rendered(self.template, {**fields, self.passage: PASSAGE})
        head, _, tail = marked.partition(PASSAGE)
        passage = whole[len(head) : len(whole) - len(tail)]
        if PASSAGE in tail or head + passage + tail != whole:
            raise ValueError(
                f"truncate: doc_to_text must have {{{{{self.passage}}}}} once, as it is"
            )
        return head, passage, tail

    def _rendered(self, template: str, fields: Row) -> str:
        if self.definition is None:
            return template.format_map(fields)
        return render("doc_to_text", template, fields)

    def prompt(self, row: Row) -> str:
        return "".join(self.prompt_parts(row))

    def choices(self, row: Row) -> tuple[str, ...]:
        """The texts that are compared: the label words, or the row's own choices."""
        if self.kind != "choice":
            return self.label_words
        choices = value_of("doc_to_choice", self.choice_list, row)
        choices = as_list(choices) if isinstance(choices, str) else choices
        is_list = isinstance(choices, list) and len(choices) > 1
        if not is_list or not all(isinstance(c, str) and c.strip() for c in choices):
            raise ValueError("doc_to_choice gives no list of two or more texts")
        return tuple(choices)

    def label(self, row: Row) -> int:
        """The index of the row's choice. Raises ValueError if it is none of them."""
        if self.definition is None:
            return row["label"]
        choices, target = self.choices(row), value_of("doc_to_target", self.answer, row)
        index = target
        if isinstance(target, str):
            text = target if target in choices else target.strip()
            if text in choices and (is_column(self.answer) or not text.isdigit()):
                index = choices.index(text)
            elif re.fullmatch("[0-9]{1,9}", text):
                index = int(text)  # as in lm-eval, digits that a template renders are an index
        if not isinstance(index, int) or not 0 <= index < len(choices):
            allowed = ", ".join(f"{i} {choice}" for i, choice in enumerate(choices))
            raise ValueError(
                f"doc_to_target gives {reprlib.repr(target)}, none of the choices ({allowed})"
            )
        return int(index)

    def completion(self, row: Row) -> str:
        """The text to be learned, with the delimiter that parts it from the prompt."""
        if self.has_choices:
            return self.delimiter + self.choices(row)[self.label(row)]
        if self.kind == "answers":
            return " " + (row[self.answer]["text"] or [UNANSWERABLE])[0].strip()
        return self.delimiter + self.references(row)[0]

    def references(self, row: Row) -> list[str]:
        """Every text that a generation is scored against; [""] for an unanswerable question."""
        if self.kind == "answers":
            return list(row[self.answer]["text"]) or [""]
        if self.has_choices:
            return [self.completion(row).strip()]
        if self.definition is None:
            return [row[self.answer].strip()]
        value = value_of("doc_to_target", self.answer, row)
        if not is_column(self.answer) and value[:1] + value[-1:] == "[]":
            value = as_list(value) or value  # as in lm-eval: a list's text is several references
            if isinstance(value, list) and not all(isinstance(text, str) for text in value):
                shown = reprlib.repr(value)
                raise ValueError(f"doc_to_target renders {shown}, no list of texts; name a column")
        texts = value if isinstance(value, list) and value else [value]
        return [str(text).strip() for text in texts]

    def group(self, row: Row) -> str:
        """What a task file's rows that belong together have in common: group_by's value."""
        return str(value_of("group_by", self.item_groups, row))

    def problem(self, row: Row) -> str | None:
        """What keeps a task file's templates from making an example of the row, in words."""
        try:
            if not self.prompt(row).strip():
                return "doc_to_text renders nothing"
            if not self.completion(row).strip():
                return "doc_to_target renders nothing"
            if self.item_groups:
                self.group(row)
        except ValueError as error:
            return str(error)
        return None

    # ----------------------------------------------------------------------------- in words

    def page(self) -> str:
        """The description as a readable page."""
        words = enumerate(zip(self.label_names, self.label_words))
        target = f"{self.answer}, then end of text"
        parts = {
            "file": self.source_file,
            "family": self.family,
            "Hub": self.hub_id + (f" ({self.hub_config})" if self.hub_config else ""),
            "official": ", ".join(f"{split} {count:,}" for split, count in self.rows.items()),
            "splits": self.splits_sentence(),
            "columns": ", ".join(self.columns or self.prompt_fields),
            "labels": ", ".join(f"{i} {name} -> {word!r}" for i, (name, word) in words),
            "choices": self.choice_list or "",
            "answer": "" if self.is_classification and self.definition is None else target,
            "truncate": self.passage if self.definition else "",
            "generation": ""
            if self.has_choices
            else f"up to {self.max_new_tokens} tokens, or until"
            f" {' or '.join(map(repr, self.stops))}",
            "metrics": ", ".join(self.metrics),
            "licence": self.licence,
            "cite": self.citation,
        }
        wrap = textwrap.TextWrapper(width=96, subsequent_indent=" " * 14)
        is_hidden = self.definition is None and "validation" not in self.hub_splits
        pairs = [*parts.items(), *(("note", note) for note in (*[CARVED] * is_hidden, *self.notes))]
        lines = [f"{self.name}: {self.title}"]
        lines += [wrap.fill(f"  {key:<10}  {text}") for key, text in pairs if text]
        return "\n".join([*lines, "  prompt", textwrap.indent(self.template, "    | ")])

    def splits_sentence(self) -> str:
        """Where each split comes from, in words."""
        carved = f"validation carved from train by {self.groups or 'row'}"
        whose = "official " if self.definition is None else ""
        sources = [f"{ours} = {whose}{theirs}" for ours, theirs in self.hub_splits.items()]
        return "; ".join(sources + [carved] * ("validation" not in self.hub_splits))


CARVED = "Official test labels are hidden: test is the official validation split."


# ------------------------------------------------------------------------ a task file's templates


@functools.cache
def _environment() -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_not_null
    )
    environment.filters["regex_replace"] = lambda string, pattern, repl, count=0: re.sub(
        pattern, repl, string, count=count
    )
    return environment


def _not_null(value: Any) -> Any:
    if value is None:  # Jinja would write the word None
        raise ValueError("a column that it writes is null")
    return value


compiled = functools.cache(lambda template: _environment().from_string(template))


@functools.cache
def template_fields(template: str) -> tuple[str, ...]:
    """The row's fields that a template names, sorted."""
    from jinja2.meta import find_undeclared_variables

    return tuple(sorted(find_undeclared_variables(_environment().parse(template))))


def render(name: str, template: str, row: Row) -> str:
    """The template with the row's fields, as lm-eval renders it, in Jinja's sandbox.

    Raises ValueError, naming the task file's field, for whatever it raises but a lack of memory.
    """
    try:
        return compiled(template).render(row)
    except MemoryError:
        raise
    except Exception as error:  # a template may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} fails: {reason:.200}") from None


def as_list(text: str) -> list | None:
    """The list that a template rendered as Python writes it, as lm-eval reads it; else None."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, list) else None


def is_column(field: str) -> bool:
    """Whether a field names a column, and is neither a template, nor a list, nor an index."""
    return not ("{" in field or field.startswith("[") or field.isdigit())


def value_of(name: str, field: str, row: Row) -> Any:
    """A column's value, if the field is its name, else the rendered text."""
    if not is_column(field):
        return render(name, field, row)
    if row.get(field) is None:
        known = ", ".join(map(str, row))
        lacks = "is null" if field in row else f"the row lacks (it has {known})"
        raise ValueError(f"{name} is the column {field!r}, which {lacks}")
    return row[field]
