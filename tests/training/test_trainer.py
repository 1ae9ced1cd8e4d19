"""The model that is built, the loss, and what is saved."""

import dataclasses

import pytest
import torch
from support import settings_for

from config import FAMILIES, UserError
from lora_tradeoffs.data.collator import CompletionCollator
from lora_tradeoffs.models.base import empty_model, load_base, read_model_config
from lora_tradeoffs.scoring.log_likelihoods import completion_losses, label_predictions, mean_by_row
from lora_tradeoffs.training.costs import Cost, check_room, expected_cost
from lora_tradeoffs.training.schedule import checkpoint_steps
from lora_tradeoffs.training.trainer import CompletionLoss, MultiTaskTrainer, training_arguments
from multi_task_training import build_model
from training_configs import default_config


def config_of(method="lora", rank=4, **changes):
    settings = settings_for(study="trainer")
    config = default_config(settings, FAMILIES["similar"], method, rank, 42, 32)
    return dataclasses.replace(config, dtype="fp32", report_to="none", **changes)


def some_rows(count=8):
    random = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        length = 6 + 3 * i
        ids = torch.randint(5, 1000, (length,), generator=random).tolist()
        rows.append({"input_ids": ids, "prompt_length": length - 1 - i % 4 - 1, "label": i % 2})
    return rows


def one_row_at_a_time(model, rows, weighting):
    """Gradient of the loss by dense logits, row by row, without a collator or padding."""
    model.zero_grad()
    tokens = sum(len(r["input_ids"]) - r["prompt_length"] for r in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        start = row["prompt_length"]
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nll = -log_probs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        loss = nll.mean() / len(rows) if weighting == "example" else nll.sum() / tokens
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["lora", "full", "full_qv"])
@pytest.mark.parametrize("weighting", ["example", "token"])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_of_a_step_equal_one_row_at_a_time(
    base, tmp_path, method, weighting, recompute
):
    """Through the Trainer itself, with accumulation: two micro-batches of four rows."""
    rows = some_rows()
    config = config_of(
        method,
        4 if method == "lora" else 0,
        loss_weighting=weighting,
        batch_size=8,
        micro_batch_size=4,
        max_grad_norm=0.0,
        activation_checkpointing=recompute,
    )
    model = build_model(base, config, bf16=False, attention="sdpa")
    if method == "lora":
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    expected, expected_gradients = one_row_at_a_time(model, rows, weighting)
    arguments = training_arguments(config, tmp_path, 1, False, "cpu", 1)
    arguments.eval_on_start = False
    arguments.logging_steps = 1
    seen = {}

    class Recorder(MultiTaskTrainer):
        def _get_grad_norm(self, model, grad_norm=None):
            seen.update(gradients(model))
            return super()._get_grad_norm(model, grad_norm=grad_norm)

    trainer = Recorder(config, {}, 2, model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-5)
    assert seen.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert torch.allclose(seen[name], gradient, atol=1e-5), name


def test_validation_equals_one_row_at_a_time(base, tmp_path):
    from datasets import Dataset

    rows, ids = some_rows(), [11, 12]
    config = config_of("full", 0, eval_batch_size=3)
    model = build_model(base, config, bf16=False, attention="sdpa").eval()
    trainer = MultiTaskTrainer(
        config,
        {"sst2": [[i] for i in ids]},
        2,
        model=model,
        args=training_arguments(config, tmp_path, 1, False, "cpu", 1),
        train_dataset=rows,
        eval_dataset={"sst2": Dataset.from_list(rows)},
    )
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = one_row_losses(model, rows)
        hits = [
            model(torch.tensor([r["input_ids"]])).logits[0, r["prompt_length"] - 1, ids].argmax()
            == r["label"]
            for r in rows
        ]
    assert metrics["eval_sst2_loss"] == pytest.approx(expected, abs=1e-5)
    assert metrics["eval_sst2_accuracy"] == pytest.approx(sum(hits) / len(hits))


def one_row_losses(model, rows):
    losses = []
    for row in rows:
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_length"]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs[range(start - 1, ids.shape[1] - 1), ids[0, start:]].mean())
    return torch.stack(losses).mean().item()


def test_frozen_linears_in_bf16_leave_logits_and_gradients_equal_bit_for_bit(base):
    """Against the same adapter on fp32 weights that autocast casts anew each time."""
    config = config_of(rank=4)
    batch = CompletionCollator(2)(some_rows())
    labels = batch.pop("labels")
    found = []
    for stored in (False, True):
        model = build_model(base, config, bf16=stored, attention="eager")
        dtypes = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert dtypes == ({torch.float32, torch.bfloat16} if stored else {torch.float32})
        assert model.get_input_embeddings().weight.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch).logits
        losses, rows = completion_losses(logits, labels)
        mean_by_row(losses, rows, len(labels)).sum().backward()
        found.append((logits, gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name]), name


