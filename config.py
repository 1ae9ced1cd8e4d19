"""Paths, shared constants, presets, and the settings of a command.

A setting is looked up in this order: command-line flag, environment variable, `.env`, preset.
`.env.example` documents every variable. Imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent

# Tasks that are trained together; families of one's own join (dataset_descriptions.family_of).
FAMILIES = {
    "similar": ("sst2", "mnli", "qqp"),
    "dissimilar": ("squad_v2", "codexglue", "cnn_dailymail"),
}
BUILT_IN_FAMILIES = tuple(FAMILIES)
TASKS = tuple(task for tasks in FAMILIES.values() for task in tasks)  # the built-in ones
RANKS = (4, 8, 16, 32, 64)
GRID = ("full", *(f"lora:{rank}" for rank in RANKS))  # the study's arms
SPLITS = ("train", "validation", "test")


class Benchmark(NamedTuple):
    """A data set of retention: its split on the Hub, and how many items that has.

    `text` is the field of held-out text; a benchmark without it is multiple choice.
    """

    hub_id: str
    hub_config: str | None
    split: str
    items: int
    text: str | None = None


# Training rows are checked for overlap with all of them.
BENCHMARKS = {
    "hellaswag": Benchmark("Rowan/hellaswag", None, "validation", 10_042),
    "arc_challenge": Benchmark("allenai/ai2_arc", "ARC-Challenge", "test", 1_172),
    "winogrande": Benchmark("allenai/winogrande", "winogrande_xl", "validation", 1_267),
    "wikitext": Benchmark(
        "EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test", 62, text="page"
    ),
}
CHOICE_BENCHMARKS = tuple(name for name, benchmark in BENCHMARKS.items() if not benchmark.text)
# What --tasks of retention_eval.py takes for several of lm-eval's benchmarks.
BENCHMARK_GROUPS = {
    "commonsense": CHOICE_BENCHMARKS,
    "knowledge": ("mmlu",),
    "reasoning": ("gsm8k", "bbh"),
    "instruction": ("ifeval",),
}
# The projections, named alike in all model families, that each value of --target-modules selects.
TARGET_MODULES = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
# The document that each analysis writes, relative to OUTPUT_DIR.
DOCUMENTS = {
    "adaptation": "performance_analysis/{study}/adaptation.json",
    "retention": "outputs/{study}/retention.json",
    "drift": "drift_analysis_plots/{study}/drift.json",
    "gradients": "performance_analysis/{study}/gradients/gradients.json",
}
# Intruder dimensions as published: the number of leading singular vectors, and the threshold.
INTRUDER_K, INTRUDER_EPSILON = 10, 0.5
MID_TRAINING_LIMIT = 1_000  # items of a task or benchmark at intermediate checkpoints
GRADIENT_BATCHES = 32  # the fewest on which the study reports gradient conflict
# Data are split, capped and sampled with this seed, never with a run's seed, so that all runs of
# a study see the same rows.
DATA_SEED = 42
EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
RESERVED_STUDIES = ("base", "sample", "tasks")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# Control characters, and bytes of a command line or variable that are no UTF-8.
UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LARGEST_NUMBER, LARGEST_SEED = 10**12, 2**32 - 1  # NumPy takes no larger seed


class UserError(Exception):
    """An error that the user can fix: one line saying what is wrong, where, and what to do."""

    def __str__(self) -> str:
        """What cannot be printed, such as a line break in a stranger's name, as an escape."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


@dataclass(frozen=True)
class Preset:
    """Defaults by what is run. Lengths are in tokens."""

    name: str
    model: str
    data: str
    examples_per_task: int
    eval_examples_per_task: int
    seeds: tuple[int, ...]
    arms: dict[str, tuple[str, ...]]  # that run_study.py trains, as --adapter takes them
    epochs: float
    checkpoints: int
    lora_rate_factor: float  # LoRA's default learning rate at rank 16 over full fine-tuning's
    batch_size: dict[str, int]  # rows per optimizer step, by family
    micro_batch_size: dict[str, int]  # rows per forward pass on a device, by family
    max_length: dict[str, int]  # prompt and completion together, by family
    held_out_documents: int  # documents of each held-out source
    drift_tokens: int  # held-out tokens on which activations and outputs are compared
    note: str = ""  # printed after the headline
    training: dict[str, Any] = field(default_factory=dict)  # other defaults of TrainingConfig


