"""What retention_eval.py is asked to measure, and a single measurement of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from config import BENCHMARK_GROUPS, CHOICE_BENCHMARKS, UserError
from dataset_descriptions import describe
from lora_tradeoffs.adaptation.analysis import TaskUnit
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.records import CONTROL, INTRUDERS, Record, unit_name

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of --scale-update without values
FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)  # of --shrink-intruders without values
# Measured at the scales: the tasks' scores and loss, or the loss alone, and what is retained.
SCALE_MEASURE = ("score", "loss", "benchmarks", "text")


@dataclass(frozen=True)
class RetentionOptions:
    """What retention_eval.py measures. Its flags have these names and defaults."""

    tasks: tuple[str, ...] = CHOICE_BENCHMARKS  # lm-eval's names, or those of BENCHMARK_GROUPS
    num_fewshot: int | None = None  # None: as lm-eval's definitions say
    fewshot_as_multiturn: bool | None = None  # None: with a chat template
    limit: int | None = None
    documents: int | None = None  # of each held-out text; None: the preset's
    scale_update: tuple[float, ...] | None = None  # (): SCALES
    scale_measure: tuple[str, ...] = SCALE_MEASURE
    shrink_intruders: tuple[float, ...] | None = None  # (): FACTORS
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError("--limit must be 1 or more")
        if self.documents is not None and self.documents < 1:
            raise UserError("--documents must be 1 or more")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError("--num-fewshot must be 0 or more")
        measured = {*self.scale_measure}
        if not measured <= {*SCALE_MEASURE} or not measured & {"score", "loss"}:
            raise UserError(
                f"--scale-measure takes {', '.join(SCALE_MEASURE)}, and needs score or loss:"
                " updates are compared where these are equal"
            )
        tasks = (task for name in self.tasks for task in BENCHMARK_GROUPS.get(name, (name,)))
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(tasks)))
        for flag, most in (("scale_update", 10), ("shrink_intruders", 1)):
            for t in getattr(self, flag) or ():
                if not 0 <= t <= most:
                    name = flag.replace("_", "-")
                    raise UserError(f"--{name} {t:g}: write numbers from 0 to {most}")
        if self.shrink_intruders and not self.shrunk:
            raise UserError("--shrink-intruders 1 is the checkpoint: name a factor below 1")

    @property
    def scaled(self) -> list[dict[str, Any]]:
        """The scales that are measured: 0 is the base, 1 the checkpoint itself."""
        if self.scale_update is None:
            return []
        return [{"scale": t} for t in sorted({*(self.scale_update or SCALES)} - {0.0, 1.0})]

    @property
    def loss_only(self) -> bool:
        """Whether of the trained tasks the validation loss alone is measured."""
        return self.shrink_intruders is None and "score" not in self.scale_measure

    @property
    def shrunk(self) -> list[dict[str, Any]]:
        """The factors that are measured, of the intruders and of the control; 1: the checkpoint."""
        if self.shrink_intruders is None:
            return []
        factors = sorted({*(self.shrink_intruders or FACTORS)} - {1.0})
        return [{"shrunk": s, "shrink": f} for f in factors for s in (INTRUDERS, CONTROL)]


@dataclass(frozen=True)
class RetentionUnit:
    """One measurement: a subject, maybe changed, on a benchmark, a text, or for its drift.

    `scale` multiplies its update; of directions that are `shrunk`, `shrink` is the factor.
    """

    subject: Subject
    kind: str  # benchmark | text | drift | adaptation | intruders
    task: str
    limit: int = 0
    shots: int = 0
    scale: float = 1.0
    shrunk: str = ""
    shrink: float = 1.0
    loss_only: bool = False

    @property
    def variant(self) -> tuple[float, str, float]:
        return self.scale, self.shrunk, self.shrink

    @property
    def name(self) -> str:
        scale = f"x{self.scale:g}" if self.scale != 1 else ""
        scale += f"{self.shrunk}{self.shrink:g}" if self.shrunk else ""
        shots = f"{self.shots}shot" if self.shots else ""
        return unit_name(self.subject.run, self.subject.step, scale, self.task, shots)

    @property
    def fields(self) -> Record:
        """The fields that all records of the unit share."""
        s = self.subject
        family = s.family or (describe(self.task).family if self.kind == "adaptation" else "both")
        fields = {**s.fields, "run": s.run, "family": family, "step": s.step}
        fields |= {"shots": self.shots, "prompt": 0, "update_scale": self.scale}
        return fields | ({"shrunk": self.shrunk, "shrink": self.shrink} if self.shrunk else {})

    @property
    def as_task(self) -> TaskUnit:
        """The adaptation that is measured beside retention: the task on validation."""
        loss_only = self.loss_only and not describe(self.task).has_choices  # else it costs nothing
        return TaskUnit(self.subject, "validation", self.task, self.limit, loss_only=loss_only)
