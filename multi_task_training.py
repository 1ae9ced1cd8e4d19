"""Fine-tune a LLaMA on several tasks at once, with LoRA or in full.

    python multi_task_training.py --similar --lora 8
    python multi_task_training.py --dissimilar --full-finetune
    python multi_task_training.py --tasks sst2 --lora 8      # a single-task control
    python multi_task_training.py                            # all of the grid that is not done
    accelerate launch multi_task_training.py --similar --lora 8   # several GPUs

A family alone means all its arms; an arm alone means both families; several arms are a union. A run
that is done is skipped, one that was interrupted goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import (
    FAMILIES,
    RANKS,
    TARGET_MODULES,
    TASKS,
    Parser,
    Settings,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from dataset_descriptions import describe
from training_configs import (
    SCALINGS,
    TrainingConfig,
    arms,
    default_config,
    parse_assignments,
    settable_help,
)

LORA_FIELDS = ("target_modules", "scaling", "lora_dropout")
# Below this many tokens (95th percentile) eager attention trains faster than sdpa under bf16 on a
# CPU, whose sdpa backward is slow: 15.4 against 10.9 examples/s at 56 tokens, 0.7 to 1.4 at 512.
EAGER_BELOW = 350


@dataclass(frozen=True)
class Run:
    """One planned run."""

    name: str
    config: TrainingConfig
    folder: Path

    @property
    def is_done(self) -> bool:
        return (self.folder / "training.json").is_file()


# ------------------------------------------------------------------------------ the plan


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Fine-tune a LLaMA on several tasks at once, with LoRA or in full.",
        epilog="fields for --set: " + settable_help(),
    )
    tasks = parser.add_argument_group("what to train on").add_mutually_exclusive_group()
    tasks.add_argument("--similar", action="store_true", help=", ".join(FAMILIES["similar"]))
    tasks.add_argument("--dissimilar", action="store_true", help=", ".join(FAMILIES["dissimilar"]))
    tasks.add_argument("--tasks", nargs="+", metavar="TASK", help="one run over these tasks")
    arm = parser.add_argument_group("arms (several are a union; none: the grid's)")
    arm.add_argument(
        "--lora", nargs="+", type=int, metavar="R", help=f"ranks; the study's are {RANKS}"
    )
    arm.add_argument("--full-finetune", action="store_true", help="all weights")
    arm.add_argument("--full-qv", action="store_true", help="q_proj and v_proj, dense")
    add_common_arguments(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--seed", nargs="+", type=int, metavar="S", help="default: the preset's")
    run.add_argument("--max-steps", type=int, help="optimizer steps in place of epochs")
    run.add_argument("--target-modules", choices=TARGET_MODULES, help="LoRA's place")
    run.add_argument("--scaling", choices=SCALINGS, help="LoRA's alpha")
    run.add_argument("--dtype", choices=("auto", "bf16", "fp32"), help="precision of computation")
    run.add_argument("--limit", type=int, help="only the first N rows of each file")
    run.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help="see below"
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and what it needs")
    run.add_argument(
        "--overwrite", action="store_true", help="delete and train again what is there"
    )
    return parser


def plan(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs that the flags ask for. Raises UserError for what cannot be."""
    values = parse_assignments(args.set)
    for flag in ("max_steps", "target_modules", "scaling", "dtype", "limit"):
        if getattr(args, flag) is not None:
            values[flag] = getattr(args, flag)
    runs = []
    for tasks in _task_mixes(args):
        for method, rank in _arms(args):
            own = values
            if method != "lora" and any(m == "lora" for m, _ in _arms(args)):
                own = {k: v for k, v in values.items() if k not in LORA_FIELDS}
            for seed in dict.fromkeys(args.seed or settings.preset.seeds):
                default = default_config(settings, tasks, method, rank, seed, hidden_size)
                config = dataclasses.replace(default, **own)
                name = config.run_name(default)
                runs.append(Run(name, config, settings.runs_dir / name))
    return runs


def _task_mixes(args: argparse.Namespace) -> list[tuple[str, ...]]:
    if args.tasks:
        for task in args.tasks:
            describe(task)
        return [tuple(t for t in TASKS if t in args.tasks)]
    chosen = [family for family in FAMILIES if getattr(args, family)]
    return [FAMILIES[family] for family in chosen or FAMILIES]


