"""One run on disk: begun, trained, stopped, resumed, ended.

`models/<study>/<run>/` holds run.json (written first), checkpoint-<step>/, and training.json
(written last: the run is done) or error.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import DATA_SEED, DISK_FULL, Diverged, Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.files import (
    MANIFEST,
    checkpoints,
    newest_whole_checkpoint,
    read_json,
    write_json,
)
from training_configs import TrainingConfig

# Below this many tokens (95th percentile) eager attention trains faster than sdpa under bf16 on a
# CPU, whose sdpa backward is slow: 15.4 against 10.9 examples/s at 56 tokens, 0.7 to 1.4 at 512.
EAGER_BELOW = 350


@dataclass(frozen=True)
class Run:
    """One planned run."""

    name: str
    config: TrainingConfig
    folder: Path
    default: TrainingConfig  # of its arm in the grid

    @property
    def arm(self) -> str:
        """The name without learning rate and seed."""
        return self.config.arm_name(self.default)

    def at_rate(self, rate: float) -> Run:
        """The same run at another learning rate."""
        config = dataclasses.replace(self.config, learning_rate=rate)
        name = config.run_name(self.default)
        return Run(name, config, self.folder.with_name(name), self.default)

    @property
    def is_done(self) -> bool:
        return (self.folder / "training.json").is_file()

    @property
    def has_diverged(self) -> bool:
        """Whether it ended since its loss was no longer a number."""
        path = self.folder / "error.json"
        return not self.is_done and path.is_file() and bool(read_json(path).get("diverged"))

    def final_loss(self) -> float:
        """Validation loss at the last checkpoint of a run that is done, the mean over the tasks."""
        entries = read_json(self.folder / "training.json")["validation"]
        return float(max(entries, key=lambda entry: entry["step"])["eval_loss"])


def is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


class Interrupted(Exception):
    """A signal asked to end; a whole checkpoint was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are noted in the list; a second SIGINT ends at once."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted and number == signal.SIGINT:
            raise KeyboardInterrupt
        noted.append(number)
        print("\nsaving a checkpoint, then ending", flush=True)

    before = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(
    run: Run, settings: Settings, base: Any, model: Any, device: str, overwrite: bool
) -> dict[str, Any] | None:
    """Train one run to its end, or go on with it; the contents of its training.json.

    None if the run was done before, with the same settings and data. `model` is the base's
    architecture on the meta device, for what the run will need. Raises UserError for what the user
    can mend, and Interrupted after a signal.
    """
    from filelock import FileLock, Timeout

    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder.with_name(f".{run.name}.lock"))
    try:
        with lock.acquire(timeout=0) if is_main() else contextlib.nullcontext():
            if overwrite and is_main():
                shutil.rmtree(run.folder)
                run.folder.mkdir()
            return _train_locked(run, settings, base, model, device)
    except Timeout:
        raise UserError(f"{run.name} is being trained by another process") from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise _disk_full(run, error) from None
    except Exception as error:
        # safetensors and torch.save wrap the system's error in their own
        if any(s in str(error) for s in ("os error 28", "os error 27", "file write failed")):
            raise _disk_full(run, error) from None
        if type(error).__name__ == "OutOfMemoryError":
            raise UserError(
                f"{run.name}: the memory of {device} ran out; try --set micro_batch_size=N lower or"
                " --set activation_checkpointing=true"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            run.folder.rmdir()  # only if nothing was written


def _disk_full(run: Run, error: Exception) -> UserError:
    for checkpoint in checkpoints(run.folder):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint)  # its half gives room back
    return UserError(
        f"{run.folder}: the disk is full ({str(error).splitlines()[0]}); free some and run the"
        " same command: it goes on from the newest whole checkpoint"
    )


@dataclass(frozen=True)
class Course:
    """All that a run will do, laid out before it begins."""

    tokenizer: Any
    prepared: dict[str, Any]  # task -> PreparedTask
    shares: np.ndarray  # of the examples, (tasks,)
    order: np.ndarray  # of the train rows, (steps * batch_size,)
    lengths: np.ndarray  # of the train rows in tokens, the tasks one after another
    steps: int
    grid: list[int]  # steps with a checkpoint


