"""Drift: how far every checkpoint moved from the base, layer by layer, by exact spectra.

    python svd_analysis.py                                      # all runs of the study
    python svd_analysis.py --runs similar_lora_r8_seed42 --checkpoints last
    python svd_analysis.py --runs FOLDER                        # any PEFT or full folder

Of the matrices that an adapter is on (of full fine-tuning q_proj and v_proj) it measures size,
rank, shift and intruder dimensions of the update, from A and B without merging, and how the runs'
updates lie to one another. What is there is not measured again. Results go to
drift_analysis_plots/<study>/; the base's decompositions, to drift_analysis_plots/base/.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from config import (
    INTRUDER_EPSILON,
    INTRUDER_K,
    TARGET_MODULES,
    Parser,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.loop import add_analysis_arguments
from lora_tradeoffs.measuring.subjects import (
    Subject,
    find_subjects,
    no_runs,
)
from lora_tradeoffs.tables.scores import drift_table

if TYPE_CHECKING:
    from lora_tradeoffs.drift.analysis import DriftAnalysis
    from lora_tradeoffs.drift.matrix import DriftSettings
    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.models.base import Base

TOP_K = (4, 8, 16, 32, 64, 128, 256)
EPSILONS = tuple(i / 10 for i in range(1, 10))
MOST_WORKERS = 8  # each holds a decomposition of the base and some copies of a matrix
BETWEEN_RUNS = "between-runs"  # the unit that compares runs with each other


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure how far every checkpoint moved from the base.")
    add_common_arguments(parser)
    group = add_analysis_arguments(parser, dtype=False)
    group.add_argument(
        "--top-k",
        nargs="+",
        type=int,
        default=TOP_K,
        metavar="K",
        help=f"leading triplets that are compared (default 4 to 256; {INTRUDER_K} always)",
    )
    group.add_argument(
        "--epsilon",
        nargs="+",
        type=float,
        default=EPSILONS,
        metavar="E",
        help=f"thresholds of intruder dimensions (default .1 to .9; {INTRUDER_EPSILON} always)",
    )
    group.add_argument(
        "--target-modules",
        choices=TARGET_MODULES,
        help="only these matrices (default: an adapter's own; of full fine-tuning qv)",
    )
    group.add_argument(
        "--workers",
        type=int,
        help=f"matrices at a time, a core each (default: the cores, at most {MOST_WORKERS})",
    )
    group.add_argument(
        "--dense", action="store_true", help="the slow reference: a dense SVD of every matrix"
    )
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UserError for a value that no matrix could have."""
    if min(args.top_k) < 1:
        raise UserError("--top-k takes numbers from 1 on")
    if not all(0 < epsilon <= 1 for epsilon in args.epsilon):
        raise UserError("--epsilon takes numbers above 0, up to 1")
    if args.workers is not None and args.workers < 1:
        raise UserError("--workers takes at least 1")


def drift_settings(args: argparse.Namespace, base: Base) -> DriftSettings:
    """What is measured of every matrix. Raises UserError for a k that the user gave and that is
    larger than every matrix of the base."""
    from lora_tradeoffs.drift.matrix import DriftSettings
    from lora_tradeoffs.models.weights import Weights

    shapes = Weights(base.folder)
    largest = max((min(shapes.shapes[m.tensor]) for m in shapes.matrices()), default=0)
    if args.top_k is not TOP_K and max(args.top_k) > largest:
        raise UserError(f"--top-k {max(args.top_k)}: the base's matrices have {largest} at most")
    ks = sorted(k for k in {INTRUDER_K, *args.top_k} if k <= largest)
    return DriftSettings(tuple(ks), tuple(sorted({INTRUDER_EPSILON, *args.epsilon})), args.dense)


def default_workers() -> int:
    """The cores that this process may use, up to MOST_WORKERS."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(MOST_WORKERS, len(cores))


def measure_all(
    analysis: DriftAnalysis, results: Results, pending: list[Subject]
) -> tuple[list[str], Counter]:
    """What was wrong with the checkpoints that could not be measured; the methods' counts."""
    from tqdm import tqdm

    from lora_tradeoffs.drift.analysis import unit_of, write

    broken, methods = [], Counter()
    with tqdm(total=len(pending), unit="checkpoint", disable=not pending) as progress:
        for subject in pending:
            progress.set_description(unit_of(subject))
            try:
                drift = analysis.measure(subject)
                write(results, subject, analysis.request(subject), drift)
                methods.update(found.method for found in drift.matrices.values())
            except UserError as error:
                broken.append(f"{subject.run}, step {subject.step}: {error}")
            progress.update()
    return broken, methods


def other_bases(subjects: list[Subject], base: Base) -> list[str]:
    """A warning for each foreign adapter that names another base: shapes alone may fit.

    Only the names' ends are compared, since a base may be a folder, a Hub repository or a copy.
    """
    named: dict[str, str] = {}
    for subject in subjects:
        folder = subject.checkpoint.folder
        if subject.checkpoint.is_adapter and not (folder.parent / "run.json").is_file():
            with suppress(UserError):  # a broken one is named where it is measured
                found = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
                named[subject.run] = str(found or base.name)
    return [
        f"warning: {run} names {name} as its base and is measured against {base.name}"
        for run, name in named.items()
        if _end_of(name) not in (_end_of(base.name), _end_of(base.folder.name))
    ]


def _end_of(name: str) -> str:
    return name.replace("--", "/").rstrip("/").rpartition("/")[2].lower()


# ------------------------------------------------------------------------------------- report


def methods_line(methods: Counter) -> str:
    """How the decompositions were made; a fallback is said."""
    told = ", ".join(f"{count} {method}" for method, count in sorted(methods.items()))
    return f"{sum(methods.values())} decompositions: {told}"


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    settings = resolve_settings(args)
    print(settings.headline("cpu"), flush=True)
    from lora_tradeoffs.drift.analysis import DriftAnalysis, is_done, join_layers, worker_threads
    from lora_tradeoffs.drift.matrix import AGGREGATION
    from lora_tradeoffs.drift.subspaces import last_directions, records_between
    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.models.base import prepare_base

    base = prepare_base(settings)
    subjects = [
        s for s in find_subjects(settings, base, args.runs, args.checkpoints) if s.checkpoint
    ]
    if not subjects:
        raise no_runs(settings)
    for warning in other_bases(subjects, base):
        print(warning, file=sys.stderr)
    results = Results(settings.document("drift").parent)
    with worker_threads(args.workers or default_workers()) as parallel_map:
        drift_options = drift_settings(args, base)
        cache = results.folder.parent / "base" / base.name
        analysis = DriftAnalysis(base, drift_options, args.target_modules, cache, parallel_map)
        pending = [
            s for s in subjects if args.overwrite or not is_done(results, s, analysis.request(s))
        ]
        there = len(subjects) - len(pending)
        print(f"{len(subjects)} checkpoints, {there} of them are there", flush=True)
        broken, methods = measure_all(analysis, results, pending)
    meta = {"study": settings.study, "base_model": base.name, "preset": settings.preset.name}
    with results.joining():
        results.write(BETWEEN_RUNS, {}, records_between(last_directions(results.folder)))
        path = results.join("drift", {**meta, "aggregation": AGGREGATION})
        layers = join_layers(results.folder)
    if methods:
        print(methods_line(methods))
    print(drift_table(read_json(path)["records"]))
    print(f"records: {path}\nall layers, k and epsilons: {layers}")
    if not args.no_figures:
        print(f"figures: {draw('drift', settings, args.pdf)}")
    for message in broken:
        print(f"error: {message}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
