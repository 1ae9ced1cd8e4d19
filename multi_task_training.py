"""Fine-tune a LLaMA on several tasks at once, with LoRA or in full.

    python multi_task_training.py --similar --lora 8
    python multi_task_training.py --dissimilar --full-finetune
    python multi_task_training.py --tasks sst2 --lora 8      # a single-task control
    python multi_task_training.py                            # all of the grid that is not done
    python multi_task_training.py --lr-sweep                 # search every arm's learning rate
    python multi_task_training.py --swept-rates              # the grid, at the rates it chose
    accelerate launch multi_task_training.py --similar --lora 8   # several GPUs

A family alone means all its arms; an arm alone means both families; several arms are a union. A run
that is done is skipped, one that was interrupted goes on from its newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Callable
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
from lora_tradeoffs.files import checkpoint_step, checkpoints
from lora_tradeoffs.training.learning_rates import FACTORS
from lora_tradeoffs.training.plan import expected_steps, plan_runs
from lora_tradeoffs.training.rate_sweep import sweep
from lora_tradeoffs.training.run import Interrupted, Run, is_main, train, write_error
from training_configs import (
    SCALINGS,
    arms,
    parse_assignments,
    settable_help,
)

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
    rates = run.add_mutually_exclusive_group()
    rates.add_argument(
        "--lr-sweep",
        nargs="*",
        type=float,
        metavar="FACTOR",
        help="search each arm's learning rate, with one seed unless --seed names more: train at"
        f" factors of its default ({' '.join(f'{f:g}' for f in FACTORS)} or those given), then at"
        " half and twice the best until neither is better",
    )
    rates.add_argument(
        "--swept-rates", action="store_true", help="train at the rates that --lr-sweep chose"
    )
    run.add_argument("--dry-run", action="store_true", help="print the plan and what it needs")
    run.add_argument(
        "--overwrite", action="store_true", help="delete and train again what is there"
    )
    return parser


def plan(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The runs that the flags ask for, of a sweep its grid. Raises UserError for what cannot be."""
    values = parse_assignments(args.set)
    for flag in ("max_steps", "target_modules", "scaling", "dtype", "limit"):
        if getattr(args, flag) is not None:
            values[flag] = getattr(args, flag)
    seeds = args.seed or settings.preset.seeds
    sweep = args.lr_sweep
    if sweep is not None:
        seeds, sweep = (seeds if args.seed else seeds[:1]), sweep or FACTORS
    mixes, arms = _task_mixes(args), _arms(args)
    return plan_runs(settings, hidden_size, mixes, arms, seeds, values, sweep, args.swept_rates)


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
    from lora_tradeoffs.training.costs import GB, expected_cost

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
        steps = run.config.max_steps or f"about {expected_steps(run.config, settings)}"
        print(f"  {run.name:<{width}}  {state:<12}  {steps} steps, {cost}")
    print(f"disk for what is not done: {total / GB:.1f} GB")


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


def _run_all(runs: list[Run], train_run: Callable[[Run], Any]) -> int:
    """Train run by run; one that fails is recorded in its error.json and the rest goes on."""
    failed = [run.name for run in runs if not _run_one(run, train_run, alone=len(runs) == 1)]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run_one(run: Run, train_run: Callable[[Run], Any], alone: bool = False) -> bool:
    """Whether the run has ended; what was wrong is said, or raised if the run is alone."""
    from lora_tradeoffs.hardware import release_memory

    try:
        train_run(run)
        return True
    except Interrupted:
        raise
    except UserError as error:
        write_error(run, error)
        if alone:
            raise
        print(f"error: {run.name}: {error}", file=sys.stderr)
    except Exception as error:
        if not write_error(run, error):
            traceback.print_exception(error)
        path = run.folder / "error.json"
        print(f"error: {run.name} failed: {error!r}; see {path}", file=sys.stderr)
    finally:
        release_memory()
    return False


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve_settings(args)
    plan(args, settings, hidden_size=2048)  # what is wrong with the flags shows before any work
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.models.base import empty_model, prepare_base, read_model_config
    from lora_tradeoffs.training.costs import expected_cost

    device = pick_device()
    if is_main():
        print(settings.headline(device), flush=True)
    model_config = read_model_config(settings)
    model = empty_model(model_config, settings.model)
    runs = plan(args, settings, model_config.hidden_size)
    precision = pick_precision(runs[0].config.dtype, device)
    for run in runs:
        expected_cost(model, run.config, precision == "bf16")  # refuses a rank above the matrix
    if is_main() and (args.dry_run or len(runs) > 1):
        print_plan(runs, settings, model, precision == "bf16")
    if args.dry_run:
        return 0
    try:
        base = prepare_base(settings)

        def train_run(run: Run) -> None:
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, dtype=precision))
            done = train(run, settings, base, model, device, args.overwrite)
            if is_main():
                told = f"{run.name} is done: {run.folder} (--overwrite trains it again)"
                print(summary(run, done, settings) if done else told, flush=True)

        if args.lr_sweep is None:
            return _run_all(runs, train_run)
        return sweep(runs, settings, lambda run: _run_one(run, train_run), args.overwrite)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + interrupted.number


if __name__ == "__main__":
    sys.exit(main())
