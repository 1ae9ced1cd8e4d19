"""Gradient conflict as an analysis: which tasks and micro-batches are compared, at which models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from config import BUILT_IN_FAMILIES, DATA_SEED, FAMILIES, GRADIENT_BATCHES, UserError
from lora_tradeoffs.measuring.loop import Analysis, Measurement
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.records import read_run, unit_name
from lora_tradeoffs.tables.scores import gradient_table

Batches = list[list[dict[str, Any]]]  # batches of prepared rows


@dataclass(frozen=True)
class GradientOptions:
    """What gradient_conflict.py measures. Its flags have these names and defaults."""

    batches: int = GRADIENT_BATCHES
    batch_size: int = 8
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.batches < 2:
            raise UserError("--batches must be 2 or more: an interval needs two")
        if self.batch_size < 2:
            raise UserError("--batch-size must be 2 or more: halves of a batch show the noise")


@dataclass(frozen=True)
class GradientUnit:
    """One measurement: a subject on the tasks that it was trained on, or all of a family."""

    subject: Subject
    family: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """With the family for the base and other models that have none."""
        family = "" if self.subject.family else self.family
        return unit_name(self.subject.run, self.subject.step, family)


class GradientAnalysis(Analysis):
    """Compares the gradients of the tasks' losses, on the same rows for every model."""

    name, progress_unit, packages = "gradients", "batch", ("scipy",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.steps_per_unit = self.options.batches
        self._batches: dict[str, Batches] = {}  # by the rows' fingerprint

    def units(self, subjects: Sequence[Subject]) -> list[GradientUnit]:
        """Every subject that has a pair of tasks; the base and foreign models on both families."""
        trained = {s.family for s in subjects if s.checkpoint is not None}
        all_families = not trained or None in trained
        units = []
        for subject in subjects:
            if subject.family:
                tasks = trained_tasks(subject)
                units += [GradientUnit(subject, subject.family, tasks)] if len(tasks) > 1 else []
                continue
            foreign = subject.checkpoint is not None
            both = BUILT_IN_FAMILIES if all_families or foreign else ()
            families = [f for f in FAMILIES if f in both or f in trained]
            families = [f for f in families if len(FAMILIES[f]) > 1]
            units += [GradientUnit(subject, family, FAMILIES[family]) for family in families]
        return units

    def request(self, unit: GradientUnit) -> dict[str, Any]:
        return {
            "data": {t: self.task(unit.subject, t).fingerprint for t in unit.tasks},
            "batches": self.options.batches,
            "batch_size": self.options.batch_size,
            "precision": self.precision,
        }

    def before_models(self, units: list[GradientUnit]) -> None:
        """Draw the batches. Raises UserError for a task that has too few rows."""
        subjects = {task: unit.subject for unit in units for task in unit.tasks}
        for task, subject in subjects.items():
            count = len(self.batches(subject, task))
            if count < self.options.batches:
                print(f"{task}: only {count} batches available (rows are not reused)")

    def batches(self, subject: Subject, task: str) -> Batches:
        """The task's batches of training rows. Raises UserError if there are too few rows."""
        from lora_tradeoffs.gradients.conflict import micro_batches

        prepared = self.task(subject, task)
        if prepared.fingerprint not in self._batches:
            rows = prepared.split("train").select_columns(["input_ids", "prompt_length"])
            sizes = self.options.batches, self.options.batch_size
            try:
                drawn = micro_batches(len(rows), *sizes, DATA_SEED)
            except ValueError as error:
                raise UserError(f"{task}, train: {error}; lower --batch-size") from None
            self._batches[prepared.fingerprint] = [rows.select(b).to_list() for b in drawn]
        return self._batches[prepared.fingerprint]

    def measure(self, model: Any, unit: GradientUnit, batch_tokens: int = 0) -> Measurement:
        from lora_tradeoffs.data.collator import CompletionCollator
        from lora_tradeoffs.gradients.conflict import (
            conflict_records,
            gradient_products,
            measured_parameters,
        )

        batches = {task: self.batches(unit.subject, task) for task in unit.tasks}
        fewest = min(map(len, batches.values()))
        batches = {task: all_batches[:fewest] for task, all_batches in batches.items()}
        collate = CompletionCollator(self.tokenizer.pad_token_id)
        subject, advance = unit.subject.fields, lambda: self.advance(1)
        rank = subject["rank"] if subject["method"] == "pissa" else 0
        products = gradient_products(model, batches, collate, self.bf16, advance, rank)
        parameter_set, _ = measured_parameters(model)
        about = {"run": unit.subject.run, "family": unit.family, "step": unit.subject.step}
        about |= {"split": "train", "of": parameter_set, "batch_size": self.options.batch_size}
        common = {**subject, **about}
        return Measurement([{**common, **record} for record in conflict_records(products)])

    def table(self, records: Iterable[dict[str, Any]]) -> str:
        return gradient_table(records)


def trained_tasks(subject: Subject) -> tuple[str, ...]:
    """The tasks in the record of the checkpoint's run."""
    folder = subject.checkpoint.folder
    run = next(p for p in (folder.parent, folder) if (p / "run.json").is_file())
    return tuple(read_run(run, "config")["config"]["tasks"])


def single_task_runs(subjects: Sequence[Subject]) -> list[str]:
    """Runs that were trained on one task, so that no gradients can conflict."""
    names = [s.run for s in subjects if s.family and len(trained_tasks(s)) == 1]
    return list(dict.fromkeys(names))
