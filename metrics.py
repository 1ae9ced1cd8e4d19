"""Metrics of adaptation: per-item statistics first, figures as aggregates of them.

Every metric is a `Scores`: one row of sufficient statistics an item and a function from their sums
to the figure. So any weighting of the items has its figure in one product, and one bootstrap
(comparisons.py) serves accuracy and corpus BLEU alike. BLEU is in [0, 100], all else in [0, 1].
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ABSTENTIONS = ("", "unanswerable", "no answer")  # as they are after normalisation
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
ORDERS = 4  # of BLEU's n-grams
# The classes whose F1 is averaged: one, the positive, or all. GLUE's label numbers.
F1_CLASSES = {"sst2": (1,), "qqp": (1,), "mnli": (0, 1, 2)}


@dataclass(frozen=True, eq=False)
class Scores:
    """A metric of a list of items.

    `statistics` has shape (items, k); `aggregate` maps sums of shape (..., k) to figures of shape
    (...), and stands in AGGREGATES, so that a file needs to hold its name and the rows alone.
    """

    name: str
    statistics: np.ndarray
    aggregate: Callable[[np.ndarray], np.ndarray]

    @property
    def value(self) -> float:
        """The figure over all items; nan for none."""
        return float(self.aggregate(self.statistics.sum(axis=0)))

    @property
    def items(self) -> np.ndarray | None:
        """Values of shape (items,), nan where an item does not count.

        None for a metric of the corpus alone, and for groups of items (comparisons.grouped).
        """
        if self.aggregate is not mean or (self.statistics[:, 1] > 1).any():
            return None
        totals, counts = self.statistics.T
        return np.where(counts == 1, totals, np.nan)

    @property
    def count(self) -> int:
        """How many items the figure is over."""
        counted = self.aggregate is mean
        return int(self.statistics[:, 1].sum()) if counted else len(self.statistics)


def mean(sums: np.ndarray) -> np.ndarray:
    """Mean from (total, count), shape (..., 2); nan where nothing counts."""
    total, count = np.moveaxis(np.asarray(sums, dtype=float), -1, 0)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean F1 from (tp, fp, fn) per class, shape (..., 3 * classes); 0 for a class without any."""
    counts = np.asarray(sums, dtype=float).reshape(*np.shape(sums)[:-1], -1, 3)
    hits, false_positives, misses = np.moveaxis(counts, -1, 0)
    whole = 2 * hits + false_positives + misses
    return np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0).mean(axis=-1)


def smoothed_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU with one added to every order's matches and possible matches, in [0, 100].

    `sums`, shape (..., 10): length, reference length, matches and possible matches of four orders.
    Lin and Och 2004 (ORANGE, COLING) as in CodeXGLUE's evaluator, which is TensorFlow NMT's
    compute_bleu(smooth=True): there the first order is smoothed too. Without a token it is 0.
    """
    penalty, matches, possible = _bleu_parts(sums)
    return 100 * penalty * np.exp(np.log((matches + 1) / (possible + 1)).mean(axis=-1))


def mteval_bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU as sacreBLEU's defaults compute it, in [0, 100]; `sums` as for smoothed_bleu.

    Papineni et al. 2002 with the "exp" smoothing of mteval-v13a (Chen and Cherry 2014, method 3):
    the k-th order without a match counts 1/2^k matches. 0 without any match, or where no text is
    long enough for an order.
    """
    penalty, matches, possible = _bleu_parts(sums)
    empty = matches == 0
    matches = np.where(empty, 0.5 ** np.cumsum(empty, axis=-1), matches)
    defined = (possible > 0).all(axis=-1) & ~empty.all(axis=-1)
    logs = np.log(matches / np.maximum(possible, 1)).mean(axis=-1)
    return np.where(defined, 100 * penalty * np.exp(logs), 0.0)


