"""Log-likelihoods of completions under a causal language model, for any task.

Continuations of a context share its row. Items are read longest first, in batches of a number of
tokens, and results are returned in the caller's order; in fp32 they do not depend on the batch.
Logits are computed at the positions that are scored, never for whole sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.scoring.rows import Item, Layout, batches

if TYPE_CHECKING:
    import torch

TOKEN_BUDGET = 4_096  # padded tokens of a batch
# Logits held at once, 32 MB in fp32: glibc requests larger blocks from the system each time, and
# the page faults cost as much as the softmax. A GPU's allocator caches them: 16 times as many.
LOGIT_BUDGET = 1 << 23


@dataclass(frozen=True)
class Score:
    """Sum of a continuation's token log-probabilities, in nats; whether each was the argmax."""

    log_likelihood: float
    is_greedy: bool


# ------------------------------------------------------------------------ shared with training


def label_predictions(logits: torch.Tensor, label_token_ids: list[int]) -> torch.Tensor:
    """The most likely label of each row, shape (rows,): the argmax over the label words' logits.

    `logits`, shape (rows, vocabulary), are those of the token after the prompt; the label words are
    one token each, so the order of their logits is that of their log-likelihoods.
    """
    return logits[:, label_token_ids].argmax(dim=-1)


def best_continuations(scores: Sequence[Sequence[Score]]) -> list[int]:
    """Of each item the continuation with the highest log-likelihood, the first of several."""
    values = ([score.log_likelihood for score in row] for row in scores)
    return [row.index(max(row)) for row in values]


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


# ----------------------------------------------------------------------------- log-likelihoods


def log_likelihoods(
    model: Any, items: Sequence[Item], token_budget: int = TOKEN_BUDGET
) -> list[list[Score]]:
    """Scores of every item's continuations, in the order of the items.

    One row per item: [context, continuation 1, ..., continuation n]. In every continuation the
    positions continue from the context, and a mask lets it see the context and itself, so that the
    context is read once. Rows with a single text are batched separately: causal attention needs no
    mask, which is faster. So are the texts of an item that is longer than some layer's window of
    sliding attention, which the model's own mask alone knows. Raises ValueError for an empty
    context or continuation, or one without a scored token.
    """
    import torch

    for item in items:
        if not item.context or not item.continuations or not all(item.continuations):
            raise ValueError("a context and its continuations need at least one token each")
        if any(len(c) <= skip for c, skip in zip(item.continuations, item.unscored)):
            raise ValueError("a continuation needs at least one token that is scored")
    window = _attention_window(model)
    parts = [i.texts if i.branches and i.span > window else [i] for i in items]
    items = [item for part in parts for item in part]
    scores: list[list[Score]] = [[] for _ in items]
    with torch.inference_mode():
        head = _last_layer(model, items[0].context[:8]) if items else None
        most = _logit_rows(model)  # limits a batch if the last layer cannot be applied separately
        for branches in (False, True):
            chosen = [i for i, item in enumerate(items) if item.branches == branches]
            lengths = [items[i].length for i in chosen]
            weights = None if head is not None else [items[i].predictions for i in chosen]
            for rows in batches(lengths, token_budget, weights, most):
                batch = [chosen[row] for row in rows]
                batch_scores = _score_batch(model, head, [items[i] for i in batch], branches)
                for i, item_scores in zip(batch, batch_scores, strict=True):
                    scores[i] = item_scores
    found = iter(scores)
    return [[score for _ in part for score in next(found)] for part in parts]


