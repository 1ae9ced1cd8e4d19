"""Tokenised rows to padded batches whose labels are the completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

IGNORED = -100  # torch's cross-entropy skips this label


@dataclass
class CompletionCollator:
    """Pads rows on the right and marks what is learned: the completion, end of text included.

    `labels` are built from spans, so EOS is learned also where it is the padding token.
    `logits_to_keep` is a bool mask (rows, tokens) of the positions that predict a label; the model
    then computes logits there alone, shape (supervised tokens, vocabulary), row by row.
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        import torch

        width = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), IGNORED)
        for i, row in enumerate(rows):
            ids, start = torch.as_tensor(row["input_ids"]), row["prompt_length"]
            input_ids[i, : len(ids)] = ids
            attention_mask[i, : len(ids)] = 1
            labels[i, start : len(ids)] = ids[start:]
        keep = torch.zeros_like(labels, dtype=torch.bool)
        keep[:, :-1] = labels[:, 1:] != IGNORED
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "logits_to_keep": keep,
        }