def _bleu_parts(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sums = np.asarray(sums, dtype=float)
    length, reference = sums[..., 0], sums[..., 1]
    penalty = np.exp(np.minimum(0, 1 - reference / np.maximum(length, 1)))
    return np.where(length > 0, penalty, 0.0), sums[..., 2 : 2 + ORDERS], sums[..., 2 + ORDERS :]


AGGREGATES = {f.__name__: f for f in (mean, macro_f1, smoothed_bleu, mteval_bleu)}


def mean_scores(name: str, values: Sequence[float], kept: np.ndarray | None = None) -> Scores:
    """Scores whose figure is the mean of values in [0, 1], over the items of the mask or all."""
    values = np.asarray(values, dtype=float)
    kept = np.ones(len(values)) if kept is None else np.asarray(kept, dtype=float)
    return Scores(name, np.stack([values * kept, kept], axis=1), mean)


def correct(predictions: Sequence[int], labels: Sequence[int]) -> np.ndarray:
    """Per-item correctness, shape (items,), bool. Raises ValueError if the lengths differ."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape:
        raise ValueError(f"{predictions.shape} predictions for {labels.shape} labels")
    return predictions == labels


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """Share of the items that are right, in [0, 1]; nan for none."""
    hits = correct(predictions, labels)
    return float(hits.mean()) if len(hits) else float("nan")


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
    #3212 scores them 0). `abstained` is the share of predictions that give no answer.
    """
    _same_length(predictions, references)
    answers = [normalize_answer(text) for text in predictions]
    answers = ["" if text in ABSTENTIONS else text for text in answers]
    golds = [[g for g in map(normalize_answer, texts) if g] or [""] for texts in references]
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
    ours, theirs = answer.split(), gold.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def code_scores(predictions: Sequence[str], references: Sequence[str]) -> list[Scores]:
    """CodeXGLUE's BLEU, sacreBLEU's corpus BLEU and exact match of code, one reference an item.

    `codexglue_bleu` takes tokens as whitespace parts them, as CodeXGLUE's text-to-code evaluator
    does (Lu et al. 2021, arXiv:2102.04664); `sacrebleu` takes those of mteval-v13a (Post 2018).
    The two are not comparable. Exact match ignores the amount of whitespace.
    """
    from sacrebleu.metrics import BLEU

    _same_length(predictions, references)
    tokenize = BLEU(tokenize="13a").tokenizer
    ours, theirs = ([text.split() for text in texts] for texts in (predictions, references))
    split = [[tokenize(text.rstrip()).split() for text in t] for t in (predictions, references)]
    return [
        Scores("codexglue_bleu", bleu_statistics(ours, theirs), smoothed_bleu),
        Scores("sacrebleu", bleu_statistics(*split), mteval_bleu),
        mean_scores("exact_match", [a == b for a, b in zip(ours, theirs)]),
    ]


def bleu_statistics(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> np.ndarray:
    """Length, reference length, matches and possible matches of four orders, shape (items, 10)."""
    rows = np.zeros((len(predictions), 2 + 2 * ORDERS))
    for row, ours, theirs in zip(rows, predictions, references):
        row[:2] = len(ours), len(theirs)
        for n in range(1, ORDERS + 1):
            common = _ngrams(ours, n) & _ngrams(theirs, n)
            row[1 + n] = sum(common.values())
            row[1 + ORDERS + n] = max(len(ours) - n + 1, 0)
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
    found = [scorer.score(theirs, ours) for ours, theirs in zip(predictions, references)]
    return [mean_scores(kind, [scores[kind].fmeasure for scores in found]) for kind in kinds]


def score(task: str, predictions: Sequence, references: Sequence) -> list[Scores]:
    """All metrics of a task.

    `references` are labels for a classification task, else lists of texts
    (DatasetDescription.references). Raises ValueError where the lengths differ or code or a
    summary has not exactly one reference; KeyError for an unknown task.
    """
    if task in F1_CLASSES:
        return classification_scores(predictions, references, F1_CLASSES[task])
    if task == "squad_v2":
        return answer_scores(predictions, references)
    scorer = {"codexglue": code_scores, "cnn_dailymail": summary_scores}[task]
    return scorer(predictions, [text for (text,) in references])


def _same_length(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")


def evaluate_metric(task: str, **options: Any) -> Any:
    """The task's metrics as an `evaluate.Metric`, which needs no Hub (evaluate.load does).

    `options` go to evaluate.Metric, such as cache_dir; compute() returns {metric: figure}.
    """
    import evaluate  # takes five seconds
    from datasets import Features, Value

    labels = task in F1_CLASSES
    prediction = Value("int64" if labels else "string")
    features = {"predictions": prediction, "references": prediction if labels else [prediction]}

    class TaskMetric(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=f"metrics.score({task!r})", citation="", features=Features(features)
            )

        def _compute(self, predictions, references):
            return {s.name: s.value for s in score(task, predictions, references)}

    return TaskMetric(**{"keep_in_memory": True, **options})