def _arms(args: argparse.Namespace) -> list[tuple[str, int]]:
    chosen = [("full", 0)] if args.full_finetune else []
    chosen += [("full_qv", 0)] if args.full_qv else []
    chosen += [("lora", rank) for rank in dict.fromkeys(args.lora or ())]
    return chosen or arms()


def print_plan(runs: list[Run], settings: Settings, model: Any, bf16: bool) -> None:
    """One line a run: its state, steps, trainable parameters, expected memory and disk."""
    from checkpoint_utils import checkpoint_step, checkpoints
    from training_costs import GB, expected_cost

    print(f"{len(runs)} runs, into {settings.runs_dir}")
    width = max(len(run.name) for run in runs)
    total = 0
    for run in runs:
        saved = checkpoints(run.folder)
        state = "done" if run.is_done else "new"
        if saved and not run.is_done:
            state = f"at step {checkpoint_step(saved[-1])}"
        cost = expected_cost(model, run.config, bf16)
        total += 0 if run.is_done else cost.disk
        steps = run.config.max_steps or f"about {_expected_steps(run.config, settings)}"
        print(f"  {run.name:<{width}}  {state:<12}  {steps} steps, {cost}")
    print(f"disk for what is not done: {total / GB:.1f} GB")


def _expected_steps(config: TrainingConfig, settings: Settings) -> int:
    """Steps from the number of rows before any is read: lines of a folder, official sizes."""
    from batching import steps_for
    from data_sources import source_folder

    source, rows = source_folder(settings), []
    for task in config.tasks:
        count = describe(task).rows["train"]
        if source is not None:
            with contextlib.suppress(OSError), (source / task / "train.jsonl").open("rb") as file:
                count = sum(1 for _ in file)
        rows.append(min(count, config.examples_per_task, config.limit or count))
    return steps_for(rows, config.epochs, config.batch_size)


# ----------------------------------------------------------------------------- one run


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
) -> dict[str, Any]:
    """Train one run to its end, or go on with it; the contents of its training.json.

    `model` is the base's architecture on the meta device, for what the run will need.

    Raises UserError for what the user can mend and Interrupted after a signal.
    """
    from filelock import FileLock, Timeout

    run.folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run.folder.with_name(f".{run.name}.lock"))
    try:
        with lock.acquire(timeout=0) if _is_main() else contextlib.nullcontext():
            if overwrite and _is_main():
                shutil.rmtree(run.folder)
                run.folder.mkdir()
            return _train_locked(run, settings, base, model, device)
    except Timeout:
        raise UserError(f"{run.name} is being trained by another process") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
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
    from checkpoint_utils import MANIFEST, checkpoints

    for checkpoint in checkpoints(run.folder):
        if not (checkpoint / MANIFEST).is_file():
            shutil.rmtree(checkpoint)  # its half gives room back
    return UserError(
        f"{run.folder}: the disk is full ({str(error).splitlines()[0]}); free some and run the"
        " same command: it goes on from the newest whole checkpoint"
    )


