"""Retention: how much pretrained ability every checkpoint keeps, measured with lm-eval's tasks.

    python retention_eval.py                                  # all runs of the study
    python retention_eval.py --tasks commonsense gsm8k boolq
    python retention_eval.py --checkpoints last --scale-update
    python retention_eval.py --checkpoints last --shrink-intruders

The base and every checkpoint are measured on benchmarks of lm-evaluation-harness, on the
log-likelihood of held-out text, and on the distance of predictions and hidden states from the
base's. Intermediate checkpoints are measured on the first 1,000 items of each benchmark; the base,
the last and the best-on-validation checkpoint on all. Existing results are reused unless weights,
base, data, limit or precision changed. Results: outputs/<study>/.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from config import BENCHMARK_GROUPS, resolve_settings
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.measuring.loop import add_analysis_arguments, options_from, run
from lora_tradeoffs.measuring.subjects import find_subjects, in_trained_form
from lora_tradeoffs.retention.analysis import Retention
from lora_tradeoffs.retention.units import FACTORS, SCALE_MEASURE, SCALES, RetentionOptions

DEFAULTS = RetentionOptions()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure how much pretrained ability every checkpoint keeps.")
    add_common_arguments(parser)
    add = add_analysis_arguments(parser, limit=True).add_argument
    groups = "; ".join(f"{name} = {' '.join(tasks)}" for name, tasks in BENCHMARK_GROUPS.items())
    scales, factors = (" ".join(f"{t:g}" for t in numbers) for numbers in (SCALES, FACTORS))
    text = f"""lm-eval tasks to measure (multiple choice, perplexity, or text that is generated), or
        groups of them: {groups} (default: commonsense; without TASK: none)"""
    add("--tasks", nargs="*", default=["commonsense"], metavar="TASK", help=text)
    text = """show N in-context examples before every question (default: as many as lm-eval's
        definition of the task says, which is 0 for most)"""
    add("--num-fewshot", type=int, default=DEFAULTS.num_fewshot, metavar="N", help=text)
    text = """with --apply-chat-template: make every in-context example two turns (default), or put
        all of them into the question's"""
    add("--fewshot-as-multiturn", action=argparse.BooleanOptionalAction, help=text)
    text = "measure the log-likelihood of N documents of each held-out text (default: the preset's)"
    add("--documents", type=int, metavar="N", help=text)
    text = f"""also measure adaptation and retention of the last checkpoint with its update
        multiplied by T (without T: {scales})"""
    add("--scale-update", nargs="*", type=float, metavar="T", help=text)
    text = """what --scale-update measures (default: all). Without `score`, only the validation loss
        of the trained tasks is measured: nothing is generated"""
    measured = {"choices": SCALE_MEASURE, "default": DEFAULTS.scale_measure}
    add("--scale-measure", nargs="+", **measured, help=text)
    text = f"""also measure adaptation and retention of the last checkpoint with the singular values
        of its intruder dimensions multiplied by L, and as a control those of as many other
        directions (without L: {factors})"""
    add("--shrink-intruders", nargs="*", type=float, metavar="L", help=text)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options = options_from(RetentionOptions, args)
    settings = in_trained_form(resolve_settings(args), args.runs)
    from checkpoint_utils import checkpoint_models
    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import prepare_base

    print(settings.headline(pick_device()), flush=True)
    base = prepare_base(settings)
    analysis = Retention(settings, base, options)
    subjects = find_subjects(settings, base, args.runs, args.checkpoints)
    models = partial(checkpoint_models, base, device=analysis.device)
    return run(analysis, analysis.units(subjects), models, draw, args)


if __name__ == "__main__":
    sys.exit(main())
