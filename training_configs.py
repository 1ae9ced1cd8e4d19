"""TrainingConfig: the defaults, help texts, checks, names and records of training runs.

The study's grid is {similar, dissimilar} x {full, LoRA 4, 8, 16, 32, 64}; arms share their code.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from dataclasses import dataclass, field, fields

from config import (
    FAMILIES,
    LARGEST_NUMBER,
    LARGEST_SEED,
    RANKS,
    TARGET_MODULES,
    Settings,
    UserError,
)
from dataset_descriptions import family_of, preset_family


class Method(typing.NamedTuple):
    """A way to train, as arms name it; an adapter has a number: its rank, or its size of blocks.

    `fields` are those of TrainingConfig that belong to it.
    """

    label: str  # in figures and tables
    number: str = ""
    fields: tuple[str, ...] = ()
    rate: float = 1.0  # its default learning rate over LoRA's


LORA_FIELDS = ("target_modules", "scaling", "lora_dropout")
# In the order of legends; what PEFT is told for an adapter stands in multi_task_training.py.
METHODS = {
    "lora": Method("LoRA r={}", "rank", LORA_FIELDS),
    "dora": Method("DoRA r={}", "rank", LORA_FIELDS),  # Liu et al. 2024, arXiv:2402.09353
    # Meng et al. 2024, arXiv:2404.02948
    "pissa": Method("PiSSA r={}", "rank", LORA_FIELDS, rate=0.25),
    # Hayou et al. 2024, arXiv:2402.12354
    "loraplus": Method("LoRA+ r={}", "rank", (*LORA_FIELDS, "loraplus_ratio"), rate=0.25),
    "oft": Method("OFT b={}", "block size", ("target_modules",)),  # Qiu et al. 2023, 2306.07280
    "full_qv": Method("full qv"),
    "full": Method("full"),
}
ADAPTER_FIELDS = tuple(dict.fromkeys(name for m in METHODS.values() for name in m.fields))
SCALINGS = ("2r", "constant", "rslora")
CHOICES = {
    "method": tuple(METHODS),
    "target_modules": tuple(TARGET_MODULES),
    "scaling": SCALINGS,
    "mixing": ("proportional", "equal", "temperature"),
    "loss_weighting": ("example", "token"),
    "schedule": ("linear", "cosine", "constant_with_warmup"),
    "dtype": ("auto", "bf16", "fp32"),
    "attention": ("auto", "eager", "sdpa"),
}
# The allowed values of numbers, both ends included. The order of the rows is laid out beforehand: a
# typing error in the steps must not take all memory.
RANGES = {
    (0, LARGEST_SEED): ("seed",),
    (0, 1_000_000): ("rank", "max_steps"),
    (0, LARGEST_NUMBER): ("limit", "weight_decay", "max_grad_norm"),
    (1, 10_000): ("checkpoints",),
    (1, LARGEST_NUMBER): (
        *("batch_size", "micro_batch_size", "eval_batch_size", "logging_steps"),
        *("examples_per_task", "eval_examples_per_task", "temperature", "loraplus_ratio"),
    ),
    (64, 1_000_000): ("max_length",),
    (1e-12, 10_000): ("epochs",),
    (1e-12, LARGEST_NUMBER): ("learning_rate",),
    (0, 0.999): ("lora_dropout", "warmup"),
}
OF_SETTINGS = ["model", "data", "apply_chat_template", "system_instruction"]
OF_SETTINGS += ["examples_per_task", "eval_examples_per_task"]
CONSTANT_ALPHA = 32  # alpha = 2r at rank 16
# A constant over sqrt(rank), as in Kalajdzievski 2023, arXiv:2312.03732: alpha = 2r over sqrt(rank)
# would grow with the rank. All three scalings have the scale 2 at rank 16.
RSLORA_ALPHA = 8


def lora_alpha(rank: int, scaling: str) -> int:
    """LoRA's alpha at a rank."""
    return {"constant": CONSTANT_ALPHA, "rslora": RSLORA_ALPHA}.get(scaling, 2 * rank)


def lora_scale(rank: int, scaling: str) -> float:
    """The factor of B A in the weight: alpha / rank, or alpha / sqrt(rank) for rslora."""
    return lora_alpha(rank, scaling) / (rank**0.5 if scaling == "rslora" else rank)