def lay_out_course(config: TrainingConfig, settings: Settings, base: Any) -> Course:
    """Prepare the data (or find them prepared) and lay out the run's batches."""
    from lora_tradeoffs.data.preparation import prepare
    from lora_tradeoffs.models.base import load_tokenizer
    from lora_tradeoffs.training.row_order import lay_out, steps_for, task_shares
    from lora_tradeoffs.training.trainer import checkpoint_grid

    tokenizer = load_tokenizer(base)
    prepared = prepare(
        settings, tokenizer, config.tasks, config.max_length, config.examples_per_task, config.limit
    )
    lengths = [np.array(prepared[task].split("train")["length"]) for task in config.tasks]
    rows = [len(task_lengths) for task_lengths in lengths]
    shares = task_shares(rows, config.mixing, config.temperature)
    steps = config.max_steps or steps_for(rows, config.epochs, config.batch_size)
    order = lay_out(lengths, shares, config.batch_size, steps, config.seed)
    grid = checkpoint_grid(steps, config.checkpoints)
    return Course(tokenizer, prepared, shares, order, np.concatenate(lengths), steps, grid)


def _train_locked(
    run: Run, settings: Settings, base: Any, empty: Any, device: str
) -> dict[str, Any] | None:
    from lora_tradeoffs.hardware import describe_environment, peak_memory, reset_peak_memory
    from lora_tradeoffs.training.costs import check_room, expected_cost
    from lora_tradeoffs.training.run_record import run_record
    from lora_tradeoffs.training.trainer import build_model, training_arguments

    config, bf16 = run.config, run.config.dtype == "bf16"
    course = lay_out_course(config, settings, base)
    attention = config.attention
    if attention == "auto":
        attention = "eager" if eager_is_faster(course.lengths, device, bf16) else "sdpa"
    longest = int(course.lengths.max())
    cost = expected_cost(empty, config, bf16, longest, attention == "eager")
    if not run.is_done:
        check_room(cost, run.folder, device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.logs_dir / run.name)
    arguments = training_arguments(config, run.folder, course.steps, bf16, device, world_size)
    record = run_record(
        run.name, config, base, course.prepared, course.shares, course.steps, course.grid
    )
    record["environment"] = describe_environment(device, bf16, attention, world_size)
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = _begin(run, record, settings)
    if run.is_done:
        return None
    arguments.eval_on_start = checkpoint is None

    if is_main():
        print(_shares_line(run.name, record["task_weights"]), flush=True)
    reset_peak_memory(device)
    model = build_model(base, config, bf16, attention)
    history, clocks = _run_trainer(run, settings, course, model, arguments, checkpoint)
    done = {
        "run": run.name,
        "steps": course.steps,
        **clocks,
        "examples_per_second": course.steps * config.batch_size / clocks["seconds"],
        "tokens": int(course.lengths[course.order].sum()),
        "peak_memory_bytes": peak_memory(device),
        "trainable_parameters": cost.trainable,
        "base_parameters": cost.parameters,
        "loss_curve": [entry for entry in history if "loss" in entry],
        "validation": [entry for entry in history if "eval_loss" in entry],
    }
    if is_main():
        write_json(run.folder / "training.json", done)
        (run.folder / "error.json").unlink(missing_ok=True)
    return done


