"""The six descriptions and their printed pages."""

from string import Formatter

import pytest
from support import assert_one_line_error

from config import FAMILIES, TASKS
from dataset_descriptions import DESCRIPTIONS, concode_fields, describe, main


def test_there_is_one_description_a_task_of_its_family():
    assert tuple(DESCRIPTIONS) == TASKS
    for family, tasks in FAMILIES.items():
        assert all(describe(task).family == family for task in tasks)
        assert all(describe(t).is_classification == (family == "similar") for t in tasks)


def test_labels_are_in_the_data_sets_own_order():
    assert describe("sst2").label_names == ("negative", "positive")
    assert describe("mnli").label_names == ("entailment", "neutral", "contradiction")
    assert describe("qqp").label_names == ("not_duplicate", "duplicate")


def test_no_two_tasks_share_a_label_word():
    words = [word for d in DESCRIPTIONS.values() for word in d.label_words]
    assert len(set(words)) == len(words)


def test_an_unanswerable_question_is_answered_by_the_word_and_scored_as_empty():
    row = {"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}
    assert describe("squad_v2").completion(row) == " unanswerable"
    assert describe("squad_v2").references(row) == [""]


def test_concode_is_split_into_description_and_class():
    nl = "adds one . concode_field_sep int n concode_elem_sep long m concode_field_sep int get"
    assert concode_fields({"nl": nl}) == {
        "nl": "adds one .",
        "environment": "Fields: int n; long m\nMethods: int get",
        "class": " int n concode_elem_sep long m concode_field_sep int get",
    }


def test_braces_in_a_row_are_text():
    row = {"sentence": "a {strange} film {0}", "label": 1}
    assert describe("sst2").prompt(row) == "Review: a {strange} film {0}\nSentiment:"


@pytest.mark.parametrize("task", TASKS)
def test_the_page_names_licence_citation_and_labels(capsys, task):
    assert main([task]) == 0
    page = capsys.readouterr().out
    description = describe(task)
    for text in (description.hub_id, "licence", "cite", *description.label_words):
        assert text in page


def test_an_unknown_name_is_refused(script):
    assert_one_line_error(script("dataset_descriptions.py", "sst3"), "unknown task 'sst3'")


@pytest.mark.parametrize("task", TASKS)
def test_paraphrases_ask_the_same_of_the_same_fields(task):
    description = describe(task)
    fields = sorted(name for _, name, _, _ in Formatter().parse(description.template) if name)
    assert len({description.template, *description.paraphrases}) == 4
    for template in description.paraphrases:
        assert sorted(n for _, n, _, _ in Formatter().parse(template) if n) == fields


def test_every_metric_that_is_named_is_computed():
    from lora_tradeoffs.adaptation.metrics import score

    examples = {
        **{task: ([0, 1], [0, 1]) for task in FAMILIES["similar"]},
        **{task: (["a b"], [["a b"]]) for task in FAMILIES["dissimilar"]},
    }
    for task, (predictions, references) in examples.items():
        computed = {scores.name for scores in score(task, predictions, references)}
        assert set(describe(task).metrics) <= computed