def default_learning_rate(
    method: str, hidden_size: int, lora_factor: float = 10, rank: int = 0, scaling: str = "2r"
) -> float:
    """5e-5 * (2000 / hidden_size)^0.781; for adapters times `lora_factor` and (1 + 2 x) / 3.

    The best rate for LoRA is about ten times that for full fine-tuning (fifteen times in runs of
    about 100 steps), so one shared rate would compare rates, not methods. Fitted to Llama and Qwen
    by Schulman et al. 2025, "LoRA Without Regret", at every rank with the scale 32 / rank. At
    another scale, x = 32 / rank / scale is what theirs is greater: with alpha = 2r one rate for
    every rank would make the steps grow with the rank. (1 + 2 x) / 3 gave losses within
    10 % after 10 and 40 steps (docs/verification.md). PiSSA has a quarter of it, and LoRA+'s A:
    with the ratio 16 LoRA's rate is the geometric mean of A's and B's. Rounded to two digits.
    """
    rate = 5e-5 * (2000 / hidden_size) ** 0.781
    kind = METHODS[method]
    if kind.number and rank > 0:
        x = CONSTANT_ALPHA / rank / lora_scale(rank, scaling) if "scaling" in kind.fields else 1
        rate *= kind.rate * lora_factor * (1 + 2 * x) / 3
    return float(f"{rate:.1e}")


