"""Gradient conflict: how far the gradients of the tasks agree, at the base and at checkpoints.

    python gradient_conflict.py                                  # all runs of the study
    python gradient_conflict.py --runs similar_lora_r8_seed42 --checkpoints last --batches 64

On the same micro-batches for every checkpoint it computes the gradient of each task's loss, with
respect to the adapter's parameters for LoRA, else to the weights of q_proj and v_proj. It reports
the cosine of every two tasks, the share of batches in conflict and the similarity of magnitudes, by
layer and overall. Existing results are reused unless weights, base, data, batches or precision
changed. Results: performance_analysis/<study>/gradients/.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from config import GRADIENT_BATCHES, resolve_settings
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions, single_task_runs
from lora_tradeoffs.measuring.loop import add_analysis_arguments, options_from, run
from lora_tradeoffs.measuring.subjects import find_subjects, in_trained_form

DEFAULTS = GradientOptions()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure how far the gradients of the tasks agree.")
    add_common_arguments(parser)
    add = add_analysis_arguments(parser).add_argument
    batches, rows = DEFAULTS.batches, DEFAULTS.batch_size
    text = f"micro-batches of every task (default {batches}, the study's minimum)"
    add("--batches", type=int, default=batches, metavar="N", help=text)
    text = f"rows of each task in a micro-batch (default {rows})"
    add("--batch-size", type=int, default=rows, metavar="ROWS", help=text)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options = options_from(GradientOptions, args)
    settings = in_trained_form(resolve_settings(args), args.runs)
    from checkpoint_utils import checkpoint_models
    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import prepare_base

    print(settings.headline(pick_device()), flush=True)
    base = prepare_base(settings)
    analysis = GradientAnalysis(settings, base, options)
    subjects = find_subjects(settings, base, args.runs, args.checkpoints)
    if skipped := single_task_runs(subjects):
        print(f"skipping single-task runs (no second task): {', '.join(skipped)}")
    if options.batches < GRADIENT_BATCHES:
        least = f"the study's minimum of {GRADIENT_BATCHES}"
        print(f"{options.batches} batches is below {least}: preliminary")
    models = partial(checkpoint_models, base, device=analysis.device, bf16=analysis.bf16)
    return run(analysis, analysis.units(subjects), models, draw, args)


if __name__ == "__main__":
    sys.exit(main())
