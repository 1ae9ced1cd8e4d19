"""Adaptation: every checkpoint and the base, evaluated on the tasks, with intervals.

    python eval.py                                      # all runs of the study
    python eval.py --runs similar_lora_r8_seed42 --checkpoints last
    python eval.py --runs FOLDER                        # any PEFT or full folder, or Hub repository

Validation is measured at every checkpoint (on --limit items in mid-training), test at the base, the
last checkpoint and the one with the lowest validation loss alone. What is there is not measured
again. Results go to performance_analysis/<study>/.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from config import (
    FAMILIES,
    MID_TRAINING_LIMIT,
    SPLITS,
    Parser,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from dataset_descriptions import DESCRIPTIONS, describe
from lora_tradeoffs.adaptation.analysis import Evaluator, Unit, records_of
from lora_tradeoffs.figures.draw import draw
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.subjects import (
    Subject,
    add_analysis_arguments,
    find_subjects,
    no_arm,
    no_runs,
    weights_of,
)
from lora_tradeoffs.tables.scores import adaptation_table

SHOTS = 4  # of the base's second row: a zero-shot base mostly lacks the format


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate every checkpoint on the tasks.")
    add_common_arguments(parser)
    group = add_analysis_arguments(parser)
    group.add_argument("--splits", nargs="+", choices=("validation", "test"), help="default both")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="default: the run's family")
    group.add_argument("--cross-family", action="store_true", help="the other family's tasks, too")
    group.add_argument(
        "--limit",
        type=int,
        help=f"at most N items, drawn with a seed (mid-training: {MID_TRAINING_LIMIT}; else all)",
    )
    group.add_argument(
        "--shots", type=int, default=SHOTS, help="examples in the base's second row; 0: no such row"
    )
    group.add_argument(
        "--prompts", type=int, default=0, metavar="K", help="K paraphrased prompts beside our own"
    )
    group.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    group.add_argument(
        "--batch-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="batches X times as large as by default (below 1 where memory runs out)",
    )
    return parser


# ----------------------------------------------------------------------------- what to measure


def plan_units(args: argparse.Namespace, subjects: list[Subject]) -> list[Unit]:
    """Every measurement that is asked for."""
    trained = {s.family for s in subjects if s.family} or set(FAMILIES)
    units = []
    most = min(len(d.paraphrases) for d in DESCRIPTIONS.values())
    if not 0 <= args.prompts <= most or args.shots < 0:
        raise UserError(f"--prompts takes 0 to {most}, --shots 0 or more")
    for subject in subjects:
        families = [subject.family] if subject.family else sorted(trained, reverse=True)
        if args.cross_family:
            families = list(FAMILIES)
        tasks = [task for family in families for task in FAMILIES[family]]
        for task in args.tasks or tasks:
            describe(task)
            for split in args.splits or ("validation", "test"):
                if split == "test" and not subject.is_final and not args.splits:
                    continue
                limit = args.limit or (0 if subject.is_final else MID_TRAINING_LIMIT)
                shots = (0, args.shots) if subject.checkpoint is None and args.shots else (0,)
                units += [Unit(subject, split, task, limit, n, 0) for n in shots]
                paraphrased = range(1, args.prompts + 1)
                units += [Unit(subject, split, task, limit, 0, k) for k in paraphrased]
    return units


def extra_tests(unit: Unit, splits: tuple[str, ...]) -> list[Unit]:
    """With test, the task's further test splits, where they are (MNLI's mismatched genres)."""
    if unit.split != "test":
        return []
    return [dataclasses.replace(unit, split=split) for split in splits if split not in SPLITS]


# ------------------------------------------------------------------------------------- report


def request_of(evaluator: Evaluator, base: Any, unit: Unit) -> dict[str, Any]:
    """What makes a measurement the same one."""
    return {**evaluator.request(unit), **weights_of(unit.subject, base)}


def measured_otherwise(results: Any) -> list[str]:
    """Units that were not measured as the base's: over another base, on other items."""
    units = dict(results.units())
    found = []
    for name, document in units.items():
        for record in document["records"][:1]:
            base = f"base-0-{record['task']}-{record['split']}"
            base += f"-prompt{record['prompt']}" if record["prompt"] else ""
            ours, theirs = (units.get(n, {}).get("request", {}) for n in (name, base))
            # mid-training validation is on fewer items by design
            fields = ["base", "data", "precision", "generation"]
            fields += ["limit"] * record["split"].startswith("test")
            if theirs and any(ours.get(f) != theirs.get(f) for f in fields):
                found.append(name)
    return found


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit takes at least 1")
    if not args.batch_scale > 0:
        raise UserError("--batch-scale takes a number above 0")
    settings = resolve_settings(args)
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    device = pick_device()
    print(settings.headline(device), flush=True)
    base = prepare_base(settings)
    subjects = find_subjects(args, settings, base)
    if len(subjects) == 1:
        raise no_runs(settings)
    bf16 = pick_precision(args.dtype, device) == "bf16"
    tokenizer = load_tokenizer(base)
    evaluator = Evaluator(settings, tokenizer, device, bf16, args.batch_scale)
    results = Results(settings.document("adaptation").parent)
    results.check("adaptation")
    units = {
        variant.name: variant
        for unit in plan_units(args, subjects)
        for variant in (unit, *extra_tests(unit, evaluator.task(unit.task).splits))
    }
    pending = [
        unit
        for name, unit in units.items()
        if args.overwrite or not results.is_done(name, request_of(evaluator, base, unit))
    ]
    print(f"{len(units)} measurements, {len(units) - len(pending)} of them are there", flush=True)
    broken = _measure_all(evaluator, results, base, pending, device)
    meta = {"study": settings.study, "base_model": base.name, "preset": settings.preset.name}
    with results.joining():
        path = results.join("adaptation", meta)

    print(adaptation_table(read_json(path)["records"]))
    print(f"records: {path}\nitems and samples: {results.folder}")
    if not args.no_figures:
        print(f"figures: {draw('adaptation', settings, args.pdf)}")
    if others := measured_otherwise(results):
        print(
            f"warning: {len(others)} measurements, such as {others[0]}, were made over another base"
            " or with another precision, limit or data than the base's: measure them again with the"
            " same flags",
            file=sys.stderr,
        )
    for message in broken:
        print(f"error: {message}", file=sys.stderr)
    return 1 if broken else 0