PRESETS = {
    "study": Preset(
        name="study",
        model="meta-llama/Llama-3.2-1B",
        data="hub",
        examples_per_task=25_000,
        eval_examples_per_task=1_000,
        seeds=(42, 43, 44),  # three: the fewest over which a method's difference can be tested
        arms=dict.fromkeys(FAMILIES, GRID),
        epochs=1,
        checkpoints=10,
        lora_rate_factor=10,
        batch_size={"similar": 32, "dissimilar": 16},
        micro_batch_size={"similar": 32, "dissimilar": 4},
        max_length={"similar": 256, "dissimilar": 1024},
        held_out_documents=48,
        drift_tokens=5_000,
    ),
    "demo": Preset(
        name="demo",
        model=EMBEDDED_MODEL,
        data="sample",
        examples_per_task=2_000,
        eval_examples_per_task=4,
        seeds=(42,),
        arms={"similar": ("full", "lora:8"), "dissimilar": ("lora:8",)},
        epochs=0.5,
        checkpoints=3,
        lora_rate_factor=15,  # the best factor in runs of about 100 steps
        batch_size={"similar": 16, "dissimilar": 8},
        micro_batch_size={"similar": 16, "dissimilar": 8},
        max_length={"similar": 256, "dissimilar": 416},
        held_out_documents=8,
        drift_tokens=1_024,
        note="This is the demo: a small instruct model trained for a few steps, not evidence."
        " For the study: cp .env.example .env",
    ),
}
PRESETS["original"] = replace(
    PRESETS["study"],
    name="original",
    epochs=3,
    batch_size=dict.fromkeys(FAMILIES, 64),
    training={"learning_rate": 1e-5, "lora_dropout": 0.1, "weight_decay": 0.01, "warmup": 0.1},
    note="The published recipe: its one learning rate favours full fine-tuning (docs/study.md)",
)


# Called with all settings that are resolved: the task files of their folders become known.
WHEN_RESOLVED: list[Callable[[Settings], None]] = []


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a command; `sources` says where each value came from."""

    preset: Preset
    model: str
    data: str
    study: str
    examples_per_task: int
    eval_examples_per_task: int
    data_dir: Path
    tasks_dir: Path  # task files of the user's own, <task>.yaml
    output_dir: Path
    apply_chat_template: bool = False  # else prompts are plain text
    system_instruction: str = ""
    sources: dict[str, str] = field(compare=False, default_factory=dict)

    @property
    def runs_dir(self) -> Path:
        """The folder of the study's runs, `models/<study>/`."""
        return self.output_dir / "models" / self.study

    @property
    def bases_dir(self) -> Path:
        return self.output_dir / "models" / "base"

    @property
    def tokenizers_dir(self) -> Path:
        return self.output_dir / "tokenizer"

    @property
    def prepared_dir(self) -> Path:
        """The folder of the study's tokenised data, `data/<study>/`."""
        return self.data_dir / self.study

    @property
    def data_folder(self) -> Path | None:
        """The folder that rows are read from; None for the Hub."""
        if self.data == "hub":
            return None
        return ROOT / "data" / "sample" if self.data == "sample" else Path(self.data)

    @property
    def logs_dir(self) -> Path:
        return self.output_dir / "logs" / self.study

    def document(self, analysis: str) -> Path:
        """The path of the document that an analysis (a key of DOCUMENTS) writes for the study."""
        path = self.output_dir / DOCUMENTS[analysis].format(study=self.study)
        packed = path.with_suffix(".json.gz")
        return packed if packed.is_file() and not path.is_file() else path

    def headline(self, device: str) -> str:
        """The line that every command prints first."""
        names = ("model", "data", "study")
        parts = [f"{name} {getattr(self, name)} ({self.sources[name]})" for name in names]
        line = f"preset {self.preset.name} ({self.sources['preset']}) | {' | '.join(parts)}"
        line += " | chat template" * self.apply_chat_template + f" | device {device}"
        return f"{line}\n{self.preset.note}".rstrip()


