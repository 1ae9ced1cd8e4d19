"""Metrics and baselines: hand-worked cases, and independent implementations on real rows."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from sklearn.dummy import DummyClassifier

from config import UserError
from dataset_descriptions import DESCRIPTIONS, EvaluateMetric, describe
from lora_tradeoffs.adaptation.baselines import (
    BASELINES,
    always_abstain,
    lead,
    majority_class,
    retrieved_code,
    sentences,
)
from lora_tradeoffs.adaptation.metrics import (
    answer_scores,
    classification_scores,
    code_scores,
    correct,
    normalize_answer,
    score,
    summary_scores,
)
from lora_tradeoffs.statistics.scores import AGGREGATES, Scores


def rows_of(folder, task, count):
    lines = Path(folder, task, "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def perturbed(texts, seed, rate=0.25):
    """The texts with words dropped, doubled and replaced; every tenth is left as it is."""
    rng = np.random.default_rng(seed)
    vocabulary = [word for text in texts for word in text.split(" ")]
    changed = []
    for number, text in enumerate(texts):
        words = []
        for word in text.split(" "):
            kind = rng.random() if number % 10 else 1.0
            if kind < rate / 3:
                continue
            words.append(word if kind > 2 * rate / 3 else vocabulary[rng.integers(len(vocabulary))])
            if rate > kind > 2 * rate / 3:
                words.append(word)
        changed.append(" ".join(words))
    return changed


def values(scores):
    return {s.name: s.value for s in scores}


def test_accuracy_is_the_share_of_right_items():
    assert correct([1, 0, 2], [1, 1, 2]).tolist() == [True, False, True]
    (scores, _) = classification_scores([1, 0, 2, 2], [1, 1, 2, 0], (0, 1, 2))
    assert scores.value == 0.5
    assert scores.items.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("task", ["sst2", "qqp", "mnli"])
def test_f1_on_real_rows_is_that_of_scikit_learn(real_data, task):
    from sklearn.metrics import accuracy_score, f1_score

    labels = np.array([row["label"] for row in rows_of(real_data, task, 1000)])
    rng = np.random.default_rng(1)
    classes = 3 if task == "mnli" else 2
    wrong = rng.random(len(labels)) < 0.3
    predictions = np.where(wrong, rng.integers(classes, size=len(labels)), labels)
    found = values(score(task, predictions, labels))
    kind = {"average": "macro"} if task == "mnli" else {"pos_label": 1}
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert found["f1"] == pytest.approx(f1_score(labels, predictions, **kind))


def test_a_class_that_nobody_predicts_counts_zero_in_macro_f1():
    # class 0: tp 2, fp 1 -> 4/5; class 1: tp 1 -> 1; class 2: one miss -> 0
    (_, f1) = classification_scores([0, 0, 0, 1], [0, 0, 2, 1], (0, 1, 2))
    assert f1.value == pytest.approx((0.8 + 1 + 0) / 3)
    assert f1.items is None


def test_answers_are_normalised_as_squad_does():
    assert normalize_answer(" The  Battle-of an Owl, a\ttheatre. ") == "battleof owl theatre"


def test_an_answer_scores_by_the_best_reference():
    # "big red dog" against "red dog house": 2 words common, 2 * 2 / (3 + 3)
    scores = values(answer_scores(["the big red dog"], [["a cat", "red dog house"]]))
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["exact_match"] == 0


@pytest.mark.parametrize("words", ["", "Unanswerable.", "no answer", " the unanswerable"])
def test_words_for_no_answer_are_the_empty_string(words):
    scores = values(answer_scores([words, words], [[""], ["Rome"]]))
    assert scores["f1_no_answer"] == scores["exact_match_no_answer"] == 1
    assert scores["f1_has_answer"] == scores["exact_match_has_answer"] == 0
    assert scores["f1"] == 0.5
    assert scores["abstained"] == 1


@pytest.mark.parametrize("words", ["Unanswerable", "no answer"])
def test_words_for_no_answer_that_are_a_reference_are_an_answer(words):
    scores = values(answer_scores([words, "", "Rome"], [[words]] * 3))
    assert scores["f1"] == scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["abstained"] == pytest.approx(1 / 3)


def test_an_answer_to_an_unanswerable_question_scores_nothing():
    scores = values(answer_scores(["Rome", "Rome"], [[""], ["in Rome"]]))
    assert scores["f1_no_answer"] == 0
    assert scores["f1_has_answer"] == pytest.approx(2 / 3)
    assert scores["abstained"] == 0


def test_answerable_and_unanswerable_items_are_counted_apart():
    scores = {s.name: s for s in answer_scores(["x", "", "y"], [["x"], [""], ["z"]])}
    assert scores["f1_has_answer"].count == 2
    assert np.array_equal(scores["f1_has_answer"].items, [1, np.nan, 0], equal_nan=True)
    assert scores["f1_no_answer"].count == 1


def test_a_question_is_answerable_by_its_answers_as_they_are_written():
    # the official script counts it as answerable, though "The" is nothing after normalisation
    scores = {s.name: s for s in answer_scores(["", "x"], [["The"], ["The", "an x"]])}
    assert scores["f1_has_answer"].items.tolist() == [1, 1]
    assert scores["f1_no_answer"].count == 0


def test_squad_scores_on_real_rows_are_those_of_torchmetrics(real_data):
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    rows = rows_of(real_data, "squad_v2", 400)
    references = [row["answers"]["text"] or [""] for row in rows]
    predictions = perturbed([texts[-1] for texts in references], seed=2)
    predictions[::7] = [""] * len(predictions[::7])
    predictions[3::11] = ["The Norman kings"] * len(predictions[3::11])
    theirs = squad(
        [{"id": str(i), "prediction_text": text} for i, text in enumerate(predictions)],
        [
            {"id": str(i), "answers": {"text": texts, "answer_start": [0] * len(texts)}}
            for i, texts in enumerate(references)
        ],
    )
    ours = values(score("squad_v2", predictions, references))
    assert 0.2 < ours["exact_match"] < ours["f1"] < 0.95
    assert 100 * ours["f1"] == pytest.approx(theirs["f1"].item(), abs=1e-3)
    assert 100 * ours["exact_match"] == pytest.approx(theirs["exact_match"].item(), abs=1e-3)


def test_codexglue_bleu_of_a_hand_worked_case():
    # a b c d e against a b c d f g: matches 4 3 2 1 of 5 4 3 2, one added to each, 5 against 6 long
    found = values(code_scores(["a b c d e"], ["a b  c d f g"]))["codexglue_bleu"]
    precisions = (5 / 6) * (4 / 5) * (3 / 4) * (2 / 3)
    assert found == pytest.approx(100 * math.exp(1 - 6 / 5) * precisions**0.25)


def test_codexglue_bleu_adds_over_items_before_it_divides():
    # matches 2 1 0 0 and 0 0 0 0, possible 2 1 0 0 and 1 0 0 0, 3 against 3 long
    found = values(code_scores(["a b", "c"], ["a b", "d"]))["codexglue_bleu"]
    assert found == pytest.approx(100 * ((3 / 4) * (2 / 2) * 1 * 1) ** 0.25)


def test_codexglue_bleu_on_real_rows_is_nltks_with_one_added(real_data):
    bleu_score = pytest.importorskip("nltk.translate.bleu_score")
    references = [row["code"] for row in rows_of(real_data, "codexglue", 300)]
    changed = zip(references, perturbed(references, seed=3))
    # nltk counts one possible match for texts that are too short for an order
    pairs = [(r.split(), c.split()) for r, c in changed if len(c.split()) >= 4]
    added = lambda p_n, **_: [(p.numerator + 1) / (p.denominator + 1) for p in p_n]  # noqa: E731
    theirs = bleu_score.corpus_bleu(
        [[r] for r, _ in pairs], [c for _, c in pairs], smoothing_function=added
    )
    ours = values(code_scores([" ".join(c) for _, c in pairs], [" ".join(r) for r, _ in pairs]))
    assert 20 < ours["codexglue_bleu"] < 90
    assert ours["codexglue_bleu"] == pytest.approx(100 * theirs)


def test_sacrebleu_on_real_rows_is_that_of_sacrebleu(real_data):
    import sacrebleu

    references = [row["code"] for row in rows_of(real_data, "codexglue", 300)]
    predictions = [text.replace(" ", "", 3) for text in perturbed(references, seed=4)]
    ours = values(score("codexglue", predictions, [[text] for text in references]))
    assert 20 < ours["sacrebleu"] < 90
    assert ours["sacrebleu"] == pytest.approx(
        sacrebleu.corpus_bleu(predictions, [references]).score
    )


@pytest.mark.parametrize(
    "prediction",
    ["a b c x d e f", "a x b y c z d", "a b", "x y z w", "", "a b c d e f g h", "int f(a, b) { }"],
)
def test_sacrebleu_smooths_and_penalises_as_sacrebleu(prediction):
    import sacrebleu

    reference = "a b c d e f int f(a, b) {}"
    found = values(code_scores([prediction], [reference]))["sacrebleu"]
    expected = sacrebleu.corpus_bleu([prediction], [[reference]]).score
    assert found == pytest.approx(expected, abs=1e-9)


def test_equal_code_scores_full_marks_whatever_its_whitespace():
    found = values(code_scores(["int f ( )\n{ return  1 ; }"], ["int f ( ) { return 1 ; }"]))
    assert found == pytest.approx({"codexglue_bleu": 100, "sacrebleu": 100, "exact_match": 1})


def test_code_without_a_token_scores_nothing():
    assert set(values(code_scores(["", " "], ["a b", "c"])).values()) == {0}


def test_rouge_of_a_hand_worked_case():
    # stemmed: dog run fast todai against todai the dog run; words 3 of 4 in both, pairs of words
    # (dog run) 1 of 3 in both, longest common subsequence (dog run) 2 of 4 in both
    found = values(summary_scores(["dogs runs fast today"], ["today the dog run"]))
    assert found["rouge1"] == pytest.approx(3 / 4)
    assert found["rouge2"] == pytest.approx(1 / 3)
    assert found["rougeL"] == pytest.approx(2 / 4)


def test_only_rouge_lsum_reads_lines_as_sentences():
    # as one line the longest subsequence is one sentence of two; line by line both are found
    ours, theirs = "one two three\nfour five six", "four five six\none two three"
    found = values(summary_scores([ours], [theirs]))
    assert found["rougeL"] == pytest.approx(0.5)
    assert found["rougeLsum"] == pytest.approx(1)
    flat = values(summary_scores([ours.replace("\n", " ")], [theirs.replace("\n", " ")]))
    assert flat["rougeLsum"] == pytest.approx(0.5)


def test_rouge_on_real_rows_is_that_of_torchmetrics(real_data):
    rouge = pytest.importorskip("torchmetrics.functional.text.rouge").rouge_score
    rows = rows_of(real_data, "cnn_dailymail", 60)
    references = [row["highlights"] for row in rows]
    predictions = perturbed(references, seed=5)
    kinds = ("rouge1", "rouge2", "rougeL")
    theirs = rouge(predictions, references, use_stemmer=True, rouge_keys=kinds)
    ours = values(summary_scores(predictions, references))
    for kind in kinds:
        assert 0.2 < ours[kind] < 0.99
        assert ours[kind] == pytest.approx(theirs[f"{kind}_fmeasure"].item(), abs=1e-5)


def test_as_many_predictions_as_references_are_asked_for():
    for task, prediction, reference in (
        ("sst2", 1, 1),
        ("squad_v2", "a", ["a"]),
        ("codexglue", "a", ["a"]),
        ("cnn_dailymail", "a", ["a"]),
    ):
        with pytest.raises(ValueError, match="predictions for"):
            score(task, [prediction], [reference] * 2)


def test_code_and_summaries_have_exactly_one_reference():
    with pytest.raises(ValueError):
        score("codexglue", ["a"], [["a", "b"]])


SAMPLES = {
    "sst2": ([1, 0, 1, 1], [1, 1, 0, 1]),
    "mnli": ([1, 0, 2, 2], [1, 1, 2, 0]),
    "squad_v2": (["red dog", "", "x"], [["a dog"], [""], [""]]),
    "codexglue": (["a b c d e", "f ;"], [["a b c x e"], ["f ( ) ;"]]),
    "cnn_dailymail": (["a red dog\nruns"], [["the red dogs run .\nFast ."]]),
}


@pytest.mark.parametrize("task", SAMPLES)
def test_scores_come_back_from_their_rows_and_the_name_of_their_aggregate(task):
    for s in score(task, *SAMPLES[task]):
        rows = json.loads(json.dumps(s.statistics.tolist()))
        back = Scores(s.name, np.array(rows), AGGREGATES[s.aggregate.__name__])
        assert back.value == s.value
        assert 0 < s.value <= 100 or s.name in ("exact_match", "exact_match_has_answer")


SCRIPT = """
import datasets
import evaluate


