"""A checkpoint whose intruder dimensions, or as many other directions, are made smaller."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from config import Settings
from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.models.checkpoint_models import with_added
from lora_tradeoffs.records import INTRUDERS, Record
from lora_tradeoffs.retention.units import RetentionUnit


class Shrunk:
    """The directions of one checkpoint (see drift.shrinking), and its model without them."""

    def __init__(self, settings: Settings, base: Base, checkpoint: Checkpoint) -> None:
        """Decompose the matrices. Raises UserError for one that is broken."""
        drift = DriftAnalysis(settings, base, DriftOptions())
        self.directions = drift.directions(read_checkpoint(checkpoint.folder, drift.weights))

    @property
    def has_intruders(self) -> bool:
        return any(len(d.chosen[INTRUDERS]) for d in self.directions.values())

    def applied(self, model: Any, shrunk: str, factor: float) -> AbstractContextManager[Any]:
        """The checkpoint's model with these directions multiplied by the factor."""
        changed = {n: d for n, d in self.directions.items() if len(d.chosen[shrunk])}
        return with_added(model, {name: d.change(shrunk, factor) for name, d in changed.items()})

    def record(self, unit: RetentionUnit) -> Record:
        """How many intruders there are afterwards, and how many directions were shrunk."""
        matrices = self.directions.values()
        values = [v for d in matrices for v in d.values[d.chosen[unit.shrunk]].tolist()]
        count = sum(d.intruders(unit.shrunk, unit.shrink) for d in matrices)
        record = {**unit.fields, "split": "", "task": INTRUDERS, "metric": INTRUDERS}
        record |= {"value": count, "n": len(matrices), "directions": len(values)}
        return record | {"mean_singular_value": sum(values) / max(len(values), 1)}