def _measure_all(
    evaluator: Evaluator, results: Any, base: Any, pending: list[Unit], device: str
) -> list[str]:
    """Measure checkpoint by checkpoint; what was wrong with those that could not be."""
    from tqdm import tqdm

    from lora_tradeoffs.models.checkpoint_models import checkpoint_models

    if not pending:
        return []
    by_folder: dict[Any, list[Unit]] = {}
    for unit in pending:
        by_folder.setdefault(unit.subject.checkpoint, []).append(unit)
    broken = []
    progress = tqdm(total=len(pending), unit="measurement")
    wanted = [checkpoint for checkpoint in by_folder if checkpoint is not None]
    for checkpoint, model in checkpoint_models(base, wanted, device, evaluator.bf16):
        for unit in by_folder.get(checkpoint, []):
            progress.set_description(unit.name)
            if isinstance(model, UserError):
                progress.update()
                continue
            try:
                scores, shares, shown = evaluator.measure(model, unit)
            except UserError as error:
                if checkpoint is None:
                    raise
                broken.append(f"{unit.name}: {error}")
                progress.update()
                continue
            _write_samples(results.folder / "samples" / f"{unit.name}.jsonl", shown)
            groups = evaluator.groups(unit)
            records = records_of(unit, scores, shares, groups)
            if checkpoint is None and not unit.shots and not unit.prompt:
                name, scored = evaluator.baseline(unit)
                arm = {**no_arm("baseline"), "run": name}
                records += [{**r, **arm} for r in records_of(unit, scored, {}, groups)]
            request = request_of(evaluator, base, unit)
            results.write(unit.name, request, records, scores, groups)
            progress.update()
        if isinstance(model, UserError):
            broken.append(str(model))
    progress.close()
    return broken


def _write_samples(path: Path, shown: list[dict[str, Any]]) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in shown)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
