"""Retention: this suite's lm-eval backend against lm-eval's own, on the same model and rows.

    python benchmarks/retention_speed.py --data FOLDER --json FILE

SmolLM2-135M, fp32 (or --dtype bf16: autocast), one process, turn about (ours, lm-eval's, ours ...),
each from the task's name to its figures; acc, acc_norm and standard errors must be equal in fp32.

    ours     requests that begin alike share a row, longest first, logits where they are scored
    lm-eval  simple_evaluate with HFLM, at its best batch size of 8, 16 and 32, found beforehand on
             the same items
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Parser, UserError, add_common_arguments, guarded, resolve_settings

BATCH_SIZES = (8, 16, 32)
# Items of each benchmark; --quick takes an eighth.
ITEMS = {"hellaswag": 96, "arc_challenge": 192, "winogrande": 384}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of both ways")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of timings (default 3)")
    parser.add_argument("--quick", action="store_true", help="few rows, in about two minutes")
    parser.add_argument("--json", type=Path, help="write meta, ratios and rows to this file")
    return parser


def load_task(settings: Any, name: str) -> Any:
    """lm-eval's task over the same rows, loaded anew."""
    from lora_tradeoffs.retention.benchmark_tasks import TaskLoader
    from lora_tradeoffs.retention.benchmarks import quiet_lm_eval

    with quiet_lm_eval():
        return TaskLoader(settings, [name], 0).load()["tasks"][name]


def our_figures(settings: Any, tokenizer: Any, model: Any, name: str, limit: int, bf16: bool):
    from lora_tradeoffs.retention.benchmarks import Benchmarks

    (result,) = Benchmarks(settings, tokenizer, [name], 0, limit).measure(model, bf16=bf16)
    return result.metrics | {f"{m}_stderr": value for m, value in result.stderrs.items()}


def peer_figures(task: Any, tokenizer: Any, model: Any, limit: int, bf16: bool, batch_size: int):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from lora_tradeoffs.retention.benchmarks import quiet_lm_eval

    with quiet_lm_eval():
        peer = HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype="bfloat16" if bf16 else None,
        )
        found = lm_eval.simple_evaluate(peer, tasks=[task], num_fewshot=0, limit=limit)
    results = found["results"][task.task_name]
    return {key.removesuffix(",none"): v for key, v in results.items() if key.endswith(",none")}


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.pairs < 3:
        raise UserError("--pairs takes at least 3: a median of fewer says nothing")
    args.preset, args.study = args.preset or "demo", args.study or "benchmark"
    settings = resolve_settings(args)
    from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base

    base = prepare_base(settings)
    tokenizer, model = load_tokenizer(base), load_base(base).eval()
    rows = []
    for name, count in ITEMS.items():
        limit = count // 8 if args.quick else count
        rows += measure(settings, tokenizer, model, name, limit, args)
    return report(args, rows)


def measure(
    settings: Any, tokenizer: Any, model: Any, name: str, limit: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Seconds of both ways on a benchmark, turn about, after a warm-up of each."""

    from tqdm import tqdm

    bf16, rows = args.dtype == "bf16", []

    def timed(function: Any, *arguments: Any) -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        figures = function(*arguments)
        return time.perf_counter() - start, figures

    def ours() -> tuple[float, dict[str, float]]:
        return timed(our_figures, settings, tokenizer, model, name, limit, bf16)

    def theirs(batch_size: int) -> tuple[float, dict[str, float]]:
        load = time.perf_counter()
        task = load_task(settings, name)
        load = time.perf_counter() - load
        seconds, figures = timed(peer_figures, task, tokenizer, model, limit, bf16, batch_size)
        return load + seconds, figures

    our_figures(settings, tokenizer, model, name, 4, bf16)
    seconds = {size: theirs(size)[0] for size in BATCH_SIZES}
    best = min(seconds, key=seconds.get)
    for number in tqdm(range(args.pairs), desc=name):
        (mine, figures), (peer, others) = ours(), theirs(best)
        equal = all(figures[key] == others[key] for key in figures)
        if not equal and not bf16:
            raise UserError(f"{name}: the figures differ, {figures} and {others}")
        rows.append(
            {"benchmark": name, "pair": number, "items": limit, "dtype": args.dtype}
            | {"ours_seconds": mine, "lm_eval_seconds": peer, "lm_eval_batch_size": best}
            | {"equal": equal, "figures": figures}
        )
    return rows


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    from importlib.metadata import version

    from lora_tradeoffs.files import write_json
    from lora_tradeoffs.hardware import describe_environment, pick_device

    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratio = row["lm_eval_seconds"] / row["ours_seconds"]
        ratios.setdefault(row["benchmark"], []).append(round(ratio, 3))
    for name, values in ratios.items():
        own = [row for row in rows if row["benchmark"] == name]
        ours, peer = (
            statistics.median(row["items"] / row[key] for row in own)
            for key in ("ours_seconds", "lm_eval_seconds")
        )
        print(
            f"{name:<16}ours {ours:.2f} items/s, lm-eval {peer:.2f} (batches of"
            f" {own[0]['lm_eval_batch_size']}), median ratio {statistics.median(values):.2f}"
            f" ({', '.join(f'{v:.2f}' for v in values)})"
        )
    if args.json:
        meta = describe_environment(pick_device(), args.dtype == "bf16", "sdpa", 1)
        meta.pop("git_commit")
        meta["versions"]["lm_eval"] = version("lm_eval")
        meta["shapes"] = {"items": {row["benchmark"]: row["items"] for row in rows}}
        write_json(args.json, {"meta": meta, "ratios": ratios, "rows": rows})
        print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
