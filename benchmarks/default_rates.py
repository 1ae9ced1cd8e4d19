"""LoRA's default learning rate at every rank: how far the ranks' validation losses lie apart.

    python -m benchmarks.default_rates --data FOLDER --json FILE

With alpha = 2r, runs of 40 steps of 16 rows of the three classification tasks, which differ only in
rank, rate and seed. A rule gives the rate at rank r as a multiple of the preset's at rank 16. Where
ranks are compared at their default rates, losses that differ show the rule and not the rank: the
spread, largest over smallest validation loss (its mean over the seeds), should be small early and
late. A run that is done is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import benchmark_settings, build_parser, write
from config import FAMILIES, RANKS, Settings
from lora_tradeoffs.command_line import guarded, seed_number
from multi_task_training import build_model, build_trainer

if TYPE_CHECKING:
    from lora_tradeoffs.training.trainer import MultiTaskTrainer

RULES = {
    "1": lambda rank: 1,
    "sqrt(16/r)": lambda rank: (16 / rank) ** 0.5,
    "(1 + 32/r)/3": lambda rank: (32 / rank + 1) / 3,
    "16/r": lambda rank: 16 / rank,
}
STEPS, READ = 40, (10, 40)


def build_trainer_that_reads(
    model: Any, arguments: Any, schedule: Any, callback: Any
) -> MultiTaskTrainer:
    """The Trainer of a run, with a validation at READ and its end alone."""
    arguments.eval_on_start = False
    callback.checkpoint_steps = [*READ, schedule.steps]
    return build_trainer(model, arguments, schedule, callback)


def losses(
    settings: Settings,
    ranks: list[int],
    rules: Sequence[str],
    scaling: str,
    seeds: Sequence[int],
    changes: dict[str, Any],
) -> list[dict[str, Any]]:
    """A row for each rank, seed and rate: the validation loss, in nats a token, at READ."""
    from lora_tradeoffs.files import read_json
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.models.base import empty_model, prepare_base, read_model_config
    from lora_tradeoffs.training.arms import ArmSpec
    from lora_tradeoffs.training.plan import plan_runs
    from lora_tradeoffs.training.run import TrainingSetup, train

    device, model_config = pick_device(), read_model_config(settings)
    architecture = empty_model(model_config, settings.model)
    builders = build_model, build_trainer_that_reads
    setup = TrainingSetup(prepare_base(settings), architecture, device, *builders)
    values = {"dtype": pick_precision("auto", device), "scaling": scaling, **changes}
    mixes = [FAMILIES["similar"]]
    (middle, *_), runs = (
        plan_runs(settings, model_config.hidden_size, mixes, arms, seeds, values)
        for arms in ([ArmSpec("lora", 16)], [ArmSpec("lora", rank) for rank in ranks])
    )
    rows = []
    for run in runs:
        factors = sorted({float(RULES[rule](run.config.rank)) for rule in rules})
        for factor in factors:
            at_rate = run.at_rate(float(f"{middle.config.learning_rate * factor:.3g}"))
            train(at_rate, settings, setup, overwrite=False)
            log = read_json(at_rate.folder / "training.json")["validation"]
            by_step = {entry["step"]: round(entry["eval_loss"], 4) for entry in log}
            row = {"rank": run.config.rank, "factor": factor, "seed": run.config.seed}
            row["learning_rate"] = at_rate.config.learning_rate
            rows.append(row | {f"loss_{step}": by_step[step] for step in READ if step in by_step})
            print(rows[-1], flush=True)
    return rows


def spreads(rows: list[dict[str, Any]], rules: Sequence[str]) -> dict[str, list[float]]:
    """By rule, the largest over the smallest loss of the ranks at each of READ."""
    import pandas as pd

    frame, ratios = pd.DataFrame(rows), {}
    for name in rules:
        chosen = frame[frame["factor"] == frame["rank"].map(RULES[name])]
        means = chosen.groupby("rank")[[c for c in frame if c.startswith("loss_")]].mean()
        print(means.to_string(float_format="{:.3f}".format))
        ratios[name] = (means.max() / means.min()).round(3).tolist()
    return ratios


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[RANKS[0], 16, RANKS[-1]])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES])
    parser.add_argument("--seeds", nargs="+", type=seed_number, default=[42, 43, 44])
    parser.add_argument("--scaling", default="2r", help="as in multi_task_training.py")
    parser.add_argument("--rows", type=int, default=100, help="validation rows of each task")
    args: argparse.Namespace = parser.parse_args(argv)
    settings = benchmark_settings(args)
    steps = 4 if args.quick else STEPS
    changes = {"max_steps": steps, "report_to": "none"}
    changes |= {"batch_size": 16, "eval_examples_per_task": args.rows}
    rows = losses(settings, args.ranks, args.rules, args.scaling, args.seeds, changes)
    ratios = spreads(rows, args.rules)
    for name, values in ratios.items():
        print(f"rate x {name}: largest over smallest loss {values}")
    meta = {"model": settings.model, "steps": steps, "scaling": args.scaling, "rows": args.rows}
    write(args.json, meta, ratios, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
