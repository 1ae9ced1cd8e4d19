"""Adaptation: a checkpoint on one split of one task, its predictions, scores and records."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import BUILT_IN_FAMILIES, DATA_SEED, FAMILIES, MID_TRAINING_LIMIT, SPLITS, UserError
from dataset_descriptions import DESCRIPTIONS, describe
from lora_tradeoffs.data.splits import group_by_key
from lora_tradeoffs.measuring.loop import Analysis, Measurement
from lora_tradeoffs.measuring.subjects import Subject, no_arm
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.statistics.comparisons import MIN_GROUPS, estimate
from lora_tradeoffs.tables.scores import adaptation_table
from lora_tradeoffs.task_description import FEWSHOT

SAMPLES = 8  # items of each unit that are written as text


@dataclass(frozen=True)
class AdaptationOptions:
    """What eval.py measures. Its flags have these names and defaults."""

    splits: tuple[str, ...] | None = None  # None: validation, and test where `is_measured_in_full`
    tasks: tuple[str, ...] | None = None  # None: those of the run's family
    cross_family: bool = False
    limit: int | None = None
    shots: int = 4  # a zero-shot base mostly lacks the format
    prompts: int = 0
    dtype: str = "auto"

    def __post_init__(self) -> None:
        most = max(len(d.paraphrases) for d in DESCRIPTIONS.values())
        if not 0 <= self.prompts <= most or self.shots < 0:
            raise UserError(f"--prompts must be 0 to {most}, --shots 0 or more")
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit must be 1 or more")
        if unknown := {*(self.splits or ())} - {"validation", "test"}:
            raise UserError(f"--splits takes validation and test, not {min(unknown)!r:.60}")
        for task in self.tasks or ():
            describe(task)


@dataclass(frozen=True)
class TaskUnit:
    """One measurement: a subject on one split of one task."""

    subject: Subject
    split: str
    task: str
    limit: int = 0  # 0: all items
    shots: int = 0
    prompt: int = 0  # 0: the description's template, k: its k-th paraphrase
    loss_only: bool = False  # nothing is generated

    @property
    def has_loss(self) -> bool:
        return self.split == "validation" and not self.shots

    @property
    def name(self) -> str:
        shots = f"{self.shots}shot" if self.shots else ""
        prompt = f"prompt{self.prompt}" if self.prompt else ""
        return unit_name(self.subject.run, self.subject.step, self.task, self.split, shots, prompt)


class Adaptation(Analysis):
    """Evaluates the base and checkpoints on the tasks."""

    name = "adaptation"
    packages = ("scipy", "sklearn", "sacrebleu", "rouge_score")

    def units(self, subjects: Sequence[Subject]) -> list[TaskUnit]:
        """Validation of every subject, test of those that are final, with the options' variants."""
        trained = {s.family for s in subjects if s.family} or set(BUILT_IN_FAMILIES)
        units: dict[str, TaskUnit] = {}
        for subject in subjects:
            families = [subject.family] if subject.family else sorted(trained, reverse=True)
            if self.options.cross_family:
                families = [f for f in FAMILIES if f in trained or f in BUILT_IN_FAMILIES]
            tasks = [task for family in families for task in FAMILIES[family]]
            for task in self.options.tasks or tasks:
                for unit in self._units_of(subject, task):
                    units.setdefault(unit.name, unit)
        return list(units.values())

    def _units_of(self, subject: Subject, task: str) -> Iterable[TaskUnit]:
        options = self.options
        limit = options.limit or (0 if subject.is_measured_in_full else MID_TRAINING_LIMIT)
        shots = (0, options.shots) if subject.checkpoint is None and options.shots else (0,)
        splits = options.splits or (
            ("validation", "test") if subject.is_measured_in_full else ("validation",)
        )
        for split in splits:
            units = [TaskUnit(subject, split, task, limit, n) for n in shots]
            paraphrased = range(1, 1 + min(options.prompts, len(describe(task).paraphrases)))
            units += [TaskUnit(subject, split, task, limit, 0, k) for k in paraphrased]
            for unit in units:
                yield unit
                if split == "test":  # and the task's further test splits: MNLI's mismatched genres
                    further = [
                        s for s in self.task(subject, task).splits if s not in (*SPLITS, FEWSHOT)
                    ]
                    yield from (dataclasses.replace(unit, split=name) for name in further)

    def request(self, unit: TaskUnit) -> dict[str, Any]:
        description = describe(unit.task)
        extra = list(map(list, description.extra_metrics))
        written = description.definition or {}
        metrics = {n: written[n] for n in ("metric_list", "filter_list") if n in written}
        return {
            "data": self.task(unit.subject, unit.task, unit.prompt).fingerprint,
            "limit": unit.limit,
            "shots": unit.shots,
            "precision": self.precision,
            "generation": [description.max_new_tokens, description.stop],
            **({"extra_metrics": extra} if extra else {}),
            **({"metrics": metrics} if metrics else {}),
            **({"loss_only": True} if unit.loss_only else {}),
            **self.form_request,
        }

    def batch_tokens(self, unit: TaskUnit) -> int:
        from lora_tradeoffs.scoring.generation import GENERATION_BUDGET
        from lora_tradeoffs.scoring.log_likelihoods import TOKEN_BUDGET

        budget = TOKEN_BUDGET if describe(unit.task).has_choices else GENERATION_BUDGET
        return budget * (8 if self.device == "cuda" else 1)

    def measure(self, model: Any, unit: TaskUnit, batch_tokens: int) -> Measurement:
        """The unit's records; with the base's also those of the predictions without a model."""
        scores, shares, samples = self.scores(model, unit, batch_tokens)
        groups = self.groups(unit)
        records = records_of(unit, scores, shares, groups)
        if unit.subject.checkpoint is None and not unit.shots and not unit.prompt:
            name, baseline_scores = self.baseline(unit)
            fields = {**no_arm("baseline"), "run": name}
            records += [{**r, **fields} for r in records_of(unit, baseline_scores, {}, groups)]
        return Measurement(records, scores, groups, samples)

    def table(self, records: Iterable[dict[str, Any]]) -> str:
        return adaptation_table(records)

    def outputs(self) -> dict[str, Path]:
        return {"items and samples": self.results.folder}

    def warnings(self) -> list[str]:
        names = self.measured_otherwise()
        return names and [
            f"{len(names)} measurements, such as {names[0]}, have a different base, precision,"
            " limit or data than the base's: measure them again with the same flags"
        ]

    def measured_otherwise(self) -> list[str]:
        """Units with another base, precision, data, or items of test than the base's unit has."""
        units = dict(self.results.units())
        names = []
        for name, document in units.items():
            for record in document["records"][:1]:
                prompt = f"prompt{record['prompt']}" if record["prompt"] else ""
                base = unit_name("base", 0, record["task"], record["split"], prompt)
                request, of_base = (units.get(n, {}).get("request", {}) for n in (name, base))
                # intermediate checkpoints have fewer items of validation by design
                fields = ["base", "data", "precision", "generation"]
                fields += ["limit"] * record["split"].startswith("test")
                if of_base and any(request.get(f) != of_base.get(f) for f in fields):
                    names.append(name)
        return names

    # ---------------------------------------------------------------------- one unit's items

    def rows(self, unit: TaskUnit) -> Any:
        """The unit's items: all, or `limit` of them, the same for every checkpoint."""
        rows = self.task(unit.subject, unit.task, unit.prompt).split(unit.split)
        if not unit.limit or unit.limit >= len(rows):
            return rows
        drawn = np.random.default_rng(DATA_SEED).permutation(len(rows))[: unit.limit]
        return rows.select(np.sort(drawn))

    def groups(self, unit: TaskUnit) -> np.ndarray | None:
        """The number of the passage that an item shares with others, shape (items,).

        Items are resampled by it. None where they share none, or where passages are too few. A
        passage that was truncated counts as another.
        """
        description = describe(unit.task)
        if description.item_groups is None:
            return None
        if description.definition is not None:
            return group_by_key(self.rows(unit)["group"][:])  # however few: it was asked for
        templates = (description.template, *description.paraphrases)
        tail = templates[unit.prompt].split("{" + description.item_groups + "}")[1]
        prompts = self.rows(unit)["prompt"][:]
        passages = group_by_key(p.rsplit("\n", tail.count("\n"))[0] for p in prompts)
        return passages if passages.max() + 1 >= MIN_GROUPS else None

    def scores(
        self, model: Any, unit: TaskUnit, batch_tokens: int
    ) -> tuple[list[Any], dict[str, float], list[dict]]:
        """Scores of a model's predictions, the share of each class, and some items as text.

        On validation the scores end with LOSS; of a unit that is `loss_only` it is all.
        """
        import torch

        from lora_tradeoffs.adaptation.metrics import correct, score
        from lora_tradeoffs.adaptation.predictions import (
            best_choices,
            completion_loss,
            continuation_scores,
            generated_texts,
        )
        from lora_tradeoffs.statistics.scores import mean_scores

        rows, description = self.rows(unit), describe(unit.task)
        prompts = self._prompts(rows, unit)
        longest = max(map(len, prompts)) + description.max_new_tokens
        window = getattr(model.config, "max_position_embeddings", longest)
        if longest > window:
            raise UserError(
                f"prompt and answer take {longest:,} tokens, and the model reads {window:,}:"
                " lower --shots"
            )
        choices = self._choices(rows, description) if description.has_choices else [[]] * len(rows)
        completions = self._completions(rows) if unit.has_loss else []
        asked = [[*c, tokens] for c, tokens in zip(choices, completions)] or choices
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            of_items = description, batch_tokens
            values = continuation_scores(model, prompts, asked, *of_items) if any(asked) else []
            losses = completion_loss(values, completions)
            if unit.loss_only:
                return losses, {}, []
            if description.has_choices:
                predictions, by_length = best_choices(values, choices, description, self.tokenizer)
                references, decode = rows["label"][:], self.tokenizer.decode
                outputs = [decode(c[p]).strip() for c, p in zip(choices, predictions)]
            else:
                predictions = generated_texts(model, prompts, *of_items, self.tokenizer)
                references, outputs = rows["references"][:], predictions
        shares = {
            f"share_{name}": float(np.mean(np.array(predictions) == i))
            for i, name in enumerate(description.label_names)
        }
        samples = [
            {"row": row["row"], "prompt": row["prompt"], "output": output}
            | {"references": row["references"]}
            for row, output in zip(rows.select(range(min(SAMPLES, len(rows)))), outputs)
        ]
        scores = score(unit.task, predictions, references)
        if "acc_norm" in description.metrics:
            scores.append(mean_scores("acc_norm", correct(by_length, references)))
        return scores + losses, shares, samples

    def baseline(self, unit: TaskUnit) -> tuple[str, list[Any]]:
        """Name and scores of the predictions that need no model, on the unit's items."""
        from lora_tradeoffs.adaptation.baselines import BASELINES
        from lora_tradeoffs.adaptation.metrics import score

        rows, description = self.rows(unit), describe(unit.task)
        references = rows["label" if description.has_choices else "references"][:]
        predict = BASELINES[description.baseline]
        task = self.task(unit.subject, unit.task)
        predictions = predict(description, rows, lambda: task.split("train"))
        return description.baseline, score(unit.task, predictions, references)

    def _prompts(self, rows: Any, unit: TaskUnit) -> list[list[int]]:
        from lora_tradeoffs.data.encoding import prompt_ids

        if unit.shots:
            shots = self.shots(unit)
            return [prompt_ids(self.tokenizer, prompt, shots) for prompt in rows["prompt"][:]]
        ids, starts = rows["input_ids"][:], rows["prompt_length"][:]
        return [row[:start] for row, start in zip(ids, starts, strict=True)]

    def shots(self, unit: TaskUnit) -> list[tuple[str, str]]:
        """The in-context examples before a prompt, the same for all. Raises UserError for few."""
        task = self.task(unit.subject, unit.task)
        train = task.split(FEWSHOT if FEWSHOT in task.splits else "train")
        if unit.shots > len(train):
            raise UserError(f"{unit.task} has {len(train)} train rows: lower --shots {unit.shots}")
        chosen = np.random.default_rng(DATA_SEED).permutation(len(train))[: unit.shots]
        return [(train[int(i)]["prompt"], train[int(i)]["completion"]) for i in chosen]

    def _choices(self, rows: Any, description: Any) -> list[list[list[int]]]:
        """The tokens of every item's choices."""
        from lora_tradeoffs.data.encoding import choice_ids

        if "choices" in rows.column_names:
            return rows["choices"][:]
        return [choice_ids(self.tokenizer, description)] * len(rows)

    def _completions(self, rows: Any) -> list[list[int]]:
        """The tokens of every item's completion as training has them, with EOS."""
        ids, starts = rows["input_ids"][:], rows["prompt_length"][:]
        return [row[start:] for row, start in zip(ids, starts, strict=True)]


def records_of(
    unit: TaskUnit, scores: list[Any], shares: dict[str, float], groups: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """The unit's flat records; errors and intervals are over `groups` of items where given."""
    subject = unit.subject
    common = {
        **subject.fields,
        "run": subject.run,
        "family": subject.family or describe(unit.task).family,
        "step": subject.step,
        "rows_seen": round(subject.step * subject.rows_per_step.get(unit.task, 0)),
        "split": unit.split,
        "task": unit.task,
        "shots": unit.shots,
        "prompt": unit.prompt,
    }
    records = []
    for s in scores:
        figures = dataclasses.asdict(estimate(s, groups=groups))
        records.append({**common, "metric": s.name, **figures})
    count = scores[0].count
    for name, value in shares.items():
        records.append({**common, "metric": name, "value": value, "n": count})
    return records
