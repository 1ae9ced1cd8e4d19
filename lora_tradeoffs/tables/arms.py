"""An arm: one training configuration, whose runs differ by the seed alone; its label and order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import total_ordering
from typing import TYPE_CHECKING, Any

from config import BUILT_IN_FAMILIES, FAMILIES, RANKS, TARGET_MODULES
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.records import run_fields
from training_configs import METHODS as TRAINED
from training_configs import Method, TrainingConfig, rate_name

if TYPE_CHECKING:
    from pandas import DataFrame

# In the order of legends; "adapter" is one from elsewhere, of a type that is not trained here.
METHODS = TRAINED | {name: Method(name) for name in ("adapter", "base", "baseline")}


@total_ordering
@dataclass(frozen=True)
class Arm:
    """A training configuration, or the base or a baseline; what is averaged over seeds.

    Whatever sets it apart from the grid's arm of its method and rank is a field, and stands in
    brackets in the label, its text: "LoRA r=8 (all, steps40)". Arms are ordered as in legends:
    adapters by rank, full qv, full, base, baselines; of one arm the learning rates rising.
    """

    method: str
    rank: int = 0
    target_modules: str = "qv"
    variant: str = ""  # other fields that are not the grid's, from the run's name: "steps40 fp32"
    run: str = ""  # the name of a run from elsewhere, or of a baseline
    tasks: str = ""  # of runs that were not trained on a whole family
    trained_on: str = ""  # the run's family, where another family's task is measured
    learning_rate: float = 0.0  # only where it tells arms apart
    shots: int = 0
    prompt: int = 0

    @property
    def kind(self) -> str:
        """Method and rank: "LoRA r=8", "OFT b=32", "full qv", "base", or the baseline's name."""
        if self.method == "baseline":
            return self.run
        return METHODS[self.method].label.format(self.rank)

    @property
    def details(self) -> str:
        """What sets it apart from the grid's arm of its kind; "" if nothing does."""
        if self.method == "baseline":
            return ""
        words = (
            self.target_modules if self.target_modules != "qv" else "",
            self.variant,
            self.run,
            f"{self.tasks} alone" if self.tasks else "",
            f"trained on {self.trained_on}" if self.trained_on else "",
            rate_name(self.learning_rate) if self.learning_rate else "",
            f"{self.shots}-shot" if self.shots else "",
            f"prompt {self.prompt}" if self.prompt else "",
        )
        return ", ".join(filter(None, words)).replace("$", r"\$")  # no formula, in figures too

    @property
    def label(self) -> str:
        return f"{self.kind} ({self.details})" if self.details else self.kind

    def __str__(self) -> str:
        return self.label

    @property
    def is_adapter(self) -> bool:
        return bool(METHODS[self.method].number)

    @property
    def is_trained(self) -> bool:
        return self.method not in ("base", "baseline")

    @property
    def without_rate(self) -> Arm:
        """The arm whose learning rates are compared."""
        return replace(self, learning_rate=0.0)

    def without(self, words: set[str]) -> Arm:
        """The arm without words of its variant, which all runs share."""
        return replace(self, variant=" ".join(w for w in self.variant.split() if w not in words))

    @property
    def _sort_key(self) -> tuple[int, int, str, float]:
        return (
            list(METHODS).index(self.method),
            self.rank,
            self.without_rate.label,
            self.learning_rate,
        )

    def __lt__(self, other: Arm) -> bool:
        return self._sort_key < other._sort_key


BASE, FULL = Arm("base"), Arm("full")
GRID = tuple(Arm("lora", rank) for rank in RANKS)


def arm_of(record: Mapping[str, Any]) -> Arm:
    """The arm of a record, from its columns.

    A run's learning rate counts where its name holds it, as it does of all but the default.
    """
    method, run = record["method"], str(record["run"])
    if method == "baseline":
        return Arm(method, run=run)
    shots, prompt = (_count(record.get(name)) for name in ("shots", "prompt"))
    if method == "base":
        return Arm(method, shots=shots, prompt=prompt)
    tasks, variant, rate = record["tasks"], record["variant"], record.get("learning_rate") or 0.0
    is_ours = bool(tasks)
    task, family = record.get("task", ""), record.get("family")
    is_other = task in DESCRIPTIONS and family and task not in FAMILIES.get(family, ())
    return Arm(
        method,
        rank=int(record["rank"]) if METHODS[method].number else 0,
        target_modules=target_modules_name(record) if METHODS[method].number else "qv",
        variant=variant.replace("_", " ") if is_ours else "",
        run="" if is_ours else variant,
        tasks="" if tasks == family or tasks in BUILT_IN_FAMILIES else tasks,
        trained_on=str(family) if is_other else "",
        learning_rate=rate if is_ours and rate_name(rate) in run.split("_") else 0.0,
        shots=shots,
        prompt=prompt,
    )


