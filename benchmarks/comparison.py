"""What the benchmarks share: their flags, and how pairs of timings are printed and written.

A pair is one timing of ours and one of the peer's, taken in turn, so that a noisy machine is noisy
for both; the result is the median over pairs of the peer's seconds over ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Settings, resolve_settings
from lora_tradeoffs.command_line import Parser, add_common_arguments, positive_int

FEWEST_PAIRS = 3


def build_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share, and the docstring as its help."""
    parser = Parser(description=docstring)
    add_common_arguments(parser)
    parser.add_argument(
        *("--pairs", "--rounds"),
        type=positive_int,
        default=FEWEST_PAIRS,
        metavar="N",
        help=f"timings of each side, in turn (default {FEWEST_PAIRS}; fewer are not a result)",
    )
    parser.add_argument("--quick", action="store_true", help="measure less, in about two minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    return parser


def benchmark_settings(args: argparse.Namespace) -> Settings:
    """The settings; unless told otherwise the demo's, in a study of their own."""
    args.preset, args.study = args.preset or "demo", args.study or "benchmark"
    if args.pairs < FEWEST_PAIRS:
        print(f"fewer than {FEWEST_PAIRS} pairs: the ratios are not a result", file=sys.stderr)
    return resolve_settings(args)


def timed(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    start = time.perf_counter()
    value = function(*arguments)
    return time.perf_counter() - start, value


def evaluate_with_lm_eval(
    task: Any,
    tokenizer: Any,
    model: Any,
    batch_size: int,
    num_fewshot: int = 0,
    bf16: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """lm-eval's results for a loaded task by its own model class.

    `simple_evaluate` would also read the definitions of all tasks and describe the machine.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from lora_tradeoffs.retention.benchmarks import SHOT_SEED, quiet_lm_eval

    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(SHOT_SEED)
    loaded = {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}
    with quiet_lm_eval():
        peer = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
        )
        return evaluate(peer, loaded, **options)


def ratios_of(
    rows: Sequence[Mapping[str, Any]], case: str, peer: str, ours: str = "ours_seconds"
) -> dict[str, list[float]]:
    """By case (a column), for every pair the peer's seconds over ours."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(row[case], []).append(round(row[peer] / row[ours], 3))
    return ratios


def print_ratios(ratios: Mapping[str, Sequence[float]]) -> None:
    """Print every ratio's median and its pairs."""
    import pandas as pd

    table = {
        name: {"median": statistics.median(values), "pairs": ", ".join(f"{v:.2f}" for v in values)}
        for name, values in ratios.items()
    }
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("peer's time / ours", axis=1)
    print(frame.to_string(float_format="{:.2f}".format))


def print_medians(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> None:
    """Print the medians over the pairs of all numeric columns."""
    import pandas as pd

    frame = pd.DataFrame(rows).drop(columns=["pair"], errors="ignore")
    medians = frame.groupby(list(by), sort=False).median(numeric_only=True)
    print(medians.to_string(float_format="{:.4g}".format))


def write(
    path: Path | None,
    meta: Mapping[str, Any],
    ratios: Mapping[str, Sequence[float]],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Write meta, ratios and rows, if a file was named."""
    from lora_tradeoffs.files import write_json

    if path:
        meta = {name: value for name, value in meta.items() if name != "git_commit"}
        write_json(path, {"meta": meta, "ratios": ratios, "rows": rows})
        print(f"written: {path}")
