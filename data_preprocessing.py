"""Prepare the tasks' data: raw rows -> checked, split, tokenised rows in data/<study>/.

    python data_preprocessing.py                  # all tasks
    python data_preprocessing.py sst2 squad_v2    # the named tasks

Training and the analyses prepare what they need by themselves; this command prints what came out.
Prepared data are found again by a fingerprint of source, tokenizer, description and limits.
"""

from __future__ import annotations

import argparse
import sys

from config import TASKS, UserError, resolve_settings
from dataset_descriptions import describe, preset_family
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.data.preparation import PreparedTask, prepare

SHORTEST = 64  # tokens; a prompt without its passage, and a completion, need about that


def table(prepared: dict[str, PreparedTask]) -> str:
    """The prepared splits as text: rows, lengths, shares, what was truncated or dropped."""
    import pandas as pd

    rows = []
    for task in prepared.values():
        for split, summary in task.report["splits"].items():
            prompt, completion = (
                "{mean:g}/{p95}/{max}".format(**summary[key])
                for key in ("prompt_tokens", "completion_tokens")
            )
            rows.append(
                {
                    "task": task.name,
                    "split": split,
                    "rows": summary["rows"],
                    "prompt mean/95%/max": prompt,
                    "completion": completion,
                    "supervised": summary["supervised_tokens"],
                    "truncated": summary["truncated"],
                    "dropped": sum(summary["dropped"].values()),
                    "labels": " ".join(f"{k}:{n}" for k, n in summary.get("labels", {}).items()),
                }
            )
    frame = pd.DataFrame(rows)
    totals = frame.groupby("split")["supervised"].transform("sum")
    frame.insert(6, "share", (frame["supervised"] / totals).map("{:.1%}".format))
    order = list(dict.fromkeys(frame["split"]))
    frame = frame.sort_values("split", key=lambda s: s.map(order.index), kind="stable")
    frame["task"] = frame["task"].str.ljust(frame["task"].str.len().max())
    formats = dict.fromkeys(("rows", "supervised"), "{:,}".format)
    return frame.to_string(index=False, formatters=formats)


def notes(task: PreparedTask) -> list[str]:
    """How the task's splits were made, their overlap with train, and why rows were dropped."""
    overlaps = [
        f"{o['exact']} of {o['of']:,} rows of {other} equal, {o['ngram']} share 13 words"
        for other, o in task.report["overlap"].items()
        if o["exact"] or o["ngram"]
    ]
    clean = [n for n, o in task.report["overlap"].items() if not (o["exact"] or o["ngram"])]
    overlaps += ["none with " + ", ".join(clean)] if clean else []
    lines = [f"{task.name}: {task.report['recipe']}. Overlap with train: {'; '.join(overlaps)}"]
    for split, summary in task.report["splits"].items():
        lines += [f"  {split}: {n} rows dropped: {why}" for why, n in summary["dropped"].items()]
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Prepare the tasks' data: check, split and tokenise the rows.")
    text = f"tasks to prepare, also your own (default: {' '.join(TASKS)})"
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=text)
    add_common_arguments(parser)
    add = parser.add_argument_group("what is prepared").add_argument
    text = "use only the first N rows of each split (default 0: all)"
    add("--limit", type=int, default=0, metavar="N", help=text)
    text = """truncate the passage so that prompt and completion fit into so many tokens (default:
        the preset's for the task's family)"""
    add("--max-length", type=int, metavar="TOKENS", help=text)
    add("--overwrite", action="store_true", help="prepare the data again even if they exist")
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.limit < 0 or (args.max_length is not None and args.max_length < SHORTEST):
        raise UserError(f"--limit must be 0 or more, --max-length {SHORTEST} or more")
    settings = resolve_settings(args)
    descriptions = [describe(task) for task in dict.fromkeys(args.tasks or TASKS)]
    print(settings.headline("none"))
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    tokenizer = load_tokenizer(prepare_base(settings), settings)
    prepared = {}
    for description in descriptions:
        length = args.max_length or settings.preset.max_length[preset_family([description.name])]
        rows = settings.examples_per_task, args.limit
        prepared |= prepare(settings, tokenizer, [description], length, *rows, args.overwrite)
    print(table(prepared))
    for task in prepared.values():
        print("\n".join(notes(task)))
    print(f"prepared data: {settings.prepared_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
