"""The Trainer of the study: one path for LoRA and for full fine-tuning.

Weights are fp32 and computed with under bf16 autocast in every arm. The loss is taken on the
completions alone, and logits are computed at their positions alone.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed

from config import Diverged, UserError
from lora_tradeoffs.data.collator import IGNORED, CompletionCollator
from lora_tradeoffs.files import (
    checkpoint_step,
    checkpoints,
    drop_resume_state,
    read_json,
    write_manifest,
)
from lora_tradeoffs.models.base import Base, load_base, store_frozen_linears_in_bf16
from lora_tradeoffs.scoring.log_likelihoods import completion_losses, label_predictions, mean_by_row
from lora_tradeoffs.training.costs import trainable_shapes
from training_configs import TrainingConfig


def build_model(base: Base, config: TrainingConfig, bf16: bool, attention: str) -> PreTrainedModel:
    """The base in fp32 with what the arm trains made trainable; started from the run's seed."""
    set_seed(config.seed)
    model = load_base(base, attention=attention)
    model.config.use_cache = False
    shapes = trainable_shapes(model, config)
    if config.method == "full":
        return model
    if config.method == "full_qv":
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in config.modules:
                module.requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.scaling == "rslora",
        lora_dropout=config.lora_dropout,
        target_modules=list(config.modules),
    )
    model = get_peft_model(model, adapter)
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    assert adapted == len(shapes), f"{adapted} of {len(shapes)} layers got an adapter"
    if bf16:
        store_frozen_linears_in_bf16(model.get_base_model())
    return model


class CompletionLoss:
    """The training loss: every row weighs the same, or every supervised token.

    `example`: the mean over the step's rows of each row's mean token loss. `token`: the mean over
    the step's tokens. Exact under gradient accumulation and over several devices: both divide by a
    count of the whole step.
    """

    def __init__(self, weighting: str, rows_per_step: int) -> None:
        self.weighting, self.rows_per_step = weighting, rows_per_step

    def __call__(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor
    ) -> torch.Tensor:
        losses, rows = completion_losses(outputs.logits, labels, IGNORED)
        if self.weighting == "token":
            return losses.sum() / num_items_in_batch
        return mean_by_row(losses, rows, len(labels)).sum() / self.rows_per_step


