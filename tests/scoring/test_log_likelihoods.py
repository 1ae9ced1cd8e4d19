"""The engine against the plain way: one row at a time, dense logits, model.generate."""

import pytest
import torch
from reference import MODEL_FIELDS, WINDOWED, family_model, plain_score

from config import FAMILIES
from dataset_descriptions import describe
from lora_tradeoffs.data.collator import IGNORED, CompletionCollator
from lora_tradeoffs.data.encoding import choice_ids, encode, text_ids
from lora_tradeoffs.data.sources import read_jsonl
from lora_tradeoffs.models.base import load_base
from lora_tradeoffs.scoring.log_likelihoods import (
    completion_losses,
    label_predictions,
    log_likelihoods,
    mean_by_row,
)
from lora_tradeoffs.scoring.rows import Item, batches, shared_rows


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, base):
    return load_base(base, attention=request.param).eval()


def random_items(count=23, seed=0):
    random = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(5, 40_000, (length,), generator=random).tolist()

    return [Item(tokens(1, 40), [tokens(1, 9) for _ in range(1 + i % 4)]) for i in range(count)]


def assert_plain(model, items, scores, tolerance=1e-4):
    for item, row in zip(items, scores, strict=True):
        for continuation, score in zip(item.continuations, row, strict=True):
            total, greedy = plain_score(model, item.context, continuation)
            assert score.log_likelihood == pytest.approx(total, abs=tolerance)
            assert score.is_greedy == greedy


def test_log_likelihoods_equal_one_continuation_at_a_time(model):
    items = random_items()
    with torch.no_grad():  # let some continuation be the greedy one
        best = model(torch.tensor([items[0].context])).logits[0, -1].argmax().item()
    items[0] = Item(items[0].context, [[best], *items[0].continuations])
    assert_plain(model, items, log_likelihoods(model, items))
    assert log_likelihoods(model, items[:1])[0][0].is_greedy


def test_log_likelihoods_do_not_depend_on_the_batch(model):
    items = random_items()
    whole = log_likelihoods(model, items, token_budget=100_000)
    for budget in (1, 100, 1000):
        for ours, theirs in zip(log_likelihoods(model, items, budget), whole, strict=True):
            found = [s.log_likelihood for s in ours]
            assert found == pytest.approx([s.log_likelihood for s in theirs], abs=1e-4)


def test_one_token_continuations_are_the_logits_after_the_context(model):
    contexts = [item.context for item in random_items()]
    scores = log_likelihoods(model, [Item(c, [[7], [9], [11]]) for c in contexts])
    for context, row in zip(contexts, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context])).logits[0, -1:]
        best = max(range(3), key=lambda k: row[k].log_likelihood)
        assert best == label_predictions(logits, [7, 9, 11]).item()
        expected = logits.log_softmax(-1)[0, [7, 9, 11]].tolist()
        assert [s.log_likelihood for s in row] == pytest.approx(expected, abs=1e-4)


def test_an_empty_context_or_continuation_is_refused(model):
    for item in (Item([], [[1]]), Item([1], []), Item([1], [[]])):
        with pytest.raises(ValueError, match="at least one token"):
            log_likelihoods(model, [item])


def test_texts_that_begin_alike_share_a_row():
    same = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7, 8], [1, 2, 3, 9, 5, 6]]
    first, second = shared_rows([(same[0], 1), (same[1], 2), ([7, 8, 9, 1], 2)])
    assert first == Item([1, 2, 3, 4, 5], [[6], [7, 8]], [0, 0])
    assert second == Item([7, 8], [[9, 1]], [0])
    # contexts that differ in their last tokens; what is scored is not shared
    assert shared_rows([(same[0], 2), (same[2], 2)]) == [
        Item([1, 2, 3], [[4, 5, 6], [9, 5, 6]], [1, 1])
    ]
    assert len(shared_rows([(same[0], 6), (same[0], 6)])) == 2
    long = [1, *range(2, 90)]
    assert len(shared_rows([(long, 9), ([1, 5, *range(100, 180)], 9)])) == 2  # not worth it


def test_shared_rows_are_scored_as_the_texts_one_by_one(model):
    random = torch.Generator().manual_seed(7)

    def tokens(length):
        return torch.randint(5, 40_000, (length,), generator=random).tolist()

    texts = []
    for k in range(12):
        start, end = tokens(9 + k), tokens(1 + k % 5)
        for width in (1, 3, 2)[: 1 + k % 3]:
            texts.append((start + tokens(width) + end, len(end)))
    items = shared_rows(texts)
    assert len(items) == 12
    found = [score for row in log_likelihoods(model, items, 200) for score in row]
    for (text, scored), score in zip(texts, found, strict=True):
        total, greedy = plain_score(model, text[:-scored], text[-scored:])
        assert score.log_likelihood == pytest.approx(total, abs=1e-4)
        assert score.is_greedy == greedy


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", MODEL_FIELDS)
def test_every_family_is_scored_as_one_continuation_at_a_time(kind, attention):
    windowed = family_model(kind, attention)
    items = [*random_items(9), *shared_rows([([7, 8, *range(9, 40), k, k + 1], 3) for k in (5, 6)])]
    assert any(item.branches and item.unscored for item in items)
    assert_plain(windowed, items, log_likelihoods(windowed, items, 200))
    labels = [Item(item.context, [[7], [9]]) for item in items]
    assert_plain(windowed, labels, log_likelihoods(windowed, labels, 200))


