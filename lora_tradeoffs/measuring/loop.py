"""The loop that the four analyses share: find what is pending, measure it, join the records.

    analysis = Adaptation(settings, base, AdaptationOptions(limit=100))
    units = analysis.units(find_subjects(settings, base))
    pending(analysis, units)                   # loads no model
    run(analysis, units, models, draw, args)   # returns the exit code

A unit is one measurement: an object with a `subject` (base or checkpoint) and a unique `name`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, MID_TRAINING_LIMIT, Settings, UserError
from dataset_descriptions import describe, own_definitions, preset_family
from lora_tradeoffs.chat import form_of
from lora_tradeoffs.files import read_records, write_text
from lora_tradeoffs.measuring.reported import report_scores
from lora_tradeoffs.measuring.results import Results, of_other_weights
from lora_tradeoffs.measuring.subjects import Subject, own_settings, weights_of
from lora_tradeoffs.models.base import Base, load_tokenizer
from lora_tradeoffs.records import run_configs

if TYPE_CHECKING:
    import numpy as np

    from lora_tradeoffs.models.checkpoint_models import Checkpoint

    # gives (None, the base), then each checkpoint with its model, or with a UserError
    Models = Callable[[list[Checkpoint]], Iterator[tuple[Checkpoint | None, Any]]]

SMALLEST_BATCH = 64  # tokens: smaller batches are single rows, and halving frees no memory


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The result of one unit."""

    records: list[dict[str, Any]]
    scores: Sequence[Any] = ()  # per-item statistics behind the records
    groups: np.ndarray | None = None  # (items,): the number of the group that an item is in
    samples: Sequence[dict[str, Any]] = ()  # some items as text


