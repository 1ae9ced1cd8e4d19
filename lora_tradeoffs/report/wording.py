"""What a finding is, and its sentences: one for each way in which a test can come out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from lora_tradeoffs.records import ABOVE_CHANCE, HELD_OUT, MEAN, metric_scale
from lora_tradeoffs.statistics.comparisons import LEVEL, MIN_SEEDS
from lora_tradeoffs.statistics.seed_intervals import SEEDS
from lora_tradeoffs.tables.predictors import OUTCOMES, PREDICTORS

CONFIRMATORY, EXPLORATORY = "confirmatory", "exploratory"
MISSING, NOTE = "missing", "note"
INTERVAL = f"{100 * LEVEL:.0f} % interval"
HIGHER, LOWER, SAME = "higher", "lower", "not distinguishable"
ADAPTS = "Does LoRA learn the tasks better or worse than full fine-tuning?"
FORGETS = "Does LoRA forget less than full fine-tuning?"
MATCHED = "Does LoRA forget less where both score the same on validation?"
FORGOTTEN = {  # what each outcome of forgetting is over; {} stands for the benchmarks at chance
    MEAN: "(mean over the benchmarks)",
    ABOVE_CHANCE: "(mean over the benchmarks without {}, where the base is at chance)",
    HELD_OUT: "on held-out text (nats a token)",
}
SHRUNK = "Does shrinking intruder dimensions undo forgetting, and what does it cost?"
EQUAL_SCORES = "where both score the same on validation"
RANK = "Does the rank matter?"
TRANSFER = "Do the tasks help or disturb each other?"
GOES_WITH = {
    "forgetting": "What goes with forgetting?",
    "gain": "What goes with learning the tasks?",
}
DEMO = (
    "No findings: this is the demo, an instruct model in 4 bits on sample data, which is no"
    " evidence for or against any method. They need the study (PRESET=study)."
)
ALL_RUNS = (
    "All runs were made with {} (unless an arm's name says otherwise), which the names leave out."
)
FULL_TUNING, FULL_TESTED = "full fine-tuning", "full fine-tuning (last checkpoint, test)"


@dataclass(frozen=True)
class Finding:
    """The answer of a test to a question. `kind`: confirmatory, exploratory, missing (no
    test), or note (what a reader of the tests has to know).

    `effect`, with its 95 % interval, is in the metric's unit (BLEU in [0, 100]), of predictors a
    rank correlation; `verdict` is higher, lower, "not distinguishable", or empty without a test.
    """

    kind: str
    question: str
    sentence: str
    family: str = ""
    arm: str = ""
    about: str = ""
    effect: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    corrected: float = math.nan
    detectable: float = math.nan
    seeds: int = 0
    over: str = ""
    verdict: str = ""


class SentenceTemplates(NamedTuple):
    """Sentences for a difference above zero, below zero, and for one that is not distinguishable.

    {} stands for the size of the difference, in `same` with its sign.
    """

    higher: str
    lower: str
    same: str
    digits: int = 3
    what: str = "differences"
    caveat: str = ""  # a sentence that follows all three

    @classmethod
    def scores(cls, arm: str, task: str, metric: str) -> SentenceTemplates:
        where = f"full fine-tuning on {task} (test {metric})"
        return cls(
            f"{arm} scores {{}} higher than {where}",
            f"{arm} scores {{}} lower than {where}",
            f"{arm} and full fine-tuning are not distinguishable on {task} (test {metric}):"
            " difference {}",
            digits_of(metric),
        )

    @classmethod
    def forgets(cls, arm: str, where: str) -> SentenceTemplates:
        return cls(
            f"{arm} forgets {{}} more than full fine-tuning {where}",
            f"{arm} forgets {{}} less than full fine-tuning {where}",
            f"{arm} and full fine-tuning are not distinguishable in what they forget {where}:"
            " difference {}",
        )

    @classmethod
    def shrinks(cls, arm: str, factor: float, where: str = "") -> SentenceTemplates:
        """Of forgetting `where`, or without it of the score on the trained tasks."""
        what = f"{arm} with its intruder dimensions multiplied by {factor:g}"
        than = "than with as many other directions"
        if where:
            higher, lower = (f"forgets {{}} {word} {than} {where}" for word in ("more", "less"))
        else:
            where = "on the trained tasks (validation)"
            higher, lower = (f"scores {{}} {word} {than} {where}" for word in ("lower", "higher"))
        return cls(
            f"{what} {higher}",
            f"{what} {lower}",
            f"{what} and with as many other directions are not distinguishable {where}: {{}} more"
            " is lost",
        )

    @classmethod
    def rank(cls, arm: str, about: str, defaults: Sequence[Any] = ()) -> SentenceTemplates:
        """`defaults` are the arms whose learning rate was not searched."""
        caveat = ""
        if defaults:
            caveat = f"No learning rate was searched for {', '.join(map(str, defaults))}: the trend"
            caveat += " mixes the rank with how well the default rate suits each rank."
        whose = {
            "score": "the mean test score",
            "forgetting": "the mean forgetting",
            "text lost": "the loss on held-out text (nats a token)",
        }[about]
        return cls(
            f"with each doubling of {arm}'s rank {whose} rises by {{}}",
            f"with each doubling of {arm}'s rank {whose} falls by {{}}",
            f"no trend of {whose} over {arm}'s rank is distinguishable: {{}} a doubling",
            digits=4,
            what="slopes",
            caveat=caveat,
        )

    @classmethod
    def transfer(cls, arm: str, task: str, metric: str) -> SentenceTemplates:
        return cls(
            f"{arm} scores {{}} higher on {task} ({metric}) when trained on the whole family than"
            " on the task alone",
            f"{arm} scores {{}} lower on {task} ({metric}) when trained on the whole family than on"
            " the task alone",
            f"{arm} trained on the whole family and on {task} alone are not distinguishable there"
            f" ({metric}): difference {{}}",
            digits_of(metric),
        )


def digits_of(metric: str) -> int:
    """Digits after the point: one on a scale of 0 to 100, three on 0 to 1."""
    return 1 if metric_scale(metric) == 100 else 3


def of_a_difference(tested: Any, corrected: float, tests: int) -> tuple[str, str]:
    """The sentence for a tested difference, and its verdict.

    Distinguishable is what has a corrected p-value below 5 %.
    """
    c, sentences, digits = tested.result.comparison, tested.sentences, tested.sentences.digits
    alone = f"{p_text(c.p_value)} alone, " if tests > 1 else ""
    seeds = f"{len(tested.result.seeds)} seeds"
    seeds += f", {tested.result.freedom} degrees of freedom" if tested.result.freedom else ""
    evidence = [f"{alone}{p_text(corrected)}{after(tests)}", seeds]
    if math.isfinite(c.low):
        over = "seeds, on these items" if tested.result.over == SEEDS else tested.result.over
        reach = f"{c.low:.{digits}f} to {c.high:.{digits}f}"
        evidence.insert(0, f"{INTERVAL} of the difference {reach} over {over}")
    numbers = ", ".join(evidence)
    power = "" if math.isnan(c.detectable) else f"{sentences.what} below {c.detectable:.{digits}f}"
    power += " could have been missed" if power else "what could have been missed is unknown"
    caveat = f" {sentences.caveat}" if sentences.caveat else ""
    if corrected < 1 - LEVEL:
        is_higher = c.difference > 0
        template, verdict = (sentences.higher, HIGHER) if is_higher else (sentences.lower, LOWER)
        text = template.format(f"{abs(c.difference):.{digits}f}")
        return f"{tested.family}: {text} ({numbers}; {power}).{caveat}", verdict
    text = sentences.same.format(f"{c.difference:+.{digits}f}")
    return f"{tested.family}: {text} ({numbers}); {power}.{caveat}", SAME


def smallest_differences(contrasts: Sequence[Any], tests: int) -> str:
    """What the tests of a question can find, the largest of its arms; "" if none was made."""
    known = [t for t in contrasts if math.isfinite(t.result.comparison.detectable)]
    if not known:
        return ""
    largest: dict[tuple[str, str], str] = {}
    for (family, about), tests_of in groupby(known, key=lambda t: (t.family, t.about)):
        widest = max(tests_of, key=lambda t: t.result.comparison.detectable)
        number = f"{widest.result.comparison.detectable:.{widest.sentences.digits}f}"
        largest[family, about] = f"{about} {number}"
    parts = [
        f"{family}: {', '.join(text for key, text in largest.items() if key[0] == family)}"
        for family in dict.fromkeys(family for family, _ in largest)
    ]
    freedom = sorted({t.result.freedom for t in known})
    error = "the error is pooled over the arms"
    if any(t.result.freedom < len(t.result.seeds) for t in known):
        error = "too few arms, or the check of equal variances kept their errors apart"
    return (
        f"Smallest detectable differences (80 % power{after(tests)}): {'; '.join(parts)}"
        f" ({' or '.join(map(str, freedom))} degrees of freedom: {error})."
    )


def p_text(p: float) -> str:
    """p as text, never 0."""
    return "p < .001" if p < 0.001 else f"p = {p:.3f}"


def after(tests: int) -> str:
    return f" after Holm over {tests} tests" if tests > 1 else ""


def few_seeds(family: str, few: Mapping[Any, int], nothing: bool, other: str = FULL_TUNING) -> str:
    """Why arms could not be compared; `few` holds the seeds that each shares with the other."""
    counts: dict[int, list[str]] = {}
    for arm, seeds in few.items():
        counts.setdefault(seeds, []).append(str(arm))
    sentence = "; ".join(
        f"{', '.join(arms)} and {other} share {seeds or 'no'} seed{'s' * (seeds != 1)}"
        for seeds, arms in sorted(counts.items())
    )
    claim = "nothing can be claimed about methods" if nothing else "not tested"
    return f"{family}: {claim}: {sentence}, and at least {MIN_SEEDS} are needed."


def other_items(tested: Any) -> str:
    """Why a contrast with enough seeds could not be tested."""
    return (
        f"{tested.family}: {tested.arm}, {tested.about}: not tested: its runs, or those it is"
        " compared with, were measured on different numbers of items (another --limit)."
    )


def association(across: Any, within: Any, tests: int) -> tuple[str, str]:
    """The sentence for a predictor's correlation across runs, with the one within runs, and its
    verdict."""
    name, outcome = PREDICTORS[across.predictor], OUTCOMES[across.outcome]
    head = f"{across.family}: across {across.arms} arms ({across.runs} runs)"
    size = correlation(across)
    if math.isnan(across.corrected):
        text, verdict = f"{name} and {outcome} have a {size} ({across.reason})", ""
    elif across.corrected < 1 - LEVEL:
        verdict = HIGHER if across.rho > 0 else LOWER
        more = "more" if across.rho > 0 else "less"
        text = f"more {name} goes with {more} {outcome}: {size}"
        text += f", {p_text(across.corrected)}{after(tests)}"
    else:
        verdict = SAME
        text = f"{name} and {outcome} are not distinguishable from unrelated: {size}"
        text += f", {p_text(across.corrected)}{after(tests)}; correlations below"
        text += f" {across.detectable:.2f} could have been missed"
    inside = f"; within runs, the step partialled out: {correlation(within)}"
    if math.isnan(within.rho):
        inside = f"; within runs nothing can be said: {within.reason}"
    return f"{head} {text}{inside}.", verdict


def correlation(row: Any) -> str:
    """A correlation and its interval over arms, as text."""
    if math.isnan(row.low):
        return f"rank correlation of {row.rho:.2f}"
    return f"rank correlation of {row.rho:.2f} ({INTERVAL} {row.low:.2f} to {row.high:.2f})"
