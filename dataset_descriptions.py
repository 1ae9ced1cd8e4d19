"""One frozen description per data set: where it comes from, its prompt, answer, metrics, licence.

    python dataset_descriptions.py            # all six
    python dataset_descriptions.py squad_v2   # one

Every task is text to text: a prompt and a completion. A classification row's completion is a label
word that is exactly one token with its leading space, so that a label is one logit. No two tasks
share a label word, so that a habit of answering learned on one is not carried into another.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Any

from config import SPLITS, TASKS, Parser, UserError, guarded

Row = dict[str, Any]
FIELD_SEPARATOR, ELEMENT_SEPARATOR = "concode_field_sep", "concode_elem_sep"
UNANSWERABLE = "unanswerable"


@dataclass(frozen=True)
class DatasetDescription:
    """A data set as a text-to-text task.

    `template` holds the prompt with the row's fields; `passage` names the one field that truncation
    may shorten. `hub_splits` maps our splits to the Hub's; a split that is missing there is carved
    from train by `groups` (see data_preprocessing.py), since its official labels are hidden.
    """

    name: str
    title: str
    family: str
    hub_id: str
    hub_config: str | None
    hub_splits: dict[str, str]
    groups: str | None
    columns: dict[str, type]
    template: str
    metrics: tuple[str, ...]
    licence: str
    citation: str
    rows: dict[str, int]
    label_names: tuple[str, ...] = ()
    label_words: tuple[str, ...] = ()
    answer: str | None = None
    passage: str | None = None
    max_new_tokens: int = 0
    paraphrases: tuple[str, ...] = ()  # other templates, to see how much the wording matters
    stop: str = "\n"  # ends a generation as EOS does: an untuned model does not know when to end
    notes: tuple[str, ...] = field(default=())

    @property
    def extra_splits(self) -> tuple[str, ...]:
        """Held-out splits beside our three, such as MNLI's mismatched genres; read with test."""
        return tuple(split for split in self.hub_splits if split not in SPLITS)

    @property
    def is_classification(self) -> bool:
        return bool(self.label_words)

    def problem(self, row: Row) -> str | None:
        """What is wrong with a raw row, in words, or None."""
        for column, kind in self.columns.items():
            if column not in row:
                return f"field {column!r} is missing (fields: {', '.join(self.columns)})"
            value = row[column]
            if not isinstance(value, kind) or isinstance(value, bool):
                return f"field {column!r} holds {value!r:.40}, not {kind.__name__}"
            if kind is str and not value.strip():
                return f"field {column!r} is empty"
        if self.is_classification and not 0 <= row["label"] < len(self.label_words):
            allowed = ", ".join(f"{i} {name}" for i, name in enumerate(self.label_names))
            return f"label {row['label']} is outside the set ({allowed})"
        if self.name == "squad_v2":
            return _answers_problem(row)
        return None

    def prompt_parts(self, row: Row) -> tuple[str, str, str]:
        """The prompt as (head, passage, tail): only the passage may be shortened."""
        fields = {k: v.strip() for k, v in row.items() if isinstance(v, str)}
        if self.name == "codexglue":
            fields["nl"], fields["environment"] = split_concode(row["nl"])
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
        if self.name == "squad_v2":
            return " " + (row["answers"]["text"] or [UNANSWERABLE])[0].strip()
        return " " + row[self.answer].strip()

    def references(self, row: Row) -> list[str]:
        """Every text that a generation is scored against; [""] for an unanswerable question."""
        if self.name == "squad_v2":
            return list(row["answers"]["text"]) or [""]
        return [self.completion(row).strip()]

    def page(self) -> str:
        """The description as a readable page."""
        wrap = textwrap.TextWrapper(width=96, subsequent_indent=" " * 14)
        splits = ", ".join(f"{s} {n:,}" for s, n in self.rows.items())
        parts = {
            "family": self.family,
            "Hub": self.hub_id + (f" ({self.hub_config})" if self.hub_config else ""),
            "official": splits,
            "splits": self.splits_sentence(),
            "columns": ", ".join(self.columns),
            "labels": ", ".join(
                f"{i} {name} -> {word!r}"
                for i, (name, word) in enumerate(zip(self.label_names, self.label_words))
            ),
            "answer": "" if self.is_classification else f"{self.answer}, then end of text",
            "metrics": ", ".join(self.metrics),
            "licence": self.licence,
            "cite": self.citation,
        }
        lines = [f"{self.name}: {self.title}"]
        lines += [wrap.fill(f"  {key:<10}  {text}") for key, text in parts.items() if text]
        lines += [wrap.fill(f"  {'note':<10}  {note}") for note in self.notes]
        prompt = textwrap.indent(self.template, "    | ")
        return "\n".join([*lines, "  prompt", prompt])

    def splits_sentence(self) -> str:
        said = [f"{ours} = official {hub}" for ours, hub in self.hub_splits.items()]
        if "validation" not in self.hub_splits:
            said.append(f"validation carved from train by {self.groups}")
        return "; ".join(said)


