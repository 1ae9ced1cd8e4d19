"""The parts of gpu_check.py that measure speed and memory, at the shape of Llama-3.2-1B."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import timed

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from benchmarks.gpu_check import Checks
    from config import Settings

LLAMA = dict(  # Llama-3.2-1B
    vocab_size=128_256,
    hidden_size=2_048,
    intermediate_size=8_192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
)
TWO_LAYERS = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FASTER = 1.5  # than the plain Trainer, at Llama's shape


def at_shape(checks: Checks) -> Settings:
    """Settings whose model has Llama's shape and random weights, and SmolLM2's tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    folder = checks.settings.output_dir / "shape"
    if not folder.is_dir():
        tokenizer = load_tokenizer(prepare_base(checks.settings))
        torch.manual_seed(0)
        # stored in bf16, which is fewer bytes; it is loaded in fp32
        model = LlamaForCausalLM(shape(checks, tokenizer)).to(torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return dataclasses.replace(checks.settings, model=str(folder))


def shape(checks: Checks, tokenizer: Any) -> LlamaConfig:
    from transformers import LlamaConfig

    sizes = {"vocab_size": len(tokenizer), **(TWO_LAYERS if checks.quick else LLAMA)}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id")}
    return LlamaConfig(tie_word_embeddings=True, **ids, **sizes)


def training_speed(checks: Checks) -> None:
    """LoRA 8 against the plain Trainer on the same rows: tokens/s, and the share of bf16's peak."""
    from benchmarks.training_throughput import ratios_of, run_peer
    from lora_tradeoffs.hardware import release_memory
    from lora_tradeoffs.models.base import empty_model, read_model_config

    settings, rows = at_shape(checks), []
    for number in range(checks.pairs):
        for peer in ("ours", "grouped"):
            steps = (1, 2) if checks.quick else (5, 20)
            rows.append({"round": number, **run_peer(peer, settings, steps)})
            release_memory()
    model = empty_model(read_model_config(settings), settings.model)
    layers = sum(weight.numel() for weight in model.model.layers.parameters())
    peak = bf16_peak(checks.device)
    for row in rows:
        tokens = row["examples_per_second"] * row.pop("environment")["shapes"]["mean_tokens"]
        # forward, and backward to the inputs of every layer: LoRA's gradients of weights are small
        share = 2 * 2 * layers * tokens / peak
        row |= {"tokens_per_second": tokens, "share_of_peak": share}
    ours, peer = ([r["loss"] for r in rows if r["peer"] == name] for name in ("ours", "grouped"))
    checks.check("loss of ours over the Trainer's - 1", abs(ours[0] / peer[0] - 1), 0.02)
    (ratios,) = ratios_of(rows).values()
    checks.figures["training"] = {"ratios": ratios, "bf16_peak": peak, "rows": rows}
    if not checks.quick:
        ratio = statistics.median(ratios)
        checks.check("training, times as fast as the Trainer", ratio, FASTER, at_least=True)


def bf16_peak(device: str) -> float:
    """Multiplications and additions a second of large bf16 matrices, measured."""
    import torch

    n = 8_192 if device == "cuda" else 512
    matrix = torch.randn(n, n, device=device, dtype=torch.bfloat16)

    def multiply(times: int) -> float:
        for _ in range(times):
            product = matrix @ matrix
        return float(product[0, 0])  # waits for the device

    multiply(3)
    return 2 * n**3 * 20 / timed(multiply, 20)[0]


def measuring_speed(checks: Checks) -> None:
    """HellaSwag against lm-eval, and generation against `generate`, in bf16."""
    from lora_tradeoffs.files import read_json

    settings = at_shape(checks)
    size = ["--items", 4] if checks.quick else []
    new_tokens = 4 if checks.quick else 64
    for name, flags in {
        "retention_speed": ["--benchmarks", "hellaswag"],
        "evaluation_speed": ["--tasks", "squad_v2", "--new-tokens", new_tokens],
    }.items():
        file = settings.output_dir / f"{name}.json"
        flags += ["--dtype", "bf16", "--pairs", checks.pairs, "--json", file, *size]
        checks.command(f"benchmarks.{name}", "--model", settings.model, *flags)
        figures = read_json(file)
        for row in figures["rows"]:
            row["items_per_second"] = row["items"] / row["ours_seconds"]
            if name == "evaluation_speed":  # random weights rarely end an answer
                row["most_tokens_per_second"] = row["items_per_second"] * new_tokens
        checks.figures[name] = {"ratios": figures["ratios"], "rows": figures["rows"]}


def memory(checks: Checks) -> None:
    """The peak of a run of each arm is at most what --dry-run expects."""
    from lora_tradeoffs.files import read_json
    from lora_tradeoffs.hardware import pick_precision
    from lora_tradeoffs.models.base import empty_model, read_model_config
    from lora_tradeoffs.training.costs import expected_cost
    from training_configs import TrainingConfig

    settings = at_shape(checks)
    flags = ["--model", settings.model, "--tasks", "squad_v2", "--lora", 8, "--full-finetune"]
    flags += ["--seed", 42, "--max-steps", 2, "--limit", 64, "--set", "checkpoints=1"]
    rows = 2 if checks.quick else 16  # of SQuAD, which fill most of 384 tokens
    flags += [f"batch_size={rows}", f"micro_batch_size={rows}", "max_length=384"]
    flags += ["eval_examples_per_task=4", "report_to=none"]
    checks.command("multi_task_training", *flags, study="memory")
    architecture = empty_model(read_model_config(settings), settings.model)
    for run in checks.runs("memory"):
        values = read_json(run / "run.json")["config"]
        names = {f.name for f in dataclasses.fields(TrainingConfig)}
        config = {name: value for name, value in values.items() if name in names}
        config = TrainingConfig(**config | {"tasks": tuple(config["tasks"])})
        bf16 = pick_precision(config.dtype, checks.device) == "bf16"
        expected = expected_cost(architecture, config, bf16).memory
        peak = read_json(run / "training.json")["peak_memory_bytes"]
        checks.figures[f"memory_{config.method}"] = {"expected": expected, "peak": peak}
        if checks.device == "cuda":  # on a CPU the peak is this process's, whatever it did before
            checks.check(f"peak memory of {config.method} over the expected", peak / expected, 1.0)
