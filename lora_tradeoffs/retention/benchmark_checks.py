"""What is checked of a benchmark before a model is asked: its rows, its requests, its packages.

lm-eval scores a row whose gold answer is not among its choices 0, and renders a missing field as
"None", without a word: here both are errors with file and line.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

from config import UserError
from dataset_descriptions import Row
from lora_tradeoffs.command_line import is_out_of_memory, reason_of

# generation_kwargs with which the greedy answer is the answer
GREEDY_OPTIONS = {
    *("until", "do_sample", "temperature", "top_p", "top_k"),
    *("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"),
}
TRIAL_ANSWER = "Yes. No."


def schema_problem(rows: list[Row]) -> tuple[int, str] | None:
    """The first line whose fields are not those of the others, and how; None if there is none."""
    kinds: dict[str, tuple[str, int]] = {}  # a field's kind, and the line that has it
    for line, row in enumerate(rows, 1):
        for field, value in row.items():
            if value is not None:
                kinds.setdefault(field, (_kind(value), line))
    for line, row in enumerate(rows, 1):
        for field, (kind, first) in kinds.items():
            if row.get(field) is None:
                return line, f"field {field!r} is missing (line {first} has it)"
            if _kind(row[field]) != kind:
                return line, f"field {field!r} is {_kind(row[field])}, in line {first} {kind}"
    return None


def _kind(value: Any) -> str:
    kinds = {str: "a text", bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def first_problem(task: Any, docs: Iterable[Row]) -> str | None:
    """What is wrong with the first bad document; None if there is none."""
    try:
        return next(filter(None, (doc_problem(task, doc) for doc in docs)), None)
    except Exception as error:
        return cause_of(error)


def cause_of(error: Exception) -> str:
    """Why the definition cannot be applied; what is not of it is raised: too little memory, a
    package or NLTK's data that are missing.
    """
    if is_out_of_memory(error) or isinstance(error, ImportError) or type(error) is LookupError:
        raise error
    cause = error.__cause__ or error
    what = next(iter(str(cause).splitlines()), "")[:160]
    return (
        f"the definition cannot be applied to it ({type(cause).__name__}: {what}); are all its"
        " fields there, and the gold answer among its choices?"
    )


def doc_problem(task: Any, doc: Row) -> str | None:
    """Why lm-eval could not score the document, or would score it 0 in silence; else None."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return None if str(task.doc_to_target(doc)).strip() else "its text is empty"
    if task.OUTPUT_TYPE == "generate_until":
        _score_trial(task, doc)
        return None if str(task.doc_to_text(doc)).strip() else "its question is empty"
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(doc)
    if len(choices) < 2:
        return f"it has {len(choices)} choice, so there is nothing to choose"
    if empty := [k for k, choice in enumerate(choices, 1) if not str(choice).strip()]:
        return f"choice {empty[0]} is empty"
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str) and gold == task.config.doc_to_target and gold not in choices:
        return f"field {gold!r}, the gold answer, is missing"
    for answer in (gold or [""]) if isinstance(gold, list) else [gold]:
        known = answer in choices if isinstance(answer, str) else 0 <= answer < len(choices)
        if not known:
            return f"the gold answer {answer!r} is not among the {len(choices)} choices"
    return None


def _score_trial(task: Any, doc: Row) -> None:
    """Score an answer to the document, before a model takes minutes for its own; raises if that
    cannot be done.
    """
    from lm_eval.api.instance import Instance

    trial = Instance("generate_until", doc, ("", {}), 0, resps=[TRIAL_ANSWER])
    for answer_filter in task._filters:
        answer_filter.apply([trial])
        task.process_results(doc, [trial.filtered_resps[answer_filter.name]])


@contextlib.contextmanager
def packages_of(name: str) -> Iterator[None]:
    """Raise UserError for a package, or NLTK's data, that a benchmark's own code lacks."""
    try:
        yield
    except ImportError as error:
        needs = f"needs the package {error.name}: pip install it"
        what = needs if error.name else f"lacks a package ({reason_of(error):.200})"
        raise UserError(f"benchmark {name} {what}") from None
    except LookupError as error:
        resource = re.search(r"nltk\.download\('(\w+)'\)", str(error))
        if not resource:
            raise
        raise UserError(
            f"benchmark {name} needs NLTK's data {resource[1]}: python -m nltk.downloader"
            f" {resource[1]}"
        ) from None


def check_requests(name: str, task: Any) -> None:
    """Raise UserError for a task whose requests are not the greedy answer to a text, or a score."""
    options = task.get_config("generation_kwargs") or {}
    sampled = options.get("do_sample", float(options.get("temperature") or 0) > 0)
    others = {
        k for k, v in options.items() if k not in GREEDY_OPTIONS and (k, v) != ("num_beams", 1)
    }
    problem = None
    if task.OUTPUT_TYPE == "generate_until" and (sampled or others):
        problem = f"does not take the greedy answer ({', '.join(sorted(others)) or 'do_sample'})"
    elif getattr(task, "MULTIMODAL", False):
        problem = "shows more than text"
    if problem:
        raise refusal(name, problem)


def refusal(name: str, problem: str) -> UserError:
    return UserError(f"benchmark {name} {problem}, which this suite does not do")
