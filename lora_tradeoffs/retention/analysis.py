"""One checkpoint's retention: benchmarks, held-out text, and drift of what the model computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import DATA_SEED, FAMILIES, Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions, TaskUnit
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.retention.forgetting import (
    TEXT,
    Record,
    benchmark_records,
    figures,
    item_scores,
)

TEXT_CHARACTERS = 4_000  # of each document's beginning: about a window's worth of tokens
TEXT_WINDOW = 1_024  # tokens
PROMPT_TOKENS = 1_000  # of each task, on which what the model computes is compared
PASSAGE = 128  # tokens


@dataclass(frozen=True)
class Unit:
    """One measurement: a subject, its update scaled, on a benchmark, a text, or for its drift."""

    subject: Subject
    kind: str  # benchmark | text | drift | adaptation
    task: str
    limit: int = 0
    shots: int = 0
    scale: float = 1.0

    @property
    def name(self) -> str:
        name = f"{self.subject.run}-{self.subject.step}"
        name += f"-x{self.scale:g}" if self.scale != 1 else ""
        return f"{name}-{self.task}" + (f"-{self.shots}shot" if self.shots else "")

    @property
    def fields(self) -> Record:
        """What all records of the unit have in common."""
        s = self.subject
        family = s.family or (describe(self.task).family if self.kind == "adaptation" else "both")
        own = {"run": s.run, "family": family, "step": s.step}
        return {**s.fields, **own, "shots": self.shots, "prompt": 0, "update_scale": self.scale}


class Retention:
    """Measures units on models; benchmarks, texts and the base's side are made once and kept."""

    def __init__(
        self,
        settings: Settings,
        base: Any,
        tokenizer: Any,
        device: str,
        bf16: bool,
        room: float = 1.0,
    ):
        """`room` multiplies the tokens that a batch may hold."""
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.bf16, self.room = bf16, room
        self.made: dict[tuple[str, int, int], Any] = {}
        self.texts_by_source: dict[str, list[str]] = {}
        self.passages_by_family: dict[str | None, dict[str, list[Any]]] = {}
        self.references: dict[str, Any] = {}
        options = AdaptationOptions(dtype="bf16" if bf16 else "fp32")
        self.evaluator = Adaptation(settings, base, options)

    @property
    def precision(self) -> str:
        return "bf16 autocast" if self.bf16 else "fp32"

    def benchmark(self, unit: Unit) -> Any:
        """The unit's benchmark: loaded, its prompts tokenised."""
        from lora_tradeoffs.retention.benchmarks import Benchmarks

        key = (unit.task, unit.shots, unit.limit)
        if key not in self.made:
            self.made[key] = Benchmarks(
                self.settings, self.tokenizer, [unit.task], unit.shots, unit.limit
            )
        return self.made[key]

    def expanded(self, names: Sequence[str], shots: int, limit: int, subject: Subject) -> list[str]:
        """The names; in place of a tag, or of a group without a mean, its tasks.

        A unit is one benchmark.
        """
        tasks: dict[str, None] = {}
        for name in names:
            made = self.benchmark(Unit(subject, "benchmark", name, limit, shots))
            group = made.loaded["groups"].get(name)
            one = name in made.tasks or (group is not None and group.has_aggregation)
            tasks |= dict.fromkeys([name] if one else made.tasks)
        return list(tasks)

    def other_shots(self) -> dict[str, tuple[int, int]]:
        """Tasks defined with another number of examples than is shown: that number, and this."""
        return {k: v for made in self.made.values() for k, v in made.other_shots.items()}

    def texts(self) -> dict[str, list[str]]:
        """Beginnings of held-out documents by source."""
        from lora_tradeoffs.data.sources import held_out_texts

        if not self.texts_by_source:
            found = held_out_texts(self.settings, self.settings.preset.held_out_documents)
            for source, texts in found.items():
                self.texts_by_source[source] = [text[:TEXT_CHARACTERS] for text in texts]
        return self.texts_by_source

    def request(self, unit: Unit) -> dict[str, Any]:
        """What makes a measurement the same one."""
        asked: dict[str, Any] = {"precision": self.precision, "limit": unit.limit}
        if unit.kind == "benchmark":
            return asked | {"benchmark": self.benchmark(unit).identities}
        if unit.kind == "text":
            return asked | {"texts": _digest(self.texts()[unit.task.removeprefix(TEXT)])}
        if unit.kind == "adaptation":
            return asked | self.evaluator.request(_task(unit))
        passages = self.passages(unit.subject.family)
        tokens = {name: [list(p.tokens) for p in found] for name, found in passages.items()}
        return asked | {"passages": _digest(tokens)}

    # ------------------------------------------------------------------------ measurements

    def measure(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        """The unit's records, and the per-item statistics behind them.

        Raises UserError for a model that gives no finite numbers.
        """
        kinds = {"benchmark": self._benchmark, "text": self._text, "adaptation": self._adaptation}
        try:
            return kinds.get(unit.kind, self._drift)(model, unit)
        except (UserError, FloatingPointError) as error:
            raise UserError(f"{unit.name}: {error}") from None

    def _benchmark(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        benchmarks = self.benchmark(unit)
        (result,) = benchmarks.measure(model, room=self.room, bf16=self.bf16)
        definition = next(iter(benchmarks.tasks.values())).config
        split = definition.test_split or definition.validation_split
        common = {**unit.fields, "split": split}
        return benchmark_records(common, result), item_scores(result.items)

    def _text(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        from lora_tradeoffs.retention.benchmarks import text_log_likelihoods

        texts = self.texts()[unit.task.removeprefix(TEXT)]
        found = text_log_likelihoods(
            model, self.tokenizer, texts, max_length=TEXT_WINDOW, room=self.room, bf16=self.bf16
        )
        items = {"log_likelihood": found.log_likelihoods, "tokens": found.tokens}
        (scores,) = item_scores(items)
        record = {**unit.fields, "split": "test", "task": unit.task, "metric": scores.name}
        return [record | figures(scores) | {"n": len(texts)}], [scores]

    def _adaptation(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        """The primary metric of one of the tasks that were trained, on validation."""
        task = _task(unit)
        found, _, _ = self.evaluator.scores(model, task, self.evaluator.batch_tokens(task))
        (scores,) = (s for s in found if s.name == describe(unit.task).metrics[0])
        record = {**unit.fields, "split": "validation", "task": unit.task, "metric": scores.name}
        return [record | figures(scores)], [scores]

    # ------------------------------------------------------------------------------- drift

    def passages(self, family: str | None) -> dict[str, list[Any]]:
        """What base and tuned model are compared on: held-out text, and the family's prompts.

        Of text every position but the first counts, of a prompt the last: its answer is read there.
        """
        if family not in self.passages_by_family:
            self.passages_by_family[family] = self._passages(family)
        return self.passages_by_family[family]

    def _passages(self, family: str | None) -> dict[str, list[Any]]:
        from lora_tradeoffs.retention.representation import Passage, limited

        sources = [self._passages_of(texts) for texts in self.texts().values()]
        each = self.settings.preset.drift_tokens // len(sources)
        own = [p for found in sources for p in limited(found, each)]
        passages = {"text": own}
        for task in FAMILIES.get(family or "", ()):
            rows = self.evaluator.task(task).split("validation")
            rows = rows.select(range(min(200, len(rows))))
            prompts = (row["input_ids"][: row["prompt_length"]] for row in rows)
            found = [Passage(ids, [len(ids) - 1]) for ids in prompts]
            passages[task] = limited(found, PROMPT_TOKENS) or found[:1]
        return passages

    def _passages_of(self, texts: Sequence[str]) -> list[Any]:
        from lora_tradeoffs.data.encoding import bos_ids, text_ids
        from lora_tradeoffs.retention.representation import Passage

        bos = bos_ids(self.tokenizer)
        ids = (text_ids(self.tokenizer, text) for text in texts)
        found = [Passage(bos + part) for tokens in ids for part in _cut(tokens)]
        # hidden states are compared within a batch: it should hold many documents, not one
        return [found[i] for i in np.random.default_rng(DATA_SEED).permutation(len(found))]

    def observe(self, base: Any, families: Sequence[str | None], overwritten: bool) -> None:
        """Keep the base's side of the drift; `overwritten`: its weights will be replaced later."""
        import torch

        from lora_tradeoffs.retention.representation import observe

        wanted: dict[str, list[Any]] = {}
        for family in families:
            wanted |= self.passages(family)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self.references = {
                name: observe(base, found, copy_head=overwritten) for name, found in wanted.items()
            }

    def _drift(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        import torch

        from lora_tradeoffs.retention.representation import compare
        from lora_tradeoffs.statistics.scores import Scores, mean

        records = []
        for task in ("text", *FAMILIES.get(unit.subject.family or "", ())):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                found = compare(self.references[task], model)
            common = {**unit.fields, "split": "test" if task == "text" else "validation"}
            common |= {"task": task}
            for metric, sums in (("kl", found.kl), ("agreement", found.agreed)):
                scores = Scores(metric, np.stack([sums, found.tokens], 1), mean)
                records.append({**common, "metric": metric, **figures(scores)})
            if task == "text":
                common |= {"metric": "cka", "n": len(found.terms)}
                records += [
                    {**common, "value": float(value), "layer": layer, "of": name}
                    for layer, (name, value) in enumerate(zip(found.layers, found.cka))
                ]
        return records, []


def _task(unit: Unit) -> TaskUnit:
    """The adaptation that is measured beside retention: the unit's task on validation."""
    return TaskUnit(unit.subject, "validation", unit.task, unit.limit, 0, 0)


def _cut(tokens: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of PASSAGE tokens; a short rest is left out."""
    for start in range(0, len(tokens) - PASSAGE // 2, PASSAGE):
        yield list(tokens[start : start + PASSAGE])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
