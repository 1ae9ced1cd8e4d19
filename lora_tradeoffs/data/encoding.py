"""Prompt and completion to tokens: as plain text or turns, BOS once, EOS at the end, truncation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from config import UserError
from dataset_descriptions import DatasetDescription, Row
from lora_tradeoffs.chat import form_of, turn_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOT_SEPARATOR = "\n\n"  # between in-context examples in plain text


def bos_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """[BOS] if the tokenizer begins a text with one (Llama 3 does, SmolLM2 does not), else []."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def choice_ids(
    tokenizer: PreTrainedTokenizerFast, description: DatasetDescription
) -> list[list[int]]:
    """The label words' tokens, in label order. Raises UserError where two have the same tokens."""
    before, words = description.template.rpartition("}")[2] or ".", description.label_words
    ids = _continuations(tokenizer, before, description.delimiter, words)
    if problem := _same_tokens(words, ids):
        where = description.source_file or "dataset_descriptions.py"
        raise UserError(f"{where}: {description.name}: {problem}; choose other words")
    return ids


@functools.lru_cache(64)
def _continuations(
    tokenizer: PreTrainedTokenizerFast, before: str, delimiter: str, texts: tuple[str, ...]
) -> list[list[int]]:
    return [completion_ids(tokenizer, before, delimiter + text) for text in texts]


def _same_tokens(words: Sequence[str], ids: Sequence[Sequence[int]]) -> str:
    """Which choices the tokenizer cannot tell apart, in words; "" if there are none."""
    first: dict[tuple[int, ...], int] = {}
    for i, tokens in enumerate(ids):
        if (other := first.setdefault(tuple(tokens), i)) != i:
            return f"the tokenizer cannot tell the choices {words[other]!r} and {words[i]!r} apart"
    return ""


def text_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Tokens of plain text: nothing added, and '<|...|>' in it is text, never a special token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def continuation_ids(
    tokenizer: PreTrainedTokenizerFast, before: str, continuation: str
) -> list[int]:
    """Tokens of `continuation` where it follows the text `before`.

    They are read from the joint text, since some tokenizers (those of Llama 2, Mistral) put a blank
    before any text. Where the last token before and the first after are one in the joint text,
    they are those after a line break.
    """
    for context in (before, "\n", ""):
        start, joint = (text_ids(tokenizer, t) for t in (context, context + continuation))
        if joint[: len(start)] == start:
            break
    return joint[len(start) :]


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, prompt: str, examples: Sequence[tuple[str, str]] = ()
) -> list[int]:
    """A prompt's tokens in the tokenizer's form, with BOS if it or the chat template has one.

    `examples`, prompts with their completions, come before it: as text, or as turns.
    """
    bos = bos_ids(tokenizer)
    if form_of(tokenizer) is None:
        shots = "".join(asked + answer + SHOT_SEPARATOR for asked, answer in examples)
        return [*bos, *text_ids(tokenizer, shots + prompt)]
    ids = turn_ids(tokenizer, [*itertools.chain(*examples), prompt])
    return ids if ids[: len(bos)] == bos else [*bos, *ids]


def completion_ids(tokenizer: PreTrainedTokenizerFast, before: str, completion: str) -> list[int]:
    """Tokens of a completion after a prompt that ends with the text `before`.

    An assistant's turn begins without the blank that parts a completion from a plain prompt.
    """
    if form := form_of(tokenizer):
        before, completion = form.tail, form.lead + completion.lstrip()
    return continuation_ids(tokenizer, before, completion)


def end_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends every completion: EOS, or that of the chat template."""
    form = form_of(tokenizer)
    return form.end_id if form else tokenizer.eos_token_id


def encode(
    tokenizer: PreTrainedTokenizerFast, description: DatasetDescription, row: Row, max_length: int
) -> dict[str, Any]:
    """The row as tokens, its passage truncated at the end until all fits into `max_length`.

    The prompt leaves room for the longest answer that is generated, not for the row's own: a
    truncated prompt's length must not tell the length of its reference. `problem` says why the row
    cannot be used, "" if it can (text in every row, as Arrow's columns have one type); `cut` counts
    the removed tokens.
    """
    head, passage, tail = description.prompt_parts(row)
    own, problem = {}, ""
    reserved = description.max_new_tokens
    if description.is_classification:
        reserved = 1 + max(map(len, choice_ids(tokenizer, description)))  # with EOS
    elif description.kind == "choice":
        before, choices = (head + passage + tail)[-64:], description.choices(row)
        own["choices"] = _continuations(tokenizer, before, description.delimiter, choices)
        reserved = 1 + max(map(len, own["choices"]))
        problem = _same_tokens(choices, own["choices"])
    if description.definition is not None and description.item_groups:
        own["group"] = description.group(row)
    room = max_length - reserved
    asked = prompt_ids(tokenizer, head + passage + tail)
    whole = len(asked)
    while len(asked) > room:
        shorter = _shorten(tokenizer, head, passage, len(asked) - room)
        if not shorter:
            problem = "does not fit without its passage"
            break
        passage = shorter
        asked = prompt_ids(tokenizer, head + passage + tail)
    prompt, completion = head + passage + tail, description.completion(row)
    ids = [*asked, *completion_ids(tokenizer, prompt, completion), end_id(tokenizer)]
    if len(ids) > max_length:
        problem = problem or "its answer does not fit"
    return {
        "prompt": prompt,
        "completion": completion,
        "references": description.references(row),
        "label": description.label(row) if description.has_choices else -1,
        "input_ids": ids,
        "prompt_length": len(asked),
        "length": len(ids),
        "cut": whole - len(asked),
        "problem": problem or _answer_cut(description, row, passage),
        **own,
    }


def _shorten(tokenizer: Any, head: str, passage: str, excess: int) -> str:
    """The passage without its last `excess` tokens, ending at a word where it can; or ''."""
    encoded = tokenizer(
        passage, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    offsets = encoded["offset_mapping"]
    if excess >= len(offsets):
        return ""
    start = passage[: offsets[len(offsets) - excess][0]].rstrip()
    words = start.rsplit(maxsplit=1)
    whole_word = len(start) == len(passage) or passage[len(start)].isspace()
    return start if whole_word or len(words) < 2 else words[0].rstrip()


def _answer_cut(description: DatasetDescription, row: Row, passage: str) -> str:
    """Whether truncation removed the answer: such a row would teach the model to make things up."""
    if description.kind != "answers" or not row[description.answer]["text"]:
        return ""
    answers, context = row[description.answer], row[description.passage]
    end = answers["answer_start"][0] + len(answers["text"][0])
    lost = end > len(passage) + len(context) - len(context.lstrip())
    return "its answer was cut off" if lost else ""
