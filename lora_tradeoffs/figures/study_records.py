"""The records of a study as data frames: what every figure is drawn from.

study = StudyRecords.load(settings)
save(learning_curves(study), path)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, FAMILIES, INTRUDER_K, PRESETS, Settings
from dataset_descriptions import preset_family
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.results import Results, adaptation_unit, item_reader, retention_unit
from lora_tradeoffs.records import MEAN, OVERALL, STUDY, Record
from lora_tradeoffs.tables.arms import Arm, shared_words, with_plain_arms
from lora_tradeoffs.tables.costs import gain_costs
from lora_tradeoffs.tables.frames import SCRIPTS, load_records
from lora_tradeoffs.tables.learning_rates import at_chosen_rates, at_only_rates
from lora_tradeoffs.tables.predictors import across_runs, predictor_table, within_runs
from lora_tradeoffs.tables.transfer import transfer_table
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.learning_rates import read_rates

if TYPE_CHECKING:
    from pandas import DataFrame

    from lora_tradeoffs.statistics.contrasts import Items


COSINES = ("gradient_cosine", "gradient_conflict", "within_cosine")


def _is_drift_shown(record: Record) -> bool:
    """Over all layers the intruders at every k, else the published k; of a layer the size."""
    metric, overall = record.get("metric"), record.get("layer") == OVERALL
    if metric in ("intruders", "update_phi", "update_share"):
        return overall
    is_published = record.get("k") == INTRUDER_K and metric in ("phi", "rho")
    return metric == "relative_frobenius" or (overall and is_published)


def _is_conflict_shown(record: Record) -> bool:
    """The cosines over all layers; of a layer the mean over the pairs of tasks."""
    is_mean = record.get("layer") == OVERALL or record.get("task") == MEAN
    return is_mean and record.get("metric") in COSINES


# No figure or table shows the other records, which are most of all.
SHOWN = {"drift": _is_drift_shown, "gradients": _is_conflict_shown}
FRAMES = (*DOCUMENTS, "shrunk")


@dataclass
class StudyRecords:
    """A frame for each analysis, None where it has not been run, and tables made of them.

    Arms whose learning rates were searched appear at their chosen rate; `at_all_rates` holds the
    frames with every rate, by analysis. `rates` are the records of learning_rates.json.
    """

    adaptation: DataFrame | None = None
    retention: DataFrame | None = None
    drift: DataFrame | None = None
    gradients: DataFrame | None = None
    shrunk: DataFrame | None = None  # of retention: of checkpoints with shrunk directions
    rates: Sequence[Mapping[str, Any]] = ()
    settings: Settings | None = None
    at_all_rates: dict[str, DataFrame | None] = field(default_factory=dict)

    @classmethod
    def load(cls, settings: Settings) -> StudyRecords:
        """Read what the analyses have written so far. Raises UserError for a broken file."""
        paths = {name: settings.document(name) for name in DOCUMENTS}
        frames = {
            name: load_records(path, SHOWN.get(name)) if path.is_file() else None
            for name, path in paths.items()
        }
        frames["shrunk"] = None
        if (frame := frames["retention"]) is not None and "shrunk" in frame:
            is_shrunk = frame["shrunk"].notna()
            frames["shrunk"] = frame[is_shrunk]
            frames["retention"] = frame[~is_shrunk].dropna(axis="columns", how="all")
        frames = {n: None if f is None or f.empty else f for n, f in frames.items()}
        rates = read_rates(settings.runs_dir)
        chosen = {n: None if f is None else at_chosen_rates(f, rates) for n, f in frames.items()}
        return cls(**at_only_rates(chosen), rates=rates, settings=settings, at_all_rates=frames)

    @cached_property
    def shared_words(self) -> set[str]:
        """What the variants of all runs say ("steps40"): it sets no arms apart."""
        frames = (getattr(self, name) for name in FRAMES)
        return shared_words(frame for frame in frames if frame is not None)

    @cached_property
    def plain(self) -> StudyRecords:
        """The same, the arms without the fields that all runs share, which become a note."""
        if not self.shared_words:
            return self
        frames = with_plain_arms(*(getattr(self, name) for name in FRAMES))
        return replace(self, **dict(zip(FRAMES, frames)))

    @cached_property
    def planned_arms(self) -> dict[str, set[Arm]]:
        """The arms of each family that the study was to train: run_study.py's, else the preset's.

        They fix the confirmatory tests, whatever was measured. Labels are plain (see `plain`).
        """
        path = self.folder("study") / "study.json" if self.settings else None
        planned = read_json(path, STUDY).get("arms") if path and path.is_file() else None
        if planned is None:
            arms = PRESETS[self.preset].arms
            return {
                family: {
                    Arm(arm.method, arm.rank)
                    for arm in map(ArmSpec.parse, arms[preset_family(tasks)])
                }
                for family, tasks in FAMILIES.items()
            }
        arms = {family: {Arm(**fields) for fields in arms} for family, arms in planned.items()}
        frames = (getattr(self.plain, name) for name in FRAMES)
        known = {arm for frame in frames if frame is not None for arm in frame["arm"].unique()}
        plain = {f: {arm.without(self.shared_words) for arm in of} for f, of in arms.items()}
        # a rate that was chosen or set stands in no label
        return {f: {a if a in known else a.without_rate for a in of} for f, of in plain.items()}

    @property
    def first_frame(self) -> DataFrame | None:
        """The records of any analysis: they say by which preset the study was made."""
        frames = (self.retention, self.adaptation, self.drift, self.gradients)
        return next((frame for frame in frames if frame is not None), None)

    @property
    def adaptation_at_all_rates(self) -> DataFrame | None:
        """The records of adaptation with every learning rate that was searched."""
        return self.at_all_rates.get("adaptation")

    @cached_property
    def preset(self) -> str:
        """The preset that the records were made by; without any, the one that is set."""
        frame = self.first_frame
        if frame is not None:
            return frame.attrs["meta"]["preset"]
        return self.settings.preset.name if self.settings else ""

    def folder(self, name: str) -> Path:
        """Where an analysis has its records; of what concerns several, the study's outputs."""
        if name in DOCUMENTS:
            return self.settings.document(name).parent
        return self.settings.output_dir / "outputs" / self.settings.study

    def command(self, analysis: str) -> str:
        """The command that makes an analysis' records."""
        study = f" --study {self.settings.study}" if self.settings else ""
        return f"python {SCRIPTS[f'{analysis}.json']}{study}"

    @cached_property
    def adaptation_items(self) -> Items | None:
        """Reads the outcome of every item, which pairs two runs; None without a folder."""
        return self._items("adaptation", adaptation_unit)

    @cached_property
    def retention_items(self) -> Items | None:
        return self._items("retention", retention_unit)

    def _items(self, analysis: str, unit_of: Callable[[Any], str]) -> Items | None:
        return item_reader(Results(self.folder(analysis)), unit_of) if self.settings else None

    @cached_property
    def transfer(self) -> DataFrame | None:
        """Scores of the runs on several tasks minus those of the single-task controls."""
        if self.adaptation is None:
            return None
        return transfer_table(self.adaptation, self.adaptation_items)

    @cached_property
    def checkpoints(self) -> DataFrame | None:
        """Forgetting, gain and the measures of drift, a row for each checkpoint."""
        if self.retention is None:
            return None
        return predictor_table(self.retention, self.drift, self.adaptation)

    @cached_property
    def checkpoints_at_all_rates(self) -> DataFrame:
        """The same, of arms at every learning rate that was searched."""
        names = ("retention", "drift", "adaptation")
        frames = [self.at_all_rates.get(name, getattr(self, name)) for name in names]
        return predictor_table(*frames)

    @cached_property
    def correlations(self) -> DataFrame:
        """What goes with forgetting and gain across runs."""
        return across_runs(self.checkpoints) if self.plain is self else self.plain.correlations

    @cached_property
    def correlations_within(self) -> DataFrame:
        """The same over the checkpoints within runs."""
        plain = self.plain
        return within_runs(self.checkpoints) if plain is self else plain.correlations_within

    @cached_property
    def gains(self) -> DataFrame:
        """Each checkpoint's gain on validation, and what it had cost by then."""
        return gain_costs(self.settings.runs_dir, self.retention, self.adaptation)