def _train_locked(
    run: Run, settings: Settings, base: Any, empty: Any, device: str
) -> dict[str, Any]:
    from batching import lay_out, steps_for, task_shares
    from checkpoint_utils import load_tokenizer, newest_whole_checkpoint, write_json
    from data_preprocessing import label_token_ids, prepare
    from multi_task_trainer import (
        MultiTaskTrainer,
        RunCallback,
        build_model,
        checkpoint_grid,
        training_arguments,
    )
    from run_records import describe_environment, peak_memory, reset_peak_memory, run_record
    from training_costs import check_room, expected_cost

    config = run.config
    tokenizer = load_tokenizer(base)
    prepared = prepare(
        settings, tokenizer, config.tasks, config.max_length, config.examples_per_task, config.limit
    )
    lengths = [prepared[task].split("train")["length"] for task in config.tasks]
    rows = [len(task_lengths) for task_lengths in lengths]
    shares = task_shares(rows, config.mixing, config.temperature)
    steps = config.max_steps or steps_for(rows, config.epochs, config.batch_size)
    grid = checkpoint_grid(steps, config.checkpoints)
    bf16 = config.dtype == "bf16"
    longest = max(map(max, lengths))
    check_room(expected_cost(empty, config, bf16, longest), run.folder, device)
    attention = config.attention
    if attention == "auto":
        attention = "eager" if _eager_is_faster(lengths, device, bf16) else "sdpa"
    order = lay_out(lengths, shares, config.batch_size, steps, config.seed)

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(settings.logs_dir / run.name)
    arguments = training_arguments(config, run.folder, steps, bf16, device, world_size)
    record = run_record(run.name, config, base, prepared, shares, steps, grid)
    record["environment"] = describe_environment(device, bf16, attention, world_size)
    with arguments.main_process_first(desc="looking for checkpoints"):
        checkpoint = _begin(run, record)
    arguments.eval_on_start = checkpoint is None

    model = build_model(base, config, bf16, attention)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log_file = settings.logs_dir / run.name / "log.jsonl"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    reset_peak_memory(device)
    with signals_noted() as noted:
        callback = RunCallback(run.folder, log_file, grid, stopped=lambda: bool(noted))
        trainer = MultiTaskTrainer(
            config,
            {
                t: label_token_ids(tokenizer, describe(t))
                for t in FAMILIES["similar"]
                if t in config.tasks
            },
            tokenizer.pad_token_id,
            model=model,
            args=arguments,
            train_dataset=_in_order(prepared, config, order),
            eval_dataset=_validation_rows(prepared, config),
            callbacks=[callback],
        )
        callback.trainer = trainer
        if checkpoint is not None:
            callback.resume_from(checkpoint)
            print(f"{run.name}: going on from {checkpoint.name} of {steps}")
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.state.global_step < steps:
        message = f"{run.name}: saved checkpoint-{trainer.state.global_step} of {steps}; run the"
        raise Interrupted(noted[0] if noted else signal.SIGTERM, f"{message} same command to go on")

    history = trainer.state.log_history
    done = {
        "run": run.name,
        "steps": steps,
        "seconds": callback.seconds,
        "examples_per_second": steps * config.batch_size / callback.seconds,
        "tokens": int(sum(_lengths_in_order(lengths, order))),
        "peak_memory_bytes": peak_memory(device),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "loss_curve": [entry for entry in history if "loss" in entry],
        "validation": [entry for entry in history if "eval_loss" in entry],
    }
    if _is_main():
        newest_whole_checkpoint(run.folder)
        write_json(run.folder / "training.json", done)
        (run.folder / "error.json").unlink(missing_ok=True)
    return done


def _begin(run: Run, record: dict[str, Any]) -> Path | None:
    """Write run.json, or compare it with what is asked; the checkpoint to go on from.

    Raises UserError with the fields that differ.
    """
    from checkpoint_utils import newest_whole_checkpoint, read_json, write_json
    from run_records import differences

    path = run.folder / "run.json"
    if not path.is_file():
        write_json(path, record)
        return None
    hard, soft = differences(read_json(path), record)
    if hard:
        raise UserError(
            f"{run.folder} was begun with other settings: {'; '.join(hard)}. Ask for the same,"
            " choose another --study, or --overwrite it"
        )
    if soft and _is_main():
        print(f"warning: {run.name} goes on under other conditions: {'; '.join(soft)}")
    return newest_whole_checkpoint(run.folder)


def _eager_is_faster(lengths: list[Any], device: str, bf16: bool) -> bool:
    import numpy as np

    return device == "cpu" and bf16 and np.percentile(np.concatenate(lengths), 95) < EAGER_BELOW


def _in_order(prepared: dict[str, Any], config: TrainingConfig, order: Any) -> Any:
    from datasets import concatenate_datasets

    train = concatenate_datasets([prepared[task].split("train") for task in config.tasks])
    return train.select_columns(["input_ids", "prompt_length"]).select(order)


def _lengths_in_order(lengths: list[Any], order: Any) -> Any:
    import numpy as np

    return np.concatenate(lengths)[order]


