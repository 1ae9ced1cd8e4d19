"""One checkpoint on one split of one task: predictions, scores, records."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from config import DATA_SEED, Settings, UserError
from dataset_descriptions import describe
from lora_tradeoffs.data.splits import group_by_key
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.statistics.comparisons import MIN_GROUPS, estimate, grouped

SHOWN = 8  # items of each unit that are kept as text
SHOT_SEPARATOR = "\n\n"
# Tasks whose items hang together, many to a passage. A passage that was cut counts as another.
PASSAGES = {"squad_v2": "context"}


@dataclass(frozen=True)
class Unit:
    """One measurement: a subject on one split of one task."""

    subject: Subject
    split: str
    task: str
    limit: int
    shots: int
    prompt: int  # 0: the description's own template, k: its k-th paraphrase

    @property
    def name(self) -> str:
        variant = f"-{self.shots}shot" if self.shots else ""
        variant += f"-prompt{self.prompt}" if self.prompt else ""
        return f"{self.subject.run}-{self.subject.step}-{self.task}-{self.split}{variant}"


class Evaluator:
    """Measures a model on a split of a task, batched; keeps the data between calls."""

    def __init__(self, settings: Settings, tokenizer: Any, device: str, bf16: bool, room: float):
        """`room` multiplies the tokens that a batch may hold."""
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.bf16, self.room = bf16, room * (8 if device == "cuda" else 1)
        self.prepared: dict[tuple[str, int], Any] = {}

    def task(self, name: str, prompt: int = 0) -> Any:
        """The prepared task, under its own prompt or a paraphrase."""
        from lora_tradeoffs.data.preparation import prepare

        if (name, prompt) not in self.prepared:
            description = describe(name)
            if prompt:
                template = description.paraphrases[prompt - 1]
                description = dataclasses.replace(description, template=template)
            length = self.settings.preset.max_length[description.family]
            count = self.settings.examples_per_task
            made = prepare(self.settings, self.tokenizer, [description], length, count)
            self.prepared[name, prompt] = made[name]
        return self.prepared[name, prompt]

    def rows(self, unit: Unit) -> Any:
        """The unit's items: all, or `limit` of them, the same for every checkpoint."""
        rows = self.task(unit.task, unit.prompt).split(unit.split)
        if not unit.limit or unit.limit >= len(rows):
            return rows
        drawn = np.random.default_rng(DATA_SEED).permutation(len(rows))[: unit.limit]
        return rows.select(np.sort(drawn))

    def request(self, unit: Unit) -> dict[str, Any]:
        """What makes a measurement the same one."""
        description = describe(unit.task)
        return {
            "data": self.task(unit.task, unit.prompt).fingerprint,
            "limit": unit.limit,
            "shots": unit.shots,
            "precision": "bf16 autocast" if self.bf16 else "fp32",
            "generation": [description.max_new_tokens, description.stop],
        }

    def groups(self, unit: Unit) -> np.ndarray | None:
        """The number of the passage that an item shares with others, shape (items,).

        Items are resampled by it. None where they share none, or where passages are too few.
        """
        if unit.task not in PASSAGES:
            return None
        description = describe(unit.task)
        templates = (description.template, *description.paraphrases)
        tail = templates[unit.prompt].split("{" + PASSAGES[unit.task] + "}")[1]
        prompts = self.rows(unit)["prompt"][:]
        passages = group_by_key(p.rsplit("\n", tail.count("\n"))[0] for p in prompts)
        return passages if passages.max() + 1 >= MIN_GROUPS else None

    def measure(self, model: Any, unit: Unit) -> tuple[list[Any], dict[str, float], list[dict]]:
        """Scores, other figures (class shares), and some items as text."""
        import torch

        from lora_tradeoffs.adaptation.metrics import score

        rows = self.rows(unit)
        prompts = self._prompts(rows, unit)
        description = describe(unit.task)
        longest = max(map(len, prompts)) + description.max_new_tokens
        window = getattr(model.config, "max_position_embeddings", longest)
        if longest > window:
            raise UserError(
                f"{unit.name}: prompt and answer take {longest:,} tokens, the model reads"
                f" {window:,}: lower --shots"
            )
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if description.is_classification:
                predictions = self._classify(model, prompts, description)
                references = rows["label"][:]
                outputs = [description.label_words[p] for p in predictions]
            else:
                predictions = outputs = self._generate(model, prompts, description)
                references = rows["references"][:]
        shares = {
            f"share_{name}": float(np.mean(np.array(predictions) == i))
            for i, name in enumerate(description.label_names)
        }
        shown = [
            {"row": rows[i]["row"], "prompt": rows[i]["prompt"], "output": outputs[i]}
            | {"references": rows[i]["references"]}
            for i in range(min(SHOWN, len(rows)))
        ]
        return score(unit.task, predictions, references), shares, shown

    def baseline(self, unit: Unit) -> tuple[str, list[Any]]:
        """Name and scores of the predictions that need no model, on the unit's items."""
        from lora_tradeoffs.adaptation.baselines import (
            always_abstain,
            lead,
            majority_class,
            retrieved_code,
        )
        from lora_tradeoffs.adaptation.metrics import score

        rows, name = self.rows(unit), unit.task
        references = rows["references"][:]
        if describe(name).is_classification:
            labels = rows["label"][:]
            return "majority_class", score(name, majority_class(labels).tolist(), labels)
        if name == "squad_v2":
            return "always_abstain", score(name, always_abstain(len(rows)), references)
        if name == "cnn_dailymail":
            head, tail = describe(name).template.split("{article}")
            articles = [p.removeprefix(head).removesuffix(tail) for p in rows["prompt"][:]]
            return "lead_3", score(name, [lead(a) for a in articles], references)
        train = self.task(name).split("train")
        code = [c.strip() for c in train["completion"][:]]
        found = retrieved_code(rows["prompt"][:], train["prompt"][:], code)
        return "nearest_description", score(name, found, references)

    def _prompts(self, rows: Any, unit: Unit) -> list[list[int]]:
        from lora_tradeoffs.data.encoding import bos_ids, text_ids

        ids, starts = rows["input_ids"][:], rows["prompt_length"][:]
        prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
        if not unit.shots:
            return prompts
        train = self.task(unit.task).split("train")
        if unit.shots > len(train):
            raise UserError(f"{unit.task} has {len(train)} train rows: lower --shots {unit.shots}")
        chosen = np.random.default_rng(DATA_SEED).permutation(len(train))[: unit.shots]
        examples = [train[int(i)]["prompt"] + train[int(i)]["completion"] for i in chosen]
        text = "".join(example + SHOT_SEPARATOR for example in examples)
        bos = bos_ids(self.tokenizer)
        return [bos + text_ids(self.tokenizer, text) + prompt[len(bos) :] for prompt in prompts]

    def _classify(self, model: Any, prompts: list[list[int]], description: Any) -> list[int]:
        from lora_tradeoffs.data.encoding import label_token_ids
        from lora_tradeoffs.scoring.log_likelihoods import TOKEN_BUDGET, Item, log_likelihoods

        words = [[i] for i in label_token_ids(self.tokenizer, description)]
        budget = int(self.room * TOKEN_BUDGET)
        found = log_likelihoods(model, [Item(p, words) for p in prompts], budget)
        values = np.array([[s.log_likelihood for s in row] for row in found])
        if not np.isfinite(values).all():
            raise UserError(f"{description.name}: the model's logits are not finite")
        return values.argmax(axis=1).tolist()

    def _generate(self, model: Any, prompts: list[list[int]], description: Any) -> list[str]:
        from lora_tradeoffs.scoring.generation import GENERATION_BUDGET, generate_greedily

        stop = description.stop
        decode = self.tokenizer.decode

        def stopped(tokens: list[int]) -> bool:
            return stop in decode(tokens[-8:]).lstrip()

        eos, budget = [self.tokenizer.eos_token_id], int(self.room * GENERATION_BUDGET)
        try:
            found = generate_greedily(
                model, prompts, description.max_new_tokens, eos, stopped, budget
            )
        except FloatingPointError as error:
            raise UserError(f"{description.name}: {error}") from None
        return [decode(tokens).lstrip().partition(stop)[0].strip() for tokens in found]


def records_of(
    unit: Unit, scores: list[Any], shares: dict[str, float], groups: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """The unit's flat records; errors and intervals are over `groups` of items where there are."""
    family = describe(unit.task).family
    common = {
        **unit.subject.fields,
        "run": unit.subject.run,
        "family": unit.subject.family or family,
        "step": unit.subject.step,
        "split": unit.split,
        "task": unit.task,
        "shots": unit.shots,
        "prompt": unit.prompt,
    }
    records = []
    for s in scores:
        e = estimate(s if groups is None else grouped(s, groups))
        figures = {"value": e.value, "stderr": e.stderr, "low": e.low, "high": e.high, "n": e.n}
        records.append({**common, "metric": s.name, **figures})
    count = scores[0].count
    for name, value in shares.items():
        records.append({**common, "metric": name, "value": value, "n": count})
    return records
