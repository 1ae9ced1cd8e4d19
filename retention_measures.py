"""One checkpoint's retention: benchmarks, held-out text, and drift of what the model computes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from analysis_subjects import Subject
from config import FAMILIES, Settings, UserError
from retention_records import TEXT, Record, benchmark_records, item_scores

TEXT_DOCUMENTS = 48  # of each source of held-out text
TEXT_CHARACTERS = 4_000  # of each document's beginning: about a window's worth of tokens
TEXT_WINDOW = 1_024  # tokens
# Of the texts that hidden states are compared on: the base's states of 8,000 tokens are kept.
DRIFT_TOKENS = 5_000
PROMPT_TOKENS = 1_000  # of each task
PASSAGE = 128  # tokens


@dataclass(frozen=True)
class Unit:
    """One measurement: a subject, its update scaled, on a benchmark, a text, or for its drift."""

    subject: Subject
    kind: str  # benchmark | text | drift | task
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
        own = {"run": s.run, "family": s.family or "both", "step": s.step}
        return {**s.fields, **own, "shots": self.shots, "prompt": 0, "update_scale": self.scale}


class Retention:
    """Measures units on models; benchmarks, texts and the base's side are made once and kept."""

    def __init__(
        self, settings: Settings, tokenizer: Any, device: str, bf16: bool, room: float = 1.0
    ):
        """`room` multiplies the tokens that a batch may hold."""
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.bf16, self.room = bf16, room
        self.made: dict[tuple[str, int, int], Any] = {}
        self.texts_by_source: dict[str, list[str]] = {}
        self.references: dict[str, Any] = {}

    @property
    def precision(self) -> str:
        return "bf16 autocast" if self.bf16 else "fp32"

    def benchmark(self, unit: Unit) -> Any:
        """The unit's benchmark: loaded, its prompts tokenised."""
        from lm_eval_backend import Benchmarks

        key = (unit.task, unit.shots, unit.limit)
        if key not in self.made:
            self.made[key] = Benchmarks(
                self.settings, self.tokenizer, [unit.task], unit.shots, unit.limit
            )
        return self.made[key]

    def texts(self) -> dict[str, list[str]]:
        """Beginnings of held-out documents by source."""
        from lm_eval_tasks import held_out_texts

        if not self.texts_by_source:
            found = held_out_texts(self.settings, TEXT_DOCUMENTS)
            self.texts_by_source = {
                source: [text[:TEXT_CHARACTERS] for text in texts] for source, texts in found.items()
            }
        return self.texts_by_source

    def request(self, unit: Unit) -> dict[str, Any]:
        """What makes a measurement the same one."""
        asked: dict[str, Any] = {"precision": self.precision, "limit": unit.limit}
        if unit.kind == "benchmark":
            return asked | {"benchmark": self.benchmark(unit).identity(unit.task)}
        if unit.kind == "text":
            return asked | {"texts": _digest(self.texts()[unit.task.removeprefix(TEXT)])}
        passages = self.passages(unit.subject.family)
        tokens = {name: [list(p.tokens) for p in found] for name, found in passages.items()}
        return asked | {"passages": _digest(tokens)}

    # ------------------------------------------------------------------------ measurements

    def measure(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        """The unit's records, and the per-item statistics behind them.

        Raises UserError for a model that gives no finite numbers.
        """
        if unit.kind == "drift":
            return self._drift(model, unit), []
        measure = self._benchmark if unit.kind == "benchmark" else self._text
        records, scores = measure(model, unit)
        for s in scores:
            if s.value != s.value:
                raise UserError(f"{unit.name}: the model's logits are not finite")
        return records, scores

    def _options(self) -> dict[str, Any]:
        from scoring import TOKEN_BUDGET

        return {"token_budget": int(self.room * TOKEN_BUDGET), "bf16": self.bf16}

    def _benchmark(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        import numpy as np

        (result,) = self.benchmark(unit).measure(model, **self._options())
        if not np.isfinite([x for row in result.log_likelihoods for x in row]).all():
            raise UserError(f"{unit.name}: the model's logits are not finite")
        common = {**unit.fields, "split": result.split}
        return benchmark_records(common, result), item_scores(result.items)

    def _text(self, model: Any, unit: Unit) -> tuple[list[Record], list[Any]]:
        from comparisons import estimate
        from lm_eval_backend import text_log_likelihoods

        texts = self.texts()[unit.task.removeprefix(TEXT)]
        found = text_log_likelihoods(
            model, self.tokenizer, texts, max_length=TEXT_WINDOW, **self._options()
        )
        items = {"log_likelihood": found.log_likelihoods, "tokens": found.tokens}
        (scores,) = item_scores(items)
        e = estimate(scores)
        record = {
            **unit.fields,
            "split": "test",
            "task": unit.task,
            "metric": scores.name,
            **{"value": e.value, "stderr": e.stderr, "low": e.low, "high": e.high},
            "n": len(texts),
        }
        return [record], [scores]

    # ------------------------------------------------------------------------------- drift

    def passages(self, family: str | None) -> dict[str, list[Any]]:
        """What base and tuned model are compared on: held-out text, and the family's prompts.

        Of text every position but the first counts, of a prompt the last: its answer is read there.
        """
        from data_preprocessing import prepare
        from representation_drift import Passage, limited

        sources = [self._passages_of(texts) for texts in self.texts().values()]
        own = [p for found in sources for p in limited(found, DRIFT_TOKENS // len(sources))]
        passages = {"text": own}
        for task in FAMILIES.get(family or "", ()):
            length = self.settings.preset.max_length[family]
            count = self.settings.examples_per_task
            rows = prepare(self.settings, self.tokenizer, [task], length, count)[task]
            held_out = rows.split("validation").select_columns(["input_ids", "prompt_length"])
            prompts = (row["input_ids"][: row["prompt_length"]] for row in held_out)
            found = [Passage(ids, [len(ids) - 1]) for _, ids in zip(range(200), prompts)]
            passages[task] = limited(found, PROMPT_TOKENS) or found[:1]
        return passages

    def _passages_of(self, texts: Sequence[str]) -> list[Any]:
        from prompt_encoding import bos_ids, text_ids
        from representation_drift import Passage

        bos = bos_ids(self.tokenizer)
        return [Passage(bos + part) for text in texts for part in _cut(text_ids(self.tokenizer, text))]

    def observe(self, base: Any, families: Sequence[str | None], overwritten: bool) -> None:
        """Keep the base's side of the drift; `overwritten`: its weights will be replaced later."""
        from representation_drift import observe

        import torch

        wanted: dict[str, list[Any]] = {}
        for family in families:
            wanted |= self.passages(family)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self.references = {
                name: observe(base, found, copy_head=overwritten) for name, found in wanted.items()
            }

    def _drift(self, model: Any, unit: Unit) -> list[Record]:
        import torch

        from comparisons import estimate
        from metrics import Scores, mean
        from representation_drift import compare

        records = []
        for task in ("text", *FAMILIES.get(unit.subject.family or "", ())):
            try:
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    found = compare(self.references[task], model)
            except FloatingPointError as error:
                raise UserError(f"{unit.name}: {error}") from None
            common = {**unit.fields, "split": "test" if task == "text" else "validation"}
            common |= {"task": task, "n": int(found.tokens.sum())}
            for metric, sums in (("kl", found.kl), ("agreement", found.agreed)):
                import numpy as np

                e = estimate(Scores(metric, np.stack([sums, found.tokens], 1), mean))
                figures = {"value": e.value, "stderr": e.stderr, "low": e.low, "high": e.high}
                records.append({**common, "metric": metric, **figures})
            if task == "text":
                records += [
                    {**common, "metric": "cka", "value": float(value), "layer": layer, "of": name}
                    for layer, (name, value) in enumerate(zip(found.layers, found.cka))
                ]
        return records


def _cut(tokens: Sequence[int]) -> Iterator[list[int]]:
    """Stretches of PASSAGE tokens; a short rest is left out."""
    for start in range(0, len(tokens) - PASSAGE // 2, PASSAGE):
        yield list(tokens[start : start + PASSAGE])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
