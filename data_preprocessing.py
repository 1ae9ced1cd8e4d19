"""Raw rows of the Hub, a folder or the sample -> checked, split, tokenised rows in data/<study>/.

    python data_preprocessing.py                  # all six tasks of the preset
    python data_preprocessing.py sst2 squad_v2    # the named ones

Prepared data carry a fingerprint of source, tokenizer, description and limits, so that a change
prepares them anew and two settings lie side by side. Training calls `prepare` by itself.
"""

from __future__ import annotations

import argparse
import sys

from config import TASKS, Parser, UserError, add_common_arguments, guarded, resolve_settings
from dataset_descriptions import describe
from lora_tradeoffs.data.preparation import PreparedTask, prepare


def table(prepared: dict[str, PreparedTask]) -> str:
    """The prepared data as text: sizes, lengths, shares, what was cut or dropped, overlap."""
    head = ("task", "split", "rows", "prompt mean/95%/max", "completion", "supervised", "share")
    lines = ["{:<14}{:<16}{:>7}  {:<20}{:<16}{:>11}{:>7}  cut  dropped  labels".format(*head)]
    splits = dict.fromkeys(split for task in prepared.values() for split in task.splits)
    for split in splits:
        having = {name: task for name, task in prepared.items() if split in task.splits}
        total = sum(p.report["splits"][split]["supervised_tokens"] for p in having.values())
        for name, task in having.items():
            s = task.report["splits"][split]
            prompt, completion = (
                "{mean:g}/{p95}/{max}".format(**s[key])
                for key in ("prompt_tokens", "completion_tokens")
            )
            share = f"{s['supervised_tokens'] / total:.1%}"
            labels = " ".join(f"{k}:{v}" for k, v in s.get("labels", {}).items())
            lines.append(
                f"{name:<14}{split:<16}{s['rows']:>7,}  {prompt:<20}{completion:<16}"
                f"{s['supervised_tokens']:>11,}{share:>7}  {s['truncated']:>3}"
                f"  {sum(s['dropped'].values()):>7}  {labels}"
            )
    for name, task in prepared.items():
        overlaps = task.report["overlap"]
        found = [
            f"{o['exact']} of {o['of']:,} rows of {other} equal, {o['ngram']} share 13 words"
            for other, o in overlaps.items()
            if o["exact"] or o["ngram"]
        ]
        none = [other for other, o in overlaps.items() if not (o["exact"] or o["ngram"])]
        found += ["none with " + ", ".join(none)] if none else []
        lines.append(f"{name}: {task.report['recipe']}. Overlap with train: {'; '.join(found)}")
        for split, s in task.report["splits"].items():
            lines += [f"  {split}: {n} rows dropped: {why}" for why, n in s["dropped"].items()]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Prepare the tasks' data: check, split, tokenise, and say what came out."
    )
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}; default all")
    add_common_arguments(parser)
    parser.add_argument("--limit", type=int, default=0, help="only the first N rows of each split")
    parser.add_argument("--max-length", type=int, help="tokens of prompt and completion")
    parser.add_argument("--overwrite", action="store_true", help="prepare again what is there")
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    tasks = list(dict.fromkeys(args.tasks or TASKS))
    descriptions = [describe(task) for task in tasks]
    if args.limit < 0 or (args.max_length is not None and args.max_length < 64):
        raise UserError("--limit takes 0 or more, --max-length at least 64")
    settings = resolve_settings(args)
    print(settings.headline("none"))
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    tokenizer = load_tokenizer(prepare_base(settings))
    prepared = {}
    for description in descriptions:
        max_length = args.max_length or settings.preset.max_length[description.family]
        prepared |= prepare(
            settings,
            tokenizer,
            [description.name],
            max_length,
            settings.examples_per_task,
            args.limit,
            args.overwrite,
        )
    print(table(prepared))
    print(f"prepared data: {settings.prepared_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