def _field(default: typing.Any, help: str, **metadata: typing.Any) -> typing.Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that determines what a run learns. Construction checks every value.

    Operational fields change how a run is computed, not what it learns; they may differ when a run
    is resumed.
    """

    # Records identify model and data by digest and fingerprint, not by these.
    model: str = _field("", "base model", identity=True, operational=True)
    data: str = _field("", "data source", identity=True, operational=True)
    family: str = _field("", "similar | dissimilar | one of its own, a+b", identity=True)
    tasks: tuple[str, ...] = _field((), "tasks that are mixed", identity=True)
    method: str = _field("lora", " | ".join(METHODS), identity=True)
    rank: int = _field(0, "rank, of OFT the size of a block; 0 for dense training", identity=True)
    apply_chat_template: bool = _field(False, "prompts are turns of a chat", identity=True)
    system_instruction: str = _field("", "the chat's system message", identity=True)
    seed: int = _field(42, "of the adapter's start, the dropout and the row order", identity=True)
    target_modules: str = _field("qv", f"adapted projections: {' | '.join(TARGET_MODULES)}")
    scaling: str = _field(
        "2r",
        f"2r: alpha = 2 rank; constant: alpha = {CONSTANT_ALPHA}; rslora: {RSLORA_ALPHA},"
        " over sqrt(rank)",
    )
    learning_rate: float = _field(
        0.0, "peak learning rate", shown="by method, hidden size and scale"
    )
    epochs: float = _field(1.0, "passes over the mixed rows")
    max_steps: int = _field(0, "optimizer steps; 0: as many as the epochs need", short="steps")
    batch_size: int = _field(32, "rows per optimizer step, over all devices", short="bs")
    max_length: int = _field(1024, "tokens of prompt and completion; longer passages are cut")
    mixing: str = _field("proportional", "proportional | equal | temperature")
    temperature: float = _field(2.0, "task share ~ rows^(1/temperature), for mixing=temperature")
    mixing_weights: str = _field("", "the tasks' shares, as in task:2,other:1; empty: by mixing")
    loss_weighting: str = _field("example", "example | token: what weighs the same")
    lora_dropout: float = _field(0.0, "dropout of LoRA's input", short="dropout")
    loraplus_ratio: float = _field(16.0, "LoRA+: rate of B over rate of A", short="ratio")
    # Decay on A and B pulls towards the base, on W away from it: none in any arm.
    weight_decay: float = _field(0.0, "AdamW's; pulls LoRA towards the base, full away from it")
    optim: str = _field("adamw_torch_fused", "any optimizer that Trainer knows, e.g. adafactor")
    optim_args: str = _field("", "its arguments, e.g. rank=128,scale=0.25")
    optim_target_modules: str = _field("", "of GaLore and APOLLO: all-linear, or names: attn,mlp")
    warmup: float = _field(0.03, "share of the steps in which the learning rate rises")
    schedule: str = _field("linear", "linear | cosine | constant_with_warmup")
    max_grad_norm: float = _field(1.0, "gradient clipping; 0: none", short="clip")
    examples_per_task: int = _field(25_000, "most train rows per task", short="rows")
    limit: int = _field(0, "use only the first N rows of each data file; 0: all")
    dtype: str = _field("auto", "auto | bf16 (autocast, fp32 weights) | fp32")
    checkpoints: int = _field(10, "evenly spaced checkpoints, the last at the end")
    eval_examples_per_task: int = _field(1_000, "validation rows per task at every checkpoint")
    micro_batch_size: int = _field(8, "rows per forward pass on a device", operational=True)
    eval_batch_size: int = _field(32, "rows per batch of the validation", operational=True)
    attention: str = _field("auto", "auto | eager | sdpa", operational=True)
    activation_checkpointing: bool = _field(False, "less memory, more time", operational=True)
    logging_steps: int = _field(10, "steps between two points of the loss curve", operational=True)
    report_to: str = _field("tensorboard", "trackers, as wandb,mlflow; or none", operational=True)

    def __post_init__(self) -> None:
        for messages in (self._wrong_types, self._problems):
            for message in messages():
                raise UserError(message)

    def _wrong_types(self) -> typing.Iterator[str]:
        """Fields that hold another type than theirs; a whole number is a float, too."""
        for name, kind in typing.get_type_hints(TrainingConfig).items():
            value, kind = getattr(self, name), typing.get_origin(kind) or kind
            allowed = (int, float) if kind is float else kind
            if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
                yield f"{name} is {value!r}; allowed: {kind.__name__}"

    def _problems(self) -> typing.Iterator[str]:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            yield f"tasks are {list(self.tasks)}; name at least one, each once"
        if not set(self.tasks) <= set(FAMILIES.get(self.family, ())):
            of = "; ".join(f"{family} has {', '.join(t)}" for family, t in FAMILIES.items())
            yield f"tasks {', '.join(self.tasks)} are not all of the family {self.family!r}: {of}"
        if self.mixing_weights and not self.weights:
            form = ",".join(f"{task}:1" for task in self.tasks)
            yield f"mixing_weights is {self.mixing_weights!r:.99}; weigh each task, as in {form}"
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                yield f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
        if self.is_adapter and self.rank < 1:
            yield f"{self.rank_name} is {self.rank}; allowed: at least 1 (the study's: {RANKS})"
        elif self.rank and not self.is_adapter:
            yield f"rank is {self.rank}, and {self.method} has none"
        for name in ADAPTER_FIELDS:
            is_set = getattr(self, name) != getattr(TrainingConfig, name)
            if is_set and name not in METHODS[self.method].fields:
                of = ", ".join(m for m, kind in METHODS.items() if name in kind.fields)
                yield f"{name} belongs to {of}; leave it out for {self.method}"
        for (low, high), names in RANGES.items():
            for name in names:
                if not low <= getattr(self, name) <= high:
                    yield f"{name} is {getattr(self, name)}; allowed: {low:,} to {high:,}"

    @property
    def is_adapter(self) -> bool:
        return bool(METHODS[self.method].number)

    @property
    def rank_name(self) -> str:
        """What `rank` is, for an error: "LoRA rank", "OFT block size"."""
        return f"{METHODS[self.method].label.partition(' ')[0]} {METHODS[self.method].number}"

    @property
    def weights(self) -> list[float]:
        """mixing_weights in the order of the tasks; [] if it is empty, or not of the family."""
        try:
            pairs = [part.split(":") for part in self.mixing_weights.split(",")]
            named = dict(pairs)
            weights = [float(named[task]) for task in self.tasks]
        except (ValueError, KeyError):
            return []
        is_known = {*named} <= {*FAMILIES.get(self.family, ())} and len(named) == len(pairs)
        return weights if is_known and 0 < min(weights) <= max(weights) <= LARGEST_NUMBER else []

    @property
    def alpha(self) -> int:
        """LoRA's alpha; 0 for a method without B A."""
        return lora_alpha(self.rank, self.scaling) * ("scaling" in METHODS[self.method].fields)

    @property
    def scale(self) -> float:
        """The factor of B A in the weight; 0 for a method without B A."""
        return lora_scale(self.rank, self.scaling) if self.alpha else 0.0

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of the trained linear layers; empty if all parameters are trained."""
        return () if self.method == "full" else TARGET_MODULES[self.target_modules]

    def record(self) -> dict[str, typing.Any]:
        """The configuration as JSON values, alpha and scale included."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}
        return values | {"alpha": self.alpha, "scale": self.scale}

    def compared(self) -> dict[str, typing.Any]:
        """The fields, and alpha, that must be equal for a run to be resumed or taken as done."""
        left_out = {"scale", *(f.name for f in fields(self) if f.metadata.get("operational"))}
        return {k: v for k, v in self.record().items() if k not in left_out}

    def run_name(self, defaults: TrainingConfig) -> str:
        """Tasks, method, every field that differs from the defaults, and seed."""
        parts = [self.family if self.tasks == FAMILIES[self.family] else "+".join(self.tasks)]
        parts.append(method_name(self.method, self.rank))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.metadata.get("identity") or f.metadata.get("operational"):
                continue
            if value != getattr(defaults, f.name):
                parts.append(_name_part(f, value))
        return "_".join([*parts, f"seed{self.seed}"])

    def arm_name(self, defaults: TrainingConfig) -> str:
        """The run's name without learning rate and seed; a sweep chooses one rate for each."""
        at_default = dataclasses.replace(self, learning_rate=defaults.learning_rate)
        return at_default.run_name(defaults).removesuffix(f"_seed{self.seed}")


