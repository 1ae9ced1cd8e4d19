"""Baselines that a model must beat: predictions that need no model.

A DatasetDescription's `baseline` is a key of BASELINES.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dataset_descriptions import DatasetDescription

ABBREVIATIONS = (
    *("mr", "mrs", "ms", "dr", "prof", "rev", "hon", "gov", "sen", "rep", "gen", "col", "lt"),
    *("sgt", "capt", "st", "jr", "sr", "vs", "inc", "ltd", "co", "corp"),
    *("jan", "feb", "aug", "sept", "oct", "nov", "dec"),
)
# A full stop with its closing quotes, where a space and the start of a sentence follow.
SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])""")


def majority_class(train_labels: Sequence[int], count: int) -> list[int]:
    """The most frequent label in training for every item; the smallest of several."""
    classes, counts = np.unique(np.asarray(train_labels), return_counts=True)
    return [int(classes[counts.argmax()])] * count


def always_abstain(count: int) -> list[str]:
    """No answer to any question: SQuAD v2's floor, the share of unanswerable questions."""
    return [""] * count


def sentences(text: str) -> list[str]:
    """The sentences of English news. Rules, no model.

    A line ends a sentence; so does . ! or ? before a space and a capital, a figure or an opening
    quote, but for a full stop after an initial, a dotted abbreviation (U.S.) or one of
    ABBREVIATIONS: "the U.S. He" stays one sentence.
    """
    parts = []
    for line in text.splitlines():
        start = 0
        for end in SENTENCE_END.finditer(line):
            word = line[start : end.start()].split()[-1:] or [""]
            word = word[0].lstrip("\"'“‘([")
            initial = re.fullmatch(r"[A-Z]|([A-Za-z]\.)+[A-Za-z]", word)
            if line[end.start()] == "." and (initial or word.lower() in ABBREVIATIONS):
                continue
            parts.append(line[start : end.end()].strip())
            start = end.end()
        parts.append(line[start:].strip())
    return [sentence for sentence in parts if sentence]


def lead(article: str, count: int = 3) -> str:
    """The first sentences of an article, a line each as rougeLsum wants them: lead-3."""
    return "\n".join(sentences(article)[:count])


def retrieved_code(
    descriptions: Sequence[str], train_descriptions: Sequence[str], train_code: Sequence[str]
) -> list[str]:
    """The code of the training row whose description is nearest, by the cosine of TF-IDF.

    After the retrieval baseline of Iyer et al. 2018 (arXiv:1808.09588), without its renaming of
    variables. Words are what whitespace parts, lower-cased; of equally near rows the first.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=r"\S+")
    train = vectorizer.fit_transform(train_descriptions)
    queries = vectorizer.transform(descriptions)
    nearest = []
    for start in range(0, len(descriptions), 100):  # all at once: gigabytes for CONCODE's train
        similarity = queries[start : start + 100] @ train.T
        nearest += np.asarray(similarity.argmax(axis=1)).ravel().tolist()
    return [train_code[row] for row in nearest]


def _leads(description: DatasetDescription, rows: Any, train: Callable[[], Any]) -> list[str]:
    head, tail = description.template.split("{" + description.passage + "}")
    return [lead(prompt.removeprefix(head).removesuffix(tail)) for prompt in rows["prompt"][:]]


def _retrieved(description: DatasetDescription, rows: Any, train: Callable[[], Any]) -> list[str]:
    examples = train()
    answers = [text.strip() for text in examples["completion"][:]]
    return retrieved_code(rows["prompt"][:], examples["prompt"][:], answers)


def _majority_answer(
    description: DatasetDescription, rows: Any, train: Callable[[], Any]
) -> list[str]:
    (answer, _), *_ = Counter(train()["completion"][:]).most_common(1)
    return [answer.strip()] * len(rows)


# Each takes the description, prepared rows, and a function that gives the prepared train rows.
BASELINES: dict[str, Callable[[DatasetDescription, Any, Callable[[], Any]], list]] = {
    "majority_class": lambda _, rows, train: majority_class(train()["label"][:], len(rows)),
    "majority_answer": _majority_answer,
    "always_abstain": lambda description, rows, train: always_abstain(len(rows)),
    "lead_3": _leads,
    "nearest_description": _retrieved,
}
