"""Evaluation: this suite's engine against what a user would take, on the same model and rows.

    python -m benchmarks.evaluation_speed --data FOLDER --json FILE

SmolLM2-135M, fp32 (or --dtype bf16), one process, in turn (ours, the peer's, ours ...); in fp32
predictions must agree. Both sides start from the prompts' texts. A peer runs at its best batch size
of 8, 16 and 32, found beforehand on the same rows.

    classification  label words' log-likelihoods under one forward pass per item, longest first;
                    against lm-evaluation-harness's HFLM on a multiple_choice task over the rows
    generation      16 rows at a time, longest first; rows that have ended (EOS or the task's stop
                    string) leave, and the next prompts take their place; against model.generate
                    on batches sorted by length, with texts cut at the stop string afterwards

Generation takes each task's limit of new tokens, or --new-tokens. The base generates, or with
--checkpoint a PEFT folder over it, whose answers end where they should: a batch of model.generate
waits for its longest answer.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
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
from config import FAMILIES, TASKS, UserError
from dataset_descriptions import describe
from lora_tradeoffs.command_line import guarded, positive_int

ROWS = 16  # that our engine generates for at a time
BATCH_SIZES = (8, 16, 32)
QUICK_TOKENS = 16


@dataclass(frozen=True)
class Engine:
    """A model with its tokenizer."""

    model: Any
    tokenizer: Any

    def encode(self, prompts: list[str]) -> list[list[int]]:
        from lora_tradeoffs.data.encoding import bos_ids, text_ids

        bos = bos_ids(self.tokenizer)
        return [[*bos, *text_ids(self.tokenizer, prompt)] for prompt in prompts]


# ---------------------------------------------------------------------------- classification


def classify(engine: Engine, task: str, prompts: list[str]) -> list[int]:
    """The label of the highest log-likelihood, by our engine."""
    from lora_tradeoffs.data.encoding import choice_ids
    from lora_tradeoffs.scoring.log_likelihoods import log_likelihoods
    from lora_tradeoffs.scoring.rows import Item

    words = choice_ids(engine.tokenizer, describe(task))
    scores = log_likelihoods(engine.model, [Item(ids, words) for ids in engine.encode(prompts)])
    return [max(range(len(words)), key=lambda k: row[k].log_likelihood) for row in scores]


@functools.cache
def lm_eval_task(task: str, prompts: tuple[str, ...]) -> Any:
    """lm-eval's multiple_choice task over a file of the prompts, whose choices are the labels."""
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": prompt, "label": 0}) for prompt in prompts]
        (folder / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
        definition = {
            "task": f"{task}_rows",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": list(describe(task).label_words),
            "doc_to_target": "label",
            "target_delimiter": " ",
            "metric_list": [{"metric": "acc"}],
        }
        # YAML reads JSON
        (folder / "rows.yaml").write_text(json.dumps(definition), encoding="utf-8")
        manager = TaskManager(include_path=name, include_defaults=False)
        return manager.load([definition["task"]])["tasks"][definition["task"]]


def classify_with_lm_eval(
    engine: Engine, task: str, prompts: list[str], batch_size: int
) -> list[int]:
    """The same by lm-eval's HFLM; its task over the prompts is loaded beforehand."""
    loaded, options = lm_eval_task(task, tuple(prompts)), {"log_samples": True}
    results = evaluate_with_lm_eval(loaded, engine.tokenizer, engine.model, batch_size, **options)
    samples = sorted(results["samples"][f"{task}_rows"], key=lambda sample: sample["doc_id"])
    scores = [[score for score, _ in sample["filtered_resps"]] for sample in samples]
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


# -------------------------------------------------------------------------------- generation


def generate(engine: Engine, task: str, prompts: list[str], new_tokens: int) -> list[str]:
    """Greedy answers by our engine."""
    from lora_tradeoffs.scoring.generation import generate_greedily

    tokenizer, stop = engine.tokenizer, describe(task).stop

    def stopped(tokens: list[int]) -> bool:
        return stop in tokenizer.decode(tokens[-8:]).lstrip()

    answers = generate_greedily(
        engine.model,
        engine.encode(prompts),
        new_tokens,
        [tokenizer.eos_token_id],
        stopped,
        token_budget=1 << 30,
        most_rows=ROWS,
    )
    return [_cut(tokenizer.decode(tokens), stop) for tokens in answers]


def generate_with_transformers(
    engine: Engine, task: str, prompts: list[str], new_tokens: int, batch_size: int
) -> list[str]:
    """Greedy answers by model.generate, longest prompts first."""
    import torch

    tokenizer, stop = engine.tokenizer, describe(task).stop
    encoded, answers = engine.encode(prompts), [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(encoded[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = tokenizer.pad(
            {"input_ids": [encoded[i] for i in batch]}, padding_side="left", return_tensors="pt"
        ).to(engine.model.device)
        with torch.inference_mode():
            tokens = engine.model.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :].tolist()
        for i, row in zip(batch, tokens, strict=True):
            ended = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            answers[i] = _cut(tokenizer.decode(row[:ended]), stop)
    return answers


def _cut(text: str, stop: str) -> str:
    return text.lstrip().partition(stop)[0].strip()


# ------------------------------------------------------------------------------------ timings


def measure(
    kind: str, work: dict[str, tuple], ours: Callable, peer: Callable, pairs: int
) -> list[dict[str, Any]]:
    """A row per task and pair of timings, after a warm-up of each side.

    `work` has a task's arguments. Raises UserError if predictions differ in fp32.
    """
    import torch
    from tqdm import tqdm

    rows = []
    for task, (engine, prompts, *rest) in work.items():
        if peer is classify_with_lm_eval:
            lm_eval_task(task, tuple(prompts))
        for function, extra in ((ours, rest), (peer, [*rest, BATCH_SIZES[0]])):
            function(engine, task, prompts[:4], *extra)
        arguments = (engine, task, prompts, *rest)
        seconds = {size: timed(peer, *arguments, size)[0] for size in BATCH_SIZES}
        best = min(seconds, key=seconds.get)
        for pair in tqdm(range(pairs), desc=f"{kind} {task}"):
            our_seconds, predictions = timed(ours, *arguments)
            peer_seconds, peer_predictions = timed(peer, *arguments, best)
            different = sum(a != b for a, b in zip(predictions, peer_predictions, strict=True))
            is_fp32 = engine.model.dtype == torch.float32
            if is_fp32 and different > max(1, len(prompts) // 32):  # ties
                raise UserError(f"{different} of {len(prompts)} predictions differ in {task}")
            rows.append(
                {"kind": kind, "task": task, "pair": pair, "items": len(prompts)}
                | {"different": different, "ours_seconds": our_seconds}
                | {"peer_seconds": peer_seconds, "peer_batch_size": best}
            )
    return rows


def by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the tasks of a kind added up, pair by pair."""
    import pandas as pd

    columns = ["items", "different", "ours_seconds", "peer_seconds"]
    sums = pd.DataFrame(rows).groupby(["kind", "pair"])[columns].sum()
    return sums.reset_index().to_dict("records")


def describe_adapter(folder: Path) -> str:
    """The adapter's rank, and the steps it was trained for if its folder says so."""
    from lora_tradeoffs.checkpoints import checkpoint_step
    from lora_tradeoffs.files import read_json

    rank, step = read_json(folder / "adapter_config.json")["r"], checkpoint_step(folder)
    return f"LoRA r = {rank}" + (f" after {step} steps" if step > 0 else "")


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="PEFT folder over the base, for generation")
    parser.add_argument(
        "--new-tokens", type=positive_int, metavar="N", help="generate at most N tokens"
    )
    parser.add_argument("--items", type=positive_int, metavar="N", help="at most N items per task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    text = "precision of the weights of both sides (bf16: predictions may differ)"
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help=text)
    args = parser.parse_args(argv)
    settings = benchmark_settings(args)
    import torch

    from lora_tradeoffs.data.preparation import prepare
    from lora_tradeoffs.hardware import describe_environment, pick_device
    from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base

    base = prepare_base(settings)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    engine = Engine(load_base(base, dtype).eval().to(pick_device()), load_tokenizer(base))
    rows = []
    sides = (classify, classify_with_lm_eval), (generate, generate_with_transformers)
    counts = (24, 4) if args.quick else (64, 32)
    for (ours, peer), family, count in zip(sides, FAMILIES, counts, strict=True):
        length, work = settings.preset.max_length[family], {}
        kind = "classification" if ours is classify else "generation"
        if kind == "generation" and args.checkpoint:
            from peft import PeftModel

            model = PeftModel.from_pretrained(engine.model, args.checkpoint).eval()
            engine = Engine(model, engine.tokenizer)
        tasks = [task for task in FAMILIES[family] if task in args.tasks]
        prepared = prepare(settings, engine.tokenizer, tasks, length, 2_000)
        for task, data in prepared.items():
            prompts = data.split("test")["prompt"][: min(count, args.items or count)]
            limit = describe(task).max_new_tokens
            limit = min(limit, args.new_tokens or (QUICK_TOKENS if args.quick else limit))
            work[task] = (engine, prompts) if kind == "classification" else (engine, prompts, limit)
        rows += measure(kind, work, ours, peer, args.pairs)
    ratios = ratios_of(by_kind(rows), "kind", "peer_seconds")
    print_medians(rows, ["kind", "task"])
    print_ratios(ratios)
    meta = describe_environment(pick_device(), False, "sdpa", 1)
    meta["shapes"] = {"rows": ROWS, "new_tokens": args.new_tokens or "the tasks' limits"}
    meta["precision"] = f"{args.dtype} weights"
    meta["generating"] = describe_adapter(args.checkpoint) if args.checkpoint else "the base"
    write(args.json, meta, ratios, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