def _score_batch(model: Any, head: Any, items: Sequence[Item], branches: bool) -> list[list[Score]]:
    import torch

    layout, count = Layout(max(item.length for item in items)), 0
    for item in items:
        layout.add(item, count)
        count += len(item.continuations)
    device = model.device
    inputs = {"input_ids": torch.tensor(layout.ids, device=device)}
    if branches:
        inputs["position_ids"] = torch.tensor(layout.positions, device=device)
        inputs["attention_mask"] = _attention_mask(
            model, torch.tensor(layout.segments, device=device)
        )
    keep = torch.zeros(len(items) * layout.width, dtype=torch.bool)
    keep[layout.kept] = True
    keep = keep.view(len(items), layout.width).to(device)
    sources, targets, owners = map(torch.tensor, (layout.sources, layout.targets, layout.owners))
    log_probs = torch.zeros(len(targets), dtype=torch.float64)
    greedy = torch.zeros(len(targets), dtype=torch.bool)
    start = 0
    for logits, hidden in _kept_logits(model, head, keep, inputs):
        chunk = ((sources >= start) & (sources < start + len(logits))).nonzero()[:, 0]
        at, token = (sources[chunk] - start).to(device), targets[chunk].to(device)
        # log_softmax rounds as lm-eval's and training's does: in fp32 each token is off by 1e-5
        table = logits.float().log_softmax(-1)
        values = table[at, token]
        if hidden is not None and logits.dtype != torch.float32:
            # bf16 resolves 1/16 of a logit at best: of two equal ones the first would win
            values += _logits_of(model, head, hidden[at], token) - logits[at, token].float()
        log_probs[chunk] = values.cpu().double()
        # max gives the first of ties, as argmax, in half of its time on a CPU
        greedy[chunk] = (table.max(-1).indices[at] == token).cpu()
        start += len(logits)
        del logits, table  # before the next chunk is made, or three would be held at once
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, owners, log_probs).tolist()
    misses = torch.zeros(count).index_add(0, owners, (~greedy).float()).tolist()
    scores = iter(Score(total, missed == 0) for total, missed in zip(sums, misses, strict=True))
    return [[next(scores) for _ in item.continuations] for item in items]


def _kept_logits(
    model: Any, head: Any, keep: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The logits at the positions in `keep`, shape (rows, tokens), in order, in chunks.

    If the last layer is applied separately (`head`), at most LOGIT_BUDGET of them are held at once,
    and each chunk comes with the hidden states that `head` was applied to.
    """
    if head is None:
        yield model(**inputs, logits_to_keep=keep, use_cache=False).logits, None
        return
    hidden: list[torch.Tensor] = []

    def take(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        hidden.append(args[0])
        return (args[0][:0],)

    handle = head.register_forward_pre_hook(take)
    try:
        model(**inputs, logits_to_keep=keep, use_cache=False)
    finally:
        handle.remove()
    for chunk in hidden[0].split(_logit_rows(model)):
        yield capped(model.config, head(chunk)), chunk


def capped(config: Any, logits: torch.Tensor) -> torch.Tensor:
    """The model's logits from the last layer's output, changed in place: Gemma 2 caps them."""
    if cap := getattr(config, "final_logit_softcapping", None):
        logits.div_(cap).tanh_().mul_(cap)
    return logits


def _logits_of(model: Any, head: Any, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """One token's logit from each hidden state, in fp32."""
    logits = (hidden.float() * head.weight[tokens].float()).sum(-1)
    return capped(model.config, logits)


def _logit_rows(model: Any) -> int:
    """How many positions' logits are held at once."""
    scale = 1 if model.device.type == "cpu" else 16
    return max(1, scale * LOGIT_BUDGET // model.config.vocab_size)


def _last_layer(model: Any, tokens: Sequence[int]) -> Any:
    """The layer whose output, `capped`, is the logits; None if the model changes it otherwise.

    Found by trying it on a few tokens.
    """
    import torch

    head, outputs = model.get_output_embeddings(), []
    if head is None:
        return None
    handle = head.register_forward_hook(lambda _, args, output: outputs.append(output.clone()))
    try:
        ids = torch.tensor([list(tokens)], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    plain = type(head) is torch.nn.Linear and head.bias is None  # else an adapter may add to it
    same = len(outputs) == 1 and torch.equal(capped(model.config, outputs[0]), logits)
    return head if plain and same else None


def _attention_window(model: Any) -> float:
    """How many tokens back every layer sees: inf for full attention, 0 for no attention.

    A mask of ours would take the place of the model's own, and be that of all its layers.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    layers = DynamicCache(config=model.config).layers
    windows = [
        math.inf if type(c) is DynamicLayer else getattr(c, "sliding_window", 0) for c in layers
    ]
    return min(windows, default=math.inf)


def _attention_mask(model: Any, segments: torch.Tensor) -> torch.Tensor:
    """The mask added to the attention scores, shape (rows, 1, width, width).

    A position sees the positions before it in the context and in its own segment. Padding sees
    itself, so that no softmax is empty. The dtype is that of attention, or every layer would
    convert the mask.
    """
    import torch

    width, kind = segments.shape[1], segments.device.type
    before = torch.ones((width, width), dtype=torch.bool, device=segments.device).tril()
    seen = before & ((segments == 0)[:, None, :] | (segments[:, :, None] == segments[:, None, :]))
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype, device=segments.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
