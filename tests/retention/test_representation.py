"""Drift of predictions and states: against plain dense computations, and exactly none for none."""

import copy

import numpy as np
import pytest
import torch
from reference import MODEL_FIELDS, Allocations, family_model
from support import moved
from transformers import LlamaConfig, LlamaForCausalLM

from lora_tradeoffs.retention.cka import MINIBATCH, centred_gram, cka, dealt, hsic_terms
from lora_tradeoffs.retention.representation import (
    Passage,
    answer_passages,
    compare,
    layer_names,
    limited,
    observe,
)
from lora_tradeoffs.retention.scores import drift_records

VOCABULARY = 300


def small_model(seed=0, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def tuned_copy(model, size=0.05, seed=1):
    """A copy with noise on every weight."""
    torch.manual_seed(seed)
    return moved(copy.deepcopy(model), size)


def adapted(model, modules=("q_proj", "v_proj"), trained=False):
    """A PeftModel around a copy; its B matrices are zero unless it is trained."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=list(modules))
    config.init_lora_weights = not trained
    return get_peft_model(copy.deepcopy(model), config).eval()


def passages_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [Passage(rng.integers(VOCABULARY, size=length).tolist()) for length in lengths]


@pytest.fixture(scope="module")
def base():
    return small_model()


# ------------------------------------------------------------------------------ linear CKA


def linear_cka(first, second):
    """Unbiased linear CKA of two sets of features of the same tokens, (tokens, size) each."""
    pairs = zip(dealt(first), dealt(second), strict=True)
    terms = [hsic_terms(centred_gram(one), centred_gram(other)) for one, other in pairs]
    return float(cka(np.concatenate([np.zeros((0, 3)), *terms])[:, None])[0])


def mean_kl(drift):
    """Nats a token; nan if no position was compared."""
    return drift.kl.sum() / drift.tokens.sum() if drift.tokens.sum() else float("nan")


def agreement(drift):
    """Share of positions with the same most likely token."""
    return drift.agreed.sum() / drift.tokens.sum()


def song_hsic(first, second):
    """The unbiased HSIC as Song et al. (2012) write it, of features (n, size)."""
    first, second = first.double(), second.double()
    count, ones = len(first), torch.ones(len(first), dtype=torch.float64)
    k, l = ((x @ x.T).fill_diagonal_(0) for x in (first, second))  # noqa: E741
    trace = (k @ l).trace()
    sums = (ones @ k @ ones) * (ones @ l @ ones) / ((count - 1) * (count - 2))
    cross = 2 / (count - 2) * (ones @ k @ l @ ones)
    return float((trace + sums - cross) / (count * (count - 3)))


def test_cka_of_four_tokens_is_that_computed_by_hand():
    """With x = (1, 1, 0, 0) only K_12 = 1, so 4 HSIC(x, x) is 2 + 2 * 2 / 6 - 2 = 2 / 3."""
    x, y, z = (torch.tensor([row]).T for row in ([1.0, 1, 0, 0], [0.0, 1, 1, 0], [0.0, 0, 1, 1]))
    cross, first, second = hsic_terms(centred_gram(x), centred_gram(y)).tolist()
    assert first == pytest.approx(2 / 3) and second == pytest.approx(2 / 3)
    assert cross == pytest.approx(0 + 2 / 3 - 1)
    assert linear_cka(x, y) == pytest.approx(-1 / 2)
    assert linear_cka(x, z) == pytest.approx(1)  # z = 1 - x


def test_terms_are_the_unbiased_hsic_of_the_literature():
    torch.manual_seed(0)
    x = torch.randn(50, 20) + 3
    y = x[:, :7] ** 2 + torch.randn(50, 7)
    terms = hsic_terms(centred_gram(x), centred_gram(y)) / 50
    expected = [song_hsic(x, y), song_hsic(x, x), song_hsic(y, y)]
    assert terms.tolist() == pytest.approx(expected, rel=1e-5)


def test_cka_of_independent_features_is_near_zero_where_the_biased_one_is_not():
    torch.manual_seed(0)
    x, y = torch.randn(2, 2048, 512)
    assert abs(linear_cka(x, y)) < 0.02
    x, y = (part[:64] - part[:64].mean(0) for part in (x, y))
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.8


def test_cka_ignores_rotation_scale_and_shift_and_is_exactly_one_for_the_same():
    torch.manual_seed(0)
    x = torch.randn(300, 16) * torch.logspace(-2, 2, 16)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16))
    assert linear_cka(x, x) == 1.0
    assert linear_cka(x, 3 * x @ rotation + 100) == pytest.approx(1, abs=1e-5)
    assert np.isnan(linear_cka(x, torch.ones(300, 4)))  # does not vary
    assert np.isnan(linear_cka(x[:3], x[:3]))  # too few


def test_terms_can_be_resampled():
    torch.manual_seed(0)
    terms = np.random.default_rng(0).random((10, 4, 3))
    rows = np.array([[0, 0, 1], [2, 3, 4]])
    drawn = cka(terms[rows])
    assert drawn.shape == (2, 4)
    assert np.allclose(drawn[1], cka(terms[2:5]))


# ------------------------------------------------------------------------------- two models


def dense(base, tuned, passages):
    """KL, agreement and HSIC terms from all logits and all states, a passage at a time."""
    kl, agreed, states = [], [], []
    with torch.no_grad():
        for passage in passages:
            tokens, at = torch.tensor([passage.tokens]), list(passage.compared)
            outputs = [m(tokens, output_hidden_states=True) for m in (base, tuned)]
            p, q = (o.logits[0, at].double().log_softmax(-1) for o in outputs)
            kl.append(float((p.exp() * (p - q)).sum()))
            agreed.append(int((p.argmax(-1) == q.argmax(-1)).sum()))
            states.append([torch.cat([h[:, 1:] for h in o.hidden_states]) for o in outputs])
    return kl, agreed, states


def dense_cka(states):
    """One batch of all passages, longest first, as one would write it down."""
    values = []
    for layer in range(len(states[0][0])):
        x, y = (torch.cat([passage[side][layer] for passage in states]) for side in (0, 1))
        parts = -(-len(x) // MINIBATCH)
        sums = np.zeros(3)
        for k in range(parts):
            a, b = x[k::parts], y[k::parts]
            sums += len(a) * np.array([song_hsic(a, b), song_hsic(a, a), song_hsic(b, b)])
        values.append(sums[0] / np.sqrt(sums[1] * sums[2]))
    return values


def test_equals_a_plain_dense_computation(base):
    tuned = tuned_copy(base)
    passages = [*passages_of(70, 61, 50, 33), Passage([1, 2, 3, 4, 5], [4]), Passage([7, 8], [0])]
    drift = compare(observe(base, passages), tuned)
    kl, agreed, states = dense(base, tuned, passages)
    assert drift.kl == pytest.approx(kl, abs=1e-5) and min(kl) > 0.01
    assert drift.agreed.tolist() == agreed and sum(agreed) < drift.tokens.sum()
    assert drift.tokens.tolist() == [69, 60, 49, 32, 1, 1]
    assert drift.cka == pytest.approx(dense_cka(states), abs=1e-5)
    assert drift.cka.min() < 0.99
    assert mean_kl(drift) == pytest.approx(sum(kl) / 212, abs=1e-5)
    assert agreement(drift) == pytest.approx(sum(agreed) / 212)


def test_a_task_is_compared_over_its_whole_answers(base):
    """The mean over all tokens that training supervises, from the logits of the whole rows."""
    from datasets import Dataset

    tuned, rng = tuned_copy(base), np.random.default_rng(3)
    rows = [(rng.integers(VOCABULARY, size=20 + 9 * k).tolist(), 4 + 7 * k) for k in range(5)]
    data = Dataset.from_list([{"input_ids": ids, "prompt_length": n} for ids, n in rows])
    drift = compare(observe(base, answer_passages(data, 1_000)), tuned)
    total, count = 0.0, 0
    for ids, prompt_length in rows:
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].double().softmax(-1) for m in (base, tuned))
        for at in range(prompt_length, len(ids)):  # the token that is predicted
            total += float((p[at - 1] * (p[at - 1] / q[at - 1]).log()).sum())
            count += 1
    assert drift.tokens.tolist() == [len(ids) - n for ids, n in rows] and count == 100
    assert mean_kl(drift) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", MODEL_FIELDS)
def test_windows_and_caps_of_other_families_count(kind):
    windowed = family_model(kind, vocabulary=VOCABULARY)
    tuned, passages = tuned_copy(windowed), passages_of(41, 30, 12, 33)
    drift = compare(observe(windowed, passages), tuned)
    kl, agreed, states = dense(windowed, tuned, passages)
    assert drift.kl == pytest.approx(kl, rel=1e-4) and drift.agreed.tolist() == agreed
    assert drift.cka == pytest.approx(dense_cka(states), abs=1e-4)


def test_layers_are_those_that_transformers_returns(base):
    passages = passages_of(40)
    reference = observe(base, passages)
    assert reference.layers == layer_names(3)
    assert reference.layers == ("embeddings", "block 1", "block 2", "final norm")
    with torch.no_grad():
        tokens = torch.tensor([passages[0].tokens])
        states = base(tokens, output_hidden_states=True).hidden_states
    for grams, expected in zip(reference.grams, states, strict=True):
        assert torch.allclose(grams[0][0], centred_gram(expected[0, 1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("modules", [("q_proj", "v_proj"), ("lm_head", "embed_tokens", "up_proj")])
def test_an_adapter_that_does_nothing_has_exactly_no_drift(base, modules):
    base = base if "lm_head" not in modules else small_model(tied=False)
    passages = passages_of(90, 61, 17, 5, 3)
    model = adapted(base, modules)
    with model.disable_adapter():
        switched_off = observe(model, passages, token_budget=128)
    for reference in (switched_off, observe(base, passages, token_budget=128)):
        drift = compare(reference, model)
        assert drift.kl.tolist() == [0] * 5
        assert drift.agreed.tolist() == drift.tokens.tolist()
        assert agreement(drift) == 1 and mean_kl(drift) == 0
        assert drift.cka.tolist() == [1] * 4
        for of_text in (True, False):
            kl, agreed = drift_records({}, drift, of_text)[:2]
            assert kl["value"] == 0 and np.isnan([kl["low"], kl["high"]]).all()
            assert agreed["high"] == 1 and 0 < agreed["low"] < 1  # of five passages


def test_an_adapter_against_itself_switched_off_is_the_dense_computation():
    model = adapted(small_model(tied=False), ("q_proj", "down_proj", "lm_head"), trained=True)
    passages = passages_of(60, 50)
    with model.disable_adapter():
        reference = observe(model, passages)
        plain = copy.deepcopy(model)
    drift = compare(reference, model)
    kl, agreed, states = dense(plain.unload(), model, passages)
    assert drift.kl == pytest.approx(kl, abs=1e-5) and min(kl) > 0.01
    assert drift.agreed.tolist() == agreed
    assert drift.cka == pytest.approx(dense_cka(states), abs=1e-5)


def test_batches_and_padding_do_not_count(base):
    tuned = tuned_copy(base)
    passages = passages_of(70, 12, 64, 41, 5, 70, 33)
    found = [compare(observe(base, passages, budget), tuned) for budget in (1, 150, 5_000)]
    assert [len(set(drift.batches)) for drift in found] == [7, 3, 1]
    for drift in found:
        assert drift.kl == pytest.approx(found[0].kl, abs=1e-5)
        assert drift.agreed.tolist() == found[0].agreed.tolist()
        assert len(drift.terms) == len(drift.batches)
    padded = compare(observe(base, passages[:2]), tuned)
    assert padded.kl == pytest.approx(found[0].kl[:2], abs=1e-5)
    assert padded.cka == pytest.approx(dense_cka(dense(base, tuned, passages[:2])[2]), abs=1e-5)


def test_the_first_position_is_left_out(base):
    """Token 0 stands first everywhere, and is all that the tuned embeddings have otherwise."""
    rng = np.random.default_rng(0)
    passages = [Passage([0, *rng.integers(1, VOCABULARY, size=40).tolist()]) for _ in range(4)]
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.get_input_embeddings().weight[0] *= 1_000
    drift = compare(observe(base, passages), tuned)
    assert drift.cka[0] == 1 and drift.cka[1] < 1
    assert drift.tokens.tolist() == [40] * 4


def test_a_base_that_is_overwritten_needs_a_copy_of_its_head(base):
    passages, model, tuned = passages_of(40, 30), copy.deepcopy(base), tuned_copy(base)
    expected = compare(observe(base, passages), tuned)
    references = [observe(model, passages, copy_head=kept) for kept in (False, True)]
    model.load_state_dict(tuned.state_dict())  # as the weights of full fine-tuning are
    with pytest.raises(ValueError, match="copy_head"):
        compare(references[0], model)
    found = compare(references[1], model)
    assert found.kl.tolist() == expected.kl.tolist()
    assert found.cka.tolist() == expected.cka.tolist()


def test_one_reference_serves_many_checkpoints(base):
    passages = passages_of(40, 30)
    reference = observe(base, passages)
    near, far = (compare(reference, tuned_copy(base, size)) for size in (0.01, 0.1))
    assert mean_kl(near) < mean_kl(far) and agreement(near) > agreement(far)
    assert (near.cka > far.cka).all()
    assert compare(reference, tuned_copy(base, 0.01)).kl.tolist() == near.kl.tolist()


def test_small_divergences_are_not_rounding(base):
    drift = compare(observe(base, passages_of(60)), tuned_copy(base, 1e-5))
    assert 0 < mean_kl(drift) < 1e-6


def test_passages_that_cannot_be_compared_are_refused(base):
    for bad in (Passage([]), Passage([1, 2], [2]), Passage([1, 2], [-1]), Passage([1, 2], [1, 1])):
        with pytest.raises(ValueError, match="a passage needs"):
            observe(base, [bad])
    broken = copy.deepcopy(base)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        compare(observe(base, passages_of(20)), broken)
    nothing = compare(observe(base, [Passage([5], [])]), base)
    assert np.isnan(mean_kl(nothing)) and np.isnan(nothing.cka).all()


def test_passages_are_limited_by_their_tokens():
    passages = passages_of(10, 20, 30, 1)
    assert limited(passages, 31) == passages[:2]
    assert limited(passages, 30) == passages[:2]
    assert limited(passages, 61) == passages


# ---------------------------------------------------------------------------------- memory


def test_memory_is_that_of_the_forward_pass_and_what_is_kept_of_the_base():
    """4,000 tokens: their logits would be 64 MB, the states of all layers 37 MB.

    What is kept is a tenth of SmolLM2's weights at 8,000 tokens; of this small model's more.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4_000,
        hidden_size=256,
        intermediate_size=1_024,
        num_hidden_layers=8,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    rng = np.random.default_rng(0)
    passages = [Passage(rng.integers(4_000, size=125).tolist()) for _ in range(32)]
    batch = torch.tensor([passage.tokens for passage in passages[:16]])
    with Allocations(model) as forward, torch.inference_mode():
        model(batch, use_cache=False, logits_to_keep=1)
    with Allocations(model) as whole:
        reference = observe(model, passages)
        compare(reference, model)
    tensors = [*reference.states, *(gram for layer in reference.grams for gram in layer)]
    stored = sum(tensor.nbytes for tensor in tensors)
    assert stored < 10e6
    assert weights + whole.peak - stored < 1.15 * (weights + forward.peak)
    assert whole.largest <= forward.largest