def resolve_settings(args: argparse.Namespace) -> Settings:
    """Settings from flags, environment, `.env` and preset. Raises UserError naming the variable."""
    env_file = _env_file()
    if env_file.get("HF_TOKEN") and not os.environ.get("HF_TOKEN"):
        os.environ["HF_TOKEN"] = env_file["HF_TOKEN"]  # huggingface_hub reads it from there
    sources: dict[str, str] = {}

    def look_up(name: str, variable: str, default: object) -> object:
        for value, source in (
            (getattr(args, name, None), f"--{name}"),
            (os.environ.get(variable), f"variable {variable}"),
            (env_file.get(variable), f"{variable} in .env"),
        ):
            if value is not None and value != "":
                if UNUSABLE.search(str(value)):
                    raise UserError(f"{source} must be UTF-8 text without control characters")
                sources[name] = source
                return value
        sources[name] = "preset" if name not in ("preset", "study") else "default"
        return default

    name = str(look_up("preset", "PRESET", "demo"))
    if name not in PRESETS:
        raise UserError(f"preset is {name!r} ({sources['preset']}); allowed: {', '.join(PRESETS)}")
    preset = PRESETS[name]

    def count(name: str, variable: str) -> int:
        return _count(look_up(name, variable, getattr(preset, name)), variable)

    model = str(look_up("model", "MODEL_NAME", preset.model))
    data = str(look_up("data", "DATA_SOURCE", preset.data))
    for name, value in (("model", model), ("data", data)):  # the demo's budget is for its own
        if sources["preset"] == "default" and value != getattr(preset, name):
            raise UserError(
                f"{name} is {value!r:.99} ({sources[name]}), and no preset is set: add --preset"
                " study (full budgets), original (the published recipe) or demo (a few steps)"
            )
    data_dir = _folder(look_up("data_dir", "DATA_DIR", ROOT / "data"), "DATA_DIR")
    settings = Settings(
        preset=preset,
        model=_model_name(model, sources["model"], env_file),
        data=_data_source(data, sources["data"]),
        study=check_study(str(look_up("study", "STUDY_NAME", preset.name)), sources["study"]),
        examples_per_task=count("examples_per_task", "EXAMPLES_PER_TASK"),
        eval_examples_per_task=count("eval_examples_per_task", "EVAL_EXAMPLES_PER_TASK"),
        data_dir=data_dir,
        tasks_dir=_folder(look_up("tasks_dir", "TASKS_DIR", data_dir / "tasks"), "TASKS_DIR"),
        output_dir=_folder(look_up("output_dir", "OUTPUT_DIR", ROOT), "OUTPUT_DIR"),
        apply_chat_template=bool(getattr(args, "apply_chat_template", None)),
        system_instruction=getattr(args, "system_instruction", None) or "",
        sources=sources,
    )
    for note in WHEN_RESOLVED:
        note(settings)
    return settings


@functools.cache
def _env_file() -> dict[str, str]:
    return read_env_file(ROOT / ".env")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a `.env` that have a value. Raises UserError if it cannot be read."""
    if not path.is_file():
        return {}
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = list(parse_stream(stream))
        values = {n: v for n, v in dotenv_values(path, encoding="utf-8-sig").items() if v}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as such") from None
    for line in lines:
        if line.error or (line.key and line.value is None):
            # without its text, which may be a token
            raise UserError(f"{path}: line {line.original.line} is not NAME=value")
    for name, value in values.items():
        if "\0" in value:
            raise UserError(f"{path}: {name} holds a NUL character; write the line again")
    return values


def _model_name(name: str, source: str, env_file: dict[str, str]) -> str:
    """Prefix HF_USERNAME to a bare name that is neither the embedded model nor a folder."""
    username = os.environ.get("HF_USERNAME") or env_file.get("HF_USERNAME")
    if name == EMBEDDED_MODEL or typed_path(name, source).exists() or "/" in name or not username:
        return name
    return f"{username}/{name}"


def typed_path(text: str, source: str) -> Path:
    """The path that a user typed, with `~` expanded. Raises UserError if there can be none."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long; an unknown ~user
        reason = getattr(error, "strerror", None) or "there is no such user"
        raise UserError(f"{source} is {text!r:.80}: {reason}") from None
    return path


def _data_source(value: str, source: str) -> str:
    if value in ("hub", "sample"):
        return value
    path = typed_path(value, source)
    if source.endswith(".env") and not path.is_absolute():
        path = ROOT / path  # a relative path in .env must not depend on the working folder
    if not path.is_dir():
        raise UserError(
            f"data is {value!r} ({source}), which is not a folder; allowed: hub, sample,"
            " or a folder of <task>/<split>.jsonl"
        )
    return str(path.resolve())


def check_study(name: str, source: str = "--study") -> str:
    """The study's name. Raises UserError if it is reserved or could be a path."""
    if not NAME_PATTERN.fullmatch(name) or ".." in name or name in RESERVED_STUDIES:
        raise UserError(
            f"study is {name!r:.99} ({source}); allowed: up to 100 letters, digits, '.', '_',"
            f" '+' and '-', not a path, and not reserved ({', '.join(RESERVED_STUDIES)})"
        )
    return name


def _count(value: object, variable: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,11}", str(value)):
        allowed = "a whole number of at least 1 and below 10^12"
        raise UserError(f"{variable} is {value!r:.40}; allowed: {allowed}")
    return int(str(value))


def _folder(value: object, variable: str) -> Path:
    path = typed_path(str(value), variable)
    path = path if path.is_absolute() else ROOT / path
    if path.exists() and not path.is_dir():
        raise UserError(f"{variable} is {str(value)!r}, which is a file; allowed: a folder")
    return path
