"""Drift: how far every checkpoint's weights moved from the base, layer by layer.

    python svd_analysis.py                                      # all runs of the study
    python svd_analysis.py --runs similar_lora_r8_seed42 --checkpoints last
    python svd_analysis.py --runs FOLDER                        # any PEFT or full folder

For every matrix that an adapter is on (q_proj and v_proj of full fine-tuning) it measures the size,
the rank and the intruder dimensions of the update and the shift of the spectrum, from exact
decompositions in fp64, on a CUDA GPU if there is one; of LoRA from A and B, without merging. The
updates of a family's runs are compared with each other. Existing results are reused unless weights,
base or options changed. Results: drift_analysis_plots/<study>/; the base's decompositions:
drift_analysis_plots/base/.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from config import INTRUDER_EPSILON, INTRUDER_K, TARGET_MODULES, resolve_settings
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.drift.analysis import MOST_WORKERS, TOP_K, DriftAnalysis, DriftOptions
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.measuring.loop import add_analysis_arguments, options_from, run
from lora_tradeoffs.measuring.subjects import find_subjects, no_runs

DEFAULTS = DriftOptions()


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure how far every checkpoint's weights moved from the base.")
    add_common_arguments(parser)
    add = add_analysis_arguments(parser, dtype=False).add_argument
    text = f"""numbers of leading singular triplets to compare; {INTRUDER_K} is always added
        (default: {" ".join(map(str, TOP_K))}, up to the size of the matrices)"""
    add("--top-k", nargs="+", type=int, metavar="K", help=text)
    text = f"""a singular vector is an intruder if its cosines with all of the base's are below E;
        {INTRUDER_EPSILON} is always added (default: 0.1 to 0.9 in steps of 0.1)"""
    add("--epsilon", nargs="+", type=float, default=DEFAULTS.epsilon, metavar="E", help=text)
    text = """measure only these matrices (default: those that an adapter is on, and qv of full
        fine-tuning)"""
    add("--target-modules", choices=TARGET_MODULES, help=text)
    text = f"""without a GPU: measure N matrices at a time, each on one core (default: the number of
        cores, at most {MOST_WORKERS})"""
    add("--workers", type=int, metavar="N", help=text)
    text = "use a dense SVD of every tuned matrix, the slow reference for the default method"
    add("--dense", action="store_true", help=text)
    text = "also compare the updates of runs of different families (default: of each family)"
    add("--all-pairs", action="store_true", help=text)
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    options = options_from(DriftOptions, args)
    settings = resolve_settings(args)
    from checkpoint_utils import checkpoint_weights
    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import prepare_base

    print(settings.headline(pick_device(fp64=True)), flush=True)
    base = prepare_base(settings)
    analysis = DriftAnalysis(settings, base, options)
    subjects = find_subjects(settings, base, args.runs, args.checkpoints)
    if len(subjects) == 1:
        raise no_runs(settings)
    weights = partial(checkpoint_weights, base)
    return run(analysis, analysis.units(subjects), weights, draw, args)


if __name__ == "__main__":
    sys.exit(main())
