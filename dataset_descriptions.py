"""One frozen description per data set: where it comes from, its prompt, answer, metrics, licence.

    python dataset_descriptions.py                         # the six built-in ones
    python dataset_descriptions.py squad_v2                # one
    python dataset_descriptions.py my_task --data FOLDER   # a task of your own, with an example

Every task is text to text: a prompt and a completion. A classification row's completion is a label
word that is exactly one token with its leading space, so that a label is one logit. No two tasks
share a label word, so that a habit of answering learned on one is not carried into another. A task
of your own is a task file (docs/tasks.md), without code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from config import (
    BUILT_IN_FAMILIES,
    FAMILIES,
    TASKS,
    WHEN_RESOLVED,
    Settings,
    UserError,
    resolve_settings,
)
from lora_tradeoffs.command_line import Parser, add_common_arguments, did_you_mean, guarded
from lora_tradeoffs.task_description import UNANSWERABLE, DatasetDescription, EvaluateMetric, Row
from lora_tradeoffs.task_yaml import check_single, describe_fields, is_free, read_task, task_files

__all__ = ["DESCRIPTIONS", "DatasetDescription", "EvaluateMetric", "Row", "describe"]

FIELD_SEPARATOR, ELEMENT_SEPARATOR = "concode_field_sep", "concode_elem_sep"


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


# ---------------------------------------------------------------- tasks and families of one's own

_broken: dict[str, str] = {}  # task files that cannot be read: what is wrong, by the task's name


def find_tasks(settings: Settings) -> None:
    """Add the tasks of the settings' task files; a broken file is an error once it is asked for."""
    for name, path in task_files(settings).items():
        _broken.pop(name, None)
        try:
            DESCRIPTIONS[name] = read_task(path, name)
            check_single(DESCRIPTIONS[name], settings.tasks_dir)
        except UserError as error:
            _broken[name] = str(error)


WHEN_RESOLVED.append(find_tasks)


def describe(name: str) -> DatasetDescription:
    """The description of a task. Raises UserError for an unknown one, or a broken task file."""
    if name in _broken:
        raise UserError(_broken[name])
    if name not in DESCRIPTIONS:
        meant = did_you_mean(name, DESCRIPTIONS)
        raise UserError(
            f"unknown task {name!r:.80}; {meant}tasks: {', '.join(DESCRIPTIONS)}; one of your own"
            " needs --data FOLDER with its task.yaml, or TASKS_DIR"
        )
    return DESCRIPTIONS[name]


def ordered(tasks: Iterable[str]) -> tuple[str, ...]:
    """Tasks in the suite's order, others after them, each once."""
    names = set(tasks)
    return (*(task for task in TASKS if task in names), *sorted(names - {*TASKS}))


def family_of(tasks: Iterable[str]) -> str:
    """The family of tasks that are trained together: a built-in one, or one of their own.

    Their own is the family that all their task files name, with all tasks that name it, else these
    tasks, "sst2+my_task". It joins FAMILIES. Raises UserError for an unknown task.
    """
    tasks = ordered(tasks)
    for family in BUILT_IN_FAMILIES:
        if set(tasks) <= set(FAMILIES[family]):
            return family
    named = {describe(task).own_family for task in tasks}
    family = (named.pop() if len(named) == 1 else None) or "+".join(tasks)
    tasks = ordered(n for n, d in DESCRIPTIONS.items() if d.own_family == family) or tasks
    FAMILIES[family] = tasks
    return family


def named_family(text: str) -> str:
    """The family that a user names: built-in, a task file's, "a+b" of its tasks, or "name=a+b".

    Raises UserError for one that does not exist, or whose name is another's.
    """
    name, equals, members = text.partition("=")
    if text in BUILT_IN_FAMILIES:
        return text
    of_files = ordered(task for task, d in DESCRIPTIONS.items() if d.own_family == name)
    if not (equals or of_files or text in DESCRIPTIONS or "+" in text):
        known = ", ".join(BUILT_IN_FAMILIES)
        raise UserError(f"families: {text:.80} is none; families: {known}, or tasks as in a+b")
    tasks = ordered(members.split("+")) if equals else of_files or ordered(text.split("+"))
    family = name if equals else family_of(tasks)
    if equals and not is_free(name.replace("+", "_")):
        raise UserError(f"families: {name!r:.80} is taken or no name; choose another")
    if tasks != (of_files or tasks if equals else FAMILIES[family]):
        mine = f"write tasks, or another name, as in mine={'+'.join(tasks)}"
        raise UserError(f"families: {text:.80} is not the whole of {family}; {mine}")
    FAMILIES[family] = tuple(describe(task).name for task in tasks)
    return family


def preset_family(tasks: Iterable[str]) -> str:
    """The built-in family whose values of a preset (lengths, batch sizes, arms) the tasks take.

    Choices are short, as those of the similar tasks; generated text is long.
    """
    return BUILT_IN_FAMILIES[not all(describe(task).has_choices for task in tasks)]


def own_definitions(families: Iterable[str], tasks: Iterable[str] = ()) -> dict[str, Any]:
    """`own`, what readers of a study's files need to know of these, unless all are built in."""
    own = {f: list(FAMILIES[f]) for f in families if f in FAMILIES and f not in BUILT_IN_FAMILIES}
    names = ordered((*tasks, *(task for members in own.values() for task in members)))
    written = {n: DESCRIPTIONS[n].definition for n in names if n in DESCRIPTIONS and n not in TASKS}
    return {"own": {"families": own, "tasks": written}} if own or written else {}


def learn(definitions: Mapping[str, Any]) -> None:
    """Add own families and tasks as a study's files have them; task files that are found win."""
    for name, fields in definitions.get("tasks", {}).items():
        if name not in DESCRIPTIONS:

            def error(field: str, reason: str, name: str = name) -> UserError:
                return UserError(f"the recorded task {name}: {field} {reason}")

            DESCRIPTIONS[name] = describe_fields(name, fields, error)
    for family, tasks in definitions.get("families", {}).items():
        FAMILIES.setdefault(family, tuple(tasks))


# ----------------------------------------------------------------------------- the command


def example(description: DatasetDescription, settings: Settings) -> str:
    """The first training row of a task of one's own as the model reads it."""
    path = description.row_file(settings.data_folder, "train")
    if path is None:
        return f"  example    python data_preprocessing.py {description.name} reads the Hub's rows"
    try:
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(file.readline())
        problem = description.problem(row)
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem:
        raise UserError(f"{path}:1: {problem}")
    return f"  example    {description.prompt(row)!r}\n  is learned {description.completion(row)!r}"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Print the data sets' descriptions.")
    parser.add_argument("name", nargs="*", help=f"{', '.join(TASKS)} (default), or your own")
    add_common_arguments(parser)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve_settings(args)
    for description in map(describe, args.name or TASKS):
        print(description.page())
        if description.definition is not None:
            print(example(description, settings))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
