"""Paths, shared constants, presets and settings, and the flags that every command shares.

A setting is looked up in this order: command-line flag, environment variable, `.env`, preset.
`.env.example` documents every variable. Imports no torch, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

ROOT = Path(__file__).resolve().parent

FAMILIES = {
    "similar": ("sst2", "mnli", "qqp"),
    "dissimilar": ("squad_v2", "codexglue", "cnn_dailymail"),
}
TASKS = tuple(task for tasks in FAMILIES.values() for task in tasks)
RANKS = (4, 8, 16, 32, 64)
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
# The projections of LlamaForCausalLM that each value of --target-modules selects.
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
RESERVED_STUDIES = ("base", "sample")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# Control characters, and bytes of a command line or variable that are no UTF-8.
UNUSABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
LARGEST_NUMBER, LARGEST_SEED = 10**12, 2**32 - 1  # NumPy takes no larger seed
# What to do about an error of the system, by its number.
SYSTEM_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free disk space"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        "allow reading and writing there, or choose other folders with OUTPUT_DIR and DATA_DIR",
    ),
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "restore it",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV), "check the disk or its network"
    ),
}


class UserError(Exception):
    """An error that the user can fix: one line saying what is wrong, where, and what to do."""


class Diverged(UserError):
    """The loss of a run became NaN or infinite: its learning rate is too high."""


@dataclass(frozen=True)
class Preset:
    """Defaults that differ between the demo and the study. Lengths are in tokens."""

    name: str
    model: str
    data: str
    examples_per_task: int
    eval_examples_per_task: int
    seeds: tuple[int, ...]
    arms: dict[str, tuple[tuple[str, int], ...]]  # (method, rank) that run_study.py trains
    epochs: float
    checkpoints: int
    lora_rate_factor: float  # LoRA's default learning rate at rank 16 over full fine-tuning's
    batch_size: dict[str, int]  # rows per optimizer step, by family
    micro_batch_size: dict[str, int]  # rows per forward pass on a device, by family
    max_length: dict[str, int]  # prompt and completion together, by family
    held_out_documents: int  # documents of each held-out source
    drift_tokens: int  # held-out tokens on which activations and outputs are compared


PRESETS = {
    "study": Preset(
        name="study",
        model="meta-llama/Llama-3.2-1B",
        data="hub",
        examples_per_task=25_000,
        eval_examples_per_task=1_000,
        seeds=(42, 43, 44),  # three: the fewest over which a method's difference can be tested
        arms=dict.fromkeys(FAMILIES, (("full", 0), *(("lora", rank) for rank in RANKS))),
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
        arms={"similar": (("full", 0), ("lora", 8)), "dissimilar": (("lora", 8),)},
        epochs=0.5,
        checkpoints=3,
        lora_rate_factor=15,  # the best factor in runs of about 100 steps
        batch_size={"similar": 16, "dissimilar": 8},
        micro_batch_size={"similar": 16, "dissimilar": 8},
        max_length={"similar": 256, "dissimilar": 416},
        held_out_documents=8,
        drift_tokens=1_024,
    ),
}


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
    output_dir: Path
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
    def logs_dir(self) -> Path:
        return self.output_dir / "logs" / self.study

    def document(self, analysis: str) -> Path:
        """The path of the document that an analysis (a key of DOCUMENTS) writes for the study."""
        return self.output_dir / DOCUMENTS[analysis].format(study=self.study)

    def headline(self, device: str) -> str:
        """The line that every command prints first."""
        parts = [
            f"{name} {getattr(self, name)} ({self.sources[name]})"
            for name in ("model", "data", "study")
        ]
        line = f"preset {self.preset.name} ({self.sources['preset']}) | {' | '.join(parts)}"
        line += f" | device {device}"
        if self.preset.name == "demo":
            line += (
                "\nThis is the demo: a small instruct model trained for a few steps, not evidence."
                " For the study: cp .env.example .env"
            )
        return line


class Parser(argparse.ArgumentParser):
    """An argparse parser with errors of one line, and exit code 2; line breaks in texts stay.

    No flag takes an infinite or huge number, or text with control characters.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.register("type", None, _usable_text)
        self.register("type", int, whole_number)
        self.register("type", float, finite_number)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": must be", " must be", 1)
        message = UNUSABLE.sub("?", f"{message:.300}")  # what was typed stands in it
        self.exit(2, f"error: {message} ({self.prog} --help lists all flags)\n")


def _usable_text(text: str) -> str:
    if UNUSABLE.search(text):
        raise argparse.ArgumentTypeError("must be UTF-8 text without control characters")
    return text


def whole_number(text: str, lowest: int = -LARGEST_NUMBER, highest: int = LARGEST_NUMBER) -> int:
    """An argparse type: a whole number in the bounds."""
    number = int(text)
    if number < lowest:
        raise argparse.ArgumentTypeError(f"must be {lowest} or more, not {number}")
    if number > highest:
        raise argparse.ArgumentTypeError(f"must be at most {highest}, not {number}")
    return number


def finite_number(text: str) -> float:
    """An argparse type: any number but infinity and nan."""
    number = float(text)
    if not abs(number) <= LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"must be a number up to {LARGEST_NUMBER:g}, not {text}")
    return number


