"""Adaptation: evaluate the base and every checkpoint on the tasks, with intervals.

    python eval.py                                      # all runs of the study
    python eval.py --runs similar_lora_r8_seed42 --checkpoints last
    python eval.py --runs FOLDER                        # any PEFT or full folder, or Hub repository

Every checkpoint is evaluated on validation (intermediate ones on 1,000 items); the base, the last
checkpoint and the one with the lowest validation loss also on test. Existing results are reused
unless weights, base, data, limit or precision changed. Results: performance_analysis/<study>/.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from config import resolve_settings
from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.measuring.loop import add_analysis_arguments, options_from, run
from lora_tradeoffs.measuring.subjects import find_subjects, in_trained_form, no_runs

DEFAULTS = AdaptationOptions()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate the base and every checkpoint on the tasks.")
    add_common_arguments(parser)
    add = add_analysis_arguments(parser, limit=True).add_argument
    text = """splits to evaluate on (default: validation, and test for the base, the last and the
        best-on-validation checkpoint)"""
    add("--splits", nargs="+", choices=("validation", "test"), help=text)
    text = "tasks to evaluate on (default: the tasks of the run's family)"
    add("--tasks", nargs="+", metavar="TASK", help=text)
    text = "also evaluate on the tasks of the family that the run was not trained on"
    add("--cross-family", action="store_true", help=text)
    shots = DEFAULTS.shots
    text = f"also evaluate the base with N in-context examples (default {shots}; 0: skip)"
    add("--shots", type=int, metavar="N", default=shots, help=text)
    text = "also evaluate with K paraphrased prompts (default 0)"
    add("--prompts", type=int, metavar="K", default=DEFAULTS.prompts, help=text)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    settings = in_trained_form(resolve_settings(args), args.runs)
    options = options_from(AdaptationOptions, args)
    from checkpoint_utils import checkpoint_models
    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import prepare_base

    print(settings.headline(pick_device()), flush=True)
    base = prepare_base(settings)
    analysis = Adaptation(settings, base, options)
    subjects = find_subjects(settings, base, args.runs, args.checkpoints)
    if len(subjects) == 1:
        raise no_runs(settings)
    models = partial(checkpoint_models, base, device=analysis.device, bf16=analysis.bf16)
    return run(analysis, analysis.units(subjects), models, draw, args)


if __name__ == "__main__":
    sys.exit(main())
