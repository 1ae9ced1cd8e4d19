"""From raw rows to tokens: what is cut, what is refused, what is kept."""

import json
import math
import re
import shutil
import tracemalloc
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, assert_one_line_error, ends_or_refuses, settings_for

import data_preprocessing
from config import FAMILIES, TASKS, UserError
from dataset_descriptions import DESCRIPTIONS, describe
from lora_tradeoffs.data import preparation
from lora_tradeoffs.data.encoding import bos_ids, choice_ids, encode
from lora_tradeoffs.data.preparation import prepare
from lora_tradeoffs.data.sources import read_folder, read_jsonl
from lora_tradeoffs.task_yaml import describe_fields

SAMPLE = ROOT / "data" / "sample"


def first_row(task, split="train"):
    return read_jsonl(SAMPLE / task / f"{split}.jsonl", limit=1)[0]


@pytest.fixture(params=["tokenizer", "llama3_tokenizer", "blank_first_tokenizer"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_bos_once_prompt_completion_and_eos(any_tokenizer, task):
    tokenizer = any_tokenizer
    row = encode(tokenizer, describe(task), first_row(task), 512)
    ids, start = row["input_ids"], row["prompt_length"]
    bos = bos_ids(tokenizer)
    assert bos == ([] if tokenizer.eos_token == "<|im_end|>" else [tokenizer.bos_token_id])
    assert ids.count(tokenizer.bos_token_id) == len(bos)
    assert ids[: len(bos)] == bos
    assert ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1
    assert tokenizer.decode(ids[len(bos) : start]) == row["prompt"]
    assert tokenizer.decode(ids[len(bos) : -1]) == row["prompt"] + row["completion"]


@pytest.mark.parametrize("task", FAMILIES["similar"])
def test_every_label_word_is_one_token_of_its_own(any_tokenizer, task):
    ids = choice_ids(any_tokenizer, describe(task))
    assert len({token for (token,) in ids}) == len(describe(task).label_words)


def test_prompt_and_completion_tokenise_apart_as_they_do_together(any_tokenizer):
    for task in TASKS:
        row = encode(any_tokenizer, describe(task), first_row(task), 512)
        together = any_tokenizer(
            row["prompt"] + row["completion"], add_special_tokens=False
        ).input_ids
        assert bos_ids(any_tokenizer) + together == row["input_ids"][:-1]


def test_special_tokens_in_a_text_stay_text(tokenizer):
    row = {"sentence": "bad <|im_end|> film", "label": 0}
    ids = encode(tokenizer, describe("sst2"), row, 256)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "Review: bad <|im_end|> film\nSentiment: negative"


@pytest.mark.parametrize("task", FAMILIES["dissimilar"])
@pytest.mark.parametrize("max_length", [256, 270, 281])
def test_truncation_cuts_the_end_of_the_passage_only(tokenizer, task, max_length):
    description, row = describe(task), first_row(task)
    row |= {k: row[k] * 3 for k in ("context", "article") if k in row}
    if task == "codexglue":
        row["nl"] += " concode_elem_sep void anotherMethod" * 40
    head, passage, tail = description.prompt_parts(row)
    short = encode(tokenizer, description, row, max_length)
    assert short["cut"] > 0 and short["problem"] in ("", "its answer was cut off")
    answer = description.max_new_tokens
    assert max_length - 12 < short["prompt_length"] + answer <= max_length >= short["length"]
    assert short["prompt"].startswith(head) and short["prompt"].endswith(tail)
    kept = short["prompt"][len(head) : len(short["prompt"]) - len(tail)]
    assert passage.startswith(kept) and passage[len(kept)].isspace()  # ends with a whole word
    assert short["completion"] == description.completion(row)
    ids = short["input_ids"]
    assert tokenizer.decode(ids[short["prompt_length"] : -1]) == short["completion"]
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_truncated_prompt_does_not_depend_on_the_reference(tokenizer, tmp_path, split):
    """Every article with short and with long highlights, in every split."""
    articles = [f"{word} " * 400 for word in ("one", "two", "three")]
    highlights = ["Yes.", "It rained all day. " * 20]
    rows = [{"article": a, "highlights": h} for a in articles for h in highlights]
    others = [{"article": name, "highlights": "x"} for name in "ab"]
    names = [split, *({"train", "validation", "test"} - {split})]
    write_rows(tmp_path, "cnn_dailymail", dict(zip(names, (rows, others[:1], others[1:]))))
    settings = settings_for(data=str(tmp_path), study=f"leak-{split}")
    task = prepare(settings, tokenizer, ["cnn_dailymail"], 256, 50)["cnn_dailymail"]
    prepared = task.split(split)
    starts = zip(prepared["input_ids"], prepared["prompt_length"], strict=True)
    prompts = [ids[:length] for ids, length in starts]
    assert len(prompts) == 6 and prompts[::2] == prompts[1::2]
    assert task.report["splits"][split]["truncated"] == 6
    assert max(prepared["length"]) <= 256


def test_prompt_and_reference_lengths_of_truncated_rows_are_unrelated(tokenizer, real_data):
    description = describe("cnn_dailymail")
    rows = read_folder(Path(real_data), description, 300)["test"]
    encoded = [encode(tokenizer, description, row, 512) for row in rows]
    cut = [(e["prompt_length"], e["length"] - e["prompt_length"]) for e in encoded if e["cut"]]
    prompts, completions = np.array(cut).T
    assert len(cut) > 100 and completions.std() > 10
    # the most that a whole last word takes
    assert prompts.max() - prompts.min() < 12 and prompts.max() == 512 - description.max_new_tokens
    assert abs(np.corrcoef(prompts, completions)[0, 1]) < 3 / len(cut) ** 0.5


def test_an_answer_that_is_too_long_is_dropped_from_train_alone(tokenizer, tmp_path):
    lengths = {"a": 5, "b": 500, "c": 9}
    rows = [{"article": f"{a} " * 300, "highlights": "w " * n} for a, n in lengths.items()]
    others = [{"article": f"d{i} " * 300, "highlights": "w " * 500} for i in range(2)]
    write_rows(tmp_path, "cnn_dailymail", dict(train=rows, validation=others[:1], test=others[1:]))
    settings = settings_for(data=str(tmp_path), study="long")
    task = prepare(settings, tokenizer, ["cnn_dailymail"], 256, 50)["cnn_dailymail"]
    splits = task.report["splits"]
    assert [splits[s]["rows"] for s in ("train", "validation", "test")] == [2, 1, 1]
    assert splits["train"]["dropped"] == {"its answer does not fit": 1}


def test_only_the_last_of_thousands_of_rows_has_a_problem(tokenizer, tmp_path):
    rows = sentences(*(f"{n}" for n in range(3_200)), "too long " * 100)
    write_rows(tmp_path, "sst2", {**GOOD, "train": rows})
    settings = settings_for(data=str(tmp_path), study="late")
    task = prepare(settings, tokenizer, ["sst2"], 64, 5_000)["sst2"]
    assert task.report["splits"]["train"]["rows"] == 3_200
    assert sum(task.report["splits"]["train"]["dropped"].values()) == 1


def test_rows_of_the_hub_may_hold_what_json_cannot(tokenizer, monkeypatch):
    """Of dates, decimals and bytes a task file's template writes what Jinja writes of them."""
    values = {"day": date(2024, 7, 26), "price": Decimal("1.50"), "raw": b"x", "score": math.nan}
    rows = [{"text": f"text {n}", "label": n % 2, **values} for n in range(30)]
    splits = {"train": rows[:20], "validation": rows[20:25], "test": rows[25:]}
    monkeypatch.setattr(preparation, "read_hub", lambda *_: (splits, {"revision": None}))
    monkeypatch.setattr(preparation, "benchmark_texts", lambda _: {})
    fields = {"dataset_path": "some/one", "training_split": "train", "test_split": "test"}
    fields |= {"doc_to_text": "{{day.year}} {{day}} {{price}} {{raw}} {{score}}: {{text}}"}
    fields |= {"doc_to_target": "label", "doc_to_choice": ["a", "b"]}
    task = describe_fields("dated", fields, lambda field, reason: UserError(f"{field} {reason}"))
    prepared = prepare(settings_for(data="hub", study="dated"), tokenizer, [task], 64, 100)["dated"]
    prompts = prepared.split("test")["prompt"][:]
    assert prompts == [task.prompt(row) for row in rows[25:]]
    assert prompts[0] == "2024 2024-07-26 1.50 b'x' nan: text 25"


def test_an_answer_that_truncation_took_is_told(tokenizer):
    row = {
        "id": "x",
        "title": "t",
        "context": "word " * 300 + "Paris is the answer.",
        "question": "Which city?",
        "answers": {"text": ["Paris"], "answer_start": [1500]},
    }
    assert encode(tokenizer, describe("squad_v2"), row, 128)["problem"] == "its answer was cut off"
    assert encode(tokenizer, describe("squad_v2"), row, 512)["problem"] == ""


def test_a_row_that_cannot_fit_is_told(tokenizer):
    row = {"sentence": "very " * 400, "label": 1}
    assert "does not fit" in encode(tokenizer, describe("sst2"), row, 256)["problem"]


def test_prepared_data_are_found_again_and_made_anew_after_a_change(tokenizer, monkeypatch):
    settings = settings_for(study="prepared")
    first = prepare(settings, tokenizer, ["sst2"], 256, 50)["sst2"]
    stamp = (first.folder / "report.json").stat().st_mtime_ns
    again = prepare(settings, tokenizer, ["sst2"], 256, 50)["sst2"]
    assert again.folder == first.folder
    assert (again.folder / "report.json").stat().st_mtime_ns == stamp
    assert prepare(settings, tokenizer, ["sst2"], 128, 50)["sst2"].folder != first.folder
    assert prepare(settings, tokenizer, ["sst2"], 256, 40)["sst2"].folder != first.folder
    changed = {**vars(DESCRIPTIONS["sst2"]), "template": "{sentence}\nIt was"}
    monkeypatch.setitem(DESCRIPTIONS, "sst2", type(DESCRIPTIONS["sst2"])(**changed))
    assert prepare(settings, tokenizer, ["sst2"], 256, 50)["sst2"].folder != first.folder


def test_caps_and_limits_are_kept_and_reported(tokenizer):
    settings = settings_for(study="prepared")
    capped = prepare(settings, tokenizer, ["qqp"], 256, 50)["qqp"]
    assert len(capped.split("train")) == 50 and len(capped.split("validation")) == 32
    assert capped.report["splits"]["train"]["rows"] == 50
    limited = prepare(settings, tokenizer, ["qqp"], 256, 50, limit=7)["qqp"]
    train = limited.split("train")
    rows = read_folder(SAMPLE, describe("qqp"))["train"][:7]
    assert [describe("qqp").prompt(row) for row in rows] == train["prompt"][:]


def test_report_agrees_with_the_rows(tokenizer):
    task = prepare(settings_for(study="prepared"), tokenizer, ["mnli"], 256, 100)["mnli"]
    for split, report in task.report["splits"].items():
        rows = task.split(split)
        completions = [n - p for n, p in zip(rows["length"], rows["prompt_length"])]
        assert report["supervised_tokens"] == sum(completions) == 2 * len(rows)
        assert report["labels"]["neutral"] == sum(label == 1 for label in rows["label"])
        assert report["prompt_tokens"]["max"] == max(rows["prompt_length"])


def test_the_script_prints_a_table(script, smollm2):
    process = script("data_preprocessing.py", "sst2", "squad_v2", "--study", "table")
    assert process.returncode == 0, process.stderr
    table = [line.split() for line in process.stdout.splitlines()]
    assert ["sst2", "train", "96"] in [words[:3] for words in table]
    assert "13 words" in process.stdout or "none with validation, test" in process.stdout


def write_rows(folder, task, splits):
    for split, rows in splits.items():
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))


