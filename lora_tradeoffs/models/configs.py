"""config.json and adapter_config.json of anybody's folder: read, checked, compared.

Every field of an adapter has to be known here, or by PEFT's configuration of its type. The four
analyses accept the same adapters, except that drift alone accepts one with a head of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.checkpoints import ADAPTER_CONFIG
from lora_tradeoffs.command_line import is_out_of_memory
from lora_tradeoffs.files import COPY, read_json

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig

# By model_type, the families that are supported, under their names in README.md: each is trained
# and measured by tests/models/test_families.py.
MODEL_FAMILIES = {
    "llama": "LLaMA",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text only)",
    "olmo2": "OLMo 2",
}
MOST_LAYERS = 1_000  # building a model of a mistyped number would not end
# Fields of config.json that this suite sets itself: the attention, for one, may name a repository
# of kernels, and `transformers_weights` a file.
OVERRIDDEN = ("attn_implementation", "_attn_implementation", "transformers_weights", "auto_map")
# Fields that do not change what an evaluated model computes from token ids. Whether the head is
# tied is read from the weights.
NOT_COMPUTED = {
    *("_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"),
    *("initializer_range", "attention_dropout", "pretraining_tp", "problem_type"),
    *("id2label", "label2id", "output_attentions", "output_hidden_states", "return_dict"),
}
NOT_COMPUTED_PREFIXES = ("_attn_implementation", "transformers", "unsloth")  # notes of tools


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn what a library raises inside the block, for a file that it cannot use, into one line.

    Memory that runs out and a package that is missing say nothing of the file, and pass.
    """
    try:
        yield
    except Exception as error:
        is_installed = not isinstance(error.__cause__ or error, ModuleNotFoundError)
        if isinstance(error, UserError) or is_out_of_memory(error) or not is_installed:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        message = f"unknown name {message}" if isinstance(error, KeyError) else message
        raise UserError(f"{what}: {message[:300]}") from None


# ------------------------------------------------------------------------------- config.json


def read_config(folder: Path, name: str | None = None) -> PreTrainedConfig:
    """The model's configuration, without weights. `name` is what an error calls the folder.

    Raises UserError for one that transformers cannot read, a model of another family than those
    supported, a quantised one, and one that is not causal.
    """
    name = name or str(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no config.json, so it is no model folder")
    fields = read_json(folder / "config.json", remedy=COPY)
    if fields.get("quantization_config"):
        raise UserError(
            f"{name} is quantised (quantization_config in its config.json): give the model in full"
            " precision that it was made from"
        )
    kind, architectures = fields.get("model_type"), fields.get("architectures")
    if kind not in list(MODEL_FAMILIES):
        what = architectures[0] if isinstance(architectures, list) and architectures else kind
        raise UserError(
            f"{name} is a {_shown(what)}, which is not supported; give a model of one of these"
            f" families with --model: {', '.join(MODEL_FAMILIES.values())}"
        )
    from transformers import CONFIG_MAPPING

    fields = {key: value for key, value in fields.items() if key not in OVERRIDDEN}
    with refusing(f"transformers cannot read {name}/config.json"):
        config = CONFIG_MAPPING[kind].from_dict(fields)
        if not 1 <= config.num_hidden_layers <= MOST_LAYERS:
            raise ValueError(f"its num_hidden_layers is {config.num_hidden_layers}")
        sees_all = getattr(config, "use_bidirectional_attention", False)  # EmbeddingGemma's
        if sees_all or not getattr(config, "is_causal", True):
            raise ValueError("its attention is bidirectional, so it is no causal language model")
    return config


def differing_fields(config: PreTrainedConfig, other: PreTrainedConfig) -> list[str]:
    """The fields in which two configurations make the same weights compute differently."""
    first, second = config.to_dict(), other.to_dict()
    names = sorted({*first, *second} - NOT_COMPUTED)
    names = [name for name in names if not name.startswith(NOT_COMPUTED_PREFIXES)]
    return [name for name in names if first.get(name) != second.get(name)]


# ------------------------------------------------------------------------ adapter_config.json


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 1 << 31


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _is_index(value: Any) -> bool:
    return value == 0 or _is_count(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_index, value))


