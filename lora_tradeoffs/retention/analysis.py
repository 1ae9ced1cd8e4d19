"""Retention: a checkpoint on benchmarks and held-out text, and its distance from the base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K, MID_TRAINING_LIMIT, Settings, UserError
from dataset_descriptions import describe, ordered
from lora_tradeoffs.adaptation.analysis import SAMPLES, Adaptation, AdaptationOptions
from lora_tradeoffs.data.encoding import bos_ids
from lora_tradeoffs.files import json_digest, read_json
from lora_tradeoffs.measuring.loop import Analysis, Measurement
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.records import INTRUDERS, LOSS, TEXT
from lora_tradeoffs.retention.derived import derived_records
from lora_tradeoffs.retention.scores import (
    Record,
    benchmark_records,
    drift_records,
    figures,
    item_scores,
)
from lora_tradeoffs.retention.units import SCALE_MEASURE, RetentionOptions, RetentionUnit
from lora_tradeoffs.tables.scores import retention_table

TEXT_CHARACTERS = 4_000  # of each document's beginning: about a window's worth of tokens
TEXT_WINDOW = 1_024  # tokens
ANSWER_TOKENS = 1_000  # of each task's rows on which base and tuned model are compared


class Retention(Analysis):
    """Measures benchmarks, held-out text and drift; the base's side is computed once."""

    name = "retention"
    trusts_records = False  # see _recorded_identities

    def __init__(self, settings: Settings, base: Base, options: RetentionOptions) -> None:
        super().__init__(settings, base, options)
        if options.fewshot_as_multiturn is not None and not settings.apply_chat_template:
            raise UserError("--fewshot-as-multiturn needs --apply-chat-template")
        self.adaptation = Adaptation(settings, base, AdaptationOptions(dtype=options.dtype))
        self.uncompared: list[str] = []  # units that differ in more than weights from the base's
        self._benchmarks: dict[tuple[str, int], Any] = {}
        self._texts: dict[str, list[str]] = {}
        # of the base, by family or task, and by max_length
        self._passages: dict[Any, dict[str, list[Any]]] = {}
        self._references: dict[Any, Any] = {}
        # of the checkpoint: directions to shrink, and what its variants share if it has none
        self._shrunk: Any = None
        self._unshrunk: dict[Any, Measurement] = {}

    # ------------------------------------------------------------------------------ units

    def units(self, subjects: Sequence[Subject]) -> list[RetentionUnit]:
        options, units = self.options, []
        tasks = self._expanded_tasks()
        last = [s for s in subjects if s.checkpoint is not None and s.is_last]
        scaled = [s for s in last if s.family is not None]  # else it has no tasks to adapt to
        for flag, which in (("scale_update", scaled), ("shrink_intruders", last)):
            if getattr(options, flag) is not None and len(subjects) > 1 and not which:
                whose = "of a run that was trained here" if last else "of a run"
                raise UserError(
                    f"--{flag.replace('_', '-')} needs the last checkpoint {whose}, and none of"
                    " the chosen checkpoints is one"
                )
        for subject in subjects:
            limit = options.limit or (0 if subject.is_measured_in_full else MID_TRAINING_LIMIT)
            units += [RetentionUnit(subject, "benchmark", t, limit, n) for t, n in tasks.items()]
            units += [RetentionUnit(subject, "text", TEXT + source) for source in self.texts()]
            if subject.checkpoint is not None:
                units.append(RetentionUnit(subject, "drift", "drift"))
            if options.scaled + options.shrunk:
                if subject in last:
                    variants = (options.scaled if subject in scaled else []) + options.shrunk
                    units += self._variant_units(subject, {subject.family}, variants, tasks, limit)
                elif subject.checkpoint is None:
                    families = {s.family for s in scaled}
                    units += self._variant_units(subject, families, [], tasks, limit)
        return units

    def _variant_units(
        self,
        subject: Subject,
        families: set,
        variants: Sequence[dict[str, Any]],
        tasks: dict[str, int],
        limit: int,
    ) -> Iterator[RetentionUnit]:
        """Adaptation of the subject as it is, and all measurements of its variants."""
        trained = ordered(task for f in FAMILIES if f in families for task in FAMILIES[f])
        few = self.options.limit or MID_TRAINING_LIMIT
        for v in ({}, *variants):
            own = {"loss_only": self.options.loss_only} | v
            yield from (RetentionUnit(subject, "adaptation", t, few, **own) for t in trained)
        for v in variants:
            measured = self.options.scale_measure if "scale" in v else SCALE_MEASURE
            for task, shots in tasks.items() if "benchmarks" in measured else ():
                yield RetentionUnit(subject, "benchmark", task, limit, shots, **v)
            for source in self.texts() if "text" in measured else ():
                yield RetentionUnit(subject, "text", TEXT + source, **v)
            if "shrunk" in v:
                yield RetentionUnit(subject, INTRUDERS, INTRUDERS, **v)

    def _expanded_tasks(self) -> dict[str, int]:
        """The options' tasks with their examples in the prompt, each of lm-eval's tags, or groups
        without a mean, replaced by its tasks.

        A unit is one benchmark.
        """
        if self.trusts_records and self.options.tasks == RetentionOptions.tasks:
            # known to be no groups, and defined without examples
            return dict.fromkeys(self.options.tasks, self.options.num_fewshot or 0)
        tasks: dict[str, int] = {}
        for name in self.options.tasks:
            benchmarks = self.benchmarks(name, self.options.limit or 0)
            group = benchmarks.loaded["groups"].get(name)
            is_one = name in benchmarks.tasks or (group is not None and group.has_aggregation)
            tasks |= dict.fromkeys([name] if is_one else benchmarks.tasks, benchmarks.num_fewshot)
        return tasks

    def benchmarks(self, task: str, limit: int) -> Any:
        """The benchmark, loaded, with its prompts tokenised."""
        from lora_tradeoffs.retention.benchmarks import Benchmarks

        if (task, limit) not in self._benchmarks:
            options = self.options.num_fewshot, limit, self.options.fewshot_as_multiturn
            self._benchmarks[task, limit] = Benchmarks(
                self.settings, self.tokenizer, [task], *options
            )
        return self._benchmarks[task, limit]

    def texts(self) -> dict[str, list[str]]:
        """Beginnings of held-out documents by source."""
        from lora_tradeoffs.data.sources import held_out_texts

        if not self._texts:
            count = self.options.documents or self.settings.preset.held_out_documents
            sources = held_out_texts(self.settings, count)
            for source, texts in sources.items():
                self._texts[source] = [text[:TEXT_CHARACTERS] for text in texts]
        return self._texts

    def request(self, unit: RetentionUnit) -> dict[str, Any]:
        request: dict[str, Any] = {"precision": self.precision, "limit": unit.limit}
        if unit.kind == "benchmark":
            identities = self._recorded_identities(unit)
            identities = identities or self.benchmarks(unit.task, unit.limit).identities
            return request | {"benchmark": identities} | self._benchmark_form
        if unit.kind == "text":
            bos = {"bos": 1} if bos_ids(self.tokenizer) else {}  # older measurements had two
            return (
                request | {"texts": json_digest(self.texts()[unit.task.removeprefix(TEXT)])} | bos
            )
        if unit.kind == "adaptation":
            grouped = {"grouped": True} if describe(unit.task).item_groups else {}
            return request | self.adaptation.request(unit.as_task) | grouped
        if unit.kind == INTRUDERS:
            return {"k": INTRUDER_K, "eps": INTRUDER_EPSILON}
        passages = self.passages(unit.subject)
        read = [(name, [[*p.tokens], [*p.compared]]) for name, of in passages.items() for p in of]
        return request | {"passages": json_digest(read)}

    @property
    def _benchmark_form(self) -> dict[str, Any]:
        turns = self.options.fewshot_as_multiturn is not False
        return self.form_request and {**self.form_request, "fewshot_as_multiturn": turns}

    def _recorded_identities(self, unit: RetentionUnit) -> dict[str, Any] | None:
        """With `trusts_records` the identities in the unit's file, if lm-eval is the same version
        and a folder's rows are older: whoever only asks what is pending need not load the tasks,
        which takes seconds. Of rows on the Hub only loading them tells whether they are new."""
        path = self.results.unit_file(unit.name)
        folder = self.settings.data_folder
        if not self.trusts_records or folder is None or not path.is_file():
            return None
        unit_shape = {"request": {"benchmark?": {"*": dict}}}
        request = read_json(path, unit_shape)["request"]
        identities = request.get("benchmark", {})
        files = (folder / unit.task).glob("*.jsonl")
        is_newer = any(file.stat().st_mtime_ns > path.stat().st_mtime_ns for file in files)
        versions = {identity.get("lm_eval") for identity in identities.values()}
        if is_newer or versions != {version("lm_eval")}:
            return None
        form = {k: request[k] for k in ("chat_template", *self._benchmark_form) if k in request}
        return identities if form == self._benchmark_form else None

    # ------------------------------------------------------------------------ measurements

    def batch_tokens(self, unit: RetentionUnit) -> int:
        """0 without batches, and for drift: its own are those in which the base was observed."""
        from lora_tradeoffs.retention.shared_prefix_lm import default_batch_tokens

        if unit.kind in ("drift", INTRUDERS):
            return 0
        if unit.kind == "adaptation":
            return self.adaptation.batch_tokens(unit.as_task)
        return default_batch_tokens(self.device)

    def before_checkpoints(self, base_model: Any, units: list[RetentionUnit]) -> None:
        """Observe the base on the passages on which checkpoints will be compared with it."""
        import torch

        from lora_tradeoffs.retention.representation import observe

        subjects = [unit.subject for unit in units if unit.kind == "drift"]
        # full fine-tuning's weights are copied over the base's
        is_overwritten = not all(subject.checkpoint.is_adapter for subject in subjects)
        passages: dict[tuple[str, int | None], list[Any]] = {}
        for subject in subjects:
            lengths = subject.max_lengths
            passages |= {(n, lengths.get(n)): p for n, p in self.passages(subject).items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            self._references = {
                name: observe(base_model, parts, copy_head=is_overwritten)
                for name, parts in passages.items()
            }

    def variants(
        self, model: Any, checkpoint: Any, units: list[RetentionUnit]
    ) -> Iterator[tuple[RetentionUnit, Any]]:
        """The units of the checkpoint as it is, then those of its variants."""
        from lora_tradeoffs.models.checkpoint_models import scaled_updates
        from lora_tradeoffs.retention.shrunk import Shrunk

        by_variant: dict[Any, list[RetentionUnit]] = {}
        for unit in units:
            by_variant.setdefault(unit.variant, []).append(unit)
        self._shrunk = None
        if any(unit.shrunk for unit in units):
            self._shrunk, self._unshrunk = Shrunk(self.settings, self.base, checkpoint), {}
        yield from ((unit, model) for unit in by_variant.get((1.0, "", 1.0), ()))
        scales = sorted({unit.scale for unit in units} - {1.0})
        if scales:
            for t, scaled in scaled_updates(self.base, checkpoint, model, scales):
                yield from ((unit, scaled) for unit in by_variant[t, "", 1.0])
        for (_, shrunk, factor), own_units in by_variant.items():
            if shrunk:
                with self._shrunk.applied(model, shrunk, factor):
                    yield from ((unit, model) for unit in own_units)

    def measure(self, model: Any, unit: RetentionUnit, batch_tokens: int) -> Measurement:
        """Raises UserError for a model that gives no finite numbers."""
        if unit.kind == INTRUDERS:
            return Measurement([self._shrunk.record(unit)])
        is_changed = self._shrunk is None or self._shrunk.has_intruders or unit.scale != 1
        if is_changed or unit.kind == "drift":
            return self._measure(model, unit, batch_tokens)
        key = unit.kind, unit.task, unit.limit, unit.shots
        if key not in self._unshrunk:
            self._unshrunk[key] = self._measure(model, unit, batch_tokens)
        same = self._unshrunk[key]
        return replace(same, records=[record | unit.fields for record in same.records])

    def _measure(self, model: Any, unit: RetentionUnit, batch_tokens: int) -> Measurement:
        try:
            if unit.kind == "benchmark":
                return self._measure_benchmark(model, unit, batch_tokens)
            if unit.kind == "text":
                return self._measure_text(model, unit, batch_tokens)
            if unit.kind == "adaptation":
                return self._measure_adaptation(model, unit, batch_tokens)
            return self._measure_drift(model, unit)
        except FloatingPointError as error:
            raise UserError(str(error)) from None

    def _measure_benchmark(self, model: Any, unit: RetentionUnit, batch_tokens: int) -> Measurement:
        benchmarks = self.benchmarks(unit.task, unit.limit)
        (result,) = benchmarks.measure(model, token_budget=batch_tokens, bf16=self.bf16)
        definition = next(iter(benchmarks.tasks.values())).config
        split = definition.test_split or definition.validation_split
        records = benchmark_records({**unit.fields, "split": split}, result)
        samples = result.answers[:SAMPLES]
        return Measurement(records, item_scores(result.items), samples=samples)

    def _measure_text(self, model: Any, unit: RetentionUnit, batch_tokens: int) -> Measurement:
        from lora_tradeoffs.retention.benchmarks import text_log_likelihoods

        texts = self.texts()[unit.task.removeprefix(TEXT)]
        options = {"max_length": TEXT_WINDOW, "token_budget": batch_tokens, "bf16": self.bf16}
        result = text_log_likelihoods(model, self.tokenizer, texts, **options)
        items = {"log_likelihood": result.log_likelihoods, "tokens": result.tokens}
        (scores,) = item_scores(items)
        record = {**unit.fields, "split": "test", "task": unit.task, "metric": scores.name}
        return Measurement([record | figures(scores) | {"n": len(texts)}], [scores])

    def _measure_adaptation(
        self, model: Any, unit: RetentionUnit, batch_tokens: int
    ) -> Measurement:
        """Primary metric and loss of one of the tasks that were trained, on validation."""
        metrics, _, _ = self.adaptation.scores(model, unit.as_task, batch_tokens)
        scores = [s for s in metrics if s.name in (describe(unit.task).metrics[0], LOSS)]
        groups = self.adaptation.groups(unit.as_task)
        common = {**unit.fields, "split": "validation", "task": unit.task}
        records = [{**common, "metric": s.name} | figures(s, groups) for s in scores]
        return Measurement(records, scores, groups)

    def _measure_drift(self, model: Any, unit: RetentionUnit) -> Measurement:
        import torch

        from lora_tradeoffs.retention.representation import compare

        records, lengths = [], unit.subject.max_lengths
        for task in ("text", *FAMILIES.get(unit.subject.family or "", ())):
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                drift = compare(self._references[task, lengths.get(task)], model)
            split = "test" if task == "text" else "validation"
            common = {**unit.fields, "split": split, "task": task}
            records += drift_records(common, drift, of_text=task == "text")
        return Measurement(records)

    def passages(self, subject: Subject) -> dict[str, list[Any]]:
        """What base and tuned model are compared on: held-out text, and the family's rows.

        Text is compared at every position but the first, a row where its answer is predicted.
        """
        from lora_tradeoffs.retention import representation as r

        family = subject.family
        key = family, *sorted(subject.max_lengths.items())
        if key not in self._passages:
            sources = [r.text_passages(self.tokenizer, texts) for texts in self.texts().values()]
            each = self.settings.preset.drift_tokens // len(sources)
            passages = {"text": [p for parts in sources for p in r.limited(parts, each)]}
            for task in FAMILIES.get(family or "", ()):
                rows = self.adaptation.task(subject, task).split("validation")
                passages[task] = r.answer_passages(rows, ANSWER_TOKENS)
            self._passages[key] = passages
        return self._passages[key]

    # ------------------------------------------------------------------------------ report

    def derived_records(self) -> list[Record]:
        records, self.uncompared = derived_records(self.results)
        return records

    def table(self, records: Iterable[Record]) -> str:
        return retention_table(records)

    def outputs(self) -> dict[str, Path]:
        return {"items": self.results.folder / "items"}

    def warnings(self) -> list[str]:
        shots = {k: v for b in self._benchmarks.values() for k, v in b.other_shots.items()}
        messages = [
            f"{task} is defined with {defined} in-context examples and was measured with {shown}"
            for task, (defined, shown) in shots.items()
        ]
        if names := self.uncompared:
            messages.append(
                f"{len(names)} measurements, such as {names[0]}, have a different precision, limit"
                " or data than the base's and are not compared with it: measure them again with"
                " the same flags"
            )
        return messages
