"""Training throughput: this suite against Trainer and TRL as they are commonly used.

    python -m benchmarks.training_throughput --data FOLDER --json FILE

SmolLM2-135M, LoRA rank 8 on q_proj and v_proj, batches of 16 rows of the three classification
tasks, fp32 weights under bf16 autocast where the device has it. Every peer trains on the same rows:
a warm-up set, then a timed set. Each runs in a process of its own, in turn (A B C ... A B C ...).

    ours                    masked logits, lengths grouped in windows, attention by length
    grouped                 Trainer, dynamic padding, group_by_length, its default attention
    grouped_same_attention  the same with our attention
    padded                  Trainer, every row padded to 128 tokens
    trl                     SFTTrainer, completion-only loss, its defaults
    trl_plain               the same without its default activation checkpointing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.comparison import (
    benchmark_settings,
    build_parser,
    print_medians,
    print_ratios,
    write,
)
from config import FAMILIES, ROOT, UserError
from lora_tradeoffs.command_line import guarded, positive_int

PEERS = ("ours", "grouped", "grouped_same_attention", "padded", "trl", "trl_plain")
BATCH, WIDTH, RANK, SEED = 16, 128, 8, 42
# So small that the weights hardly move: then the mean loss over the same rows must be the same.
RATE = 1e-6

# ------------------------------------------------------------------- one peer, in its process


class Clock:
    """Seconds from the first fetch of a batch to the end of the last step."""

    def __init__(self) -> None:
        import torch
        from transformers import TrainerCallback

        clock = self

        class Callback(TrainerCallback):
            def on_epoch_begin(self, *_: Any, **__: Any) -> None:
                clock.start = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                clock.end = time.perf_counter()

        self.callback = Callback()
        self.start = self.end = 0.0


def rows_for(settings: Any, tokenizer: Any, steps: tuple[int, int]) -> tuple[Any, Any]:
    """Warm-up and timed rows, the tasks in equal parts, none above WIDTH tokens."""
    from datasets import concatenate_datasets

    from lora_tradeoffs.data.preparation import prepare

    prepared = prepare(settings, tokenizer, FAMILIES["similar"], WIDTH, 2_000)
    train = concatenate_datasets([prepared[task].split("train") for task in FAMILIES["similar"]])
    train = train.shuffle(seed=SEED)
    warm, timed = (n * BATCH for n in steps)
    if warm + timed > len(train):
        raise UserError(f"{len(train)} rows are too few for {sum(steps)} steps; lower --steps")
    return train.select(range(warm)), train.select(range(warm, warm + timed))


def adapted_model(base: Any, attention: str) -> Any:
    """The base with LoRA as any user of PEFT would build it."""
    from peft import LoraConfig, get_peft_model

    from lora_tradeoffs.models.base import load_base

    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]
    )
    return get_peft_model(load_base(base, attention=attention), adapter)


def arguments(folder: str, steps: int, bf16: bool, device: str) -> dict[str, Any]:
    """What all peers share."""
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": RATE,
        "bf16": bf16,
        "use_cpu": device == "cpu",
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
    }


def our_trainer(base: Any, tokenizer: Any, rows: Any, common: dict, model: Any) -> Any:
    import numpy as np
    from transformers import TrainingArguments

    from lora_tradeoffs.training.row_order import order_rows
    from lora_tradeoffs.training.trainer import MultiTaskTrainer

    order = order_rows([np.array(rows["length"])], np.ones(1), BATCH, common["max_steps"], SEED)
    extra = {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    return MultiTaskTrainer(
        our_config(),
        {},
        tokenizer.pad_token_id,
        model=model,
        args=TrainingArguments(**common, **extra),
        train_dataset=rows.select_columns(["input_ids", "prompt_length"]).select(order),
    )


def our_config() -> Any:
    from training_configs import TrainingConfig

    return TrainingConfig(
        family="similar",
        tasks=FAMILIES["similar"],
        rank=RANK,
        learning_rate=RATE,
        batch_size=BATCH,
        micro_batch_size=BATCH,
    )


def plain_trainer(base: Any, tokenizer: Any, rows: Any, common: dict, model: Any, pad: str) -> Any:
    """Trainer with labels of -100 on the prompt; rows grouped by length, or padded to WIDTH."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def features(row: dict[str, Any]) -> dict[str, Any]:
        ids, start = row["input_ids"], row["prompt_length"]
        labels = [-100] * start + ids[start:]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    columns = [c for c in rows.column_names if c not in ("input_ids", "length")]
    grouped = {"train_sampling_strategy": "group_by_length"} if pad == "longest" else {}
    return Trainer(
        model=model,
        args=TrainingArguments(**common, **grouped),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=pad, max_length=WIDTH),
        train_dataset=rows.map(features, remove_columns=columns),
    )