@pytest.mark.parametrize(
    ("method", "rank", "changes", "trained"),
    [
        ("lora", 4, {}, ("lora_A", "lora_B")),
        ("lora", 4, {"target_modules": "all"}, ("lora_A", "lora_B")),
        ("full_qv", 0, {}, ("q_proj.weight", "v_proj.weight")),
        ("full", 0, {}, ("weight",)),
    ],
)
def test_an_arm_trains_what_it_says_and_the_plan_counts_it(base, method, rank, changes, trained):
    config = config_of(method, rank, **changes)
    model = build_model(base, config, bf16=False, attention="sdpa")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all(any(part in name for part in trained) for name in names)
    empty = empty_model(read_model_config(settings_for(model=str(base.folder))), "tiny")
    counted = expected_cost(empty, config, bf16=True).trainable
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_llama_1b_has_106496_trainable_parameters_a_rank():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )
    model = empty_model(config, "Llama-3.2-1B")
    cost = expected_cost(model, config_of(rank=16), bf16=True)
    assert cost.trainable == 106_496 * 16
    assert cost.parameters == 1_235_814_400
    full = expected_cost(model, config_of("full", 0), bf16=True)
    assert full.disk == 3 * 4 * cost.parameters + 2 * 8 * cost.parameters  # the demo's three


def test_lora_starts_at_the_base_and_saves_the_adapter_alone(base, tmp_path):
    from peft import PeftModel

    config = config_of(rank=4)
    model = build_model(base, config, bf16=True, attention="sdpa")
    arguments = training_arguments(config, tmp_path, 1, False, "cpu", 1)
    trainer = MultiTaskTrainer(
        config, {}, 2, model=model, args=arguments, train_dataset=some_rows()
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.save_model(str(tmp_path / "saved"))
    assert {p.name for p in (tmp_path / "saved").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    loaded = PeftModel.from_pretrained(load_base(base), tmp_path / "saved")
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    lora = [name for name in theirs if "lora_" in name]
    assert len(lora) == 2 * 2 * 2
    assert all(torch.equal(ours[name], theirs[name]) for name in lora)


def test_a_rank_above_the_matrix_is_refused(base):
    with pytest.raises(UserError, match=r"above the smallest matrix it would adapt \(16\)"):
        build_model(base, config_of(rank=17), bf16=False, attention="sdpa")


def test_batches_that_cannot_be_cut_for_the_devices_are_refused(tmp_path):
    config = config_of(batch_size=10, micro_batch_size=4)
    with pytest.raises(UserError, match="batch_size 10 is not a multiple"):
        training_arguments(config, tmp_path, 1, False, "cpu", 1)
    arguments = training_arguments(
        config_of(batch_size=16, micro_batch_size=4), tmp_path, 1, False, "cpu", 2
    )
    assert arguments.gradient_accumulation_steps == 2


def test_several_gpus_without_a_launcher_are_not_a_larger_batch(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(lambda self: None))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 4, raising=False)
    config = config_of(batch_size=16, micro_batch_size=8)
    arguments = training_arguments(config, tmp_path, 1, False, "cuda", 1)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 8


def test_checkpoints_are_evenly_spaced_and_the_last_is_the_end():
    assert checkpoint_steps(100, 10) == list(range(10, 101, 10))
    assert checkpoint_steps(7, 3) == [2, 5, 7]
    assert checkpoint_steps(3, 10) == [1, 2, 3]


def test_a_full_disk_and_a_small_memory_are_seen_before_the_run(tmp_path):
    with pytest.raises(UserError, match=r"GB free and the run needs 1000000\.0 GB"):
        check_room(Cost(1, 1, 1, 10**15), tmp_path / "not" / "there", "cpu")
    with pytest.raises(UserError, match=r"cpu has .* of memory free"):
        check_room(Cost(1, 1, 10**15, 1), tmp_path, "cpu")


def test_label_predictions_are_the_argmax_over_the_label_words():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 3.0, 8.0]])
    assert label_predictions(logits, [1, 2]).tolist() == [1, 0]


def test_the_weightings_differ_as_they_should():
    """Two rows of 1 and 3 tokens whose losses are all 1 and all 2, by hand."""
    labels = torch.tensor([[-100, 0, -100, -100], [-100, 0, 0, 0]])
    logits = torch.tensor([[0.0, v] for v in (1.0, 2.0, 2.0, 2.0)]) * 1.0
    nll = torch.log1p(torch.exp(torch.tensor([1.0, 2.0])))
    outputs = type("Outputs", (), {"logits": logits})
    example = CompletionLoss("example", 2)(outputs, labels, torch.tensor(4))
    token = CompletionLoss("token", 2)(outputs, labels, torch.tensor(4))
    assert example.item() == pytest.approx(nll.mean().item())
    assert token.item() == pytest.approx(((nll[0] + 3 * nll[1]) / 4).item())
