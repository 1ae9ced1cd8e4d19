"""The sample benchmarks are well-formed, balanced, and not solved by the choices' lengths."""

from __future__ import annotations

import re
from collections import Counter
from itertools import chain, combinations

import pytest

from config import ROOT, TASKS
from lora_tradeoffs.data.sources import read_jsonl
from lora_tradeoffs.data.splits import overlap

SAMPLE = ROOT / "data" / "sample"
FILES = {
    "hellaswag": "validation.jsonl",
    "arc_challenge": "test.jsonl",
    "winogrande": "validation.jsonl",
    "prose": "test.jsonl",
}
CHOICE_BENCHMARKS = ("hellaswag", "arc_challenge", "winogrande")
ITEMS = 48
SCHEMAS = {
    "hellaswag": {
        **dict.fromkeys(("activity_label", "ctx_a", "ctx_b", "ctx"), str),
        **dict.fromkeys(("split", "split_type", "label", "source_id"), str),
        "ind": int,
        "endings": list,
    },
    "arc_challenge": {"id": str, "question": str, "choices": dict, "answerKey": str},
    "winogrande": dict.fromkeys(("sentence", "option1", "option2", "answer"), str),
    "prose": {"page": str},
}


@pytest.fixture(params=FILES)
def name(request):
    return request.param


@pytest.fixture(params=CHOICE_BENCHMARKS)
def benchmark(request):
    return request.param


def rows_of(name):
    return read_jsonl(SAMPLE / name / FILES[name])


def context(name, row):
    """What is asked, the same for all choices: no two rows may share it."""
    return row[{"hellaswag": "ctx", "arc_challenge": "question", "winogrande": "sentence"}[name]]


def choices(name, row):
    if name == "hellaswag":
        return row["endings"]
    if name == "arc_challenge":
        return row["choices"]["text"]
    return [row["option1"], row["option2"]]


def gold(name, row):
    """The right choice's number, from 0; ValueError where it is none of the choices."""
    if name == "hellaswag":
        return ["0", "1", "2", "3"].index(row["label"])
    if name == "arc_challenge":
        return row["choices"]["label"].index(row["answerKey"])
    return ["1", "2"].index(row["answer"])


def words(text):
    return re.findall(r"\w+", text.lower())


def expected_hits(lengths_and_golds, rank):
    """Expected right answers of picking the choice of a length rank, ties broken at random."""
    hits = 0.0
    for lengths, right in lengths_and_golds:
        wanted = sorted(lengths, reverse=True)[rank]
        hits += (lengths[right] == wanted) / lengths.count(wanted)
    return hits


def assert_near_chance(hits, of, choice_count):
    """Within two standard errors of a binomial count."""
    chance = 1 / choice_count
    assert abs(hits - of * chance) <= 2 * (of * chance * (1 - chance)) ** 0.5


def test_rows_have_the_original_schema(name):
    for row in rows_of(name):
        assert {key: type(value) for key, value in row.items()} == SCHEMAS[name]
        texts = [row[key] for key in row if SCHEMAS[name][key] is str and key != "ctx_b"]
        assert all(text.strip() for text in texts)


def test_every_benchmark_has_48_items(benchmark):
    assert len(rows_of(benchmark)) == ITEMS


def test_gold_is_among_distinct_choices(benchmark):
    count = 2 if benchmark == "winogrande" else 4
    for row in rows_of(benchmark):
        offered = choices(benchmark, row)
        assert len({" ".join(words(text)) for text in offered}) == len(offered) == count
        assert all(text == text.strip() != "" for text in offered)
        assert 0 <= gold(benchmark, row) < count


