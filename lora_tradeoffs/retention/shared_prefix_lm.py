"""lm-eval's model interface, tokenised by data/encoding.py and scored by scoring/.

Requests that begin alike share a row. The tokens are those of HFLM but in two cases, in which HFLM
scores more than the text: a tokenizer that adds BOS (its rolling windows put another one before
it), and one that adds EOS (contexts end with it).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from config import UserError
from lora_tradeoffs.data.encoding import bos_ids, text_ids
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
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length)
        self.bos = bos_ids(tokenizer)
        self.token_budget = token_budget or default_batch_tokens(self.device.type)
        self.bf16 = bf16
        self.encoded = {} if encoded is None else encoded
        self.truncated: set[tuple[str, str]] = set()

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """The text's tokens, after BOS if the tokenizer adds it and `add_special_tokens` is None.

        EOS is never added: what follows the text is scored.
        """
        bos = self.bos if add_special_tokens is None else []
        return [*bos, *text_ids(self.tokenizer, string)]

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
        the window loses its beginning, as in HFLM; which texts did is in `truncated`.
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
                self.truncated.add(strings)
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
