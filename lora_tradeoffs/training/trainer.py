"""The Trainer of the study: its loss, validation, callback and arguments, the same for every arm.

Weights are fp32; the forward pass runs under bf16 autocast where the device supports it. Loss and
logits are computed at the completions' tokens only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from config import UserError
from lora_tradeoffs.checkpoints import (
    UNCONVERTED,
    checkpoint_step,
    checkpoints,
    drop_resume_state,
    write_manifest,
)
from lora_tradeoffs.data.collator import IGNORED, CompletionCollator
from lora_tradeoffs.files import read_json
from lora_tradeoffs.hardware import widest_float
from lora_tradeoffs.scoring.log_likelihoods import (
    best_continuations,
    completion_losses,
    label_predictions,
    log_likelihoods,
    mean_by_row,
)
from lora_tradeoffs.scoring.rows import Item
from lora_tradeoffs.shapes import NUMBER
from lora_tradeoffs.trackers import TrackedArguments
from lora_tradeoffs.training.schedule import Diverged
from training_configs import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Below this many tokens (95th percentile) eager attention trains faster than sdpa under bf16 on a
# CPU, whose sdpa backward is slow: 15.4 against 10.9 examples/s at 56 tokens, 0.7 to 1.4 at 512.
EAGER_BELOW = 350


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
    """A Trainer with CompletionLoss, and a validation per task in place of Trainer's.

    `eval_dataset` maps each task to its validation rows, `label_ids` each task with choices to
    their tokens ([]: they are in the rows).
    """

    def __init__(
        self,
        config: TrainingConfig,
        label_ids: dict[str, list[list[int]]],
        pad_token_id: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_collator=CompletionCollator(pad_token_id),
            compute_loss_func=CompletionLoss(config.loss_weighting, config.batch_size),
            **kwargs,
        )
        self.config, self.label_ids = config, label_ids
        self.initial_adapter: Path | None = None
        if config.method == "pissa" and self.args.should_save:
            self._temporary = TemporaryDirectory()  # lives as long as this object
            self.initial_adapter = Path(self._temporary.name) / "initial"
            self.model.save_pretrained(self.initial_adapter, save_embedding_layers=False)
        if self.is_deepspeed_enabled:
            raise UserError("DeepSpeed is not supported; launch with --multi_gpu")

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Per task the mean over rows of the row's mean token loss, and the label accuracy."""
        self.model.eval()
        if callable(getattr(self.optimizer, "eval", None)):  # as of schedule-free optimizers
            self.optimizer.eval()
        metrics = {}
        for task, rows in self.eval_dataset.items():
            loss, correct, count = self._validate(task, rows)
            metrics[f"eval_{task}_loss"] = loss / count
            if task in self.label_ids:
                metrics[f"eval_{task}_accuracy"] = correct / count
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
        """Sums over all devices: the rows' losses, the correct labels, the rows."""
        size, rank = self.config.eval_batch_size, self.args.process_index
        shards = 1 if self.is_fsdp_enabled else self.args.world_size  # FSDP: all run each batch
        rows = rows.select(range(rank % shards, len(rows), shards))
        sums = torch.zeros(3, dtype=torch.float64)
        starts = range(0, len(rows), size)
        for start in tqdm(starts, desc=f"validate {task}", leave=False, disable=rank > 0):
            items = rows.select(range(start, min(start + size, len(rows)))).to_list()
            batch = self._prepare_inputs(self.data_collator(items))
            labels = batch.pop("labels")
            with self.accelerator.autocast():
                logits = self.model(**batch).logits
            losses, row = completion_losses(logits, labels, IGNORED)
            sums[0] += mean_by_row(losses, row, len(items)).sum().item()
            sums[2] += len(items)
            if task in self.label_ids:
                first = torch.searchsorted(row, torch.arange(len(items), device=row.device))
                predicted = self._predictions(items, logits[first], self.label_ids[task])
                sums[1] += sum(p == r["label"] for p, r in zip(predicted, items))
        sums = sums.to(self.args.device, widest_float(self.args.device))
        return tuple(self.accelerator.reduce(sums, "sum").tolist())

    def _predictions(
        self, items: list[dict[str, Any]], logits: torch.Tensor, choices: list[list[int]]
    ) -> list[int]:
        """The most likely choice of each item; `logits` are those of the token after its prompt."""
        if choices and all(len(tokens) == 1 for tokens in choices):
            return label_predictions(logits, [token for (token,) in choices]).tolist()
        asked = [
            Item(i["input_ids"][: i["prompt_length"]], i.get("choices") or choices) for i in items
        ]
        with self.accelerator.autocast():
            return best_continuations(
                log_likelihoods(self.accelerator.unwrap_model(self.model), asked)
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights as safetensors and the configuration; no tokenizer, no pickle.

        PiSSA has moved the principal part of W0 to its factors. PEFT converts it to a LoRA of twice
        the rank over W0; the factors that are trained are kept beside it, to resume with.
        """
        extra: dict[str, Any] = {}
        if self.is_fsdp_enabled:  # all processes gather the weights
            extra["state_dict"] = self.accelerator.get_state_dict(self.model)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "peft_config"):  # PEFT might ask the Hub whether embeddings were changed
            extra["save_embedding_layers"] = False
        if self.initial_adapter is None:
            model.save_pretrained(folder, **extra)
            return
        model.save_pretrained(folder / UNCONVERTED, **extra)
        initial = str(self.initial_adapter)
        with torch.random.fork_rng():  # it loads the initial adapter, into one with random weights
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=initial, **extra)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        unconverted = Path(resume_from_checkpoint) / UNCONVERTED
        folder = unconverted if unconverted.is_dir() else resume_from_checkpoint
        super()._load_from_checkpoint(str(folder), model)


class RunCallback(TrainerCallback):
    """Saves and validates at the checkpoint steps, writes manifests and the log, obeys signals.

    Once `signals` holds a signal, the current state is saved and training stops. `seconds` counts
    training only, without validation and saving; both clocks include the parts before a resume.
    """

    def __init__(
        self, run_dir: Path, log_file: Path, checkpoint_steps: list[int], signals: list[int]
    ) -> None:
        self.run_dir, self.log_file, self.signals = run_dir, log_file, signals
        self.checkpoint_steps = checkpoint_steps
        self.trainer: MultiTaskTrainer | None = None
        self.seconds, self.wall_before = 0.0, 0.0
        self.began: float | None = None  # when training started or went on after a checkpoint
        self.created = time.perf_counter()

    @property
    def wall_seconds(self) -> float:
        """Seconds of the whole run, validation and saving included."""
        return self.wall_before + time.perf_counter() - self.created

    def resume_from(self, checkpoint: Path) -> None:
        shape = {"seconds": NUMBER, "wall_seconds?": NUMBER}
        manifest = read_json(checkpoint / "manifest.json", shape)
        self.seconds = manifest["seconds"]
        self.wall_before = manifest.get("wall_seconds", self.seconds)

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.began = self.began or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        stop = bool(self.signals)
        if args.world_size > 1:  # a signal may reach the processes at different steps
            flag = torch.tensor(float(stop), device=args.device)
            stop = self.trainer.accelerator.reduce(flag, "sum").item() > 0
        control.should_evaluate = state.global_step in self.checkpoint_steps
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
            if checkpoint_step(checkpoint) not in self.checkpoint_steps:  # saved at a signal
                (checkpoint / "manifest.json").unlink()  # without it the rest is no checkpoint
                shutil.rmtree(checkpoint)

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


def pick_attention(
    requested: str, lengths: np.ndarray, device: str, bf16: bool, default: str = "sdpa"
) -> str:
    """The requested attention; for `auto` the one that trains rows of these lengths faster.

    `default` is the model's `default_attention`. Raises UserError for sdpa where it is eager.
    """
    if requested == "sdpa" != default:
        raise UserError(
            "this model caps its attention scores, which sdpa cannot do; leave out --set"
            " attention=sdpa"
        )
    if requested != "auto":
        return requested
    is_short = np.percentile(lengths, 95) < EAGER_BELOW
    return "eager" if device == "cpu" and bf16 and is_short else default


def training_arguments(
    config: TrainingConfig, run_dir: Path, steps: int, bf16: bool, device: str, world_size: int
) -> TrackedArguments:
    """Trainer's arguments. Raises UserError if the batch cannot be divided among the devices."""
    micro = min(config.micro_batch_size, max(1, config.batch_size // world_size))
    accumulation, rest = divmod(config.batch_size, micro * world_size)
    if rest:
        raise UserError(
            f"batch_size {config.batch_size} is not a multiple of micro_batch_size {micro} times"
            f" {world_size} device(s); change one with --set"
        )
    arguments = TrackedArguments(
        output_dir=str(run_dir),
        max_steps=steps,
        num_train_epochs=1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        # a count: Trainer takes values below 1 for a share, and 1.0 for one step
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        optim=config.optim,
        optim_args=config.optim_args or None,
        optim_target_modules=_names(config.optim_target_modules),
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=config.activation_checkpointing,
        bf16=bf16,
        use_cpu=device == "cpu",
        seed=config.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not replaced by a mean
        save_strategy="no",  # RunCallback saves and validates
        eval_strategy="no",
        eval_on_start=True,
        dataloader_pin_memory=device == "cuda",
        ddp_find_unused_parameters=False,
    )
    if world_size == 1 and arguments.n_gpu > 1:
        # Trainer would take nn.DataParallel, which multiplies the batch and splits the loss's mask
        print(f"using one of {arguments.n_gpu} GPUs; accelerate launch uses all")
        arguments._n_gpu = 1
    return arguments


def _names(text: str) -> list[str] | str | None:
    return text if text in ("all-linear", "all_linear") else text.split(",") if text else None


PROBES = ("7", "0.3", "true", "float16")  # values that an argument of an optimizer may have


def check_optimizer(config: TrainingConfig, model: PreTrainedModel, device: str) -> None:
    """Raise UserError for an optimizer that Trainer cannot make for the arm.

    It does not know it, its package is missing, it trains whole matrices and the arm none, or it
    would ignore one of the arguments. `model` is the architecture on the meta device.
    """
    projects = config.optim.startswith(("galore", "apollo"))
    if config.optim_target_modules and not projects:
        raise UserError(f"optim {config.optim} takes no optim_target_modules; leave them out")
    if config.is_adapter and projects:
        arm = config.rank_name.partition(" ")[0]
        raise UserError(f"optim {config.optim} projects gradients of matrices; {arm} trains none")

    def options(arguments: list[str]) -> str:
        changed = dataclasses.replace(config, optim_args=",".join(arguments))
        made = training_arguments(changed, Path("unused"), 1, False, device, 1)
        return str(Trainer.get_optimizer_cls_and_kwargs(made, model))

    given = config.optim_args.split(",") if config.optim_args else []
    try:
        made = options(given)
    except (ImportError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"optim {config.optim}: {' '.join(str(error).split())[:300]}") from None
    if config.method == "loraplus" and "'model'" in made:
        raise UserError(f"optim {config.optim} takes no groups, which LoRA+ needs")
    for part in given:
        others, name = [other for other in given if other != part], part.partition("=")[0]
        results = {options(others)}
        with suppress(Exception):  # what fails was read
            results |= {options([*others, f"{name}={probe}"]) for probe in PROBES}
            if len(results) == 1:
                results.clear()
        if not results:
            raise UserError(f"optim {config.optim} takes no {name} in optim_args")
