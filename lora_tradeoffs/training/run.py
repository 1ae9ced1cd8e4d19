"""One run on disk: started, interrupted, resumed, finished.

`models/<study>/<run>/` holds run.json (written first), checkpoint-<step>/, and training.json
(written last: then the run is done) or error.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Settings, UserError
from lora_tradeoffs.checkpoints import MANIFEST, checkpoints, newest_whole_checkpoint
from lora_tradeoffs.command_line import is_out_of_memory, system_error, system_error_line
from lora_tradeoffs.files import DELETE, locked, read_json, write_json
from lora_tradeoffs.records import forget, read_run, read_training
from lora_tradeoffs.training.schedule import Diverged, Schedule, make_schedule
from training_configs import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lora_tradeoffs.models.base import Base
    from lora_tradeoffs.training.trainer import MultiTaskTrainer


@dataclass(frozen=True)
class Run:
    """One planned run."""

    name: str
    config: TrainingConfig
    folder: Path
    default: TrainingConfig  # the configuration of its arm in the study's grid

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
        """Whether it failed because its loss became NaN or infinite."""
        path = self.folder / "error.json"
        shape = {"diverged?": bool}
        return not self.is_done and path.is_file() and read_json(path, shape).get("diverged", False)

    def final_loss(self) -> float:
        """Mean validation loss over the tasks at the last checkpoint of a run that is done."""
        if not (entries := read_training(self.folder, "validation")["validation"]):
            path = self.folder / "training.json"
            raise UserError(f"{path} is damaged: its validation is empty; {DELETE}")
        return float(max(entries, key=lambda entry: entry["step"])["eval_loss"])


@dataclass(frozen=True)
class TrainingSetup:
    """What all runs of a command share: the base, and how models and Trainers are built.

    `build_model(base, config, bf16, attention)` returns the model that an arm trains,
    `build_trainer(model, arguments, schedule, callback)` the Trainer of a run. `architecture` is
    the base's architecture on the meta device, for what a run will need.
    """

    base: Base
    architecture: PreTrainedModel
    device: str
    build_model: Callable[[Base, TrainingConfig, bool, str], PreTrainedModel]
    build_trainer: Callable[..., MultiTaskTrainer]


def is_main() -> bool:
    """Whether this is the main process of a distributed run, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


class Interrupted(Exception):
    """A signal stopped the run after a whole checkpoint was saved."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are appended to; a second SIGINT interrupts at once."""
    signals: list[int] = []

    def catch(number: int, _: Any) -> None:
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)
        print("\nsaving a checkpoint, then stopping; Ctrl-C again stops now", flush=True)

    before = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------- several runs


def train_all(runs: Sequence[Run], train_run: Callable[[Run], Any]) -> int:
    """Train run by run; one that fails is recorded in its error.json and the others go on."""
    failed = [run.name for run in runs if not train_or_record(run, train_run, len(runs) == 1)]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def train_or_record(run: Run, train_run: Callable[[Run], Any], is_alone: bool = False) -> bool:
    """Whether the run is done; an error is recorded and printed, or raised if the run is alone."""
    from lora_tradeoffs.hardware import release_memory

    try:
        train_run(run)
        return True
    except (Interrupted, BrokenPipeError, ImportError):
        raise  # what the other runs would meet, too
    except UserError as error:
        _write_error(run, error)
        if is_alone:
            raise
        print(f"error: {run.name}: {error}", file=sys.stderr)
    except Exception as error:
        if not _write_error(run, error):
            traceback.print_exception(error)
        path = run.folder / "error.json"
        print(f"error: {run.name} failed: {error!r}; see {path}", file=sys.stderr)
    finally:
        release_memory()
    return False


def _write_error(run: Run, error: Exception) -> bool:
    """Record the error of a run that had started; whether it was written."""
    if not (run.folder / "run.json").is_file():
        return False
    trace = "".join(traceback.format_exception(error))
    record = {"error": str(error), "traceback": trace, "diverged": isinstance(error, Diverged)}
    try:
        write_json(run.folder / "error.json", record)
    except OSError:  # the disk may be what failed
        return False
    return True


# --------------------------------------------------------------------------------- one run


def train(
    run: Run, settings: Settings, setup: TrainingSetup, overwrite: bool
) -> dict[str, Any] | None:
    """Train or resume one run to its end; returns the contents of its training.json.

    None if the run was done before, with the same settings and data. Raises UserError for what the
    user can fix, and Interrupted after a signal.
    """
    from filelock import Timeout

    lock = run.folder.with_name(f".{run.name}.lock")
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with locked(lock, timeout=0) if is_main() else contextlib.nullcontext():
            if overwrite and is_main():
                shutil.rmtree(run.folder)
                run.folder.mkdir()
            from lora_tradeoffs.trackers import tracked_run

            with tracked_run(settings.study, run.name, settings.logs_dir / run.name):
                return _train_locked(run, settings, setup)
    except Timeout:
        raise UserError(f"{run.name} is being trained by another process") from None
    except Exception as error:
        if (cause := system_error(error)) and cause.errno != errno.EPIPE:
            _remove_incomplete(run)
            raise UserError(f"{run.name}: {system_error_line(cause)}") from None
        if is_out_of_memory(error):
            raise UserError(
                f"{run.name}: {setup.device} is out of memory; lower --set micro_batch_size=N"
                " or use --set activation_checkpointing=true"
            ) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            run.folder.rmdir()  # only if nothing was written


