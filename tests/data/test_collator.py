"""Rows as padded batches with their labels."""

import torch

from lora_tradeoffs.data.collator import CompletionCollator


def test_collator_learns_the_completion_and_its_eos_even_where_eos_is_the_padding():
    eos = pad = 2
    rows = [
        {"input_ids": [1, 5, 6, 7, eos], "prompt_length": 3},
        {"input_ids": [5, 8, eos], "prompt_length": 1},
    ]
    batch = CompletionCollator(pad)(rows)
    assert batch["labels"].tolist() == [[-100, -100, -100, 7, 2], [-100, 8, 2, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # the position before each label predicts it
    assert batch["logits_to_keep"].tolist() == [
        [False, False, True, True, False],
        [True, True, False, False, False],
    ]
    assert batch["logits_to_keep"].dtype == torch.bool
