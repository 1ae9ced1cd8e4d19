"""Gradient conflict: how far the tasks' gradients pull apart, at the base and at checkpoints.

    python gradient_conflict.py                                  # all runs of the study
    python gradient_conflict.py --runs similar_lora_r8_seed42 --checkpoints last --batches 64

On the same micro-batches for every checkpoint it takes the gradient of each task's loss: of LoRA on
the adapter's parameters, else on the weights of q_proj and v_proj. Pairwise cosine, share of
conflicts and magnitude similarity, by layer and overall. What is there is not measured again.
Results go to performance_analysis/<study>/gradients/.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from config import (
    DATA_SEED,
    FAMILIES,
    GRADIENT_BATCHES,
    Parser,
    Settings,
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
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.tables.scores import gradient_table


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure how far the tasks' gradients pull apart.")
    add_common_arguments(parser)
    group = add_analysis_arguments(parser)
    group.add_argument(
        "--batches",
        type=int,
        default=GRADIENT_BATCHES,
        help=f"micro-batches a task (default {GRADIENT_BATCHES})",
    )
    group.add_argument(
        "--batch-size", type=int, default=8, help="rows of each task in a batch (default 8)"
    )
    return parser


@dataclass(frozen=True, eq=False)
class Unit:
    """One measurement: a subject on the tasks of one family that it was trained on, or all."""

    subject: Subject
    family: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the base, and of what is of no family, with the family that is measured."""
        family = "" if self.subject.family else self.family
        return unit_name(self.subject.run, self.subject.step, family)


# ----------------------------------------------------------------------------- what to measure


def plan_units(subjects: Sequence[Subject]) -> tuple[list[Unit], list[str]]:
    """Every measurement that is asked for, the base's first; runs without a pair of tasks."""
    trained = {s.family for s in subjects if s.checkpoint is not None}
    everything = not trained or None in trained
    units, alone = [], []
    for subject in subjects:
        if subject.family:
            tasks = _trained_tasks(subject)
            if len(tasks) > 1:
                units.append(Unit(subject, subject.family, tasks))
            else:
                alone.append(subject.run)
            continue
        foreign = subject.checkpoint is not None
        families = [f for f in FAMILIES if everything or foreign or f in trained]
        units += [Unit(subject, family, FAMILIES[family]) for family in families]
    return units, list(dict.fromkeys(alone))


def _trained_tasks(subject: Subject) -> tuple[str, ...]:
    """The tasks in the record of the checkpoint's run."""
    folder = subject.checkpoint.folder
    path = next(p / "run.json" for p in (folder.parent, folder) if (p / "run.json").is_file())
    return tuple(read_json(path)["config"]["tasks"])


class MatchedBatches:
    """Each task's micro-batches: the same rows for every run and checkpoint."""

    def __init__(self, settings: Settings, tokenizer: Any, count: int, size: int) -> None:
        self.settings, self.tokenizer, self.count, self.size = settings, tokenizer, count, size
        self.prepared: dict[str, Any] = {}
        self.drawn: dict[str, list[list[dict[str, Any]]]] = {}

    def task(self, name: str) -> Any:
        """The prepared task."""
        from dataset_descriptions import describe
        from lora_tradeoffs.data.preparation import prepare

        if name not in self.prepared:
            length = self.settings.preset.max_length[describe(name).family]
            count = self.settings.examples_per_task
            self.prepared |= prepare(self.settings, self.tokenizer, [name], length, count)
        return self.prepared[name]

    def rows(self, name: str) -> list[list[dict[str, Any]]]:
        """The task's batches of rows of the train split. Raises UserError if it is too small."""
        from lora_tradeoffs.gradients.conflict import micro_batches

        if name not in self.drawn:
            rows = self.task(name).split("train").select_columns(["input_ids", "prompt_length"])
            try:
                drawn = micro_batches(len(rows), self.count, self.size, DATA_SEED)
            except ValueError as error:
                raise UserError(f"{name}, train: {error}; lower --batch-size") from None
            self.drawn[name] = [rows.select(batch).to_list() for batch in drawn]
        return self.drawn[name]

    def request(self, unit: Unit) -> dict[str, Any]:
        """What makes the rows of a measurement the same ones."""
        data = {name: self.task(name).fingerprint for name in unit.tasks}
        return {"data": data, "batches": self.count, "batch_size": self.size}


# ---------------------------------------------------------------------------------- measuring


