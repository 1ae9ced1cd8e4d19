"""The sample data are what they claim to be: balanced, varied, and without short cuts."""

import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline

from config import FAMILIES, ROOT, SPLITS, TASKS
from dataset_descriptions import describe
from lora_tradeoffs.data.sources import read_folder, row_text

SIZES = {
    **dict.fromkeys(FAMILIES["similar"], (96, 32, 32)),
    **dict.fromkeys(("squad_v2", "codexglue"), (48, 16, 16)),
    "cnn_dailymail": (24, 8, 8),
}
SAMPLE = ROOT / "data" / "sample"


@pytest.fixture(params=TASKS)
def task(request):
    return request.param


def rows_of(task):
    return read_folder(SAMPLE, describe(task))  # checks every row's schema and that none recurs


def all_rows(task):
    return [row for rows in rows_of(task).values() for row in rows]


def grams(text):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)} or {tuple(words)}


def jaccard(a, b):
    return len(a & b) / len(a | b)


def classifier():
    return make_pipeline(CountVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))


def test_splits_have_their_sizes(task):
    assert tuple(len(rows) for rows in rows_of(task).values()) == SIZES[task]


def test_no_two_rows_are_alike(task):
    description = describe(task)
    texts = [row_text(description, row) + description.completion(row) for row in all_rows(task)]
    if task == "squad_v2":  # questions share their passage on purpose
        texts = [row["question"] for row in all_rows(task)]
    worst = max(jaccard(a, b) for a, b in combinations(map(grams, texts), 2))
    assert worst < 0.5


@pytest.mark.parametrize("task", FAMILIES["similar"])
def test_labels_are_balanced(task):
    for rows in rows_of(task).values():
        counts = Counter(row["label"] for row in rows)
        assert len(counts) == len(describe(task).label_words)
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("task", FAMILIES["similar"])
def test_bag_of_words_does_not_solve_it(task):
    splits = rows_of(task)
    train, held_out = splits["train"], splits["validation"] + splits["test"]
    texts = [[row_text(describe(task), r) for r in rows] for rows in (train, held_out)]
    labels = [[r["label"] for r in rows] for rows in (train, held_out)]
    assert classifier().fit(texts[0], labels[0]).score(texts[1], labels[1]) < 0.9


def test_mnli_hypotheses_do_not_betray_the_label():
    rows = all_rows("mnli")
    texts, labels = [r["hypothesis"] for r in rows], [r["label"] for r in rows]
    train = slice(0, SIZES["mnli"][0])
    held_out = slice(SIZES["mnli"][0], None)
    model = classifier().fit(texts[train], labels[train])
    assert model.score(texts[held_out], labels[held_out]) < 0.5
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    assert np.mean(cross_val_score(classifier(), texts, labels, cv=folds)) < 0.5


def test_no_premise_question_article_or_class_is_in_two_splits():
    keys = {
        "mnli": lambda r: [r["premise"]],
        "qqp": lambda r: [r["question1"], r["question2"]],
        "squad_v2": lambda r: [r["title"], r["context"]],
        "codexglue": lambda r: [r["nl"].partition("concode_field_sep")[2], r["code"]],
        "cnn_dailymail": lambda r: [r["article"]],
    }
    for task, key in keys.items():
        found = [{k.lower() for row in rows for k in key(row)} for rows in rows_of(task).values()]
        assert not any(a & b for a, b in combinations(found, 2)), task


def test_squad_passages_have_60_to_120_words_and_a_third_is_unanswerable():
    for rows in rows_of("squad_v2").values():
        assert all(60 <= len(row["context"].split()) <= 120 for row in rows)
        unanswerable = sum(not row["answers"]["text"] for row in rows)
        assert abs(unanswerable - len(rows) / 3) < 1


def test_articles_have_120_to_200_words():
    for row in all_rows("cnn_dailymail"):
        assert 120 <= len(row["article"].split()) <= 200
        assert 20 <= len(row["highlights"].split()) <= 70


def test_code_is_tokenised_java_with_closed_brackets():
    for row in all_rows("codexglue"):
        tokens = row["code"].split(" ")
        assert "function" in tokens and all(tokens)
        for left, right in ("()", "{}", "[]"):
            assert tokens.count(left) == tokens.count(right), row["code"]


def test_files_hold_one_json_object_a_line_in_the_original_schema(task):
    for split in SPLITS:
        lines = (SAMPLE / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert {frozenset(json.loads(line)) for line in lines} == {frozenset(json.loads(lines[0]))}
