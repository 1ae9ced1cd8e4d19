"""The hypotheses of a study's file: their fields, and which combinations a study can test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from config import UserError
from lora_tradeoffs.records import HELD_OUT, MATCHED, MEAN
from lora_tradeoffs.shapes import NUMBER
from lora_tradeoffs.tables.predictors import PREDICTORS

HYPOTHESIS = {
    **{"contrast": [str], "outcome": str, "test": str, "name?": str, "family?": str},
    **{"margin?": NUMBER, "primary?": bool, "seed?": int},
}
FORGOTTEN = {"forgetting": MEAN, "text lost": HELD_OUT}  # with their task in the records
BY_ITEMS = ("score", "validation loss", *FORGOTTEN)  # and tasks: outcomes that items have, too
EQUAL = tuple(f"{what} at equal {how}" for what in FORGOTTEN for how in MATCHED)
SHRUNK = tuple(f"{what} by shrinking intruders" for what in FORGOTTEN)
# Outcomes of a hypothesis beside a task's name: whether more of it is better.
OUTCOMES = {
    **dict.fromkeys((*BY_ITEMS, *EQUAL, *SHRUNK), False),
    **dict.fromkeys(("size", "rho", "intruders", "rotation", "kl_tasks", "kl_text"), False),
    "score": True,
}
# The analysis that measures an outcome or predictor; of others it is evaluate.
MEASURED_BY = {
    **dict.fromkeys((*FORGOTTEN, "kl_tasks", "kl_text", "cka_loss"), "retention"),
    **dict.fromkeys(("size", "rho", "intruders", "rotation"), "drift"),
}
FLIPS = "sign flips"
TESTS = ("difference", "superiority", "non-inferiority", "equivalence", FLIPS)


def is_of_predictors(words: Sequence[str]) -> bool:
    """Whether a contrast is of two predictors of forgetting, not of arms."""
    return len(words) == 2 and {*words} <= {*PREDICTORS}


def check_hypothesis(
    hypothesis: Mapping[str, Any],
    arms: Mapping[str, Sequence[str]],
    tasks: Collection[str],
    seeds: Collection[int],
) -> None:
    """Raise UserError for a hypothesis that the arms, by family, and seeds cannot test."""
    if problem := _problem(hypothesis, arms, tasks, seeds):
        raise UserError(f"hypotheses: {problem}")


def check_written(
    hypotheses: Sequence[Mapping[str, Any]],
    measure: Mapping[str, Mapping[str, Any]],
    families_of: Callable[[Mapping[str, Any]], Collection[str]],
) -> None:
    """Raise UserError for what should not be written down before a study that measures so: an
    outcome that is not measured, arms that no family has both, an arm against itself, a margin
    without use, a name twice."""
    names: set[str] = set()
    for number, h in enumerate(hypotheses, 1):
        name, margin, words = h.get("name", f"H{number}"), h.get("margin", 0), h["contrast"]
        if problem := _unmeasured(h, measure):
            problem = f"{h['outcome']} is not measured: it needs {problem} in measure"
        elif not families_of(h):
            problem = f"no family trains what is compared: {' and '.join(words)} in {h['outcome']}"
        elif len({*words}) < len(words):
            problem = f"contrast {words} compares {words[0]} with itself"
        elif margin < 0 or (margin and h["test"] in (TESTS[0], FLIPS)):
            allowed = "0 or more" if margin < 0 else "none"
            problem = f"margin is {margin:g}, and {h['test']} takes {allowed}"
        elif name in names:
            problem = f"two are called {name}; choose another name"
        if problem:
            raise UserError(f"hypotheses: {problem}")
        names.add(name)


def _problem(
    hypothesis: Mapping[str, Any],
    arms: Mapping[str, Sequence[str]],
    tasks: Collection[str],
    seeds: Collection[int],
) -> str:
    words, outcome, test = (hypothesis[name] for name in ("contrast", "outcome", "test"))
    planned, outcomes = {word for of in arms.values() for word in of}, [*OUTCOMES, *tasks]
    if is_of_predictors(words):
        if outcome not in FORGOTTEN or test != TESTS[0]:
            return (
                f"contrast {words} compares rank correlations: outcome must be"
                f" {' or '.join(FORGOTTEN)}, test {TESTS[0]}"
            )
    elif not {*words} <= planned or len(words) != (1 if outcome in SHRUNK else 2):
        arms_of = "one of the study's arms" if outcome in SHRUNK else "two of the study's arms"
        return f"contrast {words} must be {arms_of}"
    if hypothesis.get("family", next(iter(arms))) not in arms:
        return f"family {hypothesis['family']!r:.60} is not trained"
    if outcome not in outcomes:
        return f"outcome is {outcome!r:.60}; allowed: {', '.join(outcomes)}"
    if test not in TESTS:
        return f"test is {test!r}; allowed: {', '.join(TESTS)}"
    if test in ("non-inferiority", "equivalence") and not hypothesis.get("margin", 0) > 0:
        return f"{test} needs a margin above 0"
    is_of_seed = "seed" in hypothesis
    return _seed_problem(hypothesis, {*BY_ITEMS, *tasks}, seeds) if is_of_seed else ""


def _unmeasured(hypothesis: Mapping[str, Any], measure: Mapping[str, Mapping[str, Any]]) -> str:
    """What `measure` lacks for the hypothesis; "" if nothing."""
    outcome, words = hypothesis["outcome"], hypothesis["contrast"]
    what, _, equal = outcome.removesuffix(" by shrinking intruders").partition(" at equal ")
    for name in (what, *(words if is_of_predictors(words) else ())):
        if (stage := MEASURED_BY.get(name, "evaluate")) not in measure:
            return stage
    options = measure[MEASURED_BY.get(what, "evaluate")]
    if what not in MEASURED_BY:
        split = "validation" if what == "validation loss" else "test"
        return "" if split in (options.get("splits") or [split]) else f"evaluate.splits: {split}"
    if what == "forgetting" and options.get("tasks") == []:
        return "retention.tasks"
    if outcome in SHRUNK and "shrink_intruders" not in options:
        return "retention.shrink_intruders"
    if outcome in EQUAL:
        scaled = {equal, "benchmarks" if what == "forgetting" else "text"}
        if "scale_update" not in options:
            return "retention.scale_update"
        if missing := sorted(scaled - {*options.get("scale_measure", scaled)}):
            return f"retention.scale_measure: {missing[0]}"
    return ""


def _seed_problem(
    hypothesis: Mapping[str, Any], outcomes: Collection[str], seeds: Collection[int]
) -> str:
    """Why two runs of one seed cannot be compared so; "" if they can."""
    seed, words = hypothesis["seed"], hypothesis["contrast"]
    if seed not in seeds:
        return f"seed {seed} is not trained"
    if hypothesis["outcome"] not in outcomes or is_of_predictors(words):
        names = ", ".join(BY_ITEMS)
        return f"seed {seed} is tested over items: outcome must be {names} or a task, of two arms"
    if hypothesis["test"] != TESTS[0]:
        return f"seed {seed} is tested over items: test must be {TESTS[0]}"
    if hypothesis.get("primary", True):
        return f"seed {seed} alone shows nothing about methods: write primary: false"
    return ""


def smallest_p_values(
    hypotheses: Sequence[Mapping[str, Any]], seeds: int, primary: int
) -> list[str]:
    """A line for each test of sign flips: the smallest p-value that so many seeds allow, before
    and after the correction for the tests of `primary` hypotheses."""
    lines = []
    for number, h in enumerate(hypotheses, 1):
        if h["test"] == FLIPS and seeds:
            p, tests = 2 / 2**seeds, primary if h.get("primary", True) else 1
            corrected = f", {min(1, p * tests):.2g} after correction for {tests} tests"
            name = h.get("name", f"H{number}")
            least = f"smallest p-value of {name}, sign flips of {seeds} seeds: {p:.2g}"
            lines.append(least + corrected * (tests > 1))
    return lines
