"""Scores of completions under a causal language model. Knows no tasks.

Log-likelihoods with shared prefixes, greedy generation in batches, and the small functions that
training shares. Items go longest first, in batches by a budget of tokens, and results come back in
the caller's order; in fp32 they do not depend on the batch. Logits are computed at the positions
that are asked about, never for whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKEN_BUDGET = 4_096  # padded tokens of a batch
# Of a batch that is generated, prompts and new tokens: every step reads all weights once, so the
# more rows the better; what bounds them is the cache (Llama-3.2-1B in bf16: half a gigabyte).
GENERATION_BUDGET = 16_384
LOGIT_BUDGET = 1 << 27  # logits of a batch: half a gigabyte in fp32


@dataclass(frozen=True)
class Item:
    """A context and the continuations to be scored after it, as tokens; none of them empty."""

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]

    @property
    def length(self) -> int:
        """Tokens that the model reads: a continuation's last token is only predicted."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def predictions(self) -> int:
        """Positions at which logits are needed; the first one is shared."""
        return 1 + sum(len(c) - 1 for c in self.continuations)


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
    model: Any,
    items: Sequence[Item],
    token_budget: int = TOKEN_BUDGET,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[Score]]:
    """Scores of every item's continuations, in the order of the items.

    One row an item: [context, continuation 1, ..., continuation n]. Positions go on from the
    context in every continuation, and a mask lets it see the context and itself, so the context is
    read once. Raises ValueError for an empty context or continuation.
    """
    import torch

    for item in items:
        if not item.context or not item.continuations or not all(item.continuations):
            raise ValueError("a context and its continuations need at least one token each")
    scores: list[list[Score]] = [[] for _ in items]
    most = max(1, LOGIT_BUDGET // model.config.vocab_size)
    lengths = [item.length for item in items]
    weights = [item.predictions for item in items]
    with torch.inference_mode():
        for rows in batches(lengths, token_budget, weights, most):
            batch = [items[i] for i in rows]
            for i, row in zip(rows, _score_batch(model, batch), strict=True):
                scores[i] = row
            progress(len(rows))
    return scores


def batches(
    lengths: Sequence[int],
    token_budget: int,
    weights: Sequence[int] | None = None,
    weight_budget: int = 0,
) -> Iterator[list[int]]:
    """Indices in batches, longest first; padded tokens and weights of a batch within budget.

    A batch holds at least one row, however long it is.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batch: list[int] = []
    weight = 0
    for i in order:
        own = weights[i] if weights else 0
        full = batch and (len(batch) + 1) * lengths[batch[0]] > token_budget
        if full or (batch and weights and weight + own > weight_budget):
            yield batch
            batch, weight = [], 0
        batch.append(i)
        weight += own
    if batch:
        yield batch


def _score_batch(model: Any, items: Sequence[Item]) -> list[list[Score]]:
    import torch

    width = max(item.length for item in items)
    input_ids = torch.zeros((len(items), width), dtype=torch.long)
    positions = torch.zeros_like(input_ids)
    # 0: context, k: the k-th continuation, -1: padding
    segments = torch.full_like(input_ids, -1)
    keep = torch.zeros_like(input_ids, dtype=torch.bool)
    targets, sources, owners = [], [], []  # token, its logits' row, its continuation
    kept = owner = 0
    for row, item in enumerate(items):
        start = len(item.context)
        input_ids[row, :start] = torch.tensor(item.context)
        positions[row, :start] = torch.arange(start)
        segments[row, :start] = 0
        keep[row, start - 1 : item.length] = True
        first, at = kept, start
        kept += item.predictions
        inner = first + 1
        for number, continuation in enumerate(item.continuations, 1):
            inside = len(continuation) - 1
            input_ids[row, at : at + inside] = torch.tensor(continuation[:-1])
            positions[row, at : at + inside] = torch.arange(start, start + inside)
            segments[row, at : at + inside] = number
            targets += continuation
            sources += [first, *range(inner, inner + inside)]
            owners += [owner] * len(continuation)
            at, inner, owner = at + inside, inner + inside, owner + 1
    device = model.device
    logits = model(
        input_ids=input_ids.to(device),
        attention_mask=_attention_mask(model, segments).to(device),
        position_ids=positions.to(device),
        logits_to_keep=keep.to(device),
        use_cache=False,
    ).logits.float()
    sources, targets = torch.tensor(sources), torch.tensor(targets)
    chosen = logits[sources.to(device), targets.to(device)]
    log_probs = (chosen - logits.logsumexp(-1)[sources.to(device)]).cpu().double()
    greedy = logits.argmax(-1).cpu()[sources] == targets
    owners = torch.tensor(owners)
    sums = torch.zeros(owner, dtype=torch.float64).index_add(0, owners, log_probs).tolist()
    misses = torch.zeros(owner).index_add(0, owners, (~greedy).float()).tolist()
    found = iter(Score(total, missed == 0) for total, missed in zip(sums, misses, strict=True))
    return [[next(found) for _ in item.continuations] for item in items]


def _attention_mask(model: Any, segments: torch.Tensor) -> torch.Tensor:
    """What may be attended to: 2-D where there are only contexts, else 4-D (rows, 1, width, width).

    A position sees what is before it in the context and in its own segment. Padding sees itself, so
    that no softmax is empty.
    """
    import torch

    if segments.max() == 0:  # continuations of one token: nothing but the context is read
        return (segments == 0).long()
    width = segments.shape[1]
    before = torch.ones((width, width), dtype=torch.bool).tril()
    seen = before & ((segments == 0)[:, None, :] | (segments[:, :, None] == segments[:, None, :]))
    seen = seen[:, None]
    if model.config._attn_implementation == "sdpa":
        return seen
    lowest = torch.finfo(torch.float32).min  # eager attention adds its mask
    return torch.zeros(seen.shape).masked_fill(~seen, lowest)


# --------------------------------------------------------------------------------- generation


def generate_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
    token_budget: int = GENERATION_BUDGET,
    most_rows: int = 1_000,
    progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The greedy continuation of every prompt, in their order, without its EOS.

    A row ends with an EOS token, when `stopped` says so of its tokens, or at `max_new_tokens`; it
    then leaves the batch, so the others do not pay for it. Raises ValueError for an empty prompt
    and FloatingPointError for logits that are not finite.
    """
    import torch

    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    outputs: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    with torch.inference_mode():
        for rows in batches(lengths, token_budget, [1] * len(prompts), most_rows):
            texts = _generate_batch(
                model, [prompts[i] for i in rows], max_new_tokens, set(eos_token_ids), stopped
            )
            for i, tokens in zip(rows, texts, strict=True):
                outputs[i] = tokens
            progress(len(rows))
    return outputs


def _generate_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos: set[int],
    stopped: Callable[[list[int]], bool],
) -> list[list[int]]:
    import torch
    from transformers import DynamicCache

    device, width = model.device, max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)  # padded on the left
        mask[row, width - len(prompt) :] = 1
    input_ids, mask = input_ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    outputs: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    cache = DynamicCache(config=model.config)
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if not outputs[active[0]] and not torch.isfinite(logits).all():
            raise FloatingPointError("the model's logits are not finite")
        tokens = logits.argmax(-1).tolist()
        goes_on = []
        for at, (row, token) in enumerate(zip(active, tokens, strict=True)):
            if token in eos:
                continue
            outputs[row].append(token)
            if len(outputs[row]) < max_new_tokens and not stopped(outputs[row]):
                goes_on.append(at)
        if not goes_on:
            break
        if len(goes_on) < len(active):
            left = torch.tensor(goes_on, device=device)
            cache.batch_select_indices(left)
            mask, positions = mask[left], positions[left]
            active = [active[at] for at in goes_on]
        input_ids = torch.tensor([[outputs[row][-1]] for row in active], device=device)
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones((len(active), 1))], dim=1)
    return outputs
