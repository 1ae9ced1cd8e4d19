"""A study as one YAML file: what it trains, on what, and what is measured.

Flags and file give the same fields, which `StudyPlan` completes from the preset and checks.
"""

from __future__ import annotations

import argparse
import typing
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from config import BUILT_IN_FAMILIES, FAMILIES, LARGEST_SEED, Preset, Settings, UserError
from dataset_descriptions import (
    describe,
    learn,
    named_family,
    ordered,
    own_definitions,
    preset_family,
)
from lora_tradeoffs.command_line import did_you_mean
from lora_tradeoffs.shapes import NUMBER, shape_problem
from lora_tradeoffs.study.hypotheses import HYPOTHESIS, OUTCOMES, check_hypothesis
from lora_tradeoffs.study.steps import ANALYSES
from lora_tradeoffs.tables.predictors import PREDICTORS
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.learning_rates import FACTORS, rates_around
from training_configs import CHOICES, parse_assignments

# Also settings of every command: a flag beats the file, which beats the environment.
SETTINGS = (
    *("preset", "study", "model", "data", "examples_per_task", "eval_examples_per_task"),
    *("apply_chat_template", "system_instruction"),
)
SHAPE = {
    **dict.fromkeys(("preset?", "study?", "model?", "data?", "dtype?"), str),
    **dict.fromkeys(("examples_per_task?", "eval_examples_per_task?", "max_steps?", "items?"), int),
    **{"system_instruction?": str, "apply_chat_template?": bool},
    **dict.fromkeys(("single_task_controls?", "measure_then_delete?"), bool),
    **{"families?": [str], "tasks?": [str], "arms?": (list, dict), "seeds?": [int]},
    **{"learning_rates?": (str, dict), "set?": {"*": (str, bool, *NUMBER)}},
    "measure?": {f"{stage}?": dict for stage in ANALYSES},
    "hypotheses?": [HYPOTHESIS],
    "task_files?": {"*": dict},
}
HEAD = "# A study of lora_tradeoffs; python run_study.py study.yaml repeats it.\n"