def _by_name(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(map(check, value.values()))


# What each field has to be that decides the update, and how an error says it. Null is PEFT's
# default.
_FLAG = (lambda v: isinstance(v, bool), "true or false")
_NAMES = (_are_names, "a list of names")
_MODULES = (lambda v: _is_text(v) or _are_names(v), "a list of names or a regular expression")
FIELD_TYPES = {
    "r": (_is_count, "a whole number of 1 or more"),
    "lora_alpha": (_is_number, "a number"),
    "rank_pattern": (lambda v: _by_name(v, _is_count), "ranks by module"),
    "alpha_pattern": (lambda v: _by_name(v, _is_number), "numbers by module"),
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "layers_pattern": _MODULES,
    "layers_to_transform": (lambda v: _is_index(v) or _are_ids(v), "numbers of layers"),
    "use_rslora": _FLAG,
    "ensure_weight_tying": _FLAG,
}
# Fields with which a LoRA adapter's update is not, or not only, scale * B A.
MERGED_FIELDS = {
    "use_dora": _FLAG,
    "lora_bias": _FLAG,
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "modules_to_save": _NAMES,
    "target_parameters": _NAMES,
    "trainable_token_indices": (lambda v: _are_ids(v) or _by_name(v, _are_ids), "token ids"),
}
# Other types, each of which PEFT merges module by module. The types that are left out share state
# between modules that they do not save, change the base when they start, or are no update of it.
MERGED_TYPES = (
    *("OFT", "BOFT", "HRA", "ROAD", "LOHA", "LOKR", "IA3", "ADALORA", "DELORA", "GRALORA", "HIRA"),
    *("MISS", "C3A", "FOURIERFT", "WAVEFT", "SHIRA", "VERA", "RANDLORA", "VBLORA"),
)
# Fields that decide nothing in an adapter that is loaded. Any other field has to be off (null,
# false, empty, "none"): PEFT ignores fields that it does not know.
OTHER_FIELDS = {
    *("peft_type", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "lora_dropout", "inference_mode", "base_model_name_or_path", "revision"),
    *("task_type", "auto_mapping", "peft_version", "megatron_core", "qalora_group_size"),
    *("runtime_config", "velora_config"),  # VeLoRA is another backward pass
}
# Starts that leave the base as it is; others, as PiSSA's, move a part of its weights to A and B.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
DEFAULTS = {"r": 8, "lora_alpha": 8}  # PEFT's
PLAIN_NAME = re.compile(r"[\w.-]*")
MATCHING_SECONDS = 10


def adapter_fields(folder: Path, purpose: str = "loaded") -> dict[str, Any]:
    """The fields of adapter_config.json that decide an adapter's update; of LoRA with PEFT's
    defaults.

    Raises UserError, which says that it "cannot be <purpose>", for a type that is not known here,
    and for an adapter that has another field set or one of another type, or starts from a changed
    base.
    """
    fields = read_json(folder / ADAPTER_CONFIG, remedy=COPY)
    kind, start = fields.get("peft_type"), fields.get("init_lora_weights")
    if kind != "LORA" and kind not in MERGED_TYPES:
        raise UserError(
            f"{folder} cannot be {purpose}: it is an adapter of type {_shown(kind)}, not of"
            f" {', '.join(('LORA', *MERGED_TYPES))}"
        )
    types = {**FIELD_TYPES, **MERGED_FIELDS}
    known, defaults = set(types), DEFAULTS
    if kind != "LORA":
        known, defaults = _fields_of(kind), {}
        types |= {"r": (_is_index, "a whole number"), "bias": (_is_text, "a word")}
    for name, value in fields.items():
        if name not in known and name not in OTHER_FIELDS and value and value != "none":
            raise UserError(f"{folder} cannot be {purpose}: its {name} is {_shown(value)}")
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise UserError(
            f"{folder} cannot be {purpose}: its init_lora_weights is {_shown(start)}, which may"
            " change the base; save it as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    used = defaults | {
        name: v for name, v in fields.items() if name in known - OTHER_FIELDS and v is not None
    }
    for name, value in used.items():
        is_valid, what = types.get(name, (lambda v: True, ""))  # else PEFT refuses the value
        if not is_valid(value):
            raise UserError(
                f"{folder} cannot be {purpose}: its {name} is {_shown(value)}, not {what}"
            )
    if not used.get("target_modules") and not used.get("target_parameters"):
        raise UserError(f"{folder} cannot be {purpose}: it has no target_modules")
    return used


def _fields_of(kind: str) -> set[str]:
    """The fields that PEFT's configuration of this type has, and that keep the base's structure."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    fields = dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])
    return {field.name for field in fields} - {"layer_replication"}


def read_adapter_config(folder: Path, purpose: str, modules: Iterable[str]) -> PeftConfig:
    """The adapter's configuration for PEFT, with nothing in it but what `adapter_fields` gives.

    `modules` are the names of the base's modules; a module of `modules_to_save` that is none of
    them, as a classifier's head, is left out. Raises UserError as `adapter_fields` does, and for a
    regular expression that is invalid, or does not end on one of the names.
    """
    fields, modules = adapter_fields(folder, purpose), list(modules)
    _check_patterns(folder, fields, modules)
    if saved := fields.pop("modules_to_save", None):
        saved = [name for name in saved if any(module.endswith(name) for module in modules)]
        fields |= {"modules_to_save": saved} if saved else {}
    from peft.mapping import get_peft_config

    kind = read_json(folder / ADAPTER_CONFIG)["peft_type"]
    with refusing(f"PEFT cannot read {folder / ADAPTER_CONFIG}"):
        return get_peft_config({"peft_type": kind, **fields})


def is_low_rank(config: PeftConfig) -> bool:
    """Whether the adapter's update is scale * B A, and nothing else."""
    return config.peft_type == "LORA" and not any(
        getattr(config, name) not in (None, False, "none", []) for name in MERGED_FIELDS
    )


def _check_patterns(folder: Path, fields: dict[str, Any], modules: list[str]) -> None:
    """Raise UserError for a regular expression that does not end in time, or is none.

    PEFT matches them with `re`, which nothing can stop in this process: nested repetition takes
    time that is exponential in the length of a name. So they are tried in another one first.
    """
    tables = [v for name, v in fields.items() if name.endswith("_pattern") and isinstance(v, dict)]
    keys = [key for table in tables for key in table]
    patterns = [rf"(.*\.)?({key})$" for key in keys if not PLAIN_NAME.fullmatch(key)]
    whole = ("target_modules", "exclude_modules", "feedforward_modules")
    templates = dict.fromkeys(whole, r"(?:{})\Z")
    templates |= {
        "layers_pattern": r"(?:^|.*?\.){}\.\d+\.",
        "modules_to_save": r"(^|.*\.){}($|\..*)",
    }
    for name, template in templates.items():
        value = fields.get(name, [])
        if isinstance(value, str) or name in ("layers_pattern", "modules_to_save"):
            values = [value] if isinstance(value, str) else value
            patterns += [template.format(v) for v in values if not PLAIN_NAME.fullmatch(v)]
    if not patterns:
        return
    code = "import json, re, sys\nfor p, n in json.load(sys.stdin): re.compile(p).match(n)"
    pairs = json.dumps([(pattern, module) for pattern in patterns for module in modules])
    command = [sys.executable, "-I", "-S", "-c", code]
    where = f"{folder / ADAPTER_CONFIG}: {_shown(patterns[0])}"
    try:
        process = subprocess.run(
            command, input=pairs, capture_output=True, text=True, timeout=MATCHING_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{where} takes too long to match: write its target modules as a list of names"
        ) from None
    if process.returncode:
        raise UserError(f"{where} is no regular expression: {process.stderr.splitlines()[-1]}")


def _shown(value: Any) -> str:
    """A value for an error of one line."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
