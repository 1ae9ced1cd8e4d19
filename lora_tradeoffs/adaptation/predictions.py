"""What a model answers on a task's items: its choices, its text, the loss of the completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from config import UserError
from lora_tradeoffs.data.encoding import end_id
from lora_tradeoffs.records import LOSS
from lora_tradeoffs.scoring.generation import configured_ends, generate_greedily
from lora_tradeoffs.scoring.log_likelihoods import log_likelihoods
from lora_tradeoffs.scoring.rows import Item
from lora_tradeoffs.statistics.scores import Scores, mean_scores

if TYPE_CHECKING:
    from dataset_descriptions import DatasetDescription

Tokens = list[int]


def continuation_scores(
    model: Any,
    prompts: Sequence[Tokens],
    continuations: Sequence[Sequence[Tokens]],
    description: DatasetDescription,
    batch_tokens: int,
) -> list[np.ndarray]:
    """Of each item the log-likelihoods of its continuations. Raises UserError for nan."""
    items = [Item(*item) for item in zip(prompts, continuations, strict=True)]
    scored = log_likelihoods(model, items, batch_tokens)
    values = [np.array([score.log_likelihood for score in row]) for row in scored]
    if not all(np.isfinite(row).all() for row in values):
        raise UserError(f"{description.name}: the model's logits are not finite")
    return values


def completion_loss(values: Sequence[np.ndarray], completions: Sequence[Tokens]) -> list[Scores]:
    """LOSS, where the last of each item's log-likelihoods is its completion's; none of none."""
    losses = [-row[-1] / len(tokens) for row, tokens in zip(values, completions)]
    return [mean_scores(LOSS, losses)] if losses else []


def best_choices(
    likelihoods: Sequence[np.ndarray],
    choices: Sequence[Sequence[Tokens]],
    description: DatasetDescription,
    tokenizer: Any,
) -> tuple[list[int], list[int]]:
    """Of each item the most likely choice, and that by log-likelihood per character."""
    values = [row[: len(own)] for row, own in zip(likelihoods, choices)]
    decode, delimiter = tokenizer.decode, description.delimiter
    by_length = [
        row / [len(decode(tokens).removeprefix(delimiter)) or 1 for tokens in own]
        for row, own in zip(values, choices)
    ]
    return [int(r.argmax()) for r in values], [int(r.argmax()) for r in by_length]


def generated_texts(
    model: Any,
    prompts: Sequence[Tokens],
    description: DatasetDescription,
    batch_tokens: int,
    tokenizer: Any,
) -> list[str]:
    """Greedy answers up to the task's stop strings. Raises UserError for nan."""
    stops, decode = description.stops, tokenizer.decode
    tail = max([8, *(2 + len(stop) for stop in stops)])  # a token is a character or more

    def stopped(tokens: Tokens) -> bool:
        text = decode(tokens[-tail:]).lstrip()
        return any(stop in text for stop in stops)

    eos = {tokenizer.eos_token_id, end_id(tokenizer), *configured_ends(model)}
    most = description.max_new_tokens
    try:
        outputs = generate_greedily(model, prompts, most, eos, stopped, batch_tokens)
    except FloatingPointError as error:
        raise UserError(f"{description.name}: {error}") from None
    texts = [decode(tokens).lstrip() for tokens in outputs]
    return [min([t, *(t.partition(s)[0] for s in stops)], key=len).strip() for t in texts]
