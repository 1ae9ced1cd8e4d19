"""Batched generation against model.generate, one prompt at a time."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from reference import MODEL_FIELDS, family_model
from support import settings_for

from config import FAMILIES
from dataset_descriptions import describe
from lora_tradeoffs.adaptation.predictions import generated_texts
from lora_tradeoffs.data.encoding import encode
from lora_tradeoffs.data.sources import read_jsonl
from lora_tradeoffs.models.base import load_base, prepare_base
from lora_tradeoffs.scoring.generation import generate_greedily


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, base):
    return load_base(base, attention=request.param).eval()


def random_prompts(count, seed=0, shortest=1):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, 40, (count,), generator=random).tolist()
    return [torch.randint(5, 40_000, (n,), generator=random).tolist() for n in lengths]


def plain_generation(model, prompt, max_new_tokens, eos):
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=eos,
    )[0, len(prompt) :].tolist()
    return output[:-1] if output and output[-1] == eos else output


def assert_same_text(model, prompt, ours, theirs):
    """Equal, or apart from the first step on at which two tokens tie; whether they were equal."""
    if ours == theirs:
        return True
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs))
    )
    with torch.no_grad():
        top = model(torch.tensor([[*prompt, *ours[:at]]])).logits[0, -1].topk(2).values
    assert top[0] - top[1] < 1e-3
    return False


@pytest.mark.parametrize("kind", MODEL_FIELDS)
def test_every_family_generates_as_one_at_a_time(kind):
    windowed, prompts = family_model(kind, vocabulary=500), [[7], *windowed_prompts()]
    ours = generate_greedily(windowed, prompts, 14, [2], token_budget=150)
    equal = [
        assert_same_text(windowed, prompt, text, plain_generation(windowed, prompt, 14, 2))
        for prompt, text in zip(prompts, ours, strict=True)
    ]
    assert sum(equal) >= len(equal) - 1 and max(map(len, ours)) == 14


def windowed_prompts():
    return [[token % 500 for token in prompt] for prompt in random_prompts(9, seed=5)]


def test_generation_equals_model_generate_one_at_a_time(model):
    prompts = random_prompts(17, seed=3)
    # the random model's own favourite tokens as EOS, so that rows end at different steps
    first = generate_greedily(model, prompts, 12, [])
    eos = max({t for o in first for t in o}, key=lambda t: sum(t in o for o in first))
    ours = generate_greedily(model, prompts, 12, [eos], token_budget=400)
    assert len({len(output) for output in ours}) > 1
    for prompt, output in zip(prompts, ours, strict=True):
        assert_same_text(model, prompt, output, plain_generation(model, prompt, 12, eos))
    alone = [generate_greedily(model, [prompt], 12, [eos])[0] for prompt in prompts]
    assert sum(a == b for a, b in zip(alone, ours, strict=True)) >= 16


def test_a_row_ends_where_its_stop_says(model):
    prompts = random_prompts(5)
    free = generate_greedily(model, prompts, 8, [])
    stopped = generate_greedily(model, prompts, 8, [], stopped=lambda tokens: len(tokens) == 3)
    assert stopped == [tokens[:3] for tokens in free]


def test_prompts_take_the_place_of_rows_that_have_ended(model):
    prompts = random_prompts(24, seed=5, shortest=4)
    alone = [generate_greedily(model, [prompt], 16, [])[0] for prompt in prompts]
    # rows end after 1 to 16 tokens, each at a step of its own
    ends = {tuple(tokens): 1 + 5 * i % 16 for i, tokens in enumerate(alone)}

    def stopped(tokens):
        return any(
            whole[: len(tokens)] == tuple(tokens) and len(tokens) == end
            for whole, end in ends.items()
        )

    calls = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    try:
        found = generate_greedily(model, prompts, 16, [], stopped, most_rows=8)
    finally:
        handle.remove()
    expected = [tokens[: ends[tuple(tokens)]] for tokens in alone]
    assert sum(a == b for a, b in zip(found, expected, strict=True)) >= 23  # ties of the logits
    assert len(found) == 24 and max(rows for rows, _ in calls) <= 8
    read = [rows for rows, width in calls if width > 1]
    assert sum(read) == 24 and len(read) > 3  # three, if batches were not refilled
    # batches that are not refilled take 15 steps each, 45 in all
    assert len(calls) - len(read) < 36


def test_what_cannot_be_generated_is_refused(model):
    with pytest.raises(ValueError, match="at least one token"):
        generate_greedily(model, [[]], 4, [2])
    assert generate_greedily(model, [], 4, [2]) == []


def test_an_answer_ends_with_any_token_that_ends_texts_of_its_model(tiny, tokenizer, tmp_path):
    """As instruct models name several: the tokenizer has one of them."""
    folder = shutil.copytree(tiny, tmp_path / "base")
    base = prepare_base(settings_for(model=str(folder)))
    (prompt,) = random_prompts(1, shortest=39)
    task = dataclasses.replace(describe("squad_v2"), stop="nothing", max_new_tokens=8)
    assert generated_texts(load_base(base), [prompt], task, 1_024, tokenizer) != [""]
    (first,) = generate_greedily(load_base(base), [prompt], 1, [2])[0]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    model = load_base(base).eval()
    with torch.no_grad():
        output = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
    assert output[0].tolist() == [*prompt, first]
    assert generated_texts(model, [prompt], task, 1_024, tokenizer) == [""]


@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("squad_v2", 8),
        *(pytest.param(task, 32, marks=pytest.mark.slow) for task in FAMILIES["dissimilar"]),
    ],
)
def test_real_rows_are_generated_as_model_generate_does(
    smollm2_model, tokenizer, real_data, task, count
):
    rows = read_jsonl(Path(real_data) / task / "test.jsonl", limit=count)
    encoded = [encode(tokenizer, describe(task), row, 192) for row in rows]
    prompts = [e["input_ids"][: e["prompt_length"]] for e in encoded]
    eos = tokenizer.eos_token_id
    ours = generate_greedily(smollm2_model, prompts, 24, [eos])
    same = [
        assert_same_text(smollm2_model, p, o, plain_generation(smollm2_model, p, 24, eos))
        for p, o in zip(prompts, ours, strict=True)
    ]
    assert sum(same) >= count - 1
