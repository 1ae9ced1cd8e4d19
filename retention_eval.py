"""Retention: what of the pretrained ability is left at every checkpoint, in lm-eval's own terms.

    python retention_eval.py                                  # all runs of the study
    python retention_eval.py --tasks hellaswag piqa boolq --num-fewshot 5
    python retention_eval.py --checkpoints last --scale-update

The base comes first, then every checkpoint: benchmarks of lm-evaluation-harness, log-likelihood of
held-out text, and how far predictions and hidden states lie from the base's. Mid-training is
measured on the first 1,000 items of each benchmark; base, last and validation-chosen checkpoint on
all. What is there is not measured again. Results go to outputs/<study>/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from config import (
    FAMILIES,
    MID_TRAINING_LIMIT,
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
    weights_of,
)
from lora_tradeoffs.records import TEXT
from lora_tradeoffs.retention.analysis import Retention, Unit
from lora_tradeoffs.tables.scores import retention_table

BENCHMARKS = ("hellaswag", "arc_challenge", "winogrande")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure what every checkpoint kept of the pretrained ability.")
    add_common_arguments(parser)
    group = add_analysis_arguments(parser, limit=True)
    group.add_argument(
        "--tasks",
        nargs="+",
        default=list(BENCHMARKS),
        metavar="TASK",
        help=f"lm-eval tasks, multiple choice or perplexity (default {' '.join(BENCHMARKS)})",
    )
    group.add_argument("--num-fewshot", type=int, default=0, help="examples before every question")
    group.add_argument(
        "--scale-update",
        nargs="*",
        type=float,
        metavar="T",
        help="measure the last checkpoint with its update scaled by T, too: adaptation and"
        f" retention (without T: {' '.join(f'{t:g}' for t in SCALES)})",
    )
    group.add_argument(
        "--batch-scale", type=float, default=1.0, metavar="X", help="batches X times as large"
    )
    return parser


# ----------------------------------------------------------------------------- what to measure


def plan_units(
    args: argparse.Namespace, subjects: list[Subject], texts: list[str], tasks: list[str]
) -> list[Unit]:
    """Every measurement that is asked for, the base's first."""
    units = []
    scales = scales_of(args)
    scaled = [s for s in subjects if _can_be_scaled(s)]
    for subject in subjects:
        limit = args.limit or (0 if subject.is_final else MID_TRAINING_LIMIT)
        units += [Unit(subject, "benchmark", task, limit, args.num_fewshot) for task in tasks]
        units += [Unit(subject, "text", TEXT + source) for source in texts]
        if subject.checkpoint is not None:
            units.append(Unit(subject, "drift", "drift"))
        families = {s.family for s in ([subject] if subject.checkpoint else scaled)}
        if args.scale_update is not None and (subject in scaled or subject.checkpoint is None):
            trained = [
                task for family in FAMILIES if family in families for task in FAMILIES[family]
            ]
            few = args.limit or MID_TRAINING_LIMIT
            for t in [1.0] + (scales if subject in scaled else []):
                units += [Unit(subject, "adaptation", task, few, 0, t) for task in trained]
                own = tasks if t != 1 else []
                units += [Unit(subject, "benchmark", b, limit, args.num_fewshot, t) for b in own]
    return units


def _can_be_scaled(subject: Subject) -> bool:
    """Whether it is a last checkpoint, and there are tasks on which its adaptation shows."""
    return subject.checkpoint is not None and subject.is_last and subject.family is not None


def scales_of(args: argparse.Namespace) -> list[float]:
    """The scales that need measuring: 0 is the base, 1 the checkpoint itself."""
    asked = SCALES if args.scale_update == [] else args.scale_update or ()
    return sorted(set(asked) - {0.0, 1.0})


# --------------------------------------------------------------------------------- measuring


def request_of(retention: Retention, base: Any, unit: Unit) -> dict[str, Any]:
    """What makes a measurement the same one."""
    return {**retention.request(unit), **weights_of(unit.subject, base)}


