"""Metrics of adaptation: per-item statistics first, figures as aggregates of them.

Every metric is a `Scores` (statistics/scores.py). BLEU is in [0, 100], all else in [0, 1].
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from config import ROOT, UserError
from dataset_descriptions import DatasetDescription, EvaluateMetric, describe
from lora_tradeoffs.command_line import reason_of
from lora_tradeoffs.statistics.scores import (
    ORDERS,
    Scores,
    macro_f1,
    mean_scores,
    mteval_bleu,
    smoothed_bleu,
)
from lora_tradeoffs.task_yaml import TEXT_METRICS, text_metrics

ABSTENTIONS = ("", "unanswerable", "no answer")  # as they are after normalisation
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def correct(predictions: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Per-item correctness, shape (items,), bool. Raises ValueError if the lengths differ."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"{predictions.shape} predictions for {labels.shape} labels")
    return predictions == labels


def classification_scores(
    predictions: Sequence[int], labels: Sequence[int], classes: Sequence[int]
) -> list[Scores]:
    """Accuracy, and F1 averaged over `classes`: (1,) is binary F1 with 1 as the positive class.

    A class without a prediction and without a label counts 0, as with scikit-learn's
    f1_score(labels=classes, average="macro", zero_division=0).
    """
    hits = correct(predictions, labels)
    predicted = np.asarray(predictions)[:, None] == np.asarray(classes)
    actual = np.asarray(labels)[:, None] == np.asarray(classes)
    counts = np.stack([predicted & actual, predicted & ~actual, ~predicted & actual], axis=-1)
    statistics = counts.reshape(len(hits), 3 * len(classes)).astype(float)
    return [mean_scores("accuracy", hits), Scores("f1", statistics, macro_f1)]


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles, single spaces."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[Scores]:
    """SQuAD v2's F1 and exact match, over all, answerable and unanswerable questions.

    Rajpurkar et al. 2018 (evaluate-v2.0.py): the best of the references; an unanswerable question
    has the empty string as its only one. The words for it count as the empty string, too (lm-eval
    #3212 scores them 0), unless they are a reference. `abstained` is the share of predictions that
    give no answer.
    """
    _same_length(predictions, references)
    golds = [[g for g in map(normalize_answer, texts) if g] or [""] for texts in references]
    answers = [normalize_answer(text) for text in predictions]
    answers = [
        "" if text in ABSTENTIONS and text not in gold else text
        for text, gold in zip(answers, golds)
    ]
    has_answer = np.array([any(texts) for texts in references], dtype=bool)
    values = {
        "f1": [max(_overlap_f1(text, g) for g in gold) for text, gold in zip(answers, golds)],
        "exact_match": [text in gold for text, gold in zip(answers, golds)],
    }
    scores = []
    for name, per_item in values.items():
        scores.append(mean_scores(name, per_item))
        scores.append(mean_scores(f"{name}_has_answer", per_item, has_answer))
        scores.append(mean_scores(f"{name}_no_answer", per_item, ~has_answer))
    return [*scores, mean_scores("abstained", [text == "" for text in answers])]


def _overlap_f1(answer: str, gold: str) -> float:
    """F1 of two normalised texts as bags of words."""
    words, gold_words = answer.split(), gold.split()
    if not words or not gold_words:
        return float(words == gold_words)
    common = sum((Counter(words) & Counter(gold_words)).values())
    return 2 * common / (len(words) + len(gold_words))


def code_scores(predictions: Sequence[str], references: Sequence[str]) -> list[Scores]:
    """CodeXGLUE's BLEU, sacreBLEU's corpus BLEU and exact match of code, one reference an item.

    `codexglue_bleu` takes tokens as whitespace parts them, as CodeXGLUE's text-to-code evaluator
    does (Lu et al. 2021, arXiv:2102.04664); `sacrebleu` takes those of mteval-v13a (Post 2018).
    The two are not comparable. Exact match ignores the amount of whitespace.
    """
    from sacrebleu.metrics import BLEU

    _same_length(predictions, references)
    tokenize = BLEU(tokenize="13a").tokenizer
    texts = predictions, references
    by_space = [[text.split() for text in side] for side in texts]
    tokens = [[tokenize(text.rstrip()).split() for text in side] for side in texts]
    return [
        Scores("codexglue_bleu", bleu_statistics(*by_space), smoothed_bleu),
        Scores("sacrebleu", bleu_statistics(*tokens), mteval_bleu),
        mean_scores("exact_match", [a == b for a, b in zip(*by_space)]),
    ]


def bleu_statistics(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """Length, reference length, matches and possible matches of four orders, shape (items, 10)."""
    rows = np.zeros((len(predictions), 2 + 2 * ORDERS))
    for row, prediction, reference in zip(rows, predictions, references):
        row[:2] = len(prediction), len(reference)
        for n in range(1, ORDERS + 1):
            common = _ngrams(prediction, n) & _ngrams(reference, n)
            row[1 + n] = sum(common.values())
            row[1 + ORDERS + n] = max(len(prediction) - n + 1, 0)
    return rows


def _ngrams(tokens: Sequence[str], n: int) -> Counter:
    return Counter(zip(*(tokens[start:] for start in range(n))))


def summary_scores(
    predictions: Sequence[str], references: Sequence[str], kinds: Sequence[str] = ROUGE
) -> list[Scores]:
    """ROUGE's F-measures, one reference an item: rouge_score with use_stemmer=True, Porter's.

    Lin 2004. rougeLsum takes lines as sentences, which is what CNN/DailyMail papers report as
    ROUGE-L; rougeL ignores them.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _same_length(predictions, references)
    scorer = RougeScorer(list(kinds), use_stemmer=True)
    items = [scorer.score(*pair) for pair in zip(references, predictions)]
    return [mean_scores(kind, [item[kind].fmeasure for item in items]) for kind in kinds]


def text_scores(
    description: DatasetDescription, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> list[Scores]:
    """A task file's metrics of generated text, each after its filters; lm-eval's own, or ours."""
    from lora_tradeoffs.scoring.lm_eval_text import filtered, metric_values

    scores = []
    for metric in text_metrics(description.definition):
        texts, name = filtered(metric.filters, predictions), metric.metric
        if name not in TEXT_METRICS:
            values = metric_values(name, metric.arguments, texts, references)
            scores.append(mean_scores(metric.name, values))
            continue
        if name == "f1":
            ours = answer_scores(texts, references)
        elif any(len(golds) != 1 for golds in references):
            raise UserError(f"{description.name}: {name} takes one reference an item")
        else:
            scorer = summary_scores if name in ROUGE else code_scores
            ours = scorer(texts, [text for (text,) in references])
        scores += [replace(s, name=metric.name) for s in ours if s.name == name]
    return scores


def score(task: str, predictions: Sequence, references: Sequence) -> list[Scores]:
    """All metrics of a task, as its description's `kind` and `extra_metrics` say.

    `references` are labels for a classification task, else lists of texts
    (DatasetDescription.references). Raises ValueError where the lengths differ or code or a
    summary has not exactly one reference; UserError for an unknown task.
    """
    description = describe(task)
    if description.kind == "choice":
        scores = [mean_scores("accuracy", correct(predictions, references))]
    elif description.is_classification:
        positive = description.positive_class
        classes = range(len(description.label_words)) if positive is None else (positive,)
        scores = classification_scores(predictions, references, tuple(classes))
    elif description.kind == "answers":
        scores = answer_scores(predictions, references)
    elif description.kind == "text":
        scores = text_scores(description, predictions, references)
    else:
        scorer = {"code": code_scores, "summary": summary_scores}[description.kind]
        scores = scorer(predictions, [text for (text,) in references])
    extra = description.extra_metrics
    return scores + [evaluate_scores(task, m, predictions, references) for m in extra]


def evaluate_scores(
    task: str, metric: EvaluateMetric, predictions: Sequence, references: Sequence
) -> Scores:
    """A metric that the library `evaluate` loads, of each item by itself; its mean is the figure.

    A path is relative to the project's folder; another name is fetched from the Hub. An item's only
    reference is given as a text, several as a list. Raises UserError for a metric that cannot be
    loaded or computed, and for a value outside 0 and `scale`.
    """
    import evaluate  # takes five seconds

    script = ROOT / metric.path
    try:
        module = evaluate.load(str(script if script.exists() else metric.path), keep_in_memory=True)
        values = []
        for prediction, reference in zip(predictions, references, strict=True):
            if isinstance(reference, list) and len(reference) == 1:
                reference = reference[0]
            result = module.compute(predictions=[prediction], references=[reference])
            values.append(float(result[metric.key]) / metric.scale)
    except Exception as error:  # a script may raise anything
        failed = f"{task}: metric {metric.path} of `evaluate` failed: {reason_of(error)}"
        raise UserError(failed) from error
    outside = [value for value in values if not 0 <= value <= 1]
    if outside:
        raise UserError(
            f"{task}: metric {metric.path} gives {outside[0] * metric.scale:g}, outside 0 to"
            f" {metric.scale:g}; set its scale in dataset_descriptions.py"
        )
    return mean_scores(Path(metric.path).stem, values)


def _same_length(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