class MultiTaskTrainer(Trainer):
    """Trainer over rows in their laid-out order, with a validation of its own per task.

    `eval_dataset` maps a task to its validation rows, `label_ids` a classification task to the
    tokens of its label words.
    """

    def __init__(
        self,
        config: TrainingConfig,
        label_ids: dict[str, list[int]],
        pad_token_id: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_collator=CompletionCollator(pad_token_id),
            compute_loss_func=CompletionLoss(config.loss_weighting, config.batch_size),
            **kwargs,
        )
        self.config, self.label_ids = config, label_ids
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise UserError("FSDP and DeepSpeed are not supported; accelerate launch --multi_gpu")

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Per task the mean over rows of the row's mean token loss, and label accuracy."""
        self.model.eval()
        metrics = {}
        for task, rows in self.eval_dataset.items():
            loss, hits, count = self._validate(task, rows)
            metrics[f"eval_{task}_loss"] = loss / count
            if task in self.label_ids:
                metrics[f"eval_{task}_accuracy"] = hits / count
        metrics["eval_loss"] = sum(metrics[f"eval_{t}_loss"] for t in self.eval_dataset) / len(
            self.eval_dataset
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @torch.no_grad()
    def _validate(self, task: str, rows: Dataset) -> tuple[float, float, float]:
        """Sums over all devices of the rows' losses, of right labels, and of rows."""
        size, rank, world = (
            self.config.eval_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        mine = rows.select(range(rank, len(rows), world))
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(0, len(mine), size)
        for start in tqdm(starts, desc=f"validate {task}", leave=False, disable=rank > 0):
            items = mine.select(range(start, min(start + size, len(mine)))).to_list()
            batch = self._prepare_inputs(self.data_collator(items))
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            losses, row = completion_losses(logits, labels, IGNORED)
            sums[0] += mean_by_row(losses, row, len(items)).sum().item()
            sums[2] += len(items)
            if task in self.label_ids:
                first = torch.searchsorted(row, torch.arange(len(items), device=row.device))
                predicted = label_predictions(logits[first], self.label_ids[task]).tolist()
                sums[1] += sum(p == r["label"] for p, r in zip(predicted, items))
        sums = self.accelerator.reduce(sums.to(self.args.device, self._sum_dtype()), "sum")
        return tuple(sums.tolist())

    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.args.device.type == "mps" else torch.float64

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Weights and configuration as safetensors; no tokenizer (tokenizer/ has it), no pickle."""
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            # PEFT might otherwise ask the Hub whether the embeddings were changed
            extra = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
            model.save_pretrained(output_dir or self.args.output_dir, **extra)


class RunCallback(TrainerCallback):
    """Saves and validates on the run's grid, seals checkpoints, keeps the log, obeys signals.

    `stopped` says whether the user asked to end; the newest state is then saved first. `seconds`
    are of training alone, validating and saving left out; both counts are over all parts of a run.
    """

    def __init__(
        self, run_dir: Path, log_file: Path, grid: list[int], stopped: Callable[[], bool]
    ) -> None:
        self.run_dir, self.log_file, self.grid, self.stopped = run_dir, log_file, grid, stopped
        self.trainer: MultiTaskTrainer | None = None
        self.seconds, self.wall_before = 0.0, 0.0
        self.began: float | None = None  # the steps since the last pause
        self.created = time.perf_counter()

    @property
    def wall_seconds(self) -> float:
        """Seconds with all that a run does beside training."""
        return self.wall_before + time.perf_counter() - self.created

    def resume_from(self, checkpoint: Path) -> None:
        manifest = read_json(checkpoint / "manifest.json")
        self.seconds = manifest["seconds"]
        self.wall_before = manifest.get("wall_seconds", self.seconds)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        stop = self.stopped()
        if args.world_size > 1:  # a signal may reach the processes at different steps
            flag = torch.tensor(float(stop), device=args.device)
            stop = self.trainer.accelerator.reduce(flag, "sum").item() > 0
        control.should_evaluate = state.global_step in self.grid
        control.should_save = control.should_evaluate or stop
        control.should_training_stop |= stop
        if control.should_save:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self.began
            self.began = None

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()  # every process writes its RNG state
        if not state.is_world_process_zero:
            return
        newest = self.run_dir / f"checkpoint-{state.global_step}"
        clocks = {"seconds": self.seconds, "wall_seconds": self.wall_seconds}
        write_manifest(newest, step=state.global_step, **clocks)
        for checkpoint in checkpoints(self.run_dir)[:-2]:
            drop_resume_state(checkpoint)
        for checkpoint in checkpoints(self.run_dir)[:-1]:
            if checkpoint_step(checkpoint) not in self.grid:  # saved at a signal, outlived now
                _remove(checkpoint)

    def on_log(
        self, args: TrainingArguments, state: Any, control: Any, logs: dict, **_: Any
    ) -> None:
        broken = [name for name in ("loss", "eval_loss") if not math.isfinite(logs.get(name, 0.0))]
        if broken:
            raise Diverged(
                f"{broken[0]} is {logs[broken[0]]} at step {state.global_step}; try a lower rate,"
                f" --set learning_rate={args.learning_rate / 3:.1e}"
            )
        if state.is_world_process_zero:
            with self.log_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def _remove(checkpoint: Path) -> None:
    import shutil

    (checkpoint / "manifest.json").unlink()  # first, so that what is left is not whole
    shutil.rmtree(checkpoint)


def checkpoint_grid(steps: int, count: int) -> list[int]:
    """The steps of `count` evenly spaced checkpoints, the last at the end."""
    return sorted({max(1, round(steps * i / count)) for i in range(1, count + 1)})


def training_arguments(
    config: TrainingConfig, run_dir: Path, steps: int, bf16: bool, device: str, world_size: int
) -> TrainingArguments:
    """Trainer's arguments. Raises UserError if the batch cannot be cut for the devices."""
    micro = min(config.micro_batch_size, max(1, config.batch_size // world_size))
    accumulation, rest = divmod(config.batch_size, micro * world_size)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of micro_batch_size {micro} times"
            f" {world_size} device(s); change one with --set"
        )
    recompute = "activation_checkpointing"
    if not hasattr(TrainingArguments, recompute):
        recompute = "gradient_checkpointing"  # its name before transformers 5.21
    arguments = TrainingArguments(
        **{recompute: config.activation_checkpointing},
        output_dir=str(run_dir),
        max_steps=steps,
        num_train_epochs=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        # a count, since Trainer reads 1.0 as one step and a share only below 1
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not replaced by a mean
        save_strategy="no",  # RunCallback saves and validates on the grid
        eval_strategy="no",
        eval_on_start=True,
        report_to=config.report_to,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )
    if world_size == 1 and arguments.n_gpu > 1:
        # Trainer would take nn.DataParallel, which multiplies the batch and splits the loss's mask
        print(f"using one of {arguments.n_gpu} GPUs; accelerate launch uses all")
        arguments._n_gpu = 1
    return arguments