def test_gold_positions_are_balanced(benchmark):
    rows = rows_of(benchmark)
    counts = Counter(gold(benchmark, row) for row in rows)
    assert set(counts.values()) == {ITEMS // len(choices(benchmark, rows[0]))}


@pytest.mark.parametrize("size", [len, lambda text: len(text.split())], ids=["chars", "words"])
def test_no_length_rank_of_the_choices_solves_it(benchmark, size):
    rows = rows_of(benchmark)
    count = len(choices(benchmark, rows[0]))
    sized = [([size(c) for c in choices(benchmark, row)], gold(benchmark, row)) for row in rows]
    for rank in range(count):  # 0 is the longest; the two in the middle share the median
        assert_near_chance(expected_hits(sized, rank), ITEMS, count)


def test_neither_kind_of_hellaswag_item_is_solved_by_length():
    rows = rows_of("hellaswag")
    for kind in (
        [row for row in rows if row["ctx_b"]],
        [row for row in rows if row["ctx"].startswith("[header]")],
    ):
        assert len(kind) >= ITEMS // 3
        sized = [([len(ending) for ending in row["endings"]], int(row["label"])) for row in kind]
        for rank in range(4):
            assert_near_chance(expected_hits(sized, rank), len(kind), 4)


@pytest.mark.parametrize("benchmark", ["hellaswag", "arc_challenge"], indirect=True)
@pytest.mark.parametrize("sign", [1, -1], ids=["most", "least"])
def test_words_shared_with_the_context_do_not_solve_it(benchmark, sign):
    rows = rows_of(benchmark)
    shared = []
    for row in rows:
        asked = set(words(context(benchmark, row)))
        shares = [
            sign * sum(word in asked for word in words(choice)) / len(words(choice))
            for choice in choices(benchmark, row)
        ]
        shared.append((shares, gold(benchmark, row)))
    assert_near_chance(expected_hits(shared, 0), ITEMS, 4)


def test_no_context_occurs_twice(name):
    keys = [row["page"] if name == "prose" else context(name, row) for row in rows_of(name)]
    assert len({" ".join(words(key)) for key in keys}) == len(keys)


def test_hellaswag_context_is_its_two_parts():
    for number, row in enumerate(rows_of("hellaswag")):
        assert row["ctx"] == f"{row['ctx_a']} {row['ctx_b']}".strip()
        assert row["ind"] == number and row["split"] == "val"
        assert bool(row["ctx_b"]) != row["ctx"].startswith("[header]")


def test_arc_choices_are_lettered():
    rows = rows_of("arc_challenge")
    assert all(row["choices"]["label"] == ["A", "B", "C", "D"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_winogrande_sentences_have_one_blank_with_text_after_it():
    for row in rows_of("winogrande"):
        assert re.search(r" _ \w", row["sentence"]) and row["sentence"].count("_") == 1
        first = row["sentence"].partition("_")[0].lower()
        assert row["option1"].lower() in first and row["option2"].lower() in first


def test_winogrande_rows_are_twins_with_opposite_answers():
    rows = rows_of("winogrande")
    for one, other in zip(rows[::2], rows[1::2], strict=True):
        assert choices("winogrande", one) == choices("winogrande", other)
        assert {one["answer"], other["answer"]} == {"1", "2"}
        starts = [row["sentence"].partition("_")[0] for row in (one, other)]
        assert starts[0] == starts[1]


def test_prose_is_18_to_24_kilobytes_of_short_documents():
    pages = [row["page"].encode() for row in rows_of("prose")]
    assert 18_000 <= sum(map(len, pages)) <= 24_000
    assert all(1_000 <= len(page) <= 1_600 for page in pages)


def test_no_two_documents_of_prose_share_eight_words_in_a_row():
    def grams(text):
        return {tuple(words(text)[i : i + 8]) for i in range(len(words(text)) - 7)}

    pages = [grams(row["page"]) for row in rows_of("prose")]
    assert not any(a & b for a, b in combinations(pages, 2))


def test_no_row_shares_13_words_in_a_row_with_the_training_rows(name):
    def texts(value):
        if isinstance(value, str):
            return [value]
        values = value.values() if isinstance(value, dict) else value
        return chain.from_iterable(map(texts, values)) if isinstance(value, dict | list) else []

    train = chain.from_iterable(read_jsonl(SAMPLE / task / "train.jsonl") for task in TASKS)
    found = overlap(
        [" ".join(words(text)) for row in train for text in texts(row)],
        [" ".join(words(" ".join(texts(row)))) for row in rows_of(name)],
    )
    assert found["exact"] == found["ngram"] == 0