def trl_trainer(base: Any, tokenizer: Any, rows: Any, common: dict, model: Any, plain: bool) -> Any:
    from trl import SFTConfig, SFTTrainer

    extra = {"gradient_checkpointing": False} if plain else {}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**common, completion_only_loss=True, max_length=WIDTH, **extra),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )


def run_peer(peer: str, settings: Any, steps: tuple[int, int]) -> dict[str, Any]:
    """Train on the warm-up rows, then on the timed rows; returns the peer's row of the results."""
    from datasets import disable_progress_bars

    from lora_tradeoffs.hardware import peak_memory, pick_device, pick_precision, reset_peak_memory
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base, quiet_transformers
    from lora_tradeoffs.training.trainer import pick_attention
    from multi_task_training import build_model

    disable_progress_bars()
    device = pick_device()
    bf16 = pick_precision("auto", device) == "bf16"
    base = prepare_base(settings)
    tokenizer = load_tokenizer(base)
    warm, timed = rows_for(settings, tokenizer, steps)
    ours = pick_attention("auto", timed["length"], device, bf16)
    attention = ours if peer in ("ours", "grouped_same_attention") else "sdpa"
    if peer == "ours":
        model = build_model(base, our_config(), bf16, attention)
    else:
        model = adapted_model(base, attention)
    clock = Clock()
    reset_peak_memory(device)
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        for rows in (warm, timed):
            common = arguments(folder, len(rows) // BATCH, bf16, device)
            if peer == "ours":
                trainer = our_trainer(base, tokenizer, rows, common, model)
            elif peer.startswith("trl"):
                trainer = trl_trainer(base, tokenizer, rows, common, model, peer == "trl_plain")
            else:
                pad = "max_length" if peer == "padded" else "longest"
                trainer = plain_trainer(base, tokenizer, rows, common, model, pad)
            trainer.add_callback(clock.callback)
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "peer": peer,
        "examples_per_second": len(timed) / (clock.end - clock.start),
        "loss": statistics.fmean(losses),
        "peak_memory_bytes": peak_memory(device),
        "attention": attention,
        "environment": environment(device, bf16, timed),
    }


def environment(device: str, bf16: bool, rows: Any) -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    from lora_tradeoffs.hardware import describe_environment

    meta = describe_environment(device, bf16, "see rows", 1)
    try:
        meta["versions"]["trl"] = version("trl")
    except PackageNotFoundError:
        meta["versions"]["trl"] = "not installed"
    lengths = rows["length"]
    meta["shapes"] = {
        "batch": BATCH,
        "rows": len(rows),
        "mean_tokens": round(statistics.fmean(lengths), 1),
        "longest": max(lengths),
    }
    return meta


# ------------------------------------------------------------------------- all peers, in turn


def spawn(peer: str, settings: Any, steps: tuple[int, int]) -> dict[str, Any]:
    """Run a peer in a process of its own; it writes its results to a file."""
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.training_throughput", "--child", peer]
        command += ["--steps", *map(str, steps), "--json", str(file)]
        command += ["--preset", settings.preset.name, "--study", settings.study]
        command += ["--model", settings.model, "--data", settings.data]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
        if process.returncode:
            lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
            raise UserError(f"{peer} failed: {lines[-1]}")
        return json.loads(file.read_text(encoding="utf-8"))


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per round, our examples/s over the peer's."""
    speed = {(r["peer"], r["round"]): r["examples_per_second"] for r in rows}
    rounds = sorted({r["round"] for r in rows})
    peers = dict.fromkeys(r["peer"] for r in rows if r["peer"] != "ours")
    return {
        f"ours/{peer}": [round(speed["ours", i] / speed[peer, i], 3) for i in rounds]
        for peer in peers
    }


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="peers to compare (default all)")
    parser.add_argument(
        "--steps",
        nargs=2,
        type=positive_int,
        metavar=("WARM_UP", "TIMED"),
        help="optimizer steps before and while the clock runs (default 5 20)",
    )
    parser.add_argument("--child", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    settings = benchmark_settings(args)
    from lora_tradeoffs.files import write_json

    steps = tuple(args.steps or ((1, 3) if args.quick else (5, 20)))
    if args.child:
        write_json(args.json, run_peer(args.child, settings, steps))
        return 0
    from tqdm import tqdm

    peers = args.peers or (("grouped",) if args.quick else PEERS)
    peers = ["ours", *(p for p in peers if p != "ours")]
    rows = []
    for number, peer in tqdm([(i, p) for i in range(args.pairs) for p in peers]):
        rows.append({"round": number, **spawn(peer, settings, steps)})
    meta = rows[0]["environment"] | {"steps": {"warm_up": steps[0], "timed": steps[1]}}
    rows = [{k: v for k, v in row.items() if k != "environment"} for row in rows]
    ratios = ratios_of(rows)
    print_medians(rows, ["peer", "attention"])
    print_ratios(ratios)
    write(args.json, meta, ratios, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
