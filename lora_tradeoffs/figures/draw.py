"""Every figure, by what it is about. A new one is a function of StudyRecords and a line here.

Each is saved in `figures/` beside the records that it shows; of those that concern several
analyses, in outputs/<study>/figures/.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Settings
from lora_tradeoffs.figures import adaptation, drift, gradients, retention, spectra, study
from lora_tradeoffs.figures.study_records import StudyRecords

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES: dict[str, tuple[Callable[[StudyRecords], Any], ...]] = {
    "adaptation": (
        adaptation.learning_curves,
        adaptation.last_by_rank,
        adaptation.validation_against_test,
    ),
    "retention": (
        retention.retention_curves,
        retention.forgetting_by_rank,
        retention.learning_forgetting_plane,
        retention.matched_forgetting,
        retention.shrunk_intruders,
        retention.cka_by_layer,
    ),
    "drift": (
        drift.drift_over_training,
        drift.drift_by_layer_over_training,
        drift.intruders_by_threshold,
        spectra.singular_values,
        spectra.similarity_matrices,
        spectra.phi_between_runs,
        drift.drift_against_forgetting,
    ),
    "gradients": (
        gradients.cosine_between_tasks,
        gradients.conflict_over_training,
        gradients.conflict_by_layer,
        gradients.conflict_by_layer_over_training,
    ),
    "learning rates": (study.learning_rate_curves,),
    "transfer": (study.transfer_by_task,),
    "predictors": (study.predictors_of_forgetting, study.predictors_of_gain),
    "costs": (study.gain_against_cost,),
}


def draw_one(
    records: StudyRecords, group: str, figure: Callable[[StudyRecords], Figure], pdf: bool = False
) -> Path:
    """Draw a figure of a group of FIGURES and save it as PNG, with `pdf` also as PDF; the PNG."""
    from lora_tradeoffs.figures.style import save

    path = records.folder(group) / "figures" / f"{figure.__name__}.png"
    return save(figure(records.plain), path, pdf)


def draw(analysis: str, settings: Settings, pdf: bool) -> Path:
    """Draw all figures of an analysis; the folder that they are in."""
    records = StudyRecords.load(settings)
    if getattr(records, analysis) is not None:  # else every checkpoint was broken
        for figure in FIGURES[analysis]:
            draw_one(records, analysis, figure, pdf)
    return records.folder(analysis) / "figures"