class Analysis:
    """What one script measures: its units, what identifies them, and how they are measured."""

    name = ""  # key of config.DOCUMENTS
    progress_unit, steps_per_unit = "measurement", 1  # `self.advance(1)` reports a step
    packages: tuple[str, ...] = ()  # without which no unit could be written

    def __init__(self, settings: Settings, base: Base, options: Any) -> None:
        self.settings, self.base, self.options = settings, base, options
        self.results = Results(settings.document(self.name).parent)
        self.advance: Callable[[int], Any] = lambda steps: None
        self.halvings = 0  # of the batches, since memory ran out
        self._tasks: dict[tuple[str, int, int], Any] = {}

    # -------------------------------------------------------------- every analysis defines

    def units(self, subjects: Sequence[Subject]) -> list[Any]:
        """Every measurement that the options ask for, the base's first."""
        raise NotImplementedError

    def request(self, unit: Any) -> dict[str, Any]:
        """What makes two measurements the same, beside the weights."""
        raise NotImplementedError

    def measure(self, model: Any, unit: Any, batch_tokens: int) -> Any:
        """Measure a unit, in batches of at most `batch_tokens` tokens.

        Raises UserError for a model that cannot be measured.
        """
        raise NotImplementedError

    def table(self, records: Iterable[dict[str, Any]]) -> str:
        """What is printed at the end."""
        raise NotImplementedError

    # ------------------------------------------------------------- an analysis may override

    def batch_tokens(self, unit: Any) -> int:
        """Tokens of a batch while memory suffices; 0 if the batch is part of the measurement."""
        return 0

    def before_models(self, units: list[Any]) -> None:
        """Called with the pending units, before a model is loaded."""

    def before_checkpoints(self, base_model: Any, units: list[Any]) -> None:
        """Called with the base's model and the pending units, before any is measured."""

    def variants(
        self, model: Any, checkpoint: Checkpoint | None, units: list[Any]
    ) -> Iterator[tuple[Any, Any]]:
        """A checkpoint's units, each with the model to measure it on."""
        yield from ((unit, model) for unit in units)

    def is_done(self, unit: Any) -> bool:
        """Whether the unit was measured on these weights with this request."""
        exists = self.results.unit_file(unit.name).is_file()  # the request may read the data
        return exists and self.results.is_done(unit.name, self.full_request(unit))

    def write(self, unit: Any, result: Measurement, batch_tokens: int) -> None:
        """Write a unit to disk, its records last."""
        if result.samples:
            lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in result.samples)
            write_text(self.results.folder / "samples" / f"{unit.name}.jsonl", "".join(lines))
        request, records = self.full_request(unit), result.records
        if "chat_template" in request:
            records = [{**r, "chat_template": request["chat_template"]} for r in records]
        parts = (records, result.scores, result.groups)
        self.results.write(unit.name, request, *parts, batch_tokens)

    def derived_records(self) -> Iterable[dict[str, Any]]:
        """Records that compare units; made before the join, while no other process joins."""
        return []

    def meta(self) -> dict[str, Any]:
        """What the document says about all its records."""
        names = {"study": self.settings.study, "base_model": self.base.name}
        return names | {"preset": self.settings.preset.name}

    def outputs(self) -> dict[str, Any]:
        """Lines after the table, by their label: files beside the document, counts."""
        return {}

    def warnings(self) -> list[str]:
        """What a reader of the results has to know."""
        return []

    # ------------------------------------------------------------------------ shared by all

    def full_request(self, unit: Any) -> dict[str, Any]:
        """What makes two measurements the same, the weights included."""
        return {**self.request(unit), **weights_of(unit.subject, self.base)}

    @property
    def form_request(self) -> dict[str, Any]:
        """What the request of a unit with prompts says of their form; nothing of plain text."""
        form = form_of(self.tokenizer)
        return form.request if form else {}

    def measure_in_memory(self, model: Any, unit: Any) -> tuple[Any, int]:
        """A unit's result and its `batch_tokens`, halved each time the memory runs out.

        Later units keep the smaller batches.
        """
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        while True:
            batch_tokens = self.batch_tokens(unit) >> self.halvings
            try:
                return self.measure(model, unit, batch_tokens), batch_tokens
            except RuntimeError as error:
                if batch_tokens < 2 * SMALLEST_BATCH or not should_reduce_batch_size(error):
                    raise
            self.halvings += 1
            clear_device_cache(garbage_collection=True)

    @functools.cached_property
    def device(self) -> str:
        from lora_tradeoffs.hardware import pick_device

        return pick_device()

    @functools.cached_property
    def bf16(self) -> bool:
        """Whether models run under bf16 autocast, by `options.dtype`."""
        from lora_tradeoffs.hardware import pick_precision

        return pick_precision(self.options.dtype, self.device) == "bf16"

    @property
    def precision(self) -> str:
        return "bf16 autocast" if self.bf16 else "fp32"

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.base, self.settings)

    def task(self, subject: Subject, name: str, prompt: int = 0) -> Any:
        """The prepared rows of a task, as long as the subject was trained on.

        With its default prompt (0) or its k-th paraphrase.
        """
        from lora_tradeoffs.data.preparation import prepare

        description = describe(name)
        default = self.settings.preset.max_length[preset_family([name])]
        length = subject.max_lengths.get(name, default)
        if (name, prompt, length) not in self._tasks:
            if prompt:
                template = description.paraphrases[prompt - 1]
                description = dataclasses.replace(description, template=template)
            count = self.settings.examples_per_task
            prepared = prepare(self.settings, self.tokenizer, [description], length, count)
            self._tasks[name, prompt, length] = prepared[name]
        return self._tasks[name, prompt, length]


# ---------------------------------------------------------------------------------- the loop


def pending(analysis: Analysis, units: Sequence[Any], overwrite: bool = False) -> list[Any]:
    """The units that are not done; all of them with `overwrite`."""
    return [unit for unit in units if overwrite or not analysis.is_done(unit)]


def run(
    analysis: Analysis,
    units: Sequence[Any],
    models: Models,
    draw: Callable[[str, Settings, bool], Path],
    args: argparse.Namespace,
) -> int:
    """Measure the pending units, join the records, print the table, draw the figures.

    `models` loads the base and the checkpoints that it is given, `draw` is figures.draw.draw, and
    `args` holds the shared flags. Returns 1 if a checkpoint could not be measured, else 0.
    """
    results = analysis.results
    results.check(analysis.name)
    to_run = pending(analysis, units, args.overwrite)
    cached = len(units) - len(to_run)
    print(f"{len(units)} measurements: {cached} cached, {len(to_run)} to run", flush=True)
    for message in own_settings([unit.subject for unit in units], analysis.base):
        print(f"warning: {message}", file=sys.stderr)
    errors = measure_all(analysis, to_run, models) if to_run else []
    with results.joining():
        families = [c["family"] for c in run_configs(analysis.settings.runs_dir).values()]
        tasks = {getattr(unit, "task", "") for unit in units}
        meta = analysis.meta() | own_definitions(families, tasks)
        path = results.join(analysis.name, meta, analysis.derived_records())
    report_scores(analysis.settings, analysis.name, path)
    print(analysis.table(read_records(path)))
    for label, output in {"records": path, **analysis.outputs()}.items():
        print(f"{label}: {output}")
    if not args.no_figures:
        print(f"figures: {draw(analysis.name, analysis.settings, args.pdf)}")
    for message in [*_mixed_weights(analysis, units), *analysis.warnings()]:
        print(f"warning: {message}", file=sys.stderr)
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return 1 if errors else 0