def sentences(*texts, label=0):
    return [{"sentence": text, "label": label} for text in texts]


GOOD = {"train": sentences("a", "b"), "validation": sentences("c"), "test": sentences("d")}
BAD = {
    "not JSON": ({"train": [*GOOD["train"], '{"sentence": \n']}, "train.jsonl:3: not JSON"),
    "not an object": ({"train": ["[1]\n"]}, "train.jsonl:1: not a JSON object"),
    "a missing field": ({"test": [{"label": 0}]}, "test.jsonl:1: field 'sentence' is missing"),
    "a label of -1": ({"test": sentences("e", label=-1)}, "test.jsonl:1: label -1 is outside"),
    "a label of 2": ({"train": sentences("e", label=2)}, "train.jsonl:1: label 2 is outside"),
    "a label as text": ({"train": sentences("e", label="1")}, "train.jsonl:1: field 'label' holds"),
    "an empty field": ({"train": sentences("x", " ")}, "train.jsonl:2: field 'sentence' is empty"),
    "an empty split": ({"validation": []}, "validation.jsonl is empty"),
    "a lone surrogate": (
        {"train": ['{"sentence": "a \\ud83d film", "label": 1}\n']},
        "train.jsonl:1: not UTF-8 text (surrogates not allowed)",
    ),
    "deep nesting": (
        {"test": ['{"sentence": "a", "label": 1, "x": ' + "[" * 9_999 + "]" * 9_999 + "}\n"]},
        "test.jsonl:1: nested too deeply",
    ),
    "nesting that only parsing survives": (
        {"test": ['{"sentence": "a", "label": 1, "x": ' + "[" * 800 + "]" * 800 + "}\n"]},
        "test.jsonl:1: nested too deeply",
    ),
    "a long number": ({"train": ['{"label": ' + "9" * 5_000 + "}\n"]}, "train.jsonl:1: not JSON"),
    "a row in two splits": ({"test": sentences("d", "b")}, "test.jsonl:2: the same row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_by_file_and_line(tmp_path, case):
    change, expected = BAD[case]
    write_rows(tmp_path, "sst2", GOOD | change)
    with pytest.raises(UserError) as error:
        read_folder(tmp_path, describe("sst2"))
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_text_that_is_not_utf8_is_named_by_its_line(tmp_path):
    write_rows(tmp_path, "sst2", GOOD)
    (tmp_path / "sst2" / "test.jsonl").write_bytes(b'{"sentence": "a\xe9", "label": 1}\n')
    with pytest.raises(UserError, match=r"test.jsonl:1: not UTF-8 text"):
        read_folder(tmp_path, describe("sst2"))


@pytest.mark.parametrize(
    "answers, message",
    [
        ({"text": ["nowhere"], "answer_start": [3]}, "answer_start 3 does not point at 'nowhere'"),
        ({"text": ["a"], "answer_start": ["24"]}, "answer_start is '24', not a whole number"),
        ({"text": ["a"], "answer_start": [24.0]}, "answer_start is 24.0, not a whole number"),
        ({"text": ["a"], "answer_start": [None]}, "answer_start is None, not a whole number"),
        ({"text": ["a"], "answer_start": [True]}, "answer_start is True, not a whole number"),
        ({"text": ["."], "answer_start": [-1]}, "answer_start is -1, not a whole number"),
        ({"text": [7], "answer_start": [0]}, "needs texts that are not empty, not 7"),
        ({"text": "a", "answer_start": [0]}, "needs two lists of one length"),
        ({"text": ["a"]}, "needs two lists of one length"),
        (["a"], "field 'answers' holds ['a'], not dict"),
    ],
)
def test_an_answer_that_cannot_be_is_named_by_file_and_line(tmp_path, answers, message):
    rows = [first_row("squad_v2"), first_row("squad_v2") | {"answers": answers}]
    write_rows(tmp_path, "squad_v2", dict.fromkeys(("train", "validation", "test"), rows))
    with pytest.raises(UserError, match=re.escape("validation.jsonl:2: ") + ".*") as error:
        read_folder(tmp_path, describe("squad_v2"))
    assert message in str(error.value)


def test_train_rows_are_drawn_while_they_are_read(tmp_path):
    """The rows are those that a draw from all of them gives; the others are never held."""
    rows = sentences(*(f"{i} {'long ' * 200}" for i in range(5_000)))
    write_rows(tmp_path, "sst2", GOOD | {"train": rows})
    chosen = np.sort(np.random.default_rng(42).permutation(5_000)[:50])
    tracemalloc.start()
    train = read_folder(tmp_path, describe("sst2"), cap=50)["train"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert train == [rows[i] for i in chosen]
    assert peak < 1e6 < 5_000 * len(rows[0]["sentence"])
    chosen = np.sort(np.random.default_rng(42).permutation(99)[:50])
    limited = read_folder(tmp_path, describe("sst2"), limit=99, cap=50)["train"]
    assert limited == [rows[i] for i in chosen]
    assert read_folder(tmp_path, describe("sst2"))["train"] == rows


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
ANY_TEXT = st.text(st.characters(exclude_categories=()))  # lone surrogates too


@st.composite
def broken_lines(draw):
    """A task, and a line of its data: a good row with some fields changed, or any bytes."""
    task = draw(st.sampled_from(TASKS))
    row = ROWS[task]
    answers = st.fixed_dictionaries(
        {"text": st.lists(JSON | st.just("1889")), "answer_start": st.lists(JSON | st.just(24))}
    )
    fields = st.sampled_from([*row, "extra"])
    changed = row | draw(st.dictionaries(fields, JSON | ANY_TEXT | answers, max_size=3))
    for field in draw(st.lists(fields, max_size=1)):
        changed.pop(field, None)
    line = json.dumps(changed).encode()
    at = draw(st.integers(0, len(line)))
    cut = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return task, draw(st.sampled_from([line, line, cut]))


ROWS = {task: first_row(task) for task in TASKS}


@pytest.mark.fuzz
@given(broken_lines())
def test_any_line_is_read_or_named(tmp_path_factory, tokenizer, example):
    from datasets import Dataset

    task, line = example
    folder = tmp_path_factory.mktemp("fuzz")
    write_rows(folder, task, {split: [first_row(task, split)] for split in ("validation", "test")})
    path = folder / task / "train.jsonl"
    path.write_bytes(line)
    with ends_or_refuses() as lines:
        (row,) = read_folder(folder, describe(task))["train"]
        Dataset.from_list([encode(tokenizer, describe(task), row, 256)])
    if lines:
        assert "train.jsonl" in lines[0]
    assert sorted(p.name for p in folder.rglob("*")) == sorted([task, *SPLIT_FILES])
    shutil.rmtree(folder)


SPLIT_FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")


def test_bad_data_leave_nothing_half_written(tmp_path, tokenizer):
    write_rows(tmp_path, "sst2", GOOD | {"test": sentences("d", label=7)})
    settings = settings_for(data=str(tmp_path), study="broken")
    with pytest.raises(UserError):
        prepare(settings, tokenizer, ["sst2"], 256, 50)
    left = [p.name for p in settings.prepared_dir.rglob("*")]
    assert sorted(left) in ([".lock", "sst2"], ["sst2"])


def test_the_script_refuses_in_one_line(inside, tmp_path, smollm2):
    def run(*command):
        return inside(data_preprocessing.main, *command)

    assert_one_line_error(run("sst3"), "unknown task 'sst3'", "sst2")
    assert_one_line_error(run("--data", tmp_path / "none"), "not a folder", "--data")
    assert_one_line_error(run("sst2", "--data", tmp_path), "sst2/train.jsonl cannot be read")
    assert_one_line_error(run("--study", "../up"), "study is '../up'")


def test_label_words_of_the_same_tokens_are_refused_and_longer_ones_are_not(tokenizer):
    changed = {**vars(describe("sst2")), "label_words": ("unanswerable", "positive")}
    first, second = choice_ids(tokenizer, type(describe("sst2"))(**changed))
    assert len(first) > 1 == len(second)
    changed["label_words"] = ("positive", "positive")
    with pytest.raises(UserError, match="cannot tell the choices 'positive' and 'positive' apart"):
        choice_ids(tokenizer, type(describe("sst2"))(**changed))


@pytest.mark.slow
def test_lengths_of_real_rows_leave_little_to_cut(real_data, tokenizer):
    settings = settings_for(data=real_data, study="real")
    task = prepare(settings, tokenizer, ["squad_v2"], 1024, 2_000)["squad_v2"]
    report = task.report["splits"]["train"]
    assert report["rows"] == 2_000 and report["truncated"] == 0
    assert task.report["overlap"]["hellaswag"] == {"exact": 0, "ngram": 0, "of": 1000}
    shutil.rmtree(task.folder)


def test_fingerprint_counts_the_code_version(tokenizer, monkeypatch):
    settings = settings_for(study="prepared")
    before = prepare(settings, tokenizer, ["sst2"], 256, 50)["sst2"].fingerprint
    monkeypatch.setattr(preparation, "FORMAT", preparation.FORMAT + 1)
    assert prepare(settings, tokenizer, ["sst2"], 256, 50)["sst2"].fingerprint != before