def measure_all(
    batches: MatchedBatches, results: Any, base: Any, pending: dict[Unit, Any], device: str
) -> list[str]:
    """Measure checkpoint by checkpoint; what was wrong with those that could not be.

    `pending` maps a unit to its request.
    """
    from tqdm import tqdm

    from lora_tradeoffs.models.checkpoint_models import checkpoint_models

    if not pending:
        return []
    by_checkpoint: dict[Any, list[Unit]] = {}
    for unit in pending:
        by_checkpoint.setdefault(unit.subject.checkpoint, []).append(unit)
    broken = []
    wanted = [checkpoint for checkpoint in by_checkpoint if checkpoint is not None]
    with tqdm(total=len(pending) * batches.count, unit="batch") as progress:
        for checkpoint, model in checkpoint_models(base, wanted, device):
            if isinstance(model, UserError):
                broken.append(str(model))
                progress.update(len(by_checkpoint[checkpoint]) * batches.count)
                continue
            for unit in by_checkpoint.get(checkpoint, []):
                progress.set_description(unit.name)
                try:
                    records = measure(batches, model, unit, pending[unit], progress.update)
                except UserError as error:
                    if checkpoint is None:
                        raise
                    broken.append(f"{unit.name}: {error}")
                    continue
                results.write(unit.name, pending[unit], records)
    return broken


def measure(
    batches: MatchedBatches, model: Any, unit: Unit, request: dict[str, Any], progress: Any
) -> list[dict[str, Any]]:
    """The unit's flat records."""
    from lora_tradeoffs.data.collator import CompletionCollator
    from lora_tradeoffs.gradients.conflict import (
        conflict_records,
        gradient_products,
        measured_parameters,
    )

    rows = {name: batches.rows(name) for name in unit.tasks}
    fewest = min(map(len, rows.values()))  # of the family's smallest task
    rows = {name: own[:fewest] for name, own in rows.items()}
    collate = CompletionCollator(batches.tokenizer.pad_token_id)
    bf16 = request["precision"] == "bf16 autocast"
    of, _ = measured_parameters(model)
    products = gradient_products(model, rows, collate, bf16, progress)
    own = {"run": unit.subject.run, "family": unit.family, "step": unit.subject.step}
    common = {**unit.subject.fields, **own, "split": "train", "of": of}
    common["batch_size"] = batches.size
    return [{**common, **record} for record in conflict_records(products)]


# ------------------------------------------------------------------------------------- report


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.batches < 2:
        raise UserError("--batches takes at least 2: an interval needs two")
    if args.batch_size < 2:
        raise UserError("--batch-size takes at least 2: halves of a batch tell noise from conflict")
    settings = resolve_settings(args)
    from lora_tradeoffs.hardware import pick_device, pick_precision
    from lora_tradeoffs.measuring.results import Results
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    device = pick_device()
    print(settings.headline(device), flush=True)
    base = prepare_base(settings)
    units, alone = plan_units(find_subjects(settings, base, args.runs, args.checkpoints))
    if alone:
        print(f"left out, of a single task, which has no other to conflict: {', '.join(alone)}")
    if args.batches < GRADIENT_BATCHES:
        print(f"{args.batches} batches: a try; the study's floor is {GRADIENT_BATCHES}")
    batches = MatchedBatches(settings, load_tokenizer(base), args.batches, args.batch_size)
    bf16 = pick_precision(args.dtype, device) == "bf16"
    precision = {"precision": "bf16 autocast" if bf16 else "fp32"}
    results = Results(settings.document("gradients").parent)
    requests = {u: batches.request(u) | precision | weights_of(u.subject, base) for u in units}
    pending = {
        unit: request
        for unit, request in requests.items()
        if args.overwrite or not results.is_done(unit.name, request)
    }
    for name in dict.fromkeys(task for unit in pending for task in unit.tasks):
        found = len(batches.rows(name))  # a task that is too small is said before a model is loaded
        if found < args.batches:
            print(f"{name}: its rows make {found} batches (none is used twice)")
    print(f"{len(units)} measurements, {len(units) - len(pending)} of them are there", flush=True)
    broken = measure_all(batches, results, base, pending, device)
    meta = {"study": settings.study, "base_model": base.name, "preset": settings.preset.name}
    with results.joining():
        path = results.join("gradients", meta)
    print(gradient_table(read_json(path)["records"]))
    print(f"records: {path}")
    if not args.no_figures:
        print(f"figures: {draw('gradients', settings, args.pdf)}")
    for message in broken:
        print(f"error: {message}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
