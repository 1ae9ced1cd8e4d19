"""One frozen description per data set: where it comes from, its prompt, answer, metrics, licence.

    python dataset_descriptions.py            # all six
    python dataset_descriptions.py squad_v2   # one

Every task is text to text: a prompt and a completion. A classification row's completion is a label
word that is exactly one token with its leading space, so that a label is one logit. No two tasks
share a label word, so that a habit of answering learned on one is not carried into another.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from config import FAMILIES, SPLITS, TASKS, UserError
from lora_tradeoffs.command_line import Parser, guarded

Row = dict[str, Any]
FIELD_SEPARATOR, ELEMENT_SEPARATOR = "concode_field_sep", "concode_elem_sep"
UNANSWERABLE = "unanswerable"


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

    A new task is one description in DESCRIPTIONS and its name in a family of config.FAMILIES.
    """

    name: str
    title: str
    # Where rows come from.
    hub_id: str
    hub_config: str | None = None
    hub_splits: dict[str, str]  # our split -> the Hub's; without "validation" it is carved by group
    columns: dict[str, type]  # fields of a raw row; classification has its class in "label"
    grouping: tuple[str, ...] = ()  # rows that carving keeps together: see group_rows in splits.py
    groups: str | None = None  # the grouping in words, part of the fingerprint of prepared rows
    rows: dict[str, int]  # official sizes
    licence: str
    citation: str
    notes: tuple[str, ...] = ()
    # What the model reads and writes.
    template: str  # the prompt, with fields in braces
    paraphrases: tuple[str, ...] = ()  # other templates, to see how much the wording matters
    derive: Callable[[Row], dict[str, str]] | None = None  # further fields of a row, by name
    passage: str | None = None  # the one field that truncation may shorten
    kind: str = "classification"  # or "answers" (SQuAD v2's), "code", "summary": how it is scored
    label_names: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()  # in the labels' order
    answer: str | None = None  # the field that is learned, unless it is a label word
    max_new_tokens: int = 0
    stop: str = "\n"  # ends a generation as EOS does: an untuned model does not know when to end
    # How it is measured.
    metrics: tuple[str, ...] = ("accuracy", "f1")  # the first is the primary metric
    extra_metrics: tuple[EvaluateMetric, ...] = ()
    positive_class: int | None = None  # F1 is of this class; None: the mean over all classes
    item_groups: str | None = None  # items that share this field are resampled together
    baseline: str = "majority_class"  # a key of BASELINES in adaptation/baselines.py
    prose: str | None = None  # the field that serves as held-out text

    def __post_init__(self) -> None:
        """Fill in `groups`. Raises ValueError for a description that contradicts itself."""
        labelled = self.kind == "classification"
        if labelled != bool(self.label_words) or len(self.label_words) != len(self.label_names):
            raise ValueError(f"{self.name}: label words, one a label, are for classification")
        if not labelled and (self.answer not in self.columns or self.max_new_tokens < 1):
            raise ValueError(f"{self.name}: kind {self.kind!r} needs answer and max_new_tokens")
        object.__setattr__(self, "groups", self.groups or " ".join(self.grouping) or None)

    @property
    def family(self) -> str:
        """The family that config.FAMILIES has the task in."""
        for family, tasks in FAMILIES.items():
            if self.name in tasks:
                return family
        raise UserError(f"task {self.name} has no family; add it to FAMILIES in config.py")

    @property
    def extra_splits(self) -> tuple[str, ...]:
        """Held-out splits beside our three, such as MNLI's mismatched genres; read with test."""
        return tuple(split for split in self.hub_splits if split not in SPLITS)

    @property
    def is_classification(self) -> bool:
        return self.kind == "classification"

    def fields(self, row: Row) -> dict[str, str]:
        """The row's texts by field, with the derived ones."""
        texts = {name: text.strip() for name, text in row.items() if isinstance(text, str)}
        return {**texts, **(self.derive(row) if self.derive else {})}

    def prompt_parts(self, row: Row) -> tuple[str, str, str]:
        """The prompt as (head, passage, tail): only the passage may be shortened."""
        fields = self.fields(row)
        if self.passage is None:
            return self.template.format_map(fields), "", ""
        head, tail = self.template.split("{" + self.passage + "}")
        return head.format_map(fields), fields[self.passage], tail.format_map(fields)

    def prompt(self, row: Row) -> str:
        return "".join(self.prompt_parts(row))

    def completion(self, row: Row) -> str:
        """The text to be learned, with the leading space that parts it from the prompt."""
        if self.is_classification:
            return " " + self.label_words[row["label"]]
        if self.kind == "answers":
            return " " + (row[self.answer]["text"] or [UNANSWERABLE])[0].strip()
        return " " + row[self.answer].strip()

    def references(self, row: Row) -> list[str]:
        """Every text that a generation is scored against; [""] for an unanswerable question."""
        if self.kind == "answers":
            return list(row[self.answer]["text"]) or [""]
        return [self.completion(row).strip()]

    def page(self) -> str:
        """The description as a readable page."""
        words = enumerate(zip(self.label_names, self.label_words))
        parts = {
            "family": self.family,
            "Hub": self.hub_id + (f" ({self.hub_config})" if self.hub_config else ""),
            "official": ", ".join(f"{split} {count:,}" for split, count in self.rows.items()),
            "splits": self.splits_sentence(),
            "columns": ", ".join(self.columns),
            "labels": ", ".join(f"{i} {name} -> {word!r}" for i, (name, word) in words),
            "answer": "" if self.is_classification else f"{self.answer}, then end of text",
            "metrics": ", ".join(self.metrics),
            "licence": self.licence,
            "cite": self.citation,
        }
        wrap = textwrap.TextWrapper(width=96, subsequent_indent=" " * 14)
        notes = (*(() if "validation" in self.hub_splits else (CARVED,)), *self.notes)
        pairs = [*parts.items(), *(("note", note) for note in notes)]
        lines = [f"{self.name}: {self.title}"]
        lines += [wrap.fill(f"  {key:<10}  {text}") for key, text in pairs if text]
        return "\n".join([*lines, "  prompt", textwrap.indent(self.template, "    | ")])

    def splits_sentence(self) -> str:
        """Where each split comes from, in words."""
        carved = f"validation carved from train by {self.groups or 'row'}"
        sources = [f"{ours} = official {hub}" for ours, hub in self.hub_splits.items()]
        return "; ".join(sources + [carved] * ("validation" not in self.hub_splits))


