"""One frozen TrainingConfig: the source of defaults, help, checks, run names and the run's record.

The study's grid is {similar, dissimilar} x {full, LoRA 4, 8, 16, 32, 64}. LoRA and full
fine-tuning share one path and differ in this data alone.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field, fields

from config import FAMILIES, RANKS, TARGET_MODULES, TASKS, Settings, UserError

METHODS = ("lora", "full", "full_qv")
SCALINGS = ("2r", "constant", "rslora")
# A constant alpha is the one that alpha = 2r gives the grid's middle rank.
CONSTANT_ALPHA = 32


def default_learning_rate(method: str, hidden_size: int, lora_factor: float = 10) -> float:
    """5e-5 * (2000 / hidden_size)^0.781, and `lora_factor` times that for LoRA.

    The best LoRA rate is about ten times full fine-tuning's (fifteen times in runs of about 100
    steps), whatever the rank; a shared rate would compare rates, not methods. Schulman et al. 2025,
    "LoRA Without Regret", who fitted it to fine-tuning of Llama and Qwen. Rounded to two figures.
    """
    rate = 5e-5 * (lora_factor if method == "lora" else 1) * (2000 / hidden_size) ** 0.781
    return float(f"{rate:.1e}")


def _field(default: typing.Any, help: str, **metadata: typing.Any) -> typing.Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides what a run learns. Construction checks every value.

    Fields marked operational change how a run is carried out, not what it learns; they may differ
    when a run is resumed.
    """

    # A record tells models and data apart by digest and fingerprint, not by where they lie.
    model: str = _field("", "base model", identity=True, operational=True)
    data: str = _field("", "data source", identity=True, operational=True)
    family: str = _field("", "similar | dissimilar", identity=True)
    tasks: tuple[str, ...] = _field((), "tasks that are mixed", identity=True)
    method: str = _field("lora", "lora | full | full_qv", identity=True)
    rank: int = _field(0, "LoRA rank; 0 for dense training", identity=True)
    seed: int = _field(42, "of the adapter's start, the dropout and the row order", identity=True)
    target_modules: str = _field("qv", f"LoRA's place: {' | '.join(TARGET_MODULES)}")
    scaling: str = _field(
        "2r", f"2r: alpha = 2 rank; constant: alpha = {CONSTANT_ALPHA}; rslora: 2r over sqrt(rank)"
    )
    learning_rate: float = _field(0.0, "peak rate; the default depends on the arm and hidden size")
    epochs: float = _field(1.0, "passes over the mixed rows")
    max_steps: int = _field(0, "optimizer steps; 0: as many as the epochs need", short="steps")
    batch_size: int = _field(32, "rows an optimizer step, over all devices", short="bs")
    max_length: int = _field(1024, "tokens of prompt and completion; the passage is cut to fit")
    mixing: str = _field("proportional", "proportional | equal | temperature")
    temperature: float = _field(2.0, "task share ~ rows^(1/temperature), for mixing=temperature")
    loss_weighting: str = _field("example", "example: every row weighs the same | token")
    lora_dropout: float = _field(0.0, "0, so that the arms differ in nothing else", short="dropout")
    # Decay on A and B pulls towards the base, on W away from it: none in any arm.
    weight_decay: float = _field(0.0, "0: on A and B it pulls to the base, on W away from it")
    warmup: float = _field(0.03, "share of the steps with a rising rate")
    schedule: str = _field("linear", "linear | cosine | constant_with_warmup")
    max_grad_norm: float = _field(1.0, "gradient clipping; 0: none", short="clip")
    examples_per_task: int = _field(25_000, "row cap a task", short="rows")
    limit: int = _field(0, "only the first N rows of each file; 0: all")
    dtype: str = _field("auto", "auto | bf16 (autocast, fp32 weights) | fp32")
    checkpoints: int = _field(10, "evenly spaced, the last at the end")
    eval_examples_per_task: int = _field(1_000, "validation rows a task at every checkpoint")
    micro_batch_size: int = _field(8, "rows a device holds at once", operational=True)
    eval_batch_size: int = _field(32, "rows of an evaluation batch", operational=True)
    attention: str = _field("auto", "auto | eager | sdpa", operational=True)
    activation_checkpointing: bool = _field(False, "less memory, more time", operational=True)
    logging_steps: int = _field(10, "steps between two points of the loss curve", operational=True)
    report_to: str = _field("tensorboard", "tensorboard | wandb | none", operational=True)

    def __post_init__(self) -> None:
        for message in self._problems():
            raise UserError(message)

    def _problems(self) -> typing.Iterator[str]:
        for task in self.tasks:
            if task not in TASKS:
                yield f"unknown task {task!r}; tasks: {', '.join(TASKS)}"
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            yield f"tasks are {list(self.tasks)}; name at least one, each once"
        families = {family for family, names in FAMILIES.items() if set(self.tasks) & set(names)}
        if families != {self.family}:
            yield (
                f"tasks {', '.join(self.tasks)} are not all of the family {self.family!r}: "
                + "; ".join(f"{family} has {', '.join(t)}" for family, t in FAMILIES.items())
            )
        choices = {
            "method": METHODS,
            "target_modules": tuple(TARGET_MODULES),
            "scaling": SCALINGS,
            "mixing": ("proportional", "equal", "temperature"),
            "loss_weighting": ("example", "token"),
            "schedule": ("linear", "cosine", "constant_with_warmup"),
            "dtype": ("auto", "bf16", "fp32"),
            "attention": ("auto", "eager", "sdpa"),
            "report_to": ("tensorboard", "wandb", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                yield f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
        if self.method == "lora" and self.rank < 1:
            yield f"LoRA rank is {self.rank}; allowed: at least 1 (the study's: {RANKS})"
        if self.method != "lora" and (
            self.rank or self.target_modules != "qv" or self.scaling != "2r" or self.lora_dropout
        ):
            yield (
                f"rank, target_modules, scaling and lora_dropout belong to LoRA; {self.method}"
                " has none of them"
            )
        floors = {
            **dict.fromkeys(
                ("batch_size", "micro_batch_size", "eval_batch_size", "checkpoints"), 1
            ),
            **dict.fromkeys(("examples_per_task", "eval_examples_per_task", "logging_steps"), 1),
            **dict.fromkeys(("max_steps", "limit", "weight_decay", "max_grad_norm", "seed"), 0),
            "max_length": 64,
            "temperature": 1,
        }
        for name, floor in floors.items():
            if not getattr(self, name) >= floor:
                yield f"{name} is {getattr(self, name)}; allowed: at least {floor}"
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                yield f"{name} is {getattr(self, name)}; allowed: above 0"
        for name in ("lora_dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; allowed: 0 or more and below 1"

    @property
    def alpha(self) -> int:
        """LoRA's alpha; 0 for dense training."""
        if self.method != "lora":
            return 0
        return CONSTANT_ALPHA if self.scaling == "constant" else 2 * self.rank

    @property
    def scale(self) -> float:
        """The factor of B A in the merged weight: alpha / rank, for rsLoRA alpha / sqrt(rank)."""
        if self.method != "lora":
            return 0.0
        return self.alpha / (self.rank**0.5 if self.scaling == "rslora" else self.rank)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the linear layers that are trained; empty: all parameters."""
        return () if self.method == "full" else TARGET_MODULES[self.target_modules]

    def record(self) -> dict[str, typing.Any]:
        """The configuration as plain JSON values, with what follows from it."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return values | {"alpha": self.alpha, "scale": self.scale}

    def compared(self) -> dict[str, typing.Any]:
        """The fields that must agree when a run is asked for again."""
        record = self.record()
        return {f.name: record[f.name] for f in fields(self) if not f.metadata.get("operational")}

    def run_name(self, defaults: TrainingConfig) -> str:
        """What the run is, and every field in which it differs from the grid's defaults."""
        parts = [self.family if self.tasks == FAMILIES[self.family] else "+".join(self.tasks)]
        parts.append(f"lora_r{self.rank}" if self.method == "lora" else self.method)
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("identity") or f.metadata.get("operational"):
                continue
            if value != getattr(defaults, f.name):
                parts.append(_name_part(f, value))
        return "_".join([*parts, f"seed{self.seed}"])

    def arm_name(self, defaults: TrainingConfig) -> str:
        """The run's name without its learning rate and seed: what a sweep chooses a rate for."""
        at_default = dataclasses.replace(self, learning_rate=defaults.learning_rate)
        return at_default.run_name(defaults).removesuffix(f"_seed{self.seed}")


def rate_name(rate: float) -> str:
    """A learning rate as names and labels write it: lr4.9e-5."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"lr{float(mantissa):g}e{int(exponent)}"


def _name_part(f: dataclasses.Field, value: typing.Any) -> str:
    if isinstance(value, str):
        return value  # the names of places, scalings, schedules ... say what they are
    if f.name == "learning_rate":
        return rate_name(value)
    return f"{f.metadata.get('short', f.name.replace('_', ''))}{value:g}"


def default_config(
    settings: Settings,
    tasks: tuple[str, ...],
    method: str,
    rank: int,
    seed: int,
    hidden_size: int,
) -> TrainingConfig:
    """The grid's configuration of an arm under the settings' preset."""
    family = next((name for name, names in FAMILIES.items() if set(tasks) & set(names)), "similar")
    preset = settings.preset
    return TrainingConfig(
        model=settings.model,
        data=settings.data,
        family=family,
        tasks=tasks,
        method=method,
        rank=rank,
        seed=seed,
        learning_rate=default_learning_rate(method, hidden_size, preset.lora_rate_factor),
        epochs=preset.epochs,
        batch_size=preset.batch_size[family],
        micro_batch_size=preset.micro_batch_size[family],
        max_length=preset.max_length[family],
        examples_per_task=settings.examples_per_task,
        eval_examples_per_task=settings.eval_examples_per_task,
        checkpoints=preset.checkpoints,
    )


def arms(ranks: tuple[int, ...] = RANKS) -> list[tuple[str, int]]:
    """The grid's arms: full fine-tuning and LoRA at every rank, as (method, rank)."""
    return [("full", 0), *(("lora", rank) for rank in ranks)]


def settable_fields() -> dict[str, dataclasses.Field]:
    """The fields that `--set` takes, by name."""
    return {f.name: f for f in fields(TrainingConfig) if not f.metadata.get("identity")}


def settable_help() -> str:
    return "; ".join(f"{name} ({f.metadata['help']})" for name, f in settable_fields().items())


def parse_assignments(assignments: list[str]) -> dict[str, typing.Any]:
    """`field=value` pairs as typed values. Raises UserError for an unknown field or wrong type."""
    settable = settable_fields()
    types = typing.get_type_hints(TrainingConfig)
    values = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in settable:
            raise UserError(
                f"--set {assignment}: write field=value; fields: {', '.join(sorted(settable))}"
            )
        kind = types[name]
        try:
            if kind is bool:
                values[name] = {"true": True, "false": False}[text.lower()]
            else:
                values[name] = kind(text)
        except (ValueError, KeyError):
            raise UserError(f"--set {assignment}: {name} takes a {kind.__name__}") from None
    return values
