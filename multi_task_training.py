"""Fine-tune a LLaMA on several tasks at once, with LoRA or in full.

    python multi_task_training.py --similar --lora 8
    python multi_task_training.py --dissimilar --full-finetune
    python multi_task_training.py --similar --adapter lora:8@all dora:8 pissa:8 loraplus:8 oft:32
    python multi_task_training.py --tasks sst2 --lora 8      # a single-task control
    python multi_task_training.py                            # every configuration not done yet
    python multi_task_training.py --lr-sweep                 # search every arm's learning rate
    python multi_task_training.py --swept-rates              # train at the rates that it chose
    accelerate launch multi_task_training.py --similar --lora 8   # several GPUs

An arm is one training configuration: full fine-tuning, or an adapter such as LoRA at a rank. With
only a family flag, all arms of the grid are trained; with only arms, both families; several such
flags add up. A run that is done is skipped; an interrupted one resumes from its newest whole
checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from config import (
    BUILT_IN_FAMILIES,
    FAMILIES,
    GRID,
    RANKS,
    TARGET_MODULES,
    Settings,
    UserError,
    resolve_settings,
)
from dataset_descriptions import describe, named_family, ordered
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded, seed_number
from lora_tradeoffs.measuring.subjects import check_trained_form
from lora_tradeoffs.training.arms import ArmSpec, add_adapter_argument, settable_help
from lora_tradeoffs.training.learning_rates import FACTORS, sweep
from lora_tradeoffs.training.plan import check_arms, plan_runs, print_plan
from lora_tradeoffs.training.run import (
    Interrupted,
    Run,
    TrainingSetup,
    is_main,
    train,
    train_all,
    train_or_record,
)
from lora_tradeoffs.training.run_record import summary
from training_configs import CHOICES, SCALINGS, TrainingConfig, parse_assignments

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainingArguments

    from lora_tradeoffs.models.base import Base
    from lora_tradeoffs.training.schedule import Schedule
    from lora_tradeoffs.training.trainer import MultiTaskTrainer, RunCallback

# -------------------------------------------------------------------- the model and its Trainer

# What a method adds to the configuration of plain LoRA. LoRA+ is another optimizer (build_trainer).
LORA_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "loraplus": {},
}


def adapter_config(config: TrainingConfig) -> PeftConfig:
    """PEFT's configuration of the arm's adapter."""
    from peft import LoraConfig, OFTConfig

    modules = list(config.modules)  # q_proj and v_proj, unless --target-modules
    shared = {"task_type": "CAUSAL_LM", "target_modules": modules}
    if config.method == "oft":
        return OFTConfig(oft_block_size=config.rank, **shared)
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.scaling == "rslora",
        lora_dropout=config.lora_dropout,
        **LORA_KINDS[config.method],
        **shared,
    )


def build_model(base: Base, config: TrainingConfig, bf16: bool, attention: str) -> PreTrainedModel:
    """The base in fp32, with the parameters that the arm trains made trainable."""
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import set_seed

    from lora_tradeoffs.models.base import load_base, store_frozen_linears_in_bf16
    from lora_tradeoffs.training.costs import reads_base, trainable_shapes

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
                module.weight.requires_grad_(True)  # as LoRA, which trains no bias
        return model
    model = get_peft_model(model, adapter_config(config))
    adapted = sum(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert adapted == len(shapes), f"{adapted} of {len(shapes)} layers got an adapter"
    if bf16 and not reads_base(config):
        store_frozen_linears_in_bf16(model.get_base_model())
    return model


def build_trainer(
    model: PreTrainedModel, arguments: TrainingArguments, schedule: Schedule, callback: RunCallback
) -> MultiTaskTrainer:
    """The Trainer of a run: its rows in their scheduled order, and a validation per task."""
    from lora_tradeoffs.training.trainer import MultiTaskTrainer

    optimizer = None  # Trainer's, by the arguments
    if schedule.config.method == "loraplus":
        from peft.optimizers import create_loraplus_optimizer

        kind, options = MultiTaskTrainer.get_optimizer_cls_and_kwargs(arguments, model)
        ratio, decay = schedule.config.loraplus_ratio, arguments.weight_decay
        options |= {"loraplus_lr_ratio": ratio, "loraplus_weight_decay": decay}
        optimizer = create_loraplus_optimizer(model, kind, **options)
    return MultiTaskTrainer(
        schedule.config,
        schedule.label_ids(),
        schedule.tokenizer.pad_token_id,
        model=model,
        args=arguments,
        train_dataset=schedule.train_rows(),
        eval_dataset=schedule.validation_rows(),
        callbacks=[callback],
        optimizers=(optimizer, None),
    )


# ------------------------------------------------------------------------- flags and the plan


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, epilog=settable_help())
    add = parser.add_argument_group("tasks (default: both families)").add_argument
    for family in BUILT_IN_FAMILIES:
        text = f"train on {', '.join(FAMILIES[family])}; both flags: each family in runs of its own"
        add(f"--{family}", action="store_true", help=text)
    text = "one run on these tasks, built-in or of your own (docs/tasks.md)"
    add("--tasks", nargs="+", metavar="TASK", help=text)
    text = "the family that --tasks are a part of, a+b+c or name=a+b+c (default: their own)"
    add("--family", metavar="FAMILY", help=text)

    group = parser.add_argument_group("arms (default: full fine-tuning and LoRA at every rank)")
    add = group.add_argument
    ranks = " ".join(map(str, RANKS))
    add("--lora", nargs="+", type=int, metavar="R", help=f"LoRA at these ranks, e.g. {ranks}")
    add("--full-finetune", action="store_true", help="train all weights")
    text = "train q_proj and v_proj without low-rank factors"
    add("--full-qv", action="store_true", help=text)
    add_adapter_argument(group)

    add_common_arguments(parser)
    add = (run := parser.add_argument_group("runs")).add_argument
    text = "a run per seed (default: the preset's)"
    add("--seed", nargs="+", type=seed_number, metavar="S", help=text)
    add("--max-steps", type=int, metavar="N", help="train N optimizer steps instead of epochs")
    modules = "which projections get adapters (default qv)"
    add("--target-modules", choices=TARGET_MODULES, help=modules)
    scaling = "how alpha follows the rank: 2r (default), constant 32, or rsLoRA (8 over sqrt(r))"
    add("--scaling", choices=SCALINGS, help=scaling)
    dtype = "precision of the computation (default auto: bf16 autocast where it is fast)"
    add("--dtype", choices=CHOICES["dtype"], help=dtype)
    add("--limit", type=int, metavar="N", help="use only the first N rows of each data file")
    text = "set any field of the training configuration (listed below)"
    add("--set", nargs="+", default=[], action="extend", metavar="FIELD=VALUE", help=text)
    rates = run.add_mutually_exclusive_group()
    factors = " ".join(f"{f:g}" for f in FACTORS)
    text = f"""search every arm's learning rate, with one seed unless --seed names more: train at
        these factors of its default ({factors}), then at half and twice the best until neither is
        better"""
    rates.add_argument("--lr-sweep", nargs="*", type=float, metavar="FACTOR", help=text)
    swept = "train at the rates that --lr-sweep chose"
    rates.add_argument("--swept-rates", action="store_true", help=swept)
    add("--dry-run", action="store_true", help="print the plan and its expected cost, then stop")
    add("--overwrite", action="store_true", help="delete the plan's existing runs and retrain them")
    return parser


def plan(args: argparse.Namespace, settings: Settings, hidden_size: int) -> list[Run]:
    """The requested runs; for a sweep the runs it starts with. Raises UserError for bad flags."""
    values = parse_assignments(args.set)
    for flag in ("max_steps", "target_modules", "scaling", "dtype", "limit"):
        if getattr(args, flag) is not None:
            values[flag] = getattr(args, flag)
    seeds, factors = args.seed or settings.preset.seeds, args.lr_sweep
    if factors is not None:
        seeds, factors = args.seed or seeds[:1], factors or FACTORS
    mixes, arms = _task_mixes(args), _arms(args)
    family = named_family(args.family) if args.family else ""
    rates = factors, args.swept_rates
    return plan_runs(settings, hidden_size, mixes, arms, seeds, values, *rates, family)


def _task_mixes(args: argparse.Namespace) -> list[tuple[str, ...]]:
    families = [family for family in BUILT_IN_FAMILIES if getattr(args, family)]
    if args.tasks and families:
        raise UserError(f"--tasks is not allowed with --{families[0]}: leave one out")
    if args.tasks:
        for task in args.tasks:
            describe(task)
        return [ordered(args.tasks)]
    return [FAMILIES[family] for family in families or BUILT_IN_FAMILIES]


def _arms(args: argparse.Namespace) -> list[ArmSpec]:
    words = ["full"] * args.full_finetune + ["full_qv"] * args.full_qv
    words += [*(f"lora:{rank}" for rank in args.lora or ()), *args.adapter]
    return [ArmSpec.parse(word) for word in words or GRID]


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = resolve_settings(args)
    check_trained_form(settings)
    plan(args, settings, hidden_size=2048)  # reports bad flags before anything is loaded
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.models.base import (
        empty_model,
        load_tokenizer,
        prepare_base,
        read_model_config,
    )

    device = pick_device()
    if is_main():
        print(settings.headline(device), flush=True)
    model_config = read_model_config(settings)
    architecture = empty_model(model_config, settings.model)
    runs = plan(args, settings, model_config.hidden_size)
    precision = pick_precision(runs[0].config.dtype, device)
    check_arms(runs, architecture, device)
    if is_main() and (args.dry_run or len(runs) > 1):
        print_plan(runs, settings, architecture, precision == "bf16")
    if args.dry_run:
        return 0
    try:
        base = prepare_base(settings)
        load_tokenizer(base, settings)  # refuses a chat that it has no template for
        setup = TrainingSetup(base, architecture, device, build_model, build_trainer)

        def train_run(run: Run) -> None:
            run = dataclasses.replace(run, config=dataclasses.replace(run.config, dtype=precision))
            training = train(run, settings, setup, args.overwrite)
            if is_main():
                skipped = f"{run.name} is done: {run.folder} (--overwrite retrains it)"
                print(summary(run.config, training, settings) if training else skipped, flush=True)

        if args.lr_sweep is None:
            return train_all(runs, train_run)
        return sweep(runs, settings, lambda run: train_or_record(run, train_run), args.overwrite)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + interrupted.number


if __name__ == "__main__":
    sys.exit(main())