def _validation_rows(prepared: dict[str, Any], config: TrainingConfig) -> dict[str, Any]:
    """At most eval_examples_per_task validation rows a task, the same in every run; by length."""
    import numpy as np

    from config import DATA_SEED

    chosen = {}
    for task in config.tasks:
        rows = prepared[task].split("validation")
        drawn = np.random.default_rng(DATA_SEED).permutation(len(rows))
        drawn = drawn[: config.eval_examples_per_task]
        lengths = np.array(rows["length"])[drawn]
        columns = ["input_ids", "prompt_length", "label"]
        chosen[task] = rows.select_columns(columns).select(drawn[np.argsort(lengths)])
    return chosen


# ------------------------------------------------------------------------------- report


def summary(run: Run, done: dict[str, Any], settings: Settings) -> str:
    """Validation loss and accuracy per task before and after, and where everything lies."""
    first, last = done["validation"][0], done["validation"][-1]
    width = max(map(len, run.config.tasks))
    lines = [f"{run.name}: {done['steps']} steps, {done['examples_per_second']:.1f} examples/s"]
    lines.append(f"  {'validation':<{width}}  loss before -> after   accuracy before -> after")
    for task in run.config.tasks:
        loss = f"{first[f'eval_{task}_loss']:.3f} -> {last[f'eval_{task}_loss']:.3f}"
        key = f"eval_{task}_accuracy"
        accuracy = f"{first[key]:.3f} -> {last[key]:.3f}" if key in last else "-"
        lines.append(f"  {task:<{width}}  {loss:<21}  {accuracy}")
    lines.append(f"  checkpoints, run.json, training.json: {run.folder}")
    lines.append(f"  log and TensorBoard files: {settings.logs_dir / run.name}")
    lines.append(f"  base model: {settings.bases_dir}; prepared data: {settings.prepared_dir}")
    return "\n".join(lines)


def _is_main() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _run_all(
    runs: list[Run], settings: Settings, base: Any, model: Any, device: str, overwrite: bool
) -> int:
    """Train run by run; one that fails is recorded in its error.json and the rest goes on."""
    from run_records import release_memory

    failed = []
    for run in runs:
        if run.is_done and not overwrite:
            print(f"{run.name} is done: {run.folder} (--overwrite trains it again)")
            continue
        try:
            done = train(run, settings, base, model, device, overwrite)
            if _is_main():
                print(summary(run, done, settings), flush=True)
        except Interrupted:
            raise
        except UserError as error:
            _write_error(run, error)
            if len(runs) == 1:
                raise
            failed.append(run.name)
            print(f"error: {run.name}: {error}", file=sys.stderr)
        except Exception as error:
            failed.append(run.name)
            if not _write_error(run, error):
                traceback.print_exception(error)
            path = run.folder / "error.json"
            print(f"error: {run.name} failed: {error!r}; see {path}", file=sys.stderr)
        release_memory()
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _write_error(run: Run, error: Exception) -> bool:
    """A failed run is a result too; one that never began leaves nothing. Whether it was written."""
    from checkpoint_utils import write_json

    if not (run.folder / "run.json").is_file():
        return False
    trace = "".join(traceback.format_exception(error))
    try:
        write_json(run.folder / "error.json", {"error": str(error), "traceback": trace})
    except OSError:  # the disk may be what failed
        return False
    return True


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve_settings(args)
    plan(args, settings, hidden_size=2048)  # what is wrong with the flags shows before any work
    from checkpoint_utils import empty_model, prepare_base, read_model_config
    from run_records import pick_device, pick_precision
    from training_costs import expected_cost

    device = pick_device()
    if _is_main():
        print(settings.headline(device), flush=True)
    model_config = read_model_config(settings)
    model = empty_model(model_config, settings.model)
    runs = plan(args, settings, model_config.hidden_size)
    precision = pick_precision(runs[0].config.dtype, device)
    runs = [
        dataclasses.replace(r, config=dataclasses.replace(r.config, dtype=precision)) for r in runs
    ]
    for run in runs:
        expected_cost(model, run.config, precision == "bf16")  # refuses a rank above the matrix
    if _is_main() and (args.dry_run or len(runs) > 1):
        print_plan(runs, settings, model, precision == "bf16")
    if args.dry_run:
        return 0
    try:
        base = prepare_base(settings)
        return _run_all(runs, settings, base, model, device, args.overwrite)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + interrupted.number


if __name__ == "__main__":
    sys.exit(main())
