"""Greedy generation in batches that are refilled, for any task.

Prompts are read longest first; rows that have ended leave the batch, and others are added. Texts
are returned in the caller's order; in fp32 they do not depend on the batch, except for ties.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Prompt and new tokens of a batch. Every step reads all weights once, so more rows are better; the
# cache bounds them (half a gigabyte for Llama-3.2-1B in bf16).
GENERATION_BUDGET = 16_384
# Share of a batch's rows that must be free before more prompts are read, which copies the cache.
REFILL = 0.25


def generate_greedily(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    stopped: Callable[[list[int]], bool] = lambda tokens: False,
    token_budget: int = GENERATION_BUDGET,
    most_rows: int = 1_000,
) -> list[list[int]]:
    """The greedy continuation of every prompt, in their order, without its EOS.

    A row ends with an EOS token, when `stopped` returns true for its tokens, or at
    `max_new_tokens`. It then leaves the batch; once REFILL of the rows have left, the next prompts
    are added. Raises ValueError for an empty prompt and FloatingPointError for logits that are not
    finite.
    """
    import torch

    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    outputs: list[list[int]] = [[] for _ in prompts]
    lengths = [len(prompt) + max_new_tokens for prompt in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-lengths[i], i)))
    active: list[int] = []  # the prompts whose rows `cache` and `mask` hold
    cache = mask = None
    eos = set(eos_token_ids)

    def unended_rows(batch: list[int], tokens: list[int]) -> list[int]:
        """The rows that continue after these tokens."""
        rows = []
        for row, (i, token) in enumerate(zip(batch, tokens, strict=True)):
            if token in eos:
                continue
            outputs[i].append(token)
            if len(outputs[i]) < max_new_tokens and not stopped(outputs[i]):
                rows.append(row)
        return rows

    with torch.inference_mode():
        while waiting or active:
            longest = max(lengths[i] for i in (*active, *islice(waiting, 1)))
            most = min(most_rows, max(1, token_budget // longest))
            if waiting and len(active) <= (1 - REFILL) * most:
                added = [waiting.popleft() for _ in range(min(most - len(active), len(waiting)))]
                read, read_mask, tokens = _read_prompts(model, [prompts[i] for i in added])
                if rows := unended_rows(added, tokens):
                    read_mask = _keep_rows(read, read_mask, rows)
                    cache, mask = _joined(cache, mask, read, read_mask)
                    active += [added[row] for row in rows]
                continue
            mask, tokens = _next_tokens(model, cache, mask, [outputs[i][-1] for i in active])
            if rows := unended_rows(active, tokens):
                mask = _keep_rows(cache, mask, rows)
            else:
                cache = mask = None
            active = [active[row] for row in rows]
    return outputs


def configured_ends(model: Any) -> set[int]:
    """The tokens that end a text by the model's generation_config.json, which may name several."""
    ids = model.generation_config.eos_token_id
    return {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}


def _read_prompts(
    model: Any, prompts: Sequence[Sequence[int]]
) -> tuple[Any, torch.Tensor, list[int]]:
    """The prompts' cache, its mask of shape (rows, width), padded on the left; their next tokens.

    Raises FloatingPointError for logits that are not finite.
    """
    import torch
    from transformers import DynamicCache

    width = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    cache = DynamicCache()
    logits = _last_logits(model, cache, mask, input_ids, (mask.cumsum(-1) - 1).clamp(min=0))
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the model's logits are not finite")
    return cache, mask, logits.argmax(-1).tolist()


def _next_tokens(
    model: Any, cache: Any, mask: torch.Tensor, tokens: list[int]
) -> tuple[torch.Tensor, list[int]]:
    """Read one token per row into the cache; the mask that includes it, and the next tokens."""
    import torch

    input_ids = torch.tensor(tokens, device=mask.device)[:, None]
    mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
    positions = mask.sum(dim=1, keepdim=True) - 1
    return mask, _last_logits(model, cache, mask, input_ids, positions).argmax(-1).tolist()


def _last_logits(
    model: Any, cache: Any, mask: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    return model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **{_cache_argument(): cache},
    ).logits[:, -1]


@functools.cache
def _cache_argument() -> str:
    """The name of the forward pass's cache argument: Transformers deprecates `past_key_values`."""
    from transformers import LlamaForCausalLM

    known = signature(LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def _keep_rows(cache: Any, mask: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Keep these rows of the cache, without columns that are padding in all of them; their mask."""
    import torch

    if len(rows) == len(mask):
        return mask
    index = torch.tensor(rows, device=mask.device)
    mask = mask[index]
    start = int((mask.sum(0) > 0).int().argmax())
    for layer in cache.layers:
        layer.keys = layer.keys[index, :, start:]
        layer.values = layer.values[index, :, start:]
    return mask[:, start:]


def _joined(
    cache: Any, mask: torch.Tensor | None, other: Any, other_mask: torch.Tensor
) -> tuple[Any, torch.Tensor]:
    """One cache with the rows of both, padded on the left to one width, and its mask."""
    import torch
    from torch.nn.functional import pad

    if mask is None:
        return other, other_mask
    width = max(mask.shape[1], other_mask.shape[1])
    first, second = width - mask.shape[1], width - other_mask.shape[1]
    for layer, added in zip(cache.layers, other.layers, strict=True):
        for name in ("keys", "values"):
            parts = (getattr(layer, name), first), (getattr(added, name), second)
            joined = torch.cat([pad(part, (0, 0, missing, 0)) for part, missing in parts])
            setattr(layer, name, joined)
            setattr(added, name, None)  # else both are held until the last layer is joined
    return cache, torch.cat([pad(mask, (first, 0)), pad(other_mask, (second, 0))])