def arm_of_config(run: str, config: TrainingConfig) -> Arm:
    """The arm of a run of this name and configuration."""
    record = config.record() | {"run": run, "task": ""}
    return arm_of(record | run_fields(run, record))


def arms_of(frame: DataFrame) -> list[Arm]:
    """The arm of every row; where one would have several learning rates in a family, with its rate.

    A run's name holds its rate only where it is not the default, and the default depends on preset
    and model, so it may change within a study. Such runs are no seeds of each other. In-context
    examples tell arms apart where a task was measured with several numbers of them: with the fewest
    the arm is the plain one.
    """
    fewest = frame.groupby(["family", "task"], dropna=False)["shots"].transform("min")
    frame = frame.assign(shots=frame["shots"].where(frame["shots"] > fewest, 0))
    names = ["run", "method", "rank", "target_modules", "tasks", "variant", "learning_rate"]
    names += ["family", "task", "shots", "prompt"]
    groups = frame.groupby(names, sort=False, dropna=False).ngroup()
    keys = list(frame[names][~groups.duplicated()].itertuples(index=False, name=None))
    by_key = {key: arm_of(dict(zip(names, key))) for key in keys}
    rates: dict[Any, set[float]] = {}
    for key, arm in by_key.items():
        rates.setdefault((key[7], arm), set()).add(key[6])
    for key, arm in by_key.items():
        if key[6] > 0 and len(rates[key[7], arm]) > 1:
            by_key[key] = replace(arm, learning_rate=key[6])
    arms = [by_key[key] for key in keys]  # in the order of the groups
    return [arms[group] for group in groups]


def arms_by_run(*frames: DataFrame | None) -> dict[str, Arm]:
    """The arm of every run in the frames, that with the fewest in-context examples."""
    names: dict[str, Arm] = {}
    for frame in frames:
        if frame is not None:
            rows = frame[["run", "arm", "shots"]].drop_duplicates()
            rows = rows.sort_values("shots", ascending=False, kind="stable")
            names |= dict(zip(rows["run"], rows["arm"]))
    return names


def target_modules_name(record: Mapping[str, Any]) -> str:
    """The name in TARGET_MODULES of a record's target modules, else their names joined by "+"."""
    modules = str(record.get("target_modules") or "qv")
    names = set(modules.replace("+", ",").replace(" ", ",").split(",")) - {""}
    for name, members in TARGET_MODULES.items():
        if names in ({name}, set(members)):
            return name
    return "+".join(sorted(names)) or "qv"


def shared_words(frames: Iterable[DataFrame]) -> set[str]:
    """Words that stand in the variant of every run ("steps40", "fp32"): they tell no arms apart.

    Ask all frames of a study together; runs from elsewhere do not count, nor single-task controls
    beside runs of a whole family: they may have steps of their own.
    """
    arms = {arm for frame in frames for arm in frame["arm"].unique()}
    arms = {arm for arm in arms if arm.is_trained and not arm.run}
    whole = {arm for arm in arms if not arm.tasks}
    variants = [set(arm.variant.split()) for arm in whole or arms]
    return set.intersection(*variants) if variants else set()


def shared_sentence(words: set[str]) -> str:
    return f"All runs: {' '.join(sorted(words))} (unless a label says otherwise)."


def with_plain_arms(*frames: Any) -> list[Any]:
    """The frames of one figure, their arms without what all runs share; the first's note says it.

    Whatever has no arms (None, a folder) is passed on.
    """
    has_arms = [hasattr(frame, "columns") and "arm" in frame for frame in frames]
    words = shared_words(f for f, has in zip(frames, has_arms) if has and "method" in f)
    if not words:
        return list(frames)
    sentence = shared_sentence(words)
    return [_plain(f, words, sentence) if has else f for f, has in zip(frames, has_arms)]


def _plain(frame: DataFrame, words: set[str], sentence: str) -> DataFrame:
    plain = {arm: arm.without(words) for arm in frame["arm"].unique()}
    plain = frame.assign(arm=frame["arm"].map(plain))
    note = " ".join(filter(None, (frame.attrs.get("note"), sentence)))
    plain.attrs = frame.attrs | {"note": note}
    return plain


def _count(value: Any) -> int:
    """A whole number, 0 for what is missing (None, or a data frame's nan)."""
    return int(value) if value and value == value else 0
