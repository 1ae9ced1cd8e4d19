"""The distance of a tuned model's predictions and hidden states from its base's. Knows no tasks.

`KL(base || tuned)` and top-1 agreement at chosen positions, and per layer the unbiased linear CKA
of the hidden states. `observe` runs the base once and stores its last states, from which logits are
computed again a few positions at a time, and a Gram matrix per minibatch and layer. `compare` runs
a checkpoint and compares it with these. For 8,000 tokens they take 50 MB for SmolLM2-135M and 82 MB
for Llama-3.2-1B, where the states of all layers would take 570 MB and 1.1 GB. So a checkpoint costs
one forward pass, not two, and no second model is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from config import DATA_SEED
from lora_tradeoffs.data.encoding import bos_ids, text_ids
from lora_tradeoffs.hardware import widest_float
from lora_tradeoffs.retention.cka import centred_gram, cka, dealt, hsic_terms
from lora_tradeoffs.scoring.log_likelihoods import capped
from lora_tradeoffs.scoring.rows import batches

if TYPE_CHECKING:
    import torch

TOKEN_BUDGET = 2_048  # padded tokens of a batch
PASSAGE = 128  # tokens of a stretch of text
CHUNK = 32  # positions whose logits are held at once


@dataclass(frozen=True)
class Passage:
    """Tokens, and the positions at which predictions are compared: all but the first, if None.

    The prediction at a position is that of the next token: the first of an answer is predicted at
    the prompt's last position. CKA uses all positions but the first, whatever `positions` are.
    """

    tokens: Sequence[int]
    positions: Sequence[int] | None = None

    @property
    def compared(self) -> Sequence[int]:
        return range(1, len(self.tokens)) if self.positions is None else self.positions


@dataclass(frozen=True, eq=False)
class Drift:
    """The distance between base and tuned model, so that it can be resampled over passages.

    `kl`: sums of KL(base || tuned) in nats, `agreed`: positions with the same most likely token,
    `tokens`: positions compared, each of shape (passages,) in the caller's order. `terms`, shape
    (minibatches, layers, 3), are those of `cka`; `batches`, shape (minibatches,), say which batch a
    minibatch is of: those of one batch share passages, so a bootstrap draws whole batches.
    `layers` are named as in `layer_names`.
    """

    kl: np.ndarray
    agreed: np.ndarray
    tokens: np.ndarray
    layers: tuple[str, ...]
    terms: np.ndarray
    batches: np.ndarray

    @property
    def cka(self) -> np.ndarray:
        """Per layer, shape (layers,); 1 for representations equal but for rotation and scale."""
        return cka(self.terms)


@dataclass(eq=False)
class Reference:
    """What is stored of a base: enough to compare any number of tuned models with it.

    `grams[layer]` are the minibatches' centred Gram matrices as vectors, stacked as in `dealt`, and
    `batches` the batch of each. `states` are the last hidden states at the compared positions, a
    tensor (positions, hidden size) a batch. `head` is the output embedding, (vocabulary, hidden
    size): the base's tensor, or a copy of it.
    """

    passages: Sequence[Passage]
    plan: list[list[int]]
    layers: tuple[str, ...]
    head: torch.Tensor
    head_sample: torch.Tensor
    grams: list[list[torch.Tensor]]
    batches: list[int] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)


# ------------------------------------------------------------------------------- passages


def text_passages(tokenizer: Any, texts: Sequence[str]) -> list[Passage]:
    """Stretches of PASSAGE tokens of the texts, shuffled; a rest of less than half is left out."""
    bos, passages = bos_ids(tokenizer), []
    for text in texts:
        tokens = text_ids(tokenizer, text)
        for start in range(0, len(tokens) - PASSAGE // 2, PASSAGE):
            passages.append(Passage(bos + list(tokens[start : start + PASSAGE])))
    # hidden states are compared within a batch: it should hold many documents, not one
    order = np.random.default_rng(DATA_SEED).permutation(len(passages))
    return [passages[i] for i in order]


def answer_passages(rows: Any, tokens: int) -> list[Passage]:
    """The first prepared rows, up to 200 and so many tokens together, but at least one.

    They are compared where the tokens of the answer are predicted, each after those before it; as
    in training, its EOS is one of them.
    """
    rows = rows.select(range(min(200, len(rows))))
    starts = [(row["input_ids"][:-1], row["prompt_length"] - 1) for row in rows]
    passages = [Passage(ids, range(start, len(ids))) for ids, start in starts]
    return limited(passages, tokens) or passages[:1]


def limited(passages: Sequence[Passage], tokens: int) -> list[Passage]:
    """The first passages that have at most so many tokens together."""
    total = np.cumsum([len(passage.tokens) for passage in passages])
    return list(passages[: int((total <= tokens).sum())])


# ------------------------------------------------------------------------- base and checkpoints


def layer_names(blocks: int) -> tuple[str, ...]:
    """Names of the layers in Transformers' `hidden_states`, in its order.

    The embeddings, the residual stream after every block but the last, and after the last block
    and the final norm: what the output embedding reads.
    """
    return ("embeddings", *(f"block {number}" for number in range(1, blocks)), "final norm")


def observe(
    base: Any,
    passages: Sequence[Passage],
    token_budget: int = TOKEN_BUDGET,
    copy_head: bool = False,
) -> Reference:
    """Read the base once: a causal language model, or a PeftModel inside `disable_adapter()`.

    `copy_head` keeps a copy of the output embedding, for a base whose weights will be overwritten
    by those of full fine-tuning; without it, `compare` refuses such a model. Passages go longest
    first in batches of `token_budget` padded tokens. Many short passages (of 128 tokens, say) serve
    CKA better than a few long ones: a batch should hold several. Raises ValueError for an empty
    passage, and for a position that lies outside it or is given twice.
    """
    import torch

    for passage in passages:
        positions = list(passage.compared)
        inside = all(0 <= position < len(passage.tokens) for position in positions)
        if not passage.tokens or not inside or len(set(positions)) < len(positions):
            raise ValueError("a passage needs tokens, and positions in it, each but once")
    head = base.get_output_embeddings().weight.detach()
    layers = layer_names(len(base.get_decoder().layers))
    reference = Reference(
        passages=passages,
        plan=list(batches([len(p.tokens) for p in passages], token_budget)),
        layers=layers,
        head=head.clone() if copy_head else head,
        head_sample=head[:, 0].clone(),
        grams=[[] for _ in layers],
    )

    def keep(layer: int, features: torch.Tensor) -> None:
        reference.grams[layer] += map(centred_gram, dealt(features))

    with torch.inference_mode():
        for batch, (_, states) in enumerate(_read(base, reference, keep)):
            reference.states.append(states)
            minibatches = sum(map(len, reference.grams[0]))
            reference.batches += [batch] * (minibatches - len(reference.batches))
    return reference


def compare(reference: Reference, tuned: Any) -> Drift:
    """Drift of a tuned model, over the same passages in the same batches as the base.

    A model that computes the same as the base has KL 0, agreement 1 and CKA 1, all exactly.
    Raises FloatingPointError for a model whose logits are not finite, and ValueError if the base's
    output embedding was overwritten since it was observed.
    """
    import torch

    if not torch.equal(reference.head[:, 0], reference.head_sample):
        raise ValueError("the base's output embedding has changed: observe it with copy_head=True")
    terms: list[list[torch.Tensor]] = [[] for _ in reference.layers]

    def take(layer: int, features: torch.Tensor) -> None:
        for part in dealt(features):
            base = reference.grams[layer][len(terms[layer])]
            terms[layer].append(hsic_terms(base, centred_gram(part)))

    kl, agreed = np.zeros((2, len(reference.passages)))
    base_states = iter(reference.states)
    with torch.inference_mode():
        for rows, states in _read(tuned, reference, take):
            owners = np.repeat(rows, [len(reference.passages[row].compared) for row in rows])
            divergences, same = _divergences(reference.head, next(base_states), tuned, states)
            np.add.at(kl, owners, divergences)
            np.add.at(agreed, owners, same)
    stacked = np.zeros((len(reference.batches), len(terms), 3))
    for layer, parts in enumerate(terms):
        if parts:
            stacked[:, layer] = torch.cat(parts).cpu().numpy()
    if not np.isfinite(kl).all() or not np.isfinite(stacked).all():
        raise FloatingPointError("the model's states or logits are not finite")
    return Drift(
        kl=kl,
        agreed=agreed,
        tokens=np.array([len(passage.compared) for passage in reference.passages], dtype=float),
        layers=reference.layers,
        terms=stacked,
        batches=np.array(reference.batches, dtype=int),
    )


# --------------------------------------------------------------------------------- inside


def _read(
    model: Any, reference: Reference, take: Callable[[int, torch.Tensor], None]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Every batch's rows, and the last states at the compared positions, row by row.

    `take` gets every layer's states, (tokens, size), at all positions but the first. Rows are
    padded on the right and have no mask: in a causal model nothing sees what follows it.
    """
    import torch

    decoder, device = model.get_decoder(), model.device
    for rows in reference.plan:
        passages = [reference.passages[row] for row in rows]
        width = max(len(passage.tokens) for passage in passages)
        input_ids = torch.zeros((len(rows), width), dtype=torch.long)
        inside = torch.zeros_like(input_ids, dtype=torch.bool)
        compared = torch.zeros_like(inside)
        for row, passage in enumerate(passages):
            input_ids[row, : len(passage.tokens)] = torch.tensor(passage.tokens)
            # the first token's states are up to a thousand times as large as all others' (massive
            # activations, Sun et al. 2024, arXiv:2402.17762): CKA would be that of one token
            inside[row, 1 : len(passage.tokens)] = True
            compared[row, list(passage.compared)] = True
        with _tapped(decoder, inside.to(device), take):
            states = decoder(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
        yield rows, states[compared.to(device)]


@contextmanager
def _tapped(
    decoder: Any, inside: torch.Tensor, take: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Pass on every layer's states at the positions `inside` as soon as they are computed.

    The tuple that Transformers returns holds the states of all layers at once: as much memory as
    the forward pass itself.
    """
    modules = (decoder.embed_tokens, *decoder.layers[:-1], decoder.norm)
    hooks = [
        module.register_forward_hook(lambda _, __, output, at=at: take(at, output[inside]))
        for at, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _divergences(
    head: torch.Tensor, base_states: torch.Tensor, tuned: Any, tuned_states: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """KL(base || tuned) in nats and whether the most likely token is the same, (positions,) each.

    Logits are fp32, also under autocast, where their steps would be larger than most divergences;
    their log-softmax is fp64, or a KL below 1e-6 would be rounding. Every chunk writes into the
    same tensors: the C library does not reuse those of the chunk before, and grows by 400 MB.
    """
    import torch

    output = tuned.get_output_embeddings()
    plain = type(output) is torch.nn.Linear and output.bias is None
    heads = (head, output.weight if plain else output)
    shape = (min(CHUNK, len(base_states)), len(head))
    logits = torch.empty(shape, dtype=head.dtype, device=head.device)
    wide, *log_probs = (torch.empty_like(logits, dtype=widest_float(head.device)) for _ in range(3))
    kl, same = [np.zeros(0)], [np.zeros(0, dtype=bool)]
    with torch.autocast(head.device.type, enabled=False):
        for chunk in zip(base_states.split(CHUNK), tuned_states.split(CHUNK), strict=True):
            rows, best = slice(len(chunk[0])), []
            for states, weight, log_prob in zip(chunk, heads, log_probs, strict=True):
                _project(states, weight, logits[rows])
                capped(tuned.config, logits[rows])
                best.append(logits[rows].argmax(-1))
                torch.log_softmax(wide[rows].copy_(logits[rows]), -1, out=log_prob[rows])
            same.append((best[0] == best[1]).cpu().numpy())
            base, ratio = (log_prob[rows] for log_prob in log_probs)
            torch.sub(base, ratio, out=ratio)
            kl.append(torch.einsum("pv,pv->p", base.exp_(), ratio).cpu().double().numpy())
    return np.concatenate(kl), np.concatenate(same)


def _project(states: torch.Tensor, head: Any, out: torch.Tensor) -> None:
    """Logits of the states, from the head's weight or, with an adapter on it, its module."""
    import torch

    if isinstance(head, torch.Tensor):
        torch.mm(states.to(head.dtype), head.mT, out=out)
    else:
        out.copy_(head(states.to(head.weight.dtype)))