def measure_all(retention: Retention, results: Any, base: Any, pending: list[Unit]) -> list[str]:
    """Measure checkpoint by checkpoint; what was wrong with those that could not be."""
    from tqdm import tqdm

    from lora_tradeoffs.models.checkpoint_models import checkpoint_models

    if not pending:
        return []
    by_checkpoint: dict[Any, list[Unit]] = {}
    for unit in pending:
        by_checkpoint.setdefault(unit.subject.checkpoint, []).append(unit)
    drifting = [unit.subject for unit in pending if unit.kind == "drift"]
    broken = []
    progress = tqdm(total=len(pending), unit="measurement")
    wanted = [checkpoint for checkpoint in by_checkpoint if checkpoint is not None]
    for checkpoint, model in checkpoint_models(base, wanted, retention.device):
        if checkpoint is None and drifting:
            families = list(dict.fromkeys(subject.family for subject in drifting))
            overwritten = not all(subject.checkpoint.is_adapter for subject in drifting)
            retention.observe(model, families, overwritten)
        units = by_checkpoint.get(checkpoint, [])
        if isinstance(model, UserError):
            broken.append(str(model))
            progress.update(len(units))
            continue
        try:
            # closed before the next checkpoint, or the end of scaling would write into its model
            with closing(_at_their_scales(base, checkpoint, model, units)) as planned:
                for unit, scaled in planned:
                    progress.set_description(unit.name)
                    records, scores = retention.measure(scaled, unit)
                    results.write(unit.name, request_of(retention, base, unit), records, scores)
                    progress.update()
        except UserError as error:
            if checkpoint is None:
                raise
            broken.append(str(error))
    progress.close()
    return broken


def _at_their_scales(
    base: Any, checkpoint: Any, model: Any, units: list[Unit]
) -> Iterator[tuple[Unit, Any]]:
    """Every unit with the model that it is about: as it is first, then its update scaled."""
    from lora_tradeoffs.models.checkpoint_models import scaled_updates

    yield from ((unit, model) for unit in units if unit.scale == 1)
    scales = sorted({unit.scale for unit in units} - {1.0})
    if scales:
        for t, scaled in scaled_updates(base, checkpoint, model, scales):
            yield from ((unit, scaled) for unit in units if unit.scale == t)


# ------------------------------------------------------------------------------------- report


def check(args: argparse.Namespace) -> None:
    """Raise UserError for values that no measurement can have."""
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit takes at least 1")
    if args.num_fewshot < 0:
        raise UserError("--num-fewshot takes 0 or more")
    for t in args.scale_update or ():
        if not math.isfinite(t) or not 0 <= t <= 10:
            raise UserError(f"--scale-update {t:g}: write numbers from 0 to 10")
    if not args.batch_scale > 0:
        raise UserError("--batch-scale takes a number above 0")


def check_scaled(args: argparse.Namespace, subjects: list[Subject]) -> None:
    """Raise UserError if updates are to be scaled and none of the checkpoints' can be."""
    asked = args.scale_update is not None and len(subjects) > 1
    if asked and not any(map(_can_be_scaled, subjects)):
        raise UserError(
            "--scale-update is about the last checkpoints of runs of this suite; of those asked for"
            " none is one"
        )


def warnings(retention: Retention, others: list[str]) -> list[str]:
    """What a reader of the figures has to know; `others` are the units that were not compared."""
    said = [
        f"{task} is defined with {own} examples before a question, and was measured with {shown}"
        for task, (own, shown) in retention.other_shots().items()
    ]
    if others:
        said.append(
            f"{len(others)} measurements, such as {others[0]}, were made with another precision,"
            " limit or data than the base's and are not compared with it; measure them again with"
            " the same flags"
        )
    return said


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check(args)
    settings = resolve_settings(args)
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base
    from lora_tradeoffs.retention.forgetting import derived_records

    device = pick_device()
    print(settings.headline(device), flush=True)
    base = prepare_base(settings)
    subjects = find_subjects(settings, base, args.runs, args.checkpoints)
    check_scaled(args, subjects)
    bf16 = pick_precision(args.dtype, device) == "bf16"
    retention = Retention(settings, base, load_tokenizer(base), device, bf16, args.batch_scale)
    results = Results(settings.document("retention").parent)
    final = args.limit or 0
    tasks = retention.expanded(args.tasks, args.num_fewshot, final, subjects[0])
    units = plan_units(args, subjects, list(retention.texts()), tasks)
    pending = [
        unit
        for unit in units
        if args.overwrite or not results.is_done(unit.name, request_of(retention, base, unit))
    ]
    print(f"{len(units)} measurements, {len(units) - len(pending)} of them are there", flush=True)
    broken = measure_all(retention, results, base, pending)
    meta = {"study": settings.study, "base_model": base.name, "preset": settings.preset.name}
    with results.joining():
        derived, others = derived_records(results)
        path = results.join("retention", meta, derived)
    print(retention_table(read_json(path)["records"], args.num_fewshot))
    print(f"records: {path}\nitems: {results.folder / 'items'}")
    if not args.no_figures:
        print(f"figures: {draw('retention', settings, args.pdf)}")
    for message in warnings(retention, others):
        print(f"warning: {message}", file=sys.stderr)
    for message in broken:
        print(f"error: {message}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
