"""Retention: this suite's lm-eval backend against lm-eval's own, on the same model and rows.

    python -m benchmarks.retention_speed --data FOLDER --json FILE

SmolLM2-135M, fp32 (or --dtype bf16: autocast), one process, in turn (ours, lm-eval's, ours ...),
each from the task's name to its scores; in fp32 scores, standard errors and texts must be equal.

    ours     requests with a common prefix share a row, longest first, logits where they are scored;
             a generated answer ends at its own stop string, and the next prompt takes its place
    lm-eval  its evaluate with HFLM, at its best batch size of 8, 16 and 32, found beforehand on the
             same items; its index of all tasks, which takes seconds to read, is not read
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.comparison import (
    benchmark_settings,
    build_parser,
    evaluate_with_lm_eval,
    print_medians,
    print_ratios,
    ratios_of,
    timed,
    write,
)
from config import CHOICE_BENCHMARKS, UserError
from lora_tradeoffs.command_line import guarded, positive_int

BATCH_SIZES = (8, 16, 32)
# Items of each benchmark, and examples in its prompt; --quick takes an eighth of the items.
ITEMS = {
    "hellaswag": (96, 0),
    "arc_challenge": (192, 0),
    "winogrande": (384, 0),
    "gsm8k": (100, 4),
}


def our_scores(settings: Any, tokenizer: Any, model: Any, name: str, limit: int, bf16: bool) -> Any:
    from lora_tradeoffs.retention.benchmarks import Benchmarks

    benchmarks = Benchmarks(settings, tokenizer, [name], ITEMS[name][1], limit)
    (result,) = benchmarks.measure(model, bf16=bf16)
    return result.metrics, result.stderrs, [answer["output"] for answer in result.answers]


def lm_eval_scores(
    settings: Any, tokenizer: Any, model: Any, name: str, limit: int, bf16: bool, batch_size: int
) -> Any:
    """The same by lm-eval's own model class; the task is loaded over the same rows."""
    from lora_tradeoffs.retention.benchmark_tasks import TaskLoader
    from lora_tradeoffs.retention.benchmarks import figures_by_metric, quiet_lm_eval, texts_of

    with quiet_lm_eval():
        task = TaskLoader(settings, [name], ITEMS[name][1]).load()["tasks"][name]
    sides = (task, tokenizer, model, batch_size, ITEMS[name][1])
    results = evaluate_with_lm_eval(*sides, bf16=bf16, limit=limit)
    texts = [answer["output"] for answer in texts_of(results["samples"][name])]
    return *figures_by_metric(results["results"][name]), texts


def measure(
    settings: Any, tokenizer: Any, model: Any, name: str, limit: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per pair of timings on a benchmark, after a warm-up of each side."""
    from tqdm import tqdm

    bf16, rows = args.dtype == "bf16", []
    shared = (settings, tokenizer, model, name)
    our_scores(*shared, min(4, limit), bf16)
    lm_eval_scores(*shared, min(4, limit), bf16, BATCH_SIZES[0])
    sizes = [n for n in BATCH_SIZES if n <= max(limit, BATCH_SIZES[0])]
    seconds = {n: timed(lm_eval_scores, *shared, limit, bf16, n)[0] for n in sizes}
    best = min(seconds, key=seconds.get)
    for number in tqdm(range(args.pairs), desc=name):
        our_seconds, scores = timed(our_scores, *shared, limit, bf16)
        peer_seconds, peer_scores = timed(lm_eval_scores, *shared, limit, bf16, best)
        is_equal = scores == peer_scores
        if not is_equal and not bf16:
            raise UserError(f"{name}: scores or texts differ, {scores[:2]} and {peer_scores[:2]}")
        rows.append(
            {"benchmark": name, "pair": number, "items": limit, "dtype": args.dtype}
            | {"ours_seconds": our_seconds, "lm_eval_seconds": peer_seconds}
            | {"lm_eval_batch_size": best, "equal": is_equal, "figures": scores[0]}
        )
    return rows


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of both sides"
    )
    parser.add_argument(
        "--items", type=positive_int, metavar="N", help="at most N items of each benchmark"
    )
    text = "which (default: all but gsm8k, which takes half an hour)"
    parser.add_argument(
        "--benchmarks", nargs="+", choices=ITEMS, default=CHOICE_BENCHMARKS, help=text
    )
    args = parser.parse_args(argv)
    settings = benchmark_settings(args)
    from importlib.metadata import version

    from lora_tradeoffs.hardware import describe_environment, pick_device
    from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base

    base = prepare_base(settings)
    tokenizer, model = load_tokenizer(base), load_base(base).eval().to(pick_device())
    rows = []
    for name in args.benchmarks:
        count = ITEMS[name][0]
        limit = min(count // 8 if args.quick else count, args.items or count)
        rows += measure(settings, tokenizer, model, name, limit, args)
    ratios = ratios_of(rows, "benchmark", "lm_eval_seconds")
    print_medians(rows, ["benchmark"])
    print_ratios(ratios)
    meta = describe_environment(pick_device(), args.dtype == "bf16", "sdpa", 1)
    meta["versions"]["lm_eval"] = version("lm_eval")
    meta["shapes"] = {"items": {row["benchmark"]: row["items"] for row in rows}}
    write(args.json, meta, ratios, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
