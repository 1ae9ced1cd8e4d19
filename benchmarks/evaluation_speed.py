"""Evaluation: this suite's engine against the plain way, on the same model and rows.

    python benchmarks/evaluation_speed.py --data FOLDER --json FILE

SmolLM2-135M, fp32, one process, turn about (ours, plain, ours, plain ...); predictions must agree.

    classification  label words' log-likelihoods under one forward pass an item, longest first;
                    against a padded pass for each label word with logits of the whole sequence,
                    in data order, in batches of 16
    generation      16 rows at a time, longest first; rows that have ended (EOS or the task's stop
                    string) leave, and the next prompts take their place; against model.generate
                    on batches of 16 in data order, with texts cut at the stop string afterwards

Generation takes each task's own limit of new tokens, or --new-tokens. The base generates, or with
--checkpoint a PEFT folder over it, whose answers end where they should: then a batch in data order
waits for its longest answer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import FAMILIES, Parser, UserError, add_common_arguments, guarded, resolve_settings

ROWS = 16  # of a batch


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of timings (default 3)")
    parser.add_argument("--checkpoint", type=Path, help="PEFT folder over the base, for generation")
    parser.add_argument("--new-tokens", type=int, help="at most so many, for generation")
    parser.add_argument("--quick", action="store_true", help="few rows, in about two minutes")
    parser.add_argument("--json", type=Path, help="write meta, ratios and rows to this file")
    return parser


def prompts_of(prepared: Any, count: int) -> list[list[int]]:
    rows = prepared.split("test").select(range(count))
    pairs = zip(rows["input_ids"][:], rows["prompt_length"][:], strict=True)
    return [ids[:start] for ids, start in pairs]


def classify(model: Any, prompts: list[list[int]], words: list[int]) -> list[int]:
    from lora_tradeoffs.scoring.log_likelihoods import Item, log_likelihoods

    found = log_likelihoods(model, [Item(p, [[w] for w in words]) for p in prompts])
    return [max(range(len(words)), key=lambda k: r[k].log_likelihood) for r in found]


def classify_plainly(model: Any, prompts: list[list[int]], words: list[int], pad: int) -> list[int]:
    """One padded pass for each label word, dense logits, in data order."""
    import torch

    predictions = []
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        scores = []
        for word in words:
            rows = [[*p, word] for p in batch]
            width = max(map(len, rows))
            ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
            mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
            with torch.inference_mode():
                log_probs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            scores.append([log_probs[i, len(r) - 2, word].item() for i, r in enumerate(rows)])
        predictions += torch.tensor(scores).argmax(0).tolist()
    return predictions


def generate(model: Any, prompts: list[list[int]], new: int, stop: str, tokenizer: Any) -> list:
    from lora_tradeoffs.scoring.generation import generate_greedily

    def stopped(tokens: list[int]) -> bool:
        return stop in tokenizer.decode(tokens[-8:]).lstrip()

    found = generate_greedily(
        model,
        prompts,
        new,
        [tokenizer.eos_token_id],
        stopped,
        token_budget=1 << 30,
        most_rows=ROWS,
    )
    return [text_of(tokens, stop, tokenizer) for tokens in found]


def generate_plainly(
    model: Any, prompts: list[list[int]], new: int, stop: str, tokenizer: Any
) -> list[str]:
    """model.generate on padded batches in data order."""
    import torch

    eos, outputs = tokenizer.eos_token_id, []
    for start in range(0, len(prompts), ROWS):
        batch = prompts[start : start + ROWS]
        width = max(map(len, batch))
        ids = torch.tensor([[eos] * (width - len(p)) + p for p in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )[:, width:].tolist()
        rows = (row[: row.index(eos)] if eos in row else row for row in found)
        outputs += [text_of(row, stop, tokenizer) for row in rows]
    return outputs


def text_of(tokens: list[int], stop: str, tokenizer: Any) -> str:
    return tokenizer.decode(tokens).lstrip().partition(stop)[0].strip()


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.pairs < 3:
        raise UserError("--pairs takes at least 3: a median of fewer says nothing")
    args.preset, args.study = args.preset or "demo", args.study or "benchmark"
    settings = resolve_settings(args)
    from dataset_descriptions import describe
    from lora_tradeoffs.data.encoding import label_token_ids
    from lora_tradeoffs.data.preparation import prepare
    from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base

    base = prepare_base(settings)
    tokenizer, model = load_tokenizer(base), load_base(base).eval()
    eos = tokenizer.eos_token_id
    measured = []
    counts = (32, 6) if args.quick else (64, 32)
    for kind, family, count in zip(("classification", "generation"), FAMILIES, counts, strict=True):
        length = settings.preset.max_length[family]
        prepared = prepare(settings, tokenizer, FAMILIES[family], length, 2_000)
        work = []
        for task, data in prepared.items():
            prompts = prompts_of(data, min(count, len(data.split("test"))))
            if kind == "classification":
                words = label_token_ids(tokenizer, describe(task))
                ways = (classify, (prompts, words)), (classify_plainly, (prompts, words, eos))
            else:
                own = describe(task).max_new_tokens
                new = min(args.new_tokens or own, own)
                asked = (prompts, new, describe(task).stop, tokenizer)
                ways = (generate, asked), (generate_plainly, asked)
            work.append((task, ways))
        if kind == "generation" and args.checkpoint:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, args.checkpoint).eval()
        measured += measure(kind, work, model, args.pairs)
    return report(args, measured)


def measure(kind: str, work: list, model: Any, pairs: int) -> list[dict[str, Any]]:
    """Seconds of both ways over all tasks of the kind, turn about, after a warm-up of each."""
    from tqdm import tqdm

    rows = []
    for number in tqdm(range(-1, pairs), desc=kind):
        seconds, outputs = [0.0, 0.0], [[], []]
        for _, ways in work:
            for side, (function, arguments) in enumerate(ways):
                if number < 0:  # warm-up
                    arguments = (arguments[0][:ROWS], *arguments[1:])
                start = time.perf_counter()
                outputs[side] += function(model, *arguments)
                seconds[side] += time.perf_counter() - start
        different = sum(a != b for a, b in zip(*outputs, strict=True))
        allowed = 0 if kind == "classification" else max(1, len(outputs[0]) // 32)  # ties in fp32
        if different > allowed:
            raise UserError(f"{different} of {len(outputs[0])} predictions differ in {kind}")
        if number >= 0:
            rows.append(
                {"kind": kind, "pair": number, "items": len(outputs[0]), "different": different}
                | {"ours_seconds": seconds[0], "plain_seconds": seconds[1]}
            )
    return rows


def describe_adapter(folder: Path) -> str:
    """What the adapter is: its rank, and the steps it was trained for where its folder says so."""
    from lora_tradeoffs.files import checkpoint_step, read_json

    rank, step = read_json(folder / "adapter_config.json")["r"], checkpoint_step(folder)
    return f"LoRA r = {rank}" + (f" after {step} steps" if step > 0 else "")


def report(args: argparse.Namespace, rows: list[dict[str, Any]]) -> int:
    from lora_tradeoffs.files import write_json
    from lora_tradeoffs.hardware import describe_environment, pick_device

    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratio = row["plain_seconds"] / row["ours_seconds"]
        ratios.setdefault(row["kind"], []).append(round(ratio, 3))
    for kind, values in ratios.items():
        own = [row for row in rows if row["kind"] == kind]
        ours, plain = (
            statistics.median(row["items"] / row[key] for row in own)
            for key in ("ours_seconds", "plain_seconds")
        )
        print(
            f"{kind:<16}ours {ours:.2f} items/s, plain {plain:.2f}, median ratio"
            f" {statistics.median(values):.2f} ({', '.join(f'{v:.2f}' for v in values)}),"
            f" {own[0]['different']} of {own[0]['items']} differ"
        )
    if args.json:
        meta = describe_environment(pick_device(), False, "sdpa", 1)
        meta.pop("git_commit")
        meta["shapes"] = {"batch": ROWS, "new_tokens": args.new_tokens or "the tasks' own"}
        meta["generating"] = describe_adapter(args.checkpoint) if args.checkpoint else "the base"
        write_json(args.json, {"meta": meta, "ratios": ratios, "rows": rows})
        print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
