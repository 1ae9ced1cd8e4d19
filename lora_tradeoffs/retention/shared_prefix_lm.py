"""lm-eval's model interface, tokenised by data/encoding.py and scored by scoring/.

Requests that begin alike share a row. The tokens are those of HFLM but in two cases, in which HFLM
scores more than the text: a tokenizer that adds BOS (its rolling windows put another one before
it), and one that adds EOS (contexts end with it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config import UserError
from lora_tradeoffs.chat import form_of
from lora_tradeoffs.data.encoding import bos_ids, text_ids
from lora_tradeoffs.scoring.generation import (
    GENERATION_BUDGET,
    configured_ends,
    generate_greedily,
)
from lora_tradeoffs.scoring.log_likelihoods import TOKEN_BUDGET, log_likelihoods
from lora_tradeoffs.scoring.rows import shared_rows

# Padded tokens of a batch. HellaSwag on two cores: 512 8.5 s, 1024 8.2 s, 2048 9.1 s, 4096 10 s.
TOKEN_BUDGETS = {"cpu": 1_024, "cuda": 8 * TOKEN_BUDGET}


def default_batch_tokens(device: str) -> int:
    return TOKEN_BUDGETS.get(device, TOKEN_BUDGET)


class SharedPrefixLM(HFLM):
    """lm-eval's HFLM with the scoring of tokenised requests replaced, for its own evaluator too.

    token_budget: padded tokens of a batch (default: `default_batch_tokens` of the device). bf16:
    under autocast. max_length: the window (default: the model's). encoded: tokens by text, kept for
    the next model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        token_budget: int | None = None,
        bf16: bool = False,
        max_length: int | None = None,
        encoded: dict[Any, Any] | None = None,
    ):
        # HFLM ties the head to the embedding; a checkpoint may have a head of its own
        with patch.object(model, "tie_weights", lambda: None):
            super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        self.bos, self.chat_form = bos_ids(tokenizer), form_of(tokenizer)
        default = default_batch_tokens(self.device.type)
        self.token_budget = token_budget or default
        # half the batch for scores is half the batch for answers
        largest = GENERATION_BUDGET * (8 if self.device.type == "cuda" else 1)
        self.generation_budget = largest * self.token_budget // default
        self.bf16 = bf16
        self.encoded = {} if encoded is None else encoded
        self.truncated: set[str] = set()  # contexts

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The text's tokens, after BOS if the tokenizer adds it and `add_special_tokens` is None.

        EOS is never added: what follows the text is scored. A chat's text has special tokens, with
        BOS perhaps among them.
        """
        if self.chat_form is None:
            ids = text_ids(self.tokenizer, string)
        else:
            ids = self.tokenizer(string, add_special_tokens=False).input_ids
        begun = add_special_tokens is not None or (self.chat_form and ids[:1] == self.bos)
        return ids if begun else [*self.bos, *ids]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, after a single BOS, in windows that score a token once."""
        texts = [text_ids(self.tokenizer, request.args[0]) for request in requests]
        rolling = (
            get_rolling_token_windows(text, self.prefix_token_id, self.max_length, context_len=1)
            for text in texts
        )
        windows = [
            (text, (None, *make_disjoint_window(window)))
            for text, text_windows in enumerate(rolling)
            for window in text_windows
        ]
        totals = [0.0] * len(texts)
        scores = self._loglikelihood_tokens([window for _, window in windows])
        for (text, _), (log_likelihood, _) in zip(windows, scores, strict=True):
            totals[text] += log_likelihood
        return totals

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As HFLM's, but once for all models; requests of one context share its tokens."""
        pair = (context, continuation)
        if pair not in self.encoded:
            context_ids, ids = super()._encode_pair(context, continuation)
            self.encoded[pair] = self.encoded.setdefault(context, context_ids), ids
        return self.encoded[pair]

    def _loglikelihood_tokens(
        self, requests: Iterable[Any], disable_tqdm: bool = False, override_bs: Any = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one.

        `requests` are ((context, continuation), their tokens, their tokens). A text longer than
        the window loses its beginning, as in HFLM; whose context did is in `truncated`.
        """
        window, texts = self.max_length, []
        for strings, context, continuation in requests:
            if len(continuation) > window:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's"
                    f" window of {window}"
                )
            text = context + continuation
            if len(text) > window + 1:
                self.truncated.add(strings[0])
                text = text[-(window + 1) :]
            texts.append((text, len(continuation)))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            rows = shared_rows(texts)
            scores = log_likelihoods(self.model, rows, self.token_budget)
        pairs = [(score.log_likelihood, score.is_greedy) for row in scores for score in row]
        # lm-eval would take the first choice in silence
        if not np.isfinite([log_likelihood for log_likelihood, _ in pairs]).all():
            raise UserError("the model's logits are not finite")
        return pairs

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy answer to every request, cut at its first stop string, as in HFLM.

        A context that leaves no room for the longest answer loses its beginning. HFLM's batches run
        until all of their rows have met the same stop string; here each row ends at its own.
        """
        answers = [""] * len(requests)
        by_options: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_options.setdefault(repr(request.args[1]), []).append(i)
        for indices in by_options.values():
            contexts = [requests[i].args[0] for i in indices]
            texts = self._generate(contexts, requests[indices[0]].args[1])
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
        return answers

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(options, self.max_gen_toks)
        most, end = options["max_gen_toks"], self.tok_decode(self.eot_token_id, False)
        stops = [stop for stop in handle_stop_sequences(options["until"], eos=end) if stop]
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"answers of {most} tokens do not fit into the model's window of {self.max_length}"
            )
        # a stop string has at most a token a byte
        tail = 1 + max(len(stop.encode()) for stop in stops)

        def stopped(tokens: list[int]) -> bool:
            text = self.tok_decode(tokens[-tail:], skip_special_tokens=False)
            return any(stop in text for stop in stops)

        prompts = []
        for context in contexts:
            key = (context, None)
            ids = self.encoded[key] = self.encoded.get(key) or self.tok_encode(context)
            if len(ids) > room:
                self.truncated.add(context)
            prompts.append(ids[-room:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            outputs = generate_greedily(
                self.model, prompts, most, self._end_ids(), stopped, self.generation_budget
            )
        return [postprocess_generated_text(self.tok_decode(o), stops, None) for o in outputs]

    def _end_ids(self) -> set[int]:
        """What ends a generation: EOS, the tokens that the model's own configuration names, and the
        chat template's end of a turn.
        """
        turn = [self.chat_form.end_id] if self.chat_form else []
        return {self.eot_token_id, *turn, *configured_ends(self.model)}