def method_name(method: str, rank: int) -> str:
    """Method and rank as names write them: lora_r8, oft_b32, full, full_qv."""
    number = METHODS[method].number if method in METHODS else ""
    return f"{method}_{number[0]}{rank}" if number else method


def tasks_and_variant(run: str, config: typing.Mapping[str, typing.Any]) -> tuple[str, str]:
    """What a run's name says of its tasks, and beside method, target modules, rate and seed.

    ("similar", "steps4_fp32") for similar_lora_r8_lr1e-3_steps4_fp32_seed42, with its method, rank,
    target_modules, learning_rate and seed in `config`. A run that is not named like this was made
    elsewhere: its tasks are "", and its name is its variant.
    """
    method = method_name(config["method"], config["rank"])
    tasks, _, rest = f"{run}_".partition(f"_{method}_")
    for known in (config.get("family"), "+".join(config.get("tasks", ()))):
        if known and run.startswith(f"{known}_{method}_"):  # it may have the method in its own name
            tasks, rest = known, f"{run}_".removeprefix(f"{known}_{method}_")
    words = rest.split("_")
    if words[-2:] != [f"seed{config['seed']}", ""]:
        return "", run
    other = {config.get("target_modules"), rate_name(config.get("learning_rate") or 0)}
    return tasks, "_".join(word for word in words[:-2] if word not in other)


def rate_name(rate: float) -> str:
    """A learning rate as written in names and labels, e.g. lr4.9e-5."""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"lr{float(mantissa):g}e{int(exponent)}"


def _name_part(f: dataclasses.Field, value: typing.Any) -> str:
    if isinstance(value, str):  # "rslora" or "cosine" need no field name
        return re.sub(r"[^\w.+-]+", "-", value)
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
    scaling: str = "2r",
    family: str = "",
) -> TrainingConfig:
    """The default configuration of an arm by the preset; the tasks may be part of a `family`."""
    preset, family = settings.preset, family or family_of(tasks)
    kind = preset_family(FAMILIES.get(family, tasks))
    rate = default_learning_rate(method, hidden_size, preset.lora_rate_factor, rank, scaling)
    foreign = {*ADAPTER_FIELDS} - {*METHODS[method].fields}
    values = {"learning_rate": rate} | {name: getattr(settings, name) for name in OF_SETTINGS}
    return TrainingConfig(
        **values | {name: v for name, v in preset.training.items() if name not in foreign},
        family=family,
        tasks=tasks,
        method=method,
        rank=rank,
        seed=seed,
        epochs=preset.epochs,
        batch_size=preset.batch_size[kind],
        micro_batch_size=preset.micro_batch_size[kind],
        max_length=preset.max_length[kind],
        checkpoints=preset.checkpoints,
    )


def settable_fields() -> dict[str, dataclasses.Field]:
    """The fields that `--set` takes, by name."""
    return {f.name: f for f in fields(TrainingConfig) if not f.metadata.get("identity")}


def parse_assignments(
    assignments: typing.Iterable[str], where: str = "--set"
) -> dict[str, typing.Any]:
    """Parse `field=value` pairs. Raises UserError for an unknown field or a wrong type."""
    settable, types, values = settable_fields(), typing.get_type_hints(TrainingConfig), {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or name not in settable:
            raise UserError(
                f"{where} {assignment}: write field=value; fields: {', '.join(sorted(settable))}"
            )
        kind = types[name]
        try:
            words = {"true": True, "false": False}
            values[name] = words[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise UserError(f"{where} {assignment}: {name} takes a {kind.__name__}") from None
    return values