def _run_trainer(
    run: Run,
    settings: Settings,
    course: Course,
    model: Any,
    arguments: Any,
    checkpoint: Path | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train from the checkpoint, or the start, to the end: the log, and RunCallback's clocks.

    Raises Interrupted if a signal ended it before.
    """
    from lora_tradeoffs.data.encoding import label_token_ids
    from lora_tradeoffs.training.trainer import MultiTaskTrainer, RunCallback

    log_file = settings.logs_dir / run.name / "log.jsonl"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    descriptions = [describe(task) for task in run.config.tasks]
    labelled = [d for d in descriptions if d.is_classification]
    with signals_noted() as noted:
        callback = RunCallback(run.folder, log_file, course.grid, stopped=lambda: bool(noted))
        trainer = MultiTaskTrainer(
            run.config,
            {d.name: label_token_ids(course.tokenizer, d) for d in labelled},
            course.tokenizer.pad_token_id,
            model=model,
            args=arguments,
            train_dataset=_train_rows(course, run.config),
            eval_dataset=_validation_rows(course, run.config),
            callbacks=[callback],
        )
        callback.trainer = trainer
        if checkpoint is not None:
            callback.resume_from(checkpoint)
            print(f"{run.name}: going on from {checkpoint.name} of {course.steps}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < course.steps:
        raise Interrupted(
            noted[0] if noted else signal.SIGTERM,
            f"{run.name}: saved checkpoint-{step} of {course.steps}; run the same command to go on",
        )
    clocks = {"seconds": callback.seconds, "wall_seconds": callback.wall_seconds}
    return trainer.state.log_history, clocks


def _begin(run: Run, record: dict[str, Any], settings: Settings) -> Path | None:
    """Write run.json, or compare it with what is asked; the checkpoint to go on from.

    A run that is new has no results yet: those of an earlier one of its name are removed. Raises
    UserError with the fields that differ.
    """
    from lora_tradeoffs.records import forget
    from lora_tradeoffs.training.run_record import differences

    path = run.folder / "run.json"
    if not path.is_file():
        if removed := forget(settings, run.name):
            print(f"{run.name} is trained anew: {removed} results of the one before are removed")
        write_json(path, record)
        return None
    hard, soft = differences(read_json(path), record)
    if hard:
        raise UserError(
            f"{run.folder} was begun with other settings: {'; '.join(hard)}. Ask for the same,"
            " choose another --study, or --overwrite it"
        )
    if run.is_done:
        return None
    if soft and is_main():
        print(f"warning: {run.name} goes on under other conditions: {'; '.join(soft)}")
    return newest_whole_checkpoint(run.folder)


def _shares_line(name: str, weights: dict[str, dict[str, float]]) -> str:
    parts = [
        f"{task} {w['examples']:.0%} of the examples, {w['supervised_tokens']:.0%} of the"
        f" supervised tokens, {w['loss']:.0%} of the loss"
        for task, w in weights.items()
    ]
    return f"{name}: {'; '.join(parts)}"


def eager_is_faster(lengths: np.ndarray, device: str, bf16: bool) -> bool:
    """Whether eager attention trains rows of these lengths faster than sdpa on the device."""
    return device == "cpu" and bf16 and np.percentile(lengths, 95) < EAGER_BELOW


def _train_rows(course: Course, config: TrainingConfig) -> Any:
    """The train rows in the order of the run."""
    from datasets import concatenate_datasets

    rows = concatenate_datasets([course.prepared[task].split("train") for task in config.tasks])
    return rows.select_columns(["input_ids", "prompt_length"]).select(course.order)


def _validation_rows(course: Course, config: TrainingConfig) -> dict[str, Any]:
    """At most eval_examples_per_task validation rows a task, the same in every run; by length."""
    chosen = {}
    for task in config.tasks:
        rows = course.prepared[task].split("validation")
        drawn = np.random.default_rng(DATA_SEED).permutation(len(rows))
        drawn = drawn[: config.eval_examples_per_task]
        lengths = np.array(rows["length"])[drawn]
        columns = ["input_ids", "prompt_length", "label"]
        chosen[task] = rows.select_columns(columns).select(drawn[np.argsort(lengths)])
    return chosen


def write_error(run: Run, error: Exception) -> bool:
    """A failed run is a result too; one that never began leaves nothing. Whether it was written."""
    if not (run.folder / "run.json").is_file():
        return False
    trace = "".join(traceback.format_exception(error))
    told = {"error": str(error), "traceback": trace, "diverged": isinstance(error, Diverged)}
    try:
        write_json(run.folder / "error.json", told)
    except OSError:  # the disk may be what failed
        return False
    return True