class SharedPrefix(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        same = [p[:2] == r[:2] for p, r in zip(predictions, references)]
        return {"prefix": 100 * sum(same) / len(same)}
"""


@pytest.fixture
def shared_prefix(tmp_path, monkeypatch):
    """Gives the summaries a metric script of their own, on a scale."""

    def describe_with(scale):
        script = tmp_path / "shared_prefix.py"
        script.write_text(SCRIPT)
        extra = (EvaluateMetric(str(script), "prefix", scale),)
        changed = replace(DESCRIPTIONS["cnn_dailymail"], extra_metrics=extra)
        monkeypatch.setitem(DESCRIPTIONS, "cnn_dailymail", changed)

    return describe_with


def test_a_metric_script_is_computed_by_evaluate_for_each_item_without_the_hub(shared_prefix):
    shared_prefix(scale=100)
    scores = score("cnn_dailymail", ["a red", "my dog", "it"], [["a dog"], ["a dog"], ["it is"]])
    assert [s.name for s in scores][-1] == "shared_prefix"
    assert scores[-1].items.tolist() == [1, 0, 1] and scores[-1].value == pytest.approx(2 / 3)


def test_a_metric_beyond_its_scale_is_refused(shared_prefix):
    shared_prefix(scale=1)
    with pytest.raises(UserError, match="gives 100, outside 0 to 1; set its scale"):
        score("cnn_dailymail", ["a red"], [["a dog"]])


def test_a_metric_that_cannot_be_loaded_is_one_line(shared_prefix, tmp_path):
    shared_prefix(scale=100)
    (tmp_path / "shared_prefix.py").write_text("import evaluate\nraise OSError('broken\\nscript')")
    with pytest.raises(UserError) as error:
        score("cnn_dailymail", ["a red"], [["a dog"]])
    assert "cnn_dailymail: metric " in str(error.value) and "\n" not in str(error.value)


def test_the_majority_class_has_its_share_as_accuracy():
    labels = [0, 1, 1, 0, 1]
    found = values(score("sst2", majority_class([1, 1, 0], 5), labels))
    assert found == pytest.approx({"accuracy": 0.6, "f1": 2 * 3 / (2 * 3 + 2)})
    assert majority_class([2, 0, 2, 0], 3) == [0, 0, 0]
    # it knows the labels of training alone, as scikit-learn's
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((3, 1)), [0, 0, 1])
    rows = Dataset.from_dict({"label": labels})
    train = Dataset.from_dict({"label": [0, 0, 1]})
    found = BASELINES["majority_class"](describe("sst2"), rows, lambda: train)
    assert found == dummy.predict(np.zeros((5, 1))).tolist()


def test_a_negative_majority_has_no_binary_f1():
    assert describe("qqp").positive_class == 1
    assert values(score("qqp", majority_class([0, 0, 1], 3), [0, 0, 1]))["f1"] == 0


def test_abstaining_always_scores_the_share_of_unanswerable_questions(real_data):
    rows = rows_of(real_data, "squad_v2", 1000)
    references = [row["answers"]["text"] or [""] for row in rows]
    share = sum(not row["answers"]["text"] for row in rows) / len(rows)
    found = values(answer_scores(always_abstain(len(rows)), references))
    assert found["f1"] == found["exact_match"] == pytest.approx(share)
    assert found["f1_has_answer"] == 0


def test_sentences_end_where_a_reader_ends_them():
    text = (
        'Mr. J. Smith left the U.S. on Jan. 5 for $1.5 million. "Why?" he asked. (He knew.)'
        " At 9 a.m. Eastern time it rained!\nA new line. 'Done.' The end"
    )
    assert sentences(text) == [
        "Mr. J. Smith left the U.S. on Jan. 5 for $1.5 million.",
        '"Why?" he asked.',
        "(He knew.)",
        "At 9 a.m. Eastern time it rained!",
        "A new line.",
        "'Done.'",
        "The end",
    ]


def test_lead_is_the_first_sentences_a_line_each():
    assert lead("One. Two is two. Three! Four.") == "One.\nTwo is two.\nThree!"
    assert lead("Only one") == "Only one"


def test_lead_beats_the_end_of_real_articles(real_data):
    rows = rows_of(real_data, "cnn_dailymail", 60)
    references = [row["highlights"] for row in rows]
    first = summary_scores([lead(row["article"]) for row in rows], references, ("rougeLsum",))
    last = ["\n".join(sentences(row["article"])[-3:]) for row in rows]
    end = summary_scores(last, references, ("rougeLsum",))
    assert first[0].value > end[0].value + 0.05


def test_retrieved_code_is_that_of_the_nearest_description():
    train = ["set the name .", "get the name .", "close the connection"]
    found = retrieved_code(["Get a name", "connection to be closed"], train, ["s", "g", "c"])
    assert found == ["g", "c"]
    assert retrieved_code(["get it"] * 250 + ["close"], train, "sgc") == ["g"] * 250 + ["c"]