positive_int = functools.partial(whole_number, lowest=1)
seed_number = functools.partial(whole_number, lowest=0, highest=LARGEST_SEED)
# argparse quotes them: invalid int value
positive_int.__name__ = seed_number.__name__ = whole_number.__name__ = "int"
finite_number.__name__ = "float"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command shares."""
    group = parser.add_argument_group(
        "model, data and study (a flag beats the environment, .env and the preset)"
    )
    for flag, metavar, text in (
        ("--preset", "{study,demo}", "defaults for all else (variable PRESET; default demo)"),
        ("--study", "NAME", "name of the study's folders (STUDY_NAME; default: the preset's name)"),
        ("--model", "ID_OR_FOLDER", "base model: a LlamaForCausalLM (MODEL_NAME)"),
        ("--data", "SOURCE", "hub, sample, or a folder of <task>/<split>.jsonl (DATA_SOURCE)"),
    ):
        group.add_argument(flag, metavar=metavar, help=text)


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

    preset_name = str(look_up("preset", "PRESET", "demo"))
    if preset_name not in PRESETS:
        raise UserError(
            f"preset is {preset_name!r} ({sources['preset']}); allowed: {', '.join(PRESETS)}"
        )
    preset = PRESETS[preset_name]

    def count(name: str, variable: str) -> int:
        return _count(look_up(name, variable, getattr(preset, name)), variable)

    model = str(look_up("model", "MODEL_NAME", preset.model))
    data = str(look_up("data", "DATA_SOURCE", preset.data))
    if sources["preset"] == "default":  # the demo's rows and steps are meant for its own model
        for name, value, is_hub in (
            (
                "model",
                model,
                model != EMBEDDED_MODEL and not typed_path(model, sources["model"]).exists(),
            ),
            ("data", data, data == "hub"),
        ):
            if is_hub:
                raise UserError(
                    f"{name} is {value!r:.99} ({sources[name]}), and no preset is set: add --preset"
                    " study (full budgets), or --preset demo (a few steps on the sample rows)"
                )
    return Settings(
        preset=preset,
        model=_model_name(model, sources["model"], env_file),
        data=_data_source(data, sources["data"]),
        study=check_study(str(look_up("study", "STUDY_NAME", preset.name)), sources["study"]),
        examples_per_task=count("examples_per_task", "EXAMPLES_PER_TASK"),
        eval_examples_per_task=count("eval_examples_per_task", "EVAL_EXAMPLES_PER_TASK"),
        data_dir=_folder(look_up("data_dir", "DATA_DIR", ROOT / "data"), "DATA_DIR"),
        output_dir=_folder(look_up("output_dir", "OUTPUT_DIR", ROOT), "OUTPUT_DIR"),
        sources=sources,
    )


@functools.cache
def _env_file() -> dict[str, str]:
    return read_env_file(ROOT / ".env")


def read_env_file(path: Path) -> dict[str, str]:
    """The variables of a `.env` that have a value. Raises UserError if it cannot be read."""
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    try:
        values = {name: value for name, value in dotenv_values(path).items() if value}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); save it as such") from None
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


def _missing_package(kind: type, error: Any, traceback: Any) -> None:
    """Python's excepthook, with one line for a package that is missing or too old."""
    cause = error
    while cause.__cause__ and not getattr(cause, "name", None):  # transformers' own has none
        cause = cause.__cause__
    package = (getattr(cause, "name", None) or "config").partition(".")[0]
    is_ours = (ROOT / package).is_dir() or (ROOT / f"{package}.py").is_file()
    if not isinstance(cause, ImportError) or is_ours:
        return sys.__excepthook__(kind, error, traceback)
    reason = cause.msg if type(cause) is ImportError else f"the package {package} is missing"
    print(f"error: {reason}; pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)


sys.excepthook = _missing_package


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's or the device's memory ran out."""
    # torch's own kind goes by its name, since torch is not imported here
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def system_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind an exception: a full disk, a folder without permission.

    safetensors and torch raise kinds of their own that hold it in their message alone.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        message = str(error)
        codes = [code for code in SYSTEM_ADVICE if os.strerror(code) in message]
        if codes or "file write failed" in message:  # torch says no more: the disk is full
            code = codes[0] if codes else errno.ENOSPC
            return OSError(code, os.strerror(code))
        error = error.__cause__
    return None


def system_error_line(error: OSError) -> str:
    """What failed, where, and what to do."""
    where = f": {error.filename}" if error.filename else ""
    advice = SYSTEM_ADVICE.get(error.errno, "mend that")
    return f"{error.strerror}{where}; {advice}, then run the same command to resume"


def guarded(main: Callable[..., int]) -> Callable[..., int]:
    """Turn what the user can mend into one line on stderr and exit code 2, and Ctrl-C into 130.

    That is a UserError, an error of the disk, and too little memory. A reader that closes the pipe,
    as `| head` does, ends the command without a word (141, as the shell has it). A command that
    takes a second or more ends by printing how long it took.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> int:
        start = time.monotonic()
        try:
            try:
                code = main(argv)
                if time.monotonic() - start >= 1:
                    print(f"{time.monotonic() - start:.0f} s")
                return code
            finally:
                sys.stdout.flush()  # here, since Python's own flush at the end cannot be caught
        except UserError as error:
            message = str(error)
        except KeyboardInterrupt:
            print("interrupted; run the same command to resume", file=sys.stderr)
            return 130
        except Exception as error:
            if cause := system_error(error):
                _discard_unwritable_output()
                if cause.errno == errno.EPIPE:
                    return 141
                message = system_error_line(cause)
            elif is_out_of_memory(error):
                message = "the memory ran out; choose smaller batches (see --help) and run"
                message += " the same command to resume: finished results are kept"
            else:
                raise
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        return 2

    return wrapper


def _discard_unwritable_output() -> None:
    """Send an output that takes no more nowhere, so that Python's last flush does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
