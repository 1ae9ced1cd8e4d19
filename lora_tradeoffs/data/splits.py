"""How validation is carved from train, and how much two splits overlap: pure functions on rows.

Rows that share a sentence, a premise, a question, an article or a class go to one side together:
drawn singly, held-out rows would repeat what was trained on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from config import DATA_SEED
from dataset_descriptions import DatasetDescription, Row

CONTAINMENT_WORDS = 5
NGRAM = 13  # words; the length that GPT-3's decontamination used (arXiv:2005.14165, appendix C)


def group_by_key(keys: Iterable[str]) -> np.ndarray:
    """Group number of each key, shape (rows,): equal keys, up to case and blanks, one group."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(_normal(key), len(numbers)) for key in keys])


def group_by_connection(pairs: Iterable[tuple[str, str]]) -> np.ndarray:
    """Group number of each pair: pairs that share a text, directly or through others, are one."""
    numbers: dict[str, int] = {}
    ends = [[numbers.setdefault(_normal(t), len(numbers)) for t in pair] for pair in pairs]
    left, right = np.array(ends).T
    return _components(left, right, len(numbers))[left]


def group_by_containment(texts: Sequence[str]) -> np.ndarray:
    """Group number of each text; texts that contain one another, word for word, are one group.

    Texts below CONTAINMENT_WORDS words get -1: many texts contain them, so they stay in train.
    """
    words = [text.lower().split() for text in texts]
    n = CONTAINMENT_WORDS
    starting_with = defaultdict(list)  # a contained text's first n words recur in its container
    for i, text in enumerate(words):
        if len(text) >= n:
            starting_with[tuple(text[:n])].append(i)
    edges = [(i, i) for i in range(len(words))]
    for j, text in enumerate(words):
        for start in range(len(text) - n + 1):
            for i in starting_with.get(tuple(text[start : start + n]), ()):
                if i != j and text[start : start + len(words[i])] == words[i]:
                    edges.append((i, j))
    left, right = np.array(edges).T
    groups = _components(left, right, len(words))
    groups[[len(text) < n for text in words]] = -1
    return groups


def group_rows(description: DatasetDescription, rows: Sequence[Row]) -> np.ndarray:
    """Group number of each row, as the description's `grouping` says; shape (rows,).

    ("equal", field) groups rows with equal texts, ("connected", field, field) pairs that share a
    text, ("containment", field) texts that contain one another. () makes each row a group.
    """
    if not description.grouping:
        return np.arange(len(rows))
    method, *names = description.grouping
    if description.definition is not None:
        return group_by_key(map(description.group, rows))
    fields = map(description.fields, rows)
    if method == "connected":
        return group_by_connection(tuple(texts[name] for name in names) for texts in fields)
    group = {"equal": group_by_key, "containment": group_by_containment}[method]
    return group([texts[names[0]] for texts in fields])


def carve(groups: np.ndarray, target: int, seed: int) -> np.ndarray:
    """Mask of the rows to hold out: whole groups in random order, at most `target` rows.

    A group that would exceed it stays in train, so one giant group cannot become the split.
    """
    sizes = np.bincount(groups[groups >= 0])
    chosen, total = np.zeros(len(sizes), bool), 0
    for group in np.random.default_rng(seed).permutation(len(sizes)):
        if 0 < sizes[group] <= target - total:
            chosen[group] = True
            total += sizes[group]
    return (groups >= 0) & chosen[groups]


def draw(rows: int, cap: int) -> np.ndarray:
    """Mask of `cap` rows (0: all) of so many, drawn with DATA_SEED."""
    drawn = np.ones(rows, bool)
    if cap and rows > cap:
        drawn[np.random.default_rng(DATA_SEED).permutation(rows)[cap:]] = False
    return drawn


def overlap(train: Sequence[str], held_out: Sequence[str]) -> dict[str, int]:
    """Held-out texts that occur in train: `exact`, and those that share 13 words in a row."""
    seen = {_normal(text) for text in train}
    vocabulary: dict[str, int] = {}
    train_grams = [_ngram_hashes(text, vocabulary) for text in train]
    held_grams = [_ngram_hashes(text, vocabulary) for text in held_out]
    owner = np.repeat(np.arange(len(held_grams)), [len(g) for g in held_grams])
    shared = np.isin(np.concatenate(held_grams), np.unique(np.concatenate(train_grams)))
    return {
        "exact": sum(_normal(text) in seen for text in held_out),
        "ngram": len(np.unique(owner[shared])),
        "of": len(held_out),
    }


def _ngram_hashes(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """64-bit polynomial hashes of the text's 13-grams; a chance collision is below 1e-9."""
    ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in _normal(text).split()]
    if len(ids) < NGRAM:
        return np.empty(0, np.uint64)
    values = np.array(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # spread the small numbers
    values ^= values >> np.uint64(29)
    windows = np.lib.stride_tricks.sliding_window_view(values, NGRAM)
    powers = np.cumprod(np.full(NGRAM, 0x100000001B3, np.uint64))
    return (windows * powers).sum(axis=1, dtype=np.uint64)


def _components(left: np.ndarray, right: np.ndarray, nodes: int) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(left)), (left, right)), shape=(nodes, nodes))
    return connected_components(graph, directed=False)[1]


def _normal(text: str) -> str:
    return " ".join(text.lower().split())