def _mixed_weights(analysis: Analysis, units: Sequence[Any]) -> list[str]:
    """What to say of results that share a checkpoint's name, and were measured on other weights."""
    foreign = {(u.subject.run, u.subject.step): u.subject for u in units if u.subject.is_foreign}
    weights = {key: weights_of(s, analysis.base)["weights"] for key, s in foreign.items()}
    folders = [analysis.settings.document(name).parent for name in DOCUMENTS]
    names = [name for folder in folders for name in of_other_weights(folder, weights)]
    return names and [
        f"{len(names)} results, such as {names[0]}, are of other weights than that checkpoint has"
        " now: measure them again, or give another --study"
    ]


def measure_all(analysis: Analysis, units: list[Any], models: Models) -> list[str]:
    """Measure and write units, checkpoint by checkpoint; an error for each that failed.

    An error of the base is raised: without it the others mean nothing.
    """
    from tqdm import tqdm

    for package in analysis.packages:  # said before hours of measuring
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(name=package)
    analysis.before_models(units)
    by_checkpoint: dict[Any, list[Any]] = {}
    for unit in units:
        by_checkpoint.setdefault(unit.subject.checkpoint, []).append(unit)
    errors, end = [], 0
    with tqdm(total=len(units) * analysis.steps_per_unit, unit=analysis.progress_unit) as progress:
        analysis.advance = progress.update
        for checkpoint, model in models([c for c in by_checkpoint if c is not None]):
            if checkpoint is None:
                analysis.before_checkpoints(model, units)
            own_units = by_checkpoint.get(checkpoint, [])
            try:
                if isinstance(model, UserError):
                    raise model
                errors += _measure_checkpoint(analysis, checkpoint, model, own_units, progress)
            except UserError as error:
                if checkpoint is None:
                    raise
                errors.append(str(error))
            end += len(own_units) * analysis.steps_per_unit
            progress.update(end - progress.n)
    return errors


def _measure_checkpoint(
    analysis: Analysis, checkpoint: Any, model: Any, units: list[Any], progress: Any
) -> list[str]:
    """Measure and write one checkpoint's units; the errors of those that failed."""
    errors, end = [], progress.n
    # closed before the next checkpoint is loaded, since variants restore the model when they end
    with closing(analysis.variants(model, checkpoint, units)) as variants:
        for unit, variant in variants:
            progress.set_description(unit.name)
            try:
                analysis.write(unit, *analysis.measure_in_memory(variant, unit))
            except UserError as error:
                if checkpoint is None:
                    raise
                errors.append(f"{unit.name}: {error}")
            end += analysis.steps_per_unit
            progress.update(end - progress.n)
    return errors


# ------------------------------------------------------------------------------------- flags


def add_analysis_arguments(
    parser: argparse.ArgumentParser, limit: bool = False, dtype: bool = True
) -> Any:
    """Add the flags that the analyses share, and return their group."""
    group = parser.add_argument_group("what to measure")
    add = group.add_argument
    text = """runs to measure: names of the study's runs, folders, or Hub repositories (default: all
        runs of the study)"""
    add("--runs", nargs="+", metavar="RUN", help=text)
    text = "checkpoints to measure: all (default), last, or step numbers"
    add("--checkpoints", nargs="+", default=["all"], metavar="STEP", help=text)
    if limit:
        text = f"""measure at most N items of each task (default: all items, and
            {MID_TRAINING_LIMIT:,} at intermediate checkpoints)"""
        add("--limit", type=int, metavar="N", help=text)
    if dtype:
        text = """precision of the forward pass: bf16 (autocast), fp32, or auto (default), which is
            bf16 where the device computes with it"""
        add("--dtype", choices=("auto", "bf16", "fp32"), default="auto", help=text)
    add("--overwrite", action="store_true", help="recompute existing results")
    add("--pdf", action="store_true", help="also save figures as PDF")
    add("--no-figures", action="store_true", help="do not draw figures")
    return group


def options_from(cls: type, args: argparse.Namespace) -> Any:
    """The options of a dataclass, from the flags that have its fields' names."""
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(cls)}
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