@pytest.mark.parametrize("kind", WINDOWED)
def test_short_items_of_a_windowed_model_still_share_a_row(kind):
    windowed, rows = family_model(kind), []
    windowed.get_input_embeddings().register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    items = [Item([5, 6, 7], [[8, 9], [10, 11, 12]]), Item([5, 6, 7], [[8, 9], [10] * 7])]
    assert_plain(windowed, items, log_likelihoods(windowed, items, 1))
    widths = [row.shape[1] for row in rows[1 : len(items) + 2]]  # the first finds the last layer
    assert widths == [9, 4, 6]


def test_capped_logits_are_computed_a_few_at_a_time_and_in_bf16_still_differ():
    model, calls = family_model("gemma2"), []
    model.lm_head.register_forward_hook(lambda _, args, output: calls.append(len(output)))
    with torch.autocast("cpu", torch.bfloat16):
        words = [[token] for token in range(1_000, 1_300)]
        (scores,) = log_likelihoods(model, [Item([9, 120, 4_000], words)])
        assert calls[1:] == [0, 1]  # the model's own last layer gets nothing
        rounded = model(torch.tensor([[9, 120, 4_000]])).logits[0, -1, 1_000:1_300]
    values = torch.tensor([score.log_likelihood for score in scores])
    assert len(rounded.unique()) < 240 < 295 < len(values.unique())
    shift = (values - rounded.float()).mean()
    assert (values - rounded.float() - shift).abs().max() < 0.03  # two steps of bf16


def test_batches_are_longest_first_and_within_budget():
    lengths, weights = [5, 90, 7, 30, 31, 5], [1, 1, 1, 9, 1, 1]
    found = list(batches(lengths, 64, weights, 9))
    assert sorted(i for batch in found for i in batch) == list(range(6))
    assert found[0] == [1]  # above the budget, and still done
    assert [max(lengths[i] for i in batch) for batch in found] == [90, 31, 30, 7]
    for batch in found[1:]:
        assert len(batch) * max(lengths[i] for i in batch) <= 64
        assert sum(weights[i] for i in batch) <= 9


@pytest.mark.parametrize("count", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_hellaswag_items_are_scored_as_one_by_one(smollm2_model, tokenizer, real_data, count):
    from pathlib import Path

    rows = read_jsonl(Path(real_data) / "hellaswag" / "validation.jsonl", limit=count)
    items = [
        Item(text_ids(tokenizer, r["ctx"]), [text_ids(tokenizer, " " + e) for e in r["endings"]])
        for r in rows
    ]
    assert_plain(smollm2_model, items, log_likelihoods(smollm2_model, items))


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("mnli", 8),
        *(pytest.param(task, 24, marks=pytest.mark.slow) for task in FAMILIES["similar"]),
    ],
)
def test_classification_is_the_argmax_that_training_sees(
    smollm2_model, tokenizer, real_data, task, count
):
    from pathlib import Path

    description = describe(task)
    rows = read_jsonl(Path(real_data) / task / "validation.jsonl", limit=count)
    encoded = [encode(tokenizer, description, row, 256) for row in rows]
    ids = [token for (token,) in choice_ids(tokenizer, description)]
    items = [Item(e["input_ids"][: e["prompt_length"]], [[i] for i in ids]) for e in encoded]
    scores = log_likelihoods(smollm2_model, items)
    ours = [max(range(len(ids)), key=lambda k: row[k].log_likelihood) for row in scores]
    batch = CompletionCollator(tokenizer.pad_token_id)(encoded)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = smollm2_model(**batch).logits
    losses, row = completion_losses(logits, labels, IGNORED)
    assert mean_by_row(losses, row, len(rows)).isfinite().all()
    first = torch.searchsorted(row, torch.arange(len(rows)))
    assert ours == label_predictions(logits[first], ids).tolist()


def test_bf16_does_not_make_label_words_equal(smollm2, smollm2_model):
    # under autocast the logits have 8 bits: among 300 tokens many are the same
    words = [[token] for token in range(1_000, 1_300)]
    with torch.autocast("cpu", torch.bfloat16):
        (scores,) = log_likelihoods(smollm2_model, [Item([9, 120, 4_000], words)])
        rounded = smollm2_model(torch.tensor([[9, 120, 4_000]])).logits[0, -1, 1_000:1_300]
    values = torch.tensor([score.log_likelihood for score in scores])
    assert len(rounded.unique()) < 200 < 295 < len(values.unique())
    # a step of bf16 at such logits is 1/16 or 1/8: each is within that of what it was rounded to
    shift = (values - rounded.float()).mean()
    assert (values - rounded.float() - shift).abs().max() < 0.13