def split_concode(nl: str) -> tuple[str, str]:
    """CONCODE's `nl` as (description, environment): the class's fields and methods, readable."""
    description, *environment = (part.strip() for part in nl.split(FIELD_SEPARATOR))
    lines = []
    for title, members in zip(("Fields", "Methods"), environment):
        names = "; ".join(member.strip() for member in members.split(ELEMENT_SEPARATOR))
        lines.append(f"{title}: {names}")
    return description, "\n".join(lines)


def _answers_problem(row: Row) -> str | None:
    answers = row["answers"]
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return "field 'answers' needs two lists of one length, text and answer_start"
    for text, start in zip(texts, starts):
        if not isinstance(text, str) or not text.strip():
            return "field 'answers' holds an empty text"
        if row["context"][start : start + len(text)] != text:
            return f"answer_start {start} does not point at {text!r:.40} in the context"
    return None


GLUE = "Wang et al. 2018, GLUE, arXiv:1804.07461"
CARVED = "Official test labels are hidden: test is the official validation split."

DESCRIPTIONS = {
    d.name: d
    for d in (
        DatasetDescription(
            name="sst2",
            title="Stanford Sentiment Treebank, binary sentiment of film reviews",
            family="similar",
            hub_id="nyu-mll/glue",
            hub_config="sst2",
            hub_splits={"train": "train", "test": "validation"},
            groups="containment",
            columns={"sentence": str, "label": int},
            template="Review: {sentence}\nSentiment:",
            paraphrases=(
                "{sentence}\nThe sentiment of this sentence is",
                "Is this positive or negative? {sentence}\nAnswer:",
                "Sentence: {sentence}\nOpinion:",
            ),
            metrics=("accuracy", "f1"),
            licence="no formal licence stated; research use",
            citation=f"Socher et al. 2013, EMNLP; {GLUE}",
            rows={"train": 67_349, "validation": 872, "test": 1_821},
            label_names=("negative", "positive"),
            label_words=("negative", "positive"),
            notes=(
                CARVED,
                "Train holds phrases of the same sentences, so validation is carved by containment:"
                " rows of five words and more that contain one another stay together.",
            ),
        ),
        DatasetDescription(
            name="mnli",
            title="Multi-Genre Natural Language Inference",
            family="similar",
            hub_id="nyu-mll/glue",
            hub_config="mnli",
            hub_splits={
                "train": "train",
                "test": "validation_matched",
                "test_mismatched": "validation_mismatched",
            },
            groups="premise",
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
            metrics=("accuracy", "f1"),
            licence="mostly OANC; fiction parts CC BY / CC BY-SA 3.0 / public domain",
            citation=f"Williams et al. 2018, NAACL, arXiv:1704.05426; {GLUE}",
            rows={"train": 392_702, "validation": 9_815, "test": 9_796},
            label_names=("entailment", "neutral", "contradiction"),
            label_words=("true", "neutral", "false"),
            notes=(CARVED, "F1 is the macro average over the three classes."),
        ),
        DatasetDescription(
            name="qqp",
            title="Quora Question Pairs, duplicate detection",
            family="similar",
            hub_id="nyu-mll/glue",
            hub_config="qqp",
            hub_splits={"train": "train", "test": "validation"},
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
            metrics=("accuracy", "f1"),
            licence="Quora's terms, non-commercial use",
            citation=f"Iyer et al. 2017, First Quora Dataset Release; {GLUE}",
            rows={"train": 363_846, "validation": 40_430, "test": 390_965},
            label_names=("not_duplicate", "duplicate"),
            label_words=("different", "duplicate"),
            notes=(CARVED,),
        ),
        DatasetDescription(
            name="squad_v2",
            title="Stanford Question Answering Dataset 2.0, extractive with unanswerable questions",
            family="dissimilar",
            hub_id="rajpurkar/squad_v2",
            hub_config=None,
            hub_splits={"train": "train", "test": "validation"},
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
            metrics=("f1", "exact_match"),
            licence="CC BY-SA 4.0",
            citation="Rajpurkar et al. 2018, ACL, arXiv:1806.03822",
            rows={"train": 130_319, "validation": 11_873},
            answer="answers",
            passage="context",
            max_new_tokens=48,
            notes=(
                CARVED,
                f"An unanswerable question's completion is {UNANSWERABLE!r}; it is scored as the"
                " empty string.",
            ),
        ),
        DatasetDescription(
            name="codexglue",
            title="CodeXGLUE text-to-code (CONCODE): a Java method from its description and class",
            family="dissimilar",
            hub_id="google/code_x_glue_tc_text_to_code",
            hub_config=None,
            hub_splits={"train": "train", "test": "validation"},
            groups="class",
            columns={"nl": str, "code": str},
            template="Description: {nl}\n{environment}\nJava method:",
            paraphrases=(
                "Task: {nl}\nClass members:\n{environment}\nJava code:",
                "Write a Java method. {nl}\n{environment}\nMethod:",
                "// {nl}\n{environment}\n// Java:",
            ),
            metrics=("codexglue_bleu", "sacrebleu", "exact_match"),
            licence="C-UDA 1.0 (Computational Use of Data Agreement)",
            citation="Iyer et al. 2018, EMNLP, arXiv:1808.09588; Lu et al. 2021, arXiv:2102.04664",
            rows={"train": 100_000, "validation": 2_000, "test": 2_000},
            answer="code",
            passage="environment",
            max_new_tokens=192,
            notes=(
                CARVED,
                "CodeXGLUE has many tasks; text-to-code is its code generation, and the one meant"
                " by 'CodeXGLUE' here. Code is tokenised by spaces and its names are normalised.",
            ),
        ),
        DatasetDescription(
            name="cnn_dailymail",
            title="CNN/DailyMail 3.0.0, news summarisation",
            family="dissimilar",
            hub_id="abisee/cnn_dailymail",
            hub_config="3.0.0",
            hub_splits={"train": "train", "validation": "validation", "test": "test"},
            groups=None,
            columns={"article": str, "highlights": str},
            template="Article: {article}\nSummary:",
            paraphrases=(
                "{article}\nHighlights:",
                "News: {article}\nIn short:",
                "Summarise this article. {article}\nSummary:",
            ),
            metrics=("rougeL", "rougeLsum", "rouge1", "rouge2"),
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
        raise UserError(f"unknown task {name!r}; tasks: {', '.join(TASKS)}")
    return DESCRIPTIONS[name]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Print the data sets' descriptions.")
    parser.add_argument("name", nargs="*", help=f"one or more of {', '.join(TASKS)}; default all")
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    print("\n\n".join(describe(name).page() for name in args.name or TASKS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