def concode_fields(row: Row) -> dict[str, str]:
    """CONCODE's `nl` as description, readable environment, and its class as it is written."""
    description, *members = (part.strip() for part in row["nl"].split(FIELD_SEPARATOR))
    lines = []
    for title, part in zip(("Fields", "Methods"), members):
        names = "; ".join(member.strip() for member in part.split(ELEMENT_SEPARATOR))
        lines.append(f"{title}: {names}")
    written = row["nl"].partition(FIELD_SEPARATOR)[2]
    return {"nl": description, "environment": "\n".join(lines), "class": written}


GLUE = "Wang et al. 2018, GLUE, arXiv:1804.07461"
CARVED = "Official test labels are hidden: test is the official validation split."

DESCRIPTIONS = {
    d.name: d
    for d in (
        DatasetDescription(
            name="sst2",
            title="Stanford Sentiment Treebank, binary sentiment of film reviews",
            hub_id="nyu-mll/glue",
            hub_config="sst2",
            hub_splits={"train": "train", "test": "validation"},
            grouping=("containment", "sentence"),
            groups="containment",
            columns={"sentence": str, "label": int},
            template="Review: {sentence}\nSentiment:",
            paraphrases=(
                "{sentence}\nThe sentiment of this sentence is",
                "Is this positive or negative? {sentence}\nAnswer:",
                "Sentence: {sentence}\nOpinion:",
            ),
            licence="no formal licence stated; research use",
            citation=f"Socher et al. 2013, EMNLP; {GLUE}",
            rows={"train": 67_349, "validation": 872, "test": 1_821},
            label_names=("negative", "positive"),
            label_words=("negative", "positive"),
            positive_class=1,
            notes=(
                "Train holds phrases of the same sentences: rows of five words and more that"
                " contain one another stay together.",
            ),
        ),
        DatasetDescription(
            name="mnli",
            title="Multi-Genre Natural Language Inference",
            hub_id="nyu-mll/glue",
            hub_config="mnli",
            hub_splits={"train": "train", "test": "validation_matched"}
            | {"test_mismatched": "validation_mismatched"},
            grouping=("equal", "premise"),
            groups="premise",
            item_groups="premise",
            columns={"premise": str, "hypothesis": str, "label": int},
            template=(
                "Premise: {premise}\nHypothesis: {hypothesis}\n"
                "The hypothesis is true, false or neutral:"
            ),
            paraphrases=(
                "{premise}\nQuestion: {hypothesis} Is that true, false or neutral?\nAnswer:",
                "Given: {premise}\nClaim: {hypothesis}\nThe claim is",
                "Text: {premise}\nStatement: {hypothesis}\nTrue, false or neutral:",
            ),
            licence="mostly OANC; fiction parts CC BY / CC BY-SA 3.0 / public domain",
            citation=f"Williams et al. 2018, NAACL, arXiv:1704.05426; {GLUE}",
            rows={"train": 392_702, "validation": 9_815, "test": 9_796},
            label_names=("entailment", "neutral", "contradiction"),
            label_words=("true", "neutral", "false"),
            notes=("F1 is the macro average over the three classes.",),
        ),
        DatasetDescription(
            name="qqp",
            title="Quora Question Pairs, duplicate detection",
            hub_id="nyu-mll/glue",
            hub_config="qqp",
            hub_splits={"train": "train", "test": "validation"},
            grouping=("connected", "question1", "question2"),
            groups="connected questions",
            columns={"question1": str, "question2": str, "label": int},
            template=(
                "Question 1: {question1}\nQuestion 2: {question2}\n"
                "The questions are different or duplicate:"
            ),
            paraphrases=(
                "First: {question1}\nSecond: {question2}\nDifferent or duplicate?\nAnswer:",
                "{question1}\n{question2}\nThese two questions are",
                "Question A: {question1}\nQuestion B: {question2}\nRelation:",
            ),
            licence="Quora's terms, non-commercial use",
            citation=f"Iyer et al. 2017, First Quora Dataset Release; {GLUE}",
            rows={"train": 363_846, "validation": 40_430, "test": 390_965},
            label_names=("not_duplicate", "duplicate"),
            label_words=("different", "duplicate"),
            positive_class=1,
        ),
        DatasetDescription(
            name="squad_v2",
            title="Stanford Question Answering Dataset 2.0, extractive with unanswerable questions",
            hub_id="rajpurkar/squad_v2",
            hub_splits={"train": "train", "test": "validation"},
            grouping=("equal", "title"),
            groups="article",
            columns={"id": str, "title": str, "context": str, "question": str, "answers": dict},
            template=(
                "Passage: {context}\nQuestion: {question}\n"
                f"Answer from the passage, or {UNANSWERABLE}:"
            ),
            paraphrases=(
                f"{{context}}\nQuestion: {{question}} (or {UNANSWERABLE})\nAnswer:",
                f"Read: {{context}}\nQ: {{question}}\nA (from the text, or {UNANSWERABLE}):",
                f"Context: {{context}}\n{{question}}\nShort answer, or {UNANSWERABLE}:",
            ),
            kind="answers",
            metrics=("f1", "exact_match"),
            item_groups="context",
            baseline="always_abstain",
            licence="CC BY-SA 4.0",
            citation="Rajpurkar et al. 2018, ACL, arXiv:1806.03822",
            rows={"train": 130_319, "validation": 11_873},
            answer="answers",
            passage="context",
            max_new_tokens=48,
            notes=(f"An unanswerable question's completion is {UNANSWERABLE!r}, scored as empty.",),
        ),
        DatasetDescription(
            name="codexglue",
            title="CodeXGLUE text-to-code (CONCODE): a Java method from its description and class",
            hub_id="google/code_x_glue_tc_text_to_code",
            hub_splits={"train": "train", "test": "validation"},
            grouping=("equal", "class"),
            groups="class",
            columns={"nl": str, "code": str},
            template="Description: {nl}\n{environment}\nJava method:",
            paraphrases=(
                "Task: {nl}\nClass members:\n{environment}\nJava code:",
                "Write a Java method. {nl}\n{environment}\nMethod:",
                "// {nl}\n{environment}\n// Java:",
            ),
            derive=concode_fields,
            kind="code",
            metrics=("codexglue_bleu", "sacrebleu", "exact_match"),
            baseline="nearest_description",
            licence="C-UDA 1.0 (Computational Use of Data Agreement)",
            citation="Iyer et al. 2018, EMNLP, arXiv:1808.09588; Lu et al. 2021, arXiv:2102.04664",
            rows={"train": 100_000, "validation": 2_000, "test": 2_000},
            answer="code",
            passage="environment",
            max_new_tokens=192,
            notes=(
                "CodeXGLUE has many tasks; text-to-code is its code generation, and the one meant"
                " by 'CodeXGLUE' here. Code is tokenised by spaces and its names are normalised.",
            ),
        ),
        DatasetDescription(
            name="cnn_dailymail",
            title="CNN/DailyMail 3.0.0, news summarisation",
            hub_id="abisee/cnn_dailymail",
            hub_config="3.0.0",
            hub_splits={"train": "train", "validation": "validation", "test": "test"},
            columns={"article": str, "highlights": str},
            template="Article: {article}\nSummary:",
            paraphrases=(
                "{article}\nHighlights:",
                "News: {article}\nIn short:",
                "Summarise this article. {article}\nSummary:",
            ),
            kind="summary",
            metrics=("rougeL", "rougeLsum", "rouge1", "rouge2"),
            baseline="lead_3",
            prose="article",
            licence="card says Apache-2.0; the articles are their publishers' copyright",
            citation="Hermann et al. 2015, arXiv:1506.03340; See et al. 2017, arXiv:1704.04368",
            rows={"train": 287_113, "validation": 13_368, "test": 11_490},
            answer="highlights",
            passage="article",
            max_new_tokens=160,
            stop="\n\n",  # highlights are lines
        ),
    )
}


def describe(name: str) -> DatasetDescription:
    """The description of a task. Raises UserError for an unknown one."""
    if name not in DESCRIPTIONS:
        close = difflib.get_close_matches(name.lower(), DESCRIPTIONS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise UserError(f"unknown task {name!r:.80}; {meant}tasks: {', '.join(TASKS)}")
    return DESCRIPTIONS[name]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Print the data sets' descriptions.")
    parser.add_argument("name", nargs="*", help=f"one or more of {', '.join(TASKS)}; default all")
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    names = build_parser().parse_args(argv).name or TASKS
    print("\n\n".join(describe(name).page() for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
