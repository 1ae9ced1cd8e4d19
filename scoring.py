"""Scores of completions under a causal language model. Knows no tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def label_predictions(logits: torch.Tensor, label_token_ids: list[int]) -> torch.Tensor:
    """The most likely label of each row, shape (rows,): the argmax over the label words' logits.

    `logits`, shape (rows, vocabulary), are those of the token after the prompt; the label words are
    one token each, so the order of their logits is that of their log-likelihoods.
    """
    return logits[:, label_token_ids].argmax(dim=-1)


def completion_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignored: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of every supervised token, and the row that it is in.

    `labels`, shape (rows, tokens), are unshifted; `logits`, shape (supervised, vocabulary), are
    those of the positions before the supervised tokens, row by row. Both results have shape
    (supervised,); the losses are fp32.
    """
    from torch.nn.functional import cross_entropy

    targets = labels[:, 1:]
    supervised = targets != ignored
    losses = cross_entropy(logits.float(), targets[supervised], reduction="none")
    return losses, supervised.nonzero()[:, 0]


def mean_by_row(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Each row's mean of its values, shape (count,)."""
    sums = values.new_zeros(count).index_add(0, rows, values)
    return sums / values.new_zeros(count).index_add(0, rows, values.new_ones(len(values)))
