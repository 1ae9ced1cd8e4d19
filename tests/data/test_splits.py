"""Carving validation by groups, and finding overlap."""

import numpy as np
import pytest

from dataset_descriptions import describe
from lora_tradeoffs.data.sources import read_jsonl
from lora_tradeoffs.data.splits import (
    carve,
    group_by_connection,
    group_by_containment,
    group_by_key,
    group_rows,
    overlap,
)


def test_questions_that_are_connected_over_others_are_one_group():
    groups = group_by_connection([("a?", "b?"), ("c?", "d?"), ("B? ", "c?"), ("e?", "f?")])
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_equal_keys_are_one_group_up_to_case_and_blanks():
    assert group_by_key(["A premise.", " a  premise.", "other"]).tolist() == [0, 0, 1]


def test_texts_that_contain_one_another_are_one_group_and_short_ones_are_never_held_out():
    texts = [
        "a film that never finds its feet at all",
        "never finds its feet at all",
        "finds its feet",
        "he never finds its feet at home , ever",
        "film that never finds its feet",
    ]
    groups = group_by_containment(texts)
    assert groups[0] == groups[1] == groups[4]
    assert groups[3] not in (groups[0], -1)
    assert groups[2] == -1


def test_rows_are_grouped_as_their_description_says():
    rows = {
        "sst2": [{"sentence": s} for s in ("not one dull moment in it", "one dull moment in it ")],
        "qqp": [{"question1": "a?", "question2": "b?"}, {"question1": "B?", "question2": "c?"}],
        "codexglue": [{"nl": f"{does} concode_field_sep int n"} for does in ("adds", "takes")],
        "cnn_dailymail": [{"article": "the same"}, {"article": "the same"}],
    }
    groups = {task: group_rows(describe(task), rows[task]).tolist() for task in rows}
    assert groups == {task: [0, 0] for task in rows} | {"cnn_dailymail": [0, 1]}


def test_carving_takes_whole_groups_and_never_too_many_rows():
    groups = np.array([0] * 50 + list(range(1, 41)) * 2 + [-1] * 30)
    mask = carve(groups, target=20, seed=3)
    assert 18 <= mask.sum() <= 20
    assert not mask[groups == -1].any()
    assert not mask[groups == 0].any()  # a giant group cannot become the split
    for group in range(1, 41):
        assert mask[groups == group].all() or not mask[groups == group].any()
    assert np.array_equal(mask, carve(groups, target=20, seed=3))


def test_overlap_counts_equal_texts_and_shared_13_grams():
    words = [f"w{i}" for i in range(40)]
    train = [" ".join(words), "another short text"]
    held_out = [
        "Another  short text",
        " ".join(["x", *words[5:18], "y"]),  # thirteen words in a row
        " ".join(["x", *words[5:17], "y"]),  # twelve
    ]
    assert overlap(train, held_out) == {"exact": 1, "ngram": 1, "of": 3}
    assert overlap(["short"], ["texts", "short"]) == {"exact": 1, "ngram": 0, "of": 2}


def test_held_out_real_sentences_do_not_contain_training_rows(real_data):
    """Drawn singly, most held-out SST-2 rows lie in, or contain, a training row."""
    sentences = [r["sentence"] for r in read_jsonl_of(real_data, "sst2")]
    mask = carve(group_by_containment(sentences), 500, seed=0)
    single = np.zeros(len(sentences), bool)
    single[np.random.default_rng(0).permutation(np.flatnonzero(mask | True))[:500]] = True
    assert contained_share(sentences, mask) == 0
    assert contained_share(sentences, single) > 0.3


def read_jsonl_of(folder, task):
    from pathlib import Path

    return read_jsonl(Path(folder) / task / "train.jsonl")


def contained_share(sentences, mask):
    """Share of held-out rows of five words and more with a training row in them, or around them."""
    padded = [f" {' '.join(s.lower().split())} " for s in sentences]
    train = [p for p, out in zip(padded, mask) if not out and len(p.split()) >= 5]
    haystack = "\n".join(train)
    held_out = [p for p, out in zip(padded, mask) if out and len(p.split()) >= 5]
    hits = [p in haystack or any(t in p for t in train) for p in held_out]
    return np.mean(hits)


@pytest.mark.parametrize("target", [0, 1])
def test_carving_may_find_nothing_that_fits(target):
    assert carve(np.array([0, 0, 0]), target, seed=0).sum() == 0