def _remove_incomplete(run: Run) -> None:
    """Remove checkpoints whose saving did not end, so that their space is free."""
    for checkpoint in checkpoints(run.folder):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint, ignore_errors=True)


def _train_locked(run: Run, settings: Settings, setup: TrainingSetup) -> dict[str, Any] | None:
    from lora_tradeoffs.hardware import describe_environment, peak_memory, reset_peak_memory
    from lora_tradeoffs.trackers import track
    from lora_tradeoffs.training.costs import check_room, expected_cost
    from lora_tradeoffs.training.run_record import run_record, shares_line
    from lora_tradeoffs.training.trainer import pick_attention, training_arguments

    config, bf16, device = run.config, run.config.dtype == "bf16", setup.device
    is_sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    fsdp = device, config.method, os.environ.get("FSDP_VERSION")
    if is_sharded and fsdp != ("cuda", "full", "2"):  # on a CPU Trainer would silently take DDP
        raise UserError(
            f"{run.name}: FSDP is for full fine-tuning on CUDA, as examples/slurm/fsdp2.yaml has"
            " it; launch with --multi_gpu"
        )
    schedule = make_schedule(config, settings, setup.base)
    default = setup.architecture.config._attn_implementation
    attention = pick_attention(config.attention, schedule.lengths, device, bf16, default)
    longest = int(schedule.lengths.max())
    cost = expected_cost(setup.architecture, config, bf16, longest, attention == "eager")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if is_sharded:  # weights, gradients and Adam's state
        spared = 16 * cost.trainable * (world_size - 1) // world_size
        cost = dataclasses.replace(cost, memory=cost.memory - spared)
    if not run.is_done:
        check_room(cost, run.folder, device)
    arguments = training_arguments(config, run.folder, schedule.steps, bf16, device, world_size)
    track(arguments, settings.study, run.name, config.record())
    record = run_record(run.name, run.default.learning_rate, setup.base, schedule)
    record["environment"] = describe_environment(device, bf16, attention, world_size)
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = _start_or_resume(run, record, settings)
    if run.is_done:
        return None
    arguments.eval_on_start = checkpoint is None

    if is_main():
        print(shares_line(run.name, record["task_weights"]), flush=True)
    reset_peak_memory(device)
    model = setup.build_model(setup.base, config, bf16, attention)
    build_trainer = functools.partial(setup.build_trainer, model, arguments, schedule)
    log_file = settings.logs_dir / run.name / "log.jsonl"
    history, clocks = _run_trainer(run, schedule, build_trainer, log_file, checkpoint)
    training = {
        "run": run.name,
        "steps": schedule.steps,
        **clocks,
        "examples_per_second": schedule.steps * config.batch_size / clocks["seconds"],
        "tokens": int(schedule.lengths[schedule.order].sum()),
        "peak_memory_bytes": peak_memory(device),
        "trainable_parameters": cost.trainable,
        "base_parameters": cost.parameters,
        "loss_curve": [entry for entry in history if "loss" in entry],
        "validation": [entry for entry in history if "eval_loss" in entry],
    }
    if is_main():
        write_json(run.folder / "training.json", training)
        (run.folder / "error.json").unlink(missing_ok=True)
    return training


def _run_trainer(
    run: Run,
    schedule: Schedule,
    build_trainer: Callable[[Any], MultiTaskTrainer],
    log_file: Path,
    checkpoint: Path | None,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train from the checkpoint, or the start, to the end: the log, and RunCallback's clocks.

    Raises Interrupted if a signal stopped it before.
    """
    from lora_tradeoffs.training.trainer import RunCallback

    log_file.parent.mkdir(parents=True, exist_ok=True)
    with caught_signals() as signals:
        callback = RunCallback(run.folder, log_file, schedule.checkpoint_steps, signals)
        trainer = callback.trainer = build_trainer(callback)
        if checkpoint is not None:
            callback.resume_from(checkpoint)
            print(f"{run.name}: resuming from {checkpoint.name} of {schedule.steps}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if step < schedule.steps:
        raise Interrupted(
            signals[0] if signals else signal.SIGTERM,
            f"{run.name}: saved checkpoint-{step} of {schedule.steps}; run the same command to"
            " resume",
        )
    clocks = {"seconds": callback.seconds, "wall_seconds": callback.wall_seconds}
    return trainer.state.log_history, clocks


def _start_or_resume(run: Run, record: dict[str, Any], settings: Settings) -> Path | None:
    """Write run.json, or compare it with the new record; the checkpoint to resume from.

    A new run has no results yet: those of an earlier run of its name are removed. Raises UserError
    with the fields that differ.
    """
    from lora_tradeoffs.training.run_record import differences

    path = run.folder / "run.json"
    if not path.is_file():
        if run.is_done or checkpoints(run.folder):
            raise UserError(
                f"{run.folder} has checkpoints and no run.json, which says how they were trained:"
                " restore it, or retrain the run with --overwrite"
            )
        if removed := forget(settings, run.name):
            print(f"retraining {run.name}: removed {removed} results of the previous run")
        write_json(path, record)
        return None
    before = read_run(run.folder, *("compared", "base", "data", "environment"))
    forbidden, harmless = differences(before, record)
    if forbidden:
        raise UserError(
            f"{run.folder} was started with different settings: {'; '.join(forbidden)}. Use the"
            " same settings, another --study, or --overwrite to retrain it"
        )
    if run.is_done:
        return None
    if harmless and is_main():
        changes = "; ".join(harmless)
        print(f"warning: resuming {run.name} in a different environment: {changes}")
    return newest_whole_checkpoint(run.folder)