@dataclass(frozen=True)
class StudyPlan:
    """What defines a study. Raises UserError for a value that cannot be, by the field's name.

    `arms` are words by family, or by "+".join(tasks); `measure` has the options of each analysis
    that is made; `learning_rates` is "default", "swept", or the factors of a sweep.
    """

    preset: str
    study: str
    model: str
    data: str
    examples_per_task: int
    eval_examples_per_task: int
    apply_chat_template: bool
    system_instruction: str
    arms: Mapping[str, Sequence[str]]
    seeds: Sequence[int]
    families: Sequence[str] = ()
    tasks: Sequence[str] = ()
    single_task_controls: bool = False
    learning_rates: str | Sequence[float] = "default"
    max_steps: int | None = None
    items: int | None = None
    dtype: str = "auto"
    set: Mapping[str, Any] = field(default_factory=dict)
    measure: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measure_then_delete: bool = False
    hypotheses: tuple[Mapping[str, Any], ...] = ()  # see report/hypotheses.py
    task_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of tasks not ours

    @classmethod
    def of(cls, given: Mapping[str, Any], settings: Settings) -> StudyPlan:
        """The plan of the fields of a file or of flags, the rest as the preset has it."""
        check_shape(given)
        learn({"tasks": given.get("task_files", {})})
        values: dict[str, Any] = {name: getattr(settings, name) for name in SETTINGS}
        values |= {k: v for k, v in given.items() if k not in SETTINGS}
        values["preset"], preset = settings.preset.name, settings.preset
        values["arms"] = _arms_by_key(given, values, preset)
        trained = [task for family in values.get("families", ()) for task in FAMILIES[family]]
        own = own_definitions((), [*trained, *values.get("tasks", ())])
        values["task_files"] = own["own"]["tasks"] if own else {}
        values["seeds"] = list(dict.fromkeys(given.get("seeds", preset.seeds)))
        always = {"retention": {"scale_update": ()}} if preset.name != "demo" else {}
        values["hypotheses"] = tuple(given.get("hypotheses", ()))
        values.setdefault("measure", {stage: always.get(stage, {}) for stage in ANALYSES})
        pairs = [f"{name}={value}" for name, value in given.get("set", {}).items()]
        values["set"] = parse_assignments(pairs, "set:")
        rates = given.get("learning_rates", "default")
        values["learning_rates"] = rates["sweep"] if isinstance(rates, dict) else rates
        return cls(**values)

    def __post_init__(self) -> None:
        for words in self.arms.values():
            if not list(map(ArmSpec.parse, words)):
                raise UserError("arms: name at least one")
        for seed in self.seeds:
            if not 0 <= seed <= LARGEST_SEED:
                raise UserError(f"seeds: {seed}; allowed: 0 to {LARGEST_SEED}")
        for name in ("max_steps", "items"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; allowed: at least 1")
        if self.dtype not in CHOICES["dtype"]:
            raise UserError(f"dtype is {self.dtype!r}; allowed: {', '.join(CHOICES['dtype'])}")
        if not self.seeds:
            raise UserError("seeds: name at least one")
        if isinstance(self.learning_rates, str):
            if self.learning_rates not in ("default", "swept"):
                raise UserError("learning_rates: write default, swept, or {sweep: [0.5, 1, 2]}")
        else:
            rates_around(1.0, self.learning_rates)
        if self.learning_rates != "default":
            of_arms = {w: ArmSpec.parse(w).values for words in self.arms.values() for w in words}
            for name, values in {"set": self.set, **of_arms}.items():
                if "learning_rate" in values:
                    raise UserError(f"learning_rates and {name} both set the rate: leave one out")
        for name in sorted({*self.set} & {*self._own_values}):
            raise UserError(f"{name} and set.{name} are both given: leave one out")
        tasks = [task for tasks in self.mixes for task in tasks] if self.hypotheses else ()
        for hypothesis in self.hypotheses:
            check_hypothesis(hypothesis, self.arms, tasks, self.seeds)

    @property
    def primary_tests(self) -> int:
        """How many tests the primary hypotheses are: one in each family."""
        primary = [h for h in self.hypotheses if h.get("primary", True)]
        return sum(len(self.families_of(h)) for h in primary)

    def families_of(self, hypothesis: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The tasks by each family that a hypothesis is tested in: of its own, else of those that
        train its arms, and its outcome if that is a task."""
        words, outcome = {*hypothesis["contrast"]}, {hypothesis["outcome"]}
        words -= {*PREDICTORS}
        return {
            family: tasks
            for (family, arms), tasks in zip(self.arms.items(), self.mixes)
            if hypothesis.get("family", family) == family
            and words <= {*arms}
            and outcome <= {*OUTCOMES, *tasks}
        }

    @property
    def mixes(self) -> dict[tuple[str, ...], list[ArmSpec]]:
        """The arms by the tasks that are mixed."""
        tasks = {family: FAMILIES[family] for family in self.families}
        tasks = tasks or {"+".join(self.tasks): tuple(self.tasks)}
        return {tasks[key]: list(map(ArmSpec.parse, words)) for key, words in self.arms.items()}

    @property
    def values(self) -> dict[str, Any]:
        """The fields of TrainingConfig that it sets for all arms."""
        return dict(self.set) | self._own_values

    @property
    def _own_values(self) -> dict[str, Any]:
        values = {"max_steps": self.max_steps} if self.max_steps else {}
        return values | ({"dtype": self.dtype} if self.dtype != "auto" else {})

    def record(self) -> dict[str, Any]:
        """The fields as a file has them, without those that say nothing."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values = _plain({k: v for k, v in values.items() if v or k == "measure"})
        if self.families:
            values["families"] = list(map(_family_word, self.families))
        first, *others = values["arms"].values()
        if all(words == first for words in others):
            values["arms"] = first
        if not isinstance(self.learning_rates, str):
            values["learning_rates"] = {"sweep": values["learning_rates"]}
        return values

    def text(self) -> str:
        """The file that repeats the study."""
        return file_text(self.record())

    def extended(self, before: StudyPlan) -> StudyPlan:
        """The plan of a study that had another grid before: with the arms and seeds of both."""
        if tuple(before.tasks) != tuple(self.tasks):
            raise UserError("it has other tasks; start another study with --study NAME")
        keys = dict.fromkeys([*before.arms, *self.arms])
        both = [before.arms, self.arms]
        arms = {k: list(dict.fromkeys(w for a in both for w in a.get(k, ()))) for k in keys}
        return replace(
            self,
            arms=arms,
            families=[f for f in FAMILIES if f in arms and not self.tasks],
            seeds=list(dict.fromkeys([*before.seeds, *self.seeds])),
            task_files={**before.task_files, **self.task_files},
            single_task_controls=self.single_task_controls or before.single_task_controls,
            hypotheses=before.hypotheses
            + tuple(h for h in self.hypotheses if h not in before.hypotheses),
        )


def _arms_by_key(
    given: Mapping[str, Any], values: dict[str, Any], preset: Preset
) -> dict[str, list[str]]:
    """The arms by family, or by the tasks; completes families or tasks in `values`."""
    if "families" in given and "tasks" in given:
        raise UserError("families and tasks are both given: leave one out")
    if "tasks" in given:
        tasks = ordered(given["tasks"])
        values["tasks"], mixes = list(tasks), {"+".join(tasks): tasks}
    else:
        families = map(named_family, given.get("families", BUILT_IN_FAMILIES))
        mixes = {family: FAMILIES[family] for family in families}
        if not mixes or len({*mixes.values()}) < len(mixes):
            raise UserError(f"families are {[*mixes]}: name at least one, each of other tasks")
        values["families"] = list(mixes)
    keys = list(mixes)
    default = {key: [*preset.arms[preset_family(tasks)]] for key, tasks in mixes.items()}
    arms = given.get("arms", default)
    if isinstance(arms, list):
        arms = dict.fromkeys(keys, arms)
    problem = shape_problem(arms, {key: [str] for key in keys}, "arms")
    if others := sorted({*arms} - {*keys}):
        problem = f"arms: {others[0]} is not trained"
    if problem:
        raise UserError(f"{problem}; write a list of arms, or one for each of {', '.join(keys)}")
    return arms


def is_of_type(value: Any, kind: Any) -> bool:
    """Whether the value is of a dataclass field's type, as from YAML: a list is a tuple."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, (list, tuple)) and all(is_of_type(v, parts[0]) for v in value)
    if parts:
        return any(is_of_type(value, part) for part in parts)
    return type(value) in ((int, float) if kind is float else (kind,))


def _family_word(name: str) -> str:
    """The family as `named_family` takes it where only the built-in and the tasks' are known."""
    tasks = "+".join(FAMILIES[name])
    of_tasks = {describe(task).own_family for task in FAMILIES[name]}
    is_known = name in (*BUILT_IN_FAMILIES, tasks) or of_tasks == {name}
    return name if is_known else f"{name}={tasks}"


def _plain(value: Any) -> Any:
    """The value with lists and dictionaries of Python's own, as YAML's safe_dump takes them."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_shape(given: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown field, or a value of another type."""
    names = [name.rstrip("?") for name in SHAPE]
    for name in given:
        if name not in names:
            hint = did_you_mean(str(name), names)
            raise UserError(f"unknown field {name!r:.60}; {hint}fields: {', '.join(names)}")
    for stage in given["measure"] if isinstance(given.get("measure"), dict) else ():
        if stage not in ANALYSES:
            raise UserError(f"measure: {stage} is none; allowed: {', '.join(ANALYSES)}")
    if problem := shape_problem(dict(given), SHAPE):
        raise UserError(problem)
    for hypothesis in given.get("hypotheses", ()):
        if unknown := sorted({*hypothesis} - {name.rstrip("?") for name in HYPOTHESIS}):
            raise UserError(f"hypotheses: unknown field {unknown[0]!r}")
    rates = given.get("learning_rates")
    if isinstance(rates, dict) and not (
        {*rates} == {"sweep"} and rates["sweep"] and not shape_problem(rates, {"sweep": [NUMBER]})
    ):
        raise UserError("learning_rates: write default, swept, or {sweep: [0.5, 1, 2]}")


@contextmanager
def naming(path: Path | None):
    """Begin the line of a UserError with the file that the plan came from, if there is one."""
    try:
        yield
    except UserError as error:
        raise (UserError(f"{path}: {error}") if path else error) from None


def read_study_file(path: Path) -> dict[str, Any]:
    """The fields of a study file. Raises UserError for one that is no YAML mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that occurs twice, of which YAML would keep the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise yaml.YAMLError(f"{key!r} occurs twice")
            return super().construct_mapping(node, deep)

    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(given, dict):
        raise UserError(f"{path} is no study file: write fields, such as arms: [full, 'lora:8']")
    with naming(path):
        check_shape(given)
    return given


def file_text(given: Mapping[str, Any]) -> str:
    """The fields of a study as a file."""
    return HEAD + as_yaml(given)


def as_yaml(fields: Mapping[str, Any]) -> str:
    import yaml

    style = {"sort_keys": False, "default_flow_style": None, "width": 96, "allow_unicode": True}
    return yaml.safe_dump(dict(fields), **style)


def fields_of_flags(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The fields that run_study.py's flags set, but for those of SETTINGS."""
    names = ("families", "tasks", "seeds", "max_steps", "items", "single_task_controls")
    given = {name: getattr(args, name) for name in (*names, "measure_then_delete")}
    given["set"] = parse_assignments(args.set)
    given["dtype"] = None if args.dtype == "auto" else args.dtype
    words = ["full", *(f"lora:{rank}" for rank in args.ranks)] if args.ranks else []
    words += args.adapter
    extra = ["full_qv"] * args.full_qv
    given["arms"] = words + extra if words else None
    if extra and not words:
        values: dict[str, Any] = {}
        of_mix = {k: v for k, v in given.items() if k in ("families", "tasks") and v}
        arms = _arms_by_key(of_mix, values, settings.preset)
        given["arms"] = {key: [*words, *extra] for key, words in arms.items()}
    if args.lr_sweep is not None:
        given["learning_rates"] = {"sweep": args.lr_sweep or list(FACTORS)}
    if args.scale_update:
        given["measure"] = {s: {} for s in ANALYSES} | {"retention": {"scale_update": []}}
    return {name: value for name, value in given.items() if value}
